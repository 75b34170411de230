"""The seam to ComfyUI: the only code besides the nodes that imports it. Families are tables and import nothing of it."""

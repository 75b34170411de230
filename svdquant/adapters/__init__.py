"""The seam to ComfyUI: the only code besides the nodes that imports it. `families` are tables and import none."""

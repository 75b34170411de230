"""ComfyUI's side of making a 4-bit file, for the quantizer that knows no model.

plans          which linears of a 16-bit file are quantized, how, and what they are called in the new one
plan_flux      those of FLUX.1; plan_published the families whose published layout a table says
calibration    a model that records what its linears read
quantize       from a node's inputs to a file
compare        two models' pictures and layers next to each other
"""

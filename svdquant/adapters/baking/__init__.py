"""LoRAs folded into a checkpoint: a file with more rank and the same 4-bit weights. No host is needed.

bake       files in, a file out; the order of events
base       the checkpoint, and what the LoRAs change of it
places     where a LoRA's name leads in it
adapter    one adapter as a pair, within an error
pairs      pairs cut to a stored linear and laid beside its own
tensors    the tensors that change, as the file holds them
"""

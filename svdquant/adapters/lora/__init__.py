"""LoRAs on a loaded model: from a file or the host's patches to branches beside the 4-bit products.

apply                 a LoRA file becomes patches of the host's; what it did, as a report
layer_names           what trainers call the model's layers; diffusers_names where the host has no map
nunchaku              files in the engine's own layout
patches, factors      one patch in the host's form; what it adds to a weight, as exact low-rank branches
truncation            the best low-rank part of what has no such form
rescaling             DoRA, OFT, BOFT: what looks at the weight
joining               all patches of one layer become its branches
branches              the callbacks that keep the layers' branches in step with the patcher
residence, budget     where branches are, and what the host counts for them
bypass                the host's bypassing LoRAs
"""

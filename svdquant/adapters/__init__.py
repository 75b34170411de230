"""The seam to ComfyUI: the only code besides the nodes that imports it.

load, text_encoder   a checkpoint becomes a host's model or text encoder
                     for text encoders: encoder_types, which files go together; encoder_sizes
                     for them: family, conventions, layout, operations, dense_bias, inputs, feed_forward,
                     single_block, activations
families/            one table a model family; they import no ComfyUI
lora/                LoRAs on a loaded model
baking/              LoRAs folded into a file
quantizing/          which linears become 4-bit, calibration, comparison
patcher              methods of the host's patcher that must act differently on 4-bit layers
convert, report, sampling, folders, devices, demo   what the other nodes call
"""

"""From files to a `Checkpoint`, and back.

    detect.open_checkpoint(path) -> Checkpoint      header first; layers are decoded when asked for
    <dialect>.write(path, layers, plain, metadata)  nunchaku, kitchen, natural; one layer in memory at a time

A dialect is one file with `detect`, `read` and, where we write it, `write`. All of them decode to the same
`LinearWeights` (svdquant.core.weights). Files are trusted for nothing: precision, rank and shapes come from
the tensors, metadata is a cross-check, and only the safetensors format is opened.
"""

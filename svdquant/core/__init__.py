"""The mathematics of SVDQuant in plain torch.

Letters   M tokens, K in_features, N out_features, R rank, G groups along K, T the 16-bit storage dtype.
Codes     4-bit numbers as stored: int4 two's complement, e2m1 floats, or unsigned 0..15 (AWQ); int8 in the 8-bit mode.
Scale     the real number that multiplies a code; one per output row and group of K.
Smooth    the vector [K] that divides activations and multiplied the weight's columns before rounding.
Branch    the 16-bit low-rank pair `down` [R, K], `up` [N, R]; it sees raw, un-smoothed activations.

W_eff = codes * scales / smooth + up @ down        y = W_eff @ x + bias
"""

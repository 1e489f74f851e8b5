"""Quantized matrices: formats, layout of blocks in parameters, and tensors that quantize or dequantize on read."""

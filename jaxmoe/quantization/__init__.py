"""Quantized matrices: formats, how blocks lie in parameters, tensors that quantize or dequantize what they read."""

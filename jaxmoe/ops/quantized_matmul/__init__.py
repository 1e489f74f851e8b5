"""Matmuls with quantized matrices, for linear and for grouped_matmul. One implementation, on any platform."""

from jaxmoe.ops.quantized_matmul.array import QuantizedArray, Weights, as_matrices, dequantized, layer_weights
from jaxmoe.ops.quantized_matmul.tiles import multiply

__all__ = ["QuantizedArray", "Weights", "as_matrices", "dequantized", "layer_weights", "multiply"]

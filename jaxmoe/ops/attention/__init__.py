"""Causal grouped-query attention within prompts, and the attention mask.

There is one implementation, so that no option selects one.
"""

from jaxmoe.ops.attention.blocks import causal_attention
from jaxmoe.ops.attention.mask import MaskSpec

__all__ = ["MaskSpec", "causal_attention"]

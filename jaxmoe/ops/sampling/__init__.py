"""Choice of one token per row from logits."""

from jaxmoe.ops.sampling.api import sample
from jaxmoe.ops.sampling.arrays import MAX_TOP, SamplerOutput, SamplingArrays, SamplingFeatures
from jaxmoe.ops.sampling.backends import BACKENDS, SamplingBackend

__all__ = [
    "BACKENDS",
    "MAX_TOP",
    "SamplerOutput",
    "SamplingArrays",
    "SamplingBackend",
    "SamplingFeatures",
    "sample",
]

"""The collectives one step holds under a layout: which, over which axes, how many, how many bytes.

Source: docs/architecture.md, "Communication is a contract"; byte counts of rings as in the Megatron-LM papers.
"""

# Dims: t tokens of this device, D width, E experts (padded), N ranks of an axis.
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from jaxmoe.config import ModelConfig
from jaxmoe.sharding import Placement, array_sizes

Op = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of collective: op over mesh axes, with result_bytes on each device."""

    op: Op
    axes: tuple[str, ...]
    result_bytes: int

    def sent_bytes(self, num_ranks: int) -> float:
        """Bytes one device sends: ring for all-reduce, directly for the others."""
        share = (num_ranks - 1) / num_ranks
        factor = {
            "all-reduce": 2 * share,
            "all-gather": share,
            "reduce-scatter": num_ranks - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }
        return factor[self.op] * self.result_bytes


def planned_collectives(
    config: ModelConfig,
    placement: Placement,
    *,
    num_tokens: int,
    num_sampled: int,
    itemsize: int,
    dispatch: str = "all_to_all",
) -> Counter[Collective]:
    """Every collective of one step and how often it runs.

    num_tokens, num_sampled: tokens and rows of logits of one rank of the batch, padding included; itemsize: bytes of a
    number of the activations.
    """
    sizes = array_sizes(config, placement)
    tokens, width = num_tokens, config.hidden_size
    found: Counter[Collective] = Counter()

    def add(op: Op, dim: str, result_bytes: int, count: int = 1) -> None:
        axes = tuple(axis for axis in placement.axes(dim) if placement.mesh.shape[axis] > 1)
        if axes and count:
            found[Collective(op=op, axes=axes, result_bytes=result_bytes)] += count

    layers, sparse = config.num_hidden_layers, sum(config.moe_layers)
    hidden = tokens * width * itemsize
    add("all-reduce", "vocab", hidden)  # rows of the split embedding table
    add("all-reduce", "kv_head", hidden, layers)  # attention output
    if config.qk_norm == "full":
        add("all-reduce", "kv_head", tokens * 2 * 4, layers)  # squares of query and key, float32
    add("all-reduce", "ffn", hidden, layers - sparse)
    add("all-reduce", "moe_ffn", hidden, sparse)
    ranks = placement.parts("moe_expert")
    if dispatch == "all_gather":
        add("all-gather", "moe_expert", ranks * tokens * (width + sizes.moe_experts) * itemsize, sparse)
        add("reduce-scatter", "moe_expert", hidden, sparse)
    else:
        add("all-to-all", "moe_expert", ranks * tokens * (width + sizes.moe_experts // ranks) * itemsize, sparse)
        add("all-to-all", "moe_expert", ranks * hidden, sparse)
    add("all-gather", "vocab", num_sampled * sizes.vocab * 4)  # logits, float32
    return found

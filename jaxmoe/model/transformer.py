"""The whole forward pass, once. Where arrays lie is the placement's business, how keys are kept the caller's."""

# Dims: B batch, S length, D width, V vocabulary (padded), E experts.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.depth import segments
from jaxmoe.model.attention import Attend
from jaxmoe.model.block import Block
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.params import Maker, normal, ones
from jaxmoe.model.project import project
from jaxmoe.model.rows import HIDDEN, normed, real_tokens
from jaxmoe.ops.rope import inverse_frequencies, rotation
from jaxmoe.sharding import Placement, array_sizes

Kept = Sequence[tuple[Any, ...]]  # of every segment, of every block


class Transformer(nnx.Module):
    """A decoder-only transformer of any supported family."""

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        kernels: Kernels = Kernels(),
    ) -> None:
        sizes = array_sizes(config, placement)
        make = Maker(rngs, jnp.dtype(dtype))
        self.config, self.placement, self.kernels = config, placement, kernels
        self.embed = make(normal(0.02), vocab=sizes.vocab, width=config.hidden_size)
        self.parts = segments(config, kernels.layers)
        self.segments = nnx.List(
            nnx.List(
                Block(config, sizes, placement, kernels, part.first + block, make=make.stacked(part.repeats))
                for block in range(part.period)
            )
            for part in self.parts
        )
        self.final_norm = make(ones, width=config.hidden_size)
        if not config.tie_word_embeddings:
            self.head = make(normal(0.02), width=config.hidden_size, vocab=sizes.vocab)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, active: jax.Array, attend: Attend, kept: Kept | None = None,
        *, routing: bool = False,
    ) -> tuple[jax.Array, Kept, list[jax.Array]]:  # fmt: skip
        """Hidden states [B,S,D] of tokens [B,S] at positions [B,S], what attend keeps of them, and where `routing` the
        router probabilities of each MoE layer.

        active [B,S] is False for padding, which visits no expert. kept: what attend kept of earlier tokens; None for
        one that keeps nothing.
        """
        cos, sin = rotation(positions, inverse_frequencies(self.config.rope, self.config.head_dim))
        x = jnp.take(self.embed[...], tokens, axis=0)
        x = self.placement.constrain(x, "batch", "length", "width")
        kept = [(None,) * part.period for part in self.parts] if kept is None else list(kept)
        real, routed = real_tokens(active, self.placement, count=self.kernels.linear == "native"), []
        for number, (part, blocks) in enumerate(zip(self.parts, self.segments, strict=True)):

            def repeat(carry, at, blocks=blocks):
                x, kept = carry[0], []
                probabilities = []
                for block, own in zip(blocks, carry[1], strict=True):
                    x, own, choice = block(x, at, cos, sin, real, attend, own)
                    kept.append(own)
                    if routing and choice is not None:
                        probabilities.append(choice)
                return (x, tuple(kept)), probabilities

            if part.repeats == 1:
                (x, kept[number]), probabilities = repeat((x, kept[number]), 0)
                routed += probabilities
            else:
                at = jnp.arange(part.repeats, dtype=jnp.int32)
                (x, kept[number]), stacked = jax.lax.scan(repeat, (x, kept[number]), at)
                routed += [probabilities[index] for index in range(part.repeats) for probabilities in stacked]
        eps, kind = self.config.rms_norm_eps, self.kernels.pointwise
        return normed(x, self.final_norm[...], HIDDEN, self.placement, kind, eps=eps), kept, routed

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits [B,S,V] of hidden states [B,S,D], split over the vocabulary; columns of padding are -inf. float32."""
        if self.config.tie_word_embeddings:
            logits = project(hidden, self.embed, self.placement, self.kernels.linear, transposed=True, dtype="float32")
        else:
            logits = project(hidden, self.head, self.placement, self.kernels.linear, dtype="float32")
        real = jnp.arange(logits.shape[-1]) < self.config.vocab_size
        return jnp.where(real, logits, -jnp.inf)


def abstract_model(
    config: ModelConfig, placement: Placement, *, dtype: str, kernels: Kernels = Kernels()
) -> Transformer:
    """The model without arrays: shape, dtype and logical dims of every parameter, which everything else reads."""
    return nnx.eval_shape(lambda: Transformer(config, placement, dtype=dtype, rngs=nnx.Rngs(0), kernels=kernels))

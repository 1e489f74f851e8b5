"""The whole forward pass, once. Where arrays lie is the placement's business, how keys are kept the caller's."""

# Dims: B batch, S length, D width, V vocabulary (padded), E experts.
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.model.attention import Attend
from jaxmoe.model.block import Block
from jaxmoe.model.kernels import Kernels
from jaxmoe.model.params import Maker, normal, ones
from jaxmoe.model.project import project
from jaxmoe.ops.norm import rms_norm
from jaxmoe.ops.rope import inverse_frequencies, rotation
from jaxmoe.sharding import Placement, array_sizes


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
        self.blocks = nnx.List(
            [Block(config, sizes, placement, kernels, layer, make=make) for layer in range(config.num_hidden_layers)]
        )
        self.final_norm = make(ones, width=config.hidden_size)
        if not config.tie_word_embeddings:
            self.head = make(normal(0.02), width=config.hidden_size, vocab=sizes.vocab)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, active: jax.Array, attend: Attend
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Hidden states [B,S,D] of tokens [B,S] at positions [B,S], and router probabilities of each MoE layer.

        active [B,S] is False for padding, which visits no expert.
        """
        cos, sin = rotation(positions, inverse_frequencies(self.config.rope, self.config.head_dim))
        x = jnp.take(self.embed[...], tokens, axis=0)
        x = self.placement.constrain(x, "batch", "length", "width")
        routed = []
        for block in self.blocks:
            x, probabilities = block(x, cos, sin, active, attend)
            if probabilities is not None:
                routed.append(probabilities)
        return rms_norm(x, self.final_norm[...], eps=self.config.rms_norm_eps), routed

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

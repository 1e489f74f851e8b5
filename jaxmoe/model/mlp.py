"""The dense SwiGLU MLP."""

# Dims: B batch, S length, D width, F ffn.
from __future__ import annotations

import jax
from flax import nnx

from jaxmoe.config import ModelConfig
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.params import Init, ParamFactory, at_layer, zeros
from jaxmoe.model.project import all_gather_tokens, project
from jaxmoe.model.rows import swiglu
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim


class MLP(nnx.Module):
    """Compute down(silu(gate(x)) * up(x)) with optional biases.

    Gate and up are separate matrices: XLA:TPU would copy adjacent gates and ups into another order at every step
    (docs/decisions/0002).
    """

    def __init__(
        self,
        config: ModelConfig,
        ffn: int,
        placement: MeshPlacement,
        kernels: KernelConfig,
        *,
        params: ParamFactory,
        init: Init,
    ) -> None:
        self.placement, self.kernels, self.bias = placement, kernels, config.mlp_bias
        self.gate = params.matrix("mlp/gate", init, width=config.hidden_size, ffn=ffn)
        self.up = params.matrix("mlp/up", init, width=config.hidden_size, ffn=ffn)
        self.down = params.matrix("mlp/down", init, ffn=ffn, width=config.hidden_size)
        if self.bias:
            self.gate_bias = params(zeros, ffn=ffn)
            self.up_bias = params(zeros, ffn=ffn)
            self.down_bias = params(zeros, width=config.hidden_size)

    def __call__(self, x: jax.Array, layer: LayerIndex, num_valid: jax.Array | None, token_dim: TokenDim) -> jax.Array:
        """Apply the MLP with the weights of `layer`: x [B,S,D] -> [B,S,D].

        num_valid, token_dim: see project.
        """
        placement, backend = self.placement, self.kernels.linear
        x = all_gather_tokens(x, placement, token_dim)
        gate, up = (project(x, matrix, placement, backend, layer, num_valid) for matrix in (self.gate, self.up))
        if self.bias:
            gate, up = gate + at_layer(self.gate_bias, layer), up + at_layer(self.up_bias, layer)
        y = project(
            swiglu(gate, up, placement, self.kernels.pointwise),
            self.down,
            placement,
            backend,
            layer,
            num_valid,
            token_dim=token_dim,
        )
        return y + at_layer(self.down_bias, layer) if self.bias else y

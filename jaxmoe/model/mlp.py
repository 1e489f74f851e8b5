"""The dense SwiGLU MLP."""

# Dims: B batch, S length, D width, F ffn.
from __future__ import annotations

import jax
from flax import nnx

from jaxmoe.config import ArraySizes, ModelConfig
from jaxmoe.families.parameters import mlp_parameters
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.params import Matrix, ParamFactory, at_layer
from jaxmoe.model.project import all_gather_tokens, project
from jaxmoe.model.rows import swiglu
from jaxmoe.ops.stack import LayerIndex
from jaxmoe.parallel.sharding import MeshPlacement, TokenDim


class MLP(nnx.Module):
    """Compute down(silu(gate(x)) * up(x)) with optional biases.

    Gate and up are separate matrices: XLA:TPU would copy adjacent gates and ups into another order at every step
    (docs/decisions/0002).
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: nnx.Param
    up_bias: nnx.Param
    down_bias: nnx.Param

    def __init__(
        self,
        config: ModelConfig,
        sizes: ArraySizes,
        placement: MeshPlacement,
        kernels: KernelConfig,
        *,
        params: ParamFactory,
    ) -> None:
        self.placement, self.kernels, self.bias = placement, kernels, config.mlp_bias
        params.create(self, mlp_parameters(config, sizes), within="mlp")

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

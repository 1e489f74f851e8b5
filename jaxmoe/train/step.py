"""Sharded training step: loss, gradients and AdamW in one jitted call. Optimizer state is sharded like the weights."""

# Dims: B batch rows, S window tokens.
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmoe.config import ArraySizes
from jaxmoe.errors import MeshError
from jaxmoe.model.attend import DensePrefillInputs
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.model.transformer import TransformerModel, abstract_model
from jaxmoe.parallel.sharding import MeshPlacement, array_sizes
from jaxmoe.train.loss import balance_loss, cross_entropy
from jaxmoe.train.recipe import TrainingRecipe
from jaxmoe.weights.params import parameter_table

DTYPE = "float32"


class TrainState(NamedTuple):
    """Hold the state between steps: parameters in the order of the parameter table, and the optimizer state."""

    params: tuple[jax.Array, ...]
    optimizer: optax.OptState


class StepMetrics(NamedTuple):
    """Report one step: cross entropy in nats per token, balance loss, global gradient norm before clipping."""

    loss: jax.Array
    balance: jax.Array
    grad_norm: jax.Array


def optimizer_of(recipe: TrainingRecipe, decayed: tuple[bool, ...]) -> optax.GradientTransformation:
    """Return the recipe's AdamW. decayed: for each parameter, whether weight decay applies."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.num_steps,
        end_value=recipe.learning_rate * recipe.final_fraction,
    )
    adamw = optax.adamw(
        schedule, b1=recipe.beta1, b2=recipe.beta2, eps=recipe.epsilon, weight_decay=recipe.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), adamw)


class Trainer:
    """Provide the jitted functions of one recipe on one placement. They are pure: state is an argument and a result."""

    def __init__(
        self, recipe: TrainingRecipe, placement: MeshPlacement, *, kernels: KernelConfig = KernelConfig(layers="unroll")
    ) -> None:
        _check_mesh(recipe, placement)
        self.recipe, self.placement, self.kernels = recipe, placement, kernels
        shapes = abstract_model(recipe.model, placement, dtype=DTYPE, kernels=kernels)
        self._graph, abstract = nnx.split(shapes)
        self.segments = shapes.layer_segments
        self._structure = jax.tree.structure(abstract)
        self.table = parameter_table(abstract, placement)
        self._optimizer = optimizer_of(recipe, tuple(len(set(info.dims) - {"layer"}) > 1 for info in self.table))
        self._init_fn = jax.jit(self._init, out_shardings=self._state_sharding())
        self._step_fn = jax.jit(self._step, donate_argnums=0, out_shardings=(self._state_sharding(), None))
        self._nats_fn = jax.jit(self._nats)

    def init(self) -> TrainState:
        """Return the initial state. Parameters depend on the recipe's seed only and are the same on every mesh."""
        return self._init_fn()

    def step(self, state: TrainState, tokens: np.ndarray) -> tuple[TrainState, StepMetrics]:
        """Update the state with one batch of windows [B, S + 1] of token ids. state is donated."""
        return self._step_fn(state, self._put(tokens, "batch", "length"))

    def nats(self, params: tuple[jax.Array, ...], tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
        """Return the summed loss [B] in nats of the first lengths[B] targets of windows [B, S + 1].

        The other targets are padding.
        """
        return self._nats_fn(params, self._put(tokens, "batch", "length"), self._put(lengths, "batch"))

    def named(self, params: tuple[jax.Array, ...]) -> Mapping[str, jax.Array]:
        """Map each parameter's path in the model to its array."""
        return {info.path: array for info, array in zip(self.table, params, strict=True)}

    def _put(self, values: np.ndarray, *dims: str) -> jax.Array:
        return jax.device_put(values, self.placement.sharding(*dims))

    def _state_sharding(self) -> Any:
        """Return a TrainState of shardings."""
        params = tuple(info.sharding for info in self.table)
        shapes = tuple(jax.ShapeDtypeStruct(info.shape, info.dtype) for info in self.table)
        everywhere = self.placement.sharding()
        optimizer = optax.tree_map_params(
            self._optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self._optimizer.init, shapes),
            params,
            transform_non_params=lambda _: everywhere,
        )
        return TrainState(cast(Any, params), optimizer)

    # --- traced ---

    def _model(self, params: tuple[jax.Array, ...]) -> TransformerModel:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, params))

    def _init(self) -> TrainState:
        rngs = nnx.Rngs(self.recipe.seed)
        model = TransformerModel(self.recipe.model, self.placement, dtype=DTYPE, rngs=rngs, kernels=self.kernels)
        params = tuple(jax.tree.leaves(nnx.split(model)[1]))
        return TrainState(params, self._optimizer.init(params))

    def _forward(self, params, tokens, valid) -> tuple[jax.Array, list[jax.Array]]:
        """Return the cross entropy [B,S] of each target and the router probabilities of each MoE layer."""
        model = self._model(params)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        step_inputs = DensePrefillInputs(valid=valid, num_ranks=self.placement.num_shards("batch"))
        hidden, _, routed = model(inputs, step_inputs, probabilities=True)
        return cross_entropy(model.logits(hidden), targets), routed

    def _step(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, StepMetrics]:
        moe = self.recipe.model.moe

        def total_loss(params):
            nats, routed = self._forward(params, tokens, jnp.ones(tokens[:, 1:].shape, bool))
            loss = jnp.mean(nats)
            balance = balance_loss(routed, top_k=moe.num_experts_per_tok) if moe and routed else jnp.float32(0)
            return loss + self.recipe.balance_weight * balance, (loss, balance)

        grads, (loss, balance) = jax.grad(total_loss, has_aux=True)(state.params)
        grad_norm = jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in grads))
        updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer), StepMetrics(loss, balance, grad_norm)

    def _nats(self, params, tokens, lengths) -> jax.Array:
        valid = jnp.arange(tokens.shape[1] - 1) < lengths[:, None]
        nats, _ = self._forward(params, tokens, valid)
        return jnp.sum(jnp.where(valid, nats, 0.0), axis=1)


def _check_mesh(recipe: TrainingRecipe, placement: MeshPlacement) -> None:
    """Raise MeshError for pipelines, uneven splits and unsuitable batch sizes.

    Uneven splits pad dims or replicate heads. Training starts from random values, so padding would not stay zero and
    replicated heads would not stay equal.
    """
    if placement.num_stages > 1:
        raise MeshError(f"pipeline={placement.num_stages}: training runs pipeline=1 only; use data, tensor, expert")
    wanted, got = ArraySizes.unpadded(recipe.model), array_sizes(recipe.model, placement)
    if wanted != got:
        raise MeshError(
            f"training needs even splits without padding, but this mesh gives {got}, not {wanted}; use smaller axes"
        )
    if recipe.batch_rows % placement.num_shards("batch"):
        raise MeshError(
            f"batch_rows={recipe.batch_rows} must be a multiple of data x expert = {placement.num_shards('batch')}"
        )

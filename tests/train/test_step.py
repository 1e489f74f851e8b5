"""The training step: it learns, a mesh does not change it, what it learned is what the loaded checkpoint says."""

from __future__ import annotations

import dataclasses
from functools import cache

import jax
import numpy as np
import pytest

from jaxmoe import LLM
from jaxmoe.config import ModelConfig, MoEConfig, RopeConfig
from jaxmoe.errors import CheckpointError, ConfigError, MeshError
from jaxmoe.model.kernels import KernelConfig
from jaxmoe.parallel.sharding import MeshPlacement
from jaxmoe.train.loop import as_written, evaluate, train
from jaxmoe.train.recipe import TrainingRecipe
from jaxmoe.train.step import Trainer
from scripts.demo_export import replace_directory, write_checkpoint
from scripts.demo_recipe import DEMO_MODEL, DEMO_RECIPE
from tests.conftest import mesh_of

MODEL = ModelConfig(
    family="qwen3_moe",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    moe_layers=(True, True),
    sliding_windows=(None, None),
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=16, norm_topk_prob=True),
    qk_norm="head",
    tie_word_embeddings=True,
)
# epsilon well above the noise of float32: Adam divides by the size of a gradient, and near zero would magnify it.
RECIPE = TrainingRecipe(
    model=MODEL, num_steps=40, warmup_steps=4, batch_rows=8, window_tokens=16, learning_rate=1e-2, epsilon=1e-5
)
ONE, EIGHT = "data=1", "data=2,tensor=2,expert=2"


@cache  # its step is compiled once
def trainer(mesh: str = ONE, recipe: TrainingRecipe = RECIPE, kernels: KernelConfig = KernelConfig()) -> Trainer:
    return Trainer(recipe, MeshPlacement(mesh=mesh_of(mesh)), kernels=kernels)


def windows(seed: int = 0) -> np.ndarray:
    """Rows that count up: easy to learn."""
    first = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (RECIPE.batch_rows, 1))
    return ((first + np.arange(RECIPE.window_tokens + 1)) % MODEL.vocab_size).astype(np.int32)


def run(trainer: Trainer, num_steps: int):
    state, metrics = trainer.init(), []
    for step in range(num_steps):
        state, new = trainer.step(state, windows(step))
        metrics.append([float(value) for value in new])
    return state, np.array(metrics)


def test_loss_falls():
    _, metrics = run(trainer(), RECIPE.num_steps)
    assert metrics[0, 0] == pytest.approx(np.log(MODEL.vocab_size), rel=0.05)
    assert metrics[-1, 0] < metrics[0, 0] / 3


@pytest.mark.parametrize(
    "mesh", [EIGHT, *(pytest.param(mesh, marks=pytest.mark.sweep) for mesh in ("data=8", "expert=4,data=2"))]
)
def test_a_mesh_does_not_change_the_steps(mesh):
    alone, alone_metrics = run(trainer(), 5)
    together, metrics = run(trainer(mesh), 5)
    np.testing.assert_allclose(metrics, alone_metrics, rtol=1e-5)
    for one, many in zip(alone.params, together.params, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kernels",
    [pytest.param(KernelConfig(grouped="dense"), marks=pytest.mark.sweep), KernelConfig(dispatch="all_gather")],
)
def test_kernels_do_not_change_the_steps(kernels):
    _, wanted = run(trainer(), 3)
    _, metrics = run(trainer(EIGHT, kernels=kernels), 3)
    np.testing.assert_allclose(metrics, wanted, rtol=1e-5)


def test_state_lies_by_the_parameter_table():
    made = trainer(EIGHT)
    state, _ = made.step(made.init(), windows())
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 0]
    assert len(moments) == 2 * len(made.table)
    for info, param, first, second in zip(
        made.table, state.params, moments[: len(made.table)], moments[len(made.table) :], strict=True
    ):
        for array in (param, first, second):
            assert array.sharding.is_equivalent_to(info.sharding, array.ndim), info.path


def test_norms_are_not_decayed():
    recipe = dataclasses.replace(RECIPE, weight_decay=1.0, learning_rate=0.5, clip_norm=1e-12, epsilon=1.0)
    made = trainer(recipe=recipe)
    before = made.named([np.asarray(param) for param in made.init().params])
    state, _ = run(made, 3)
    after = made.named(state.params)
    np.testing.assert_allclose(after["final_norm"], before["final_norm"], atol=1e-6)
    assert np.abs(after["embed"]).sum() < 0.9 * np.abs(before["embed"]).sum()


@pytest.mark.parametrize("mesh", ["tensor=4", "expert=8"])
def test_a_mesh_that_would_need_padding_is_refused(mesh):
    with pytest.raises(MeshError, match="even"):
        trainer(mesh)


def test_rows_must_divide_among_the_ranks():
    with pytest.raises(MeshError, match="batch_rows=6 must be a multiple of data x expert = 4"):
        trainer("data=4", recipe=dataclasses.replace(RECIPE, batch_rows=6))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 4), ("warmup_steps", 0), ("window_tokens", 33), ("learning_rate", 0.0), ("balance_weight", -1.0)],
)
def test_a_recipe_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}="):
        dataclasses.replace(RECIPE, **{name: value})


def test_evaluation_counts_every_token_once():
    made = trainer()
    state = made.init()
    stream = np.random.default_rng(2).integers(0, MODEL.vocab_size, 333).astype(np.int32)
    held_out = evaluate(made, state, stream, num_bytes=1000)
    assert held_out.num_tokens == 332
    assert held_out.nats_per_token == pytest.approx(np.log(MODEL.vocab_size), rel=0.05)
    assert held_out.nats_per_byte == pytest.approx(held_out.nats_per_token * 332 / 1000)
    assert held_out.bits_per_byte == pytest.approx(held_out.nats_per_byte / np.log(2))


@pytest.mark.parametrize("mesh", [pytest.param(ONE, marks=pytest.mark.sweep), EIGHT])
def test_the_exported_checkpoint_says_what_was_trained(tmp_path, mesh):
    made = trainer(mesh)
    stream = np.concatenate([windows(seed).ravel() for seed in range(20)])
    result = train(made, stream, stream[:200], held_out_bytes=600, evaluate_every=20)
    assert result.num_tokens == RECIPE.num_steps * RECIPE.batch_rows * RECIPE.window_tokens
    write_checkpoint(tmp_path, made.named(result.state.params), MODEL, made.placement, made.segments)
    llm = LLM.load(tmp_path, mesh=mesh_of(EIGHT), dtype="float32")
    assert dataclasses.replace(llm.config, moe=MODEL.moe) == MODEL

    tokens = windows(99)
    scored = llm.score([row.tolist() for row in tokens])
    lengths = np.full(len(tokens), RECIPE.window_tokens, np.int32)
    written = as_written(result.state.params, MODEL.dtype)
    nats = np.asarray(made.nats(written, tokens, lengths))
    np.testing.assert_allclose([-row.sum() for row in scored], nats, rtol=1e-5)


def test_only_its_own_family_is_exported(tmp_path):
    made = trainer()
    params, model = made.named(made.init().params), dataclasses.replace(MODEL, qkv_bias=True)
    with pytest.raises(CheckpointError, match="only plain qwen3_moe"):
        write_checkpoint(tmp_path, params, model, made.placement, made.segments)


def test_the_demo_model_splits_on_the_meshes_that_train_it():
    assert DEMO_MODEL.moe is not None
    assert DEMO_MODEL.moe.num_experts >= 8
    for mesh in (ONE, "data=2", EIGHT):
        Trainer(DEMO_RECIPE, MeshPlacement(mesh=mesh_of(mesh)))


def test_replace_directory_leaves_the_new_one_only(tmp_path):
    old, new = tmp_path / "demo", tmp_path / "scratch" / "demo"
    old.mkdir()
    (old / "stale").write_text("")
    new.mkdir(parents=True)
    (new / "fresh").write_text("")
    replace_directory(new, old)
    assert [path.name for path in old.iterdir()] == ["fresh"]
    assert not list((tmp_path / "scratch").iterdir())

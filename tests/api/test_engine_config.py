"""EngineConfig: one list of options for LLM, AsyncEngine and the command line; old names are named with the new one."""

from __future__ import annotations

import click
import pytest

import jaxmoe
from jaxmoe import LLM, AsyncEngine, CacheConfig, ConfigError, EngineConfig, ParallelConfig
from jaxmoe.cli.main import cli, run
from jaxmoe.config.engine import OPTION_FIELDS, RENAMED, SERVING_OPTIONS, EngineOptions


def test_keyword_arguments_are_the_fields_of_the_configuration():
    assert set(EngineOptions.__annotations__) == {*OPTION_FIELDS, "parallel", "cache"}
    assert set(EngineConfig().options()) == set(OPTION_FIELDS)
    assert set(OPTION_FIELDS) > SERVING_OPTIONS


def test_options_go_to_their_parts():
    config = EngineConfig(dtype="float32").with_options(
        {"mesh": "tensor=2", "kv_dtype": "int8", "max_num_seqs": 3, "kernels": {"grouped": "blocks"}}
    )
    assert (config.parallel.mesh, config.cache.kv_dtype, config.max_num_seqs) == ("tensor=2", "int8", 3)
    assert config.options() | {"dtype": None} == EngineConfig().options() | {
        "mesh": "tensor=2", "kv_dtype": "int8", "max_num_seqs": 3, "kernels": {"grouped": "blocks"},
    }  # fmt: skip
    whole = config.with_options({"cache": CacheConfig(page_size=8), "parallel": ParallelConfig()})
    assert (whole.cache.page_size, whole.cache.kv_dtype, whole.parallel.mesh) == (8, None, None)
    assert EngineConfig().options() == EngineConfig().with_options({}).options()


def _flags(command: str) -> set[str]:
    return {name for option in cli.commands[command].params if isinstance(option, click.Option) for name in option.opts}


@pytest.mark.parametrize(
    "command", ["generate", "score", "verify", "bench", "balance", "compile", "inspect", "map", "plan"]
)
def test_the_command_line_has_the_same_names_and_texts(command):
    options = {option.name: option for option in cli.commands[command].params if isinstance(option, click.Option)}
    shared = set(options) & set(OPTION_FIELDS)
    assert {"dtype", "weights_dtype", "kv_dtype", "layout"} <= shared or command == "verify"
    if command in ("generate", "score", "bench"):
        for name in shared:
            assert options[name].help == OPTION_FIELDS[name].metadata["help"]
            given = options[name].to_info_dict()["default"]
            assert given == OPTION_FIELDS[name].default or OPTION_FIELDS[name].default in (None, ())
    assert _flags(command).isdisjoint({f"--{old.replace('_', '-')}" for old in RENAMED} - {"--batch"})


@pytest.mark.parametrize("alias", ["bf16", "torch.bfloat16"])
def test_dtypes_are_kept_by_their_full_names(alias):
    config = EngineConfig().with_options({"dtype": alias, "weights_dtype": alias, "kv_dtype": alias})
    assert (config.dtype, config.weights_dtype, config.cache.kv_dtype) == ("bfloat16",) * 3


@pytest.mark.parametrize("old", sorted(old for old, new in RENAMED.items() if new in OPTION_FIELDS))
def test_an_old_keyword_argument_is_named_with_the_new_one(old):
    for load in (LLM, LLM.load, AsyncEngine):
        with pytest.raises(ConfigError, match=f"{old} is now called {RENAMED[old]}"):
            load("demo", **{old: 1})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["generate", "--max-batch", "4"], "--max-batch is now called --max-num-seqs"),
        (["compile", "demo", "--batch", "4"], "--batch is now called --max-num-seqs"),
        (["plan", "demo", "--concurrency", "4"], "--concurrency is now called --max-num-seqs"),
        (["generate", "--stage-chunks", "2"], "--stage-chunks is now called --virtual-stages"),
        (["probe", "--most-mib", "1"], "--most-mib is now called --max-mib"),
    ],
)
def test_an_old_option_is_named_with_the_new_one(line, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(line)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"jaxmoe: error: {words}\n"


@pytest.mark.parametrize(("old", "new"), [("Engine", "AsyncEngine"), ("Chunk", "TokenEvent")])
def test_an_old_export_is_named_with_the_new_one(old, new):
    with pytest.raises(AttributeError, match=f"jaxmoe.{old} is now called jaxmoe.{new}"):
        getattr(jaxmoe, old)


def test_everything_a_user_meets_is_exported():
    for name in jaxmoe.__all__:
        assert getattr(jaxmoe, name).__name__ == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a whole number of at least 1"),
        ({"page_size": True}, "page_size=True must be a whole number"),
        ({"decode_steps": 1.5}, "decode_steps=1.5"),
        ({"host_cache_gib": -1}, "host_cache_gib=-1 must be a number of at least 0"),
        ({"kv_cache_gib": "8"}, "kv_cache_gib='8'"),
        ({"max_num_seq": 3}, "there is no option max_num_seq: did you mean max_num_seqs?"),
        ({"zzz": 3}, "there is no option zzz: the options are "),
    ],
)
def test_values_that_cannot_be_are_named(options, words):
    with pytest.raises(ConfigError) as error:
        EngineConfig().with_options(options)
    assert words in str(error.value)


def test_a_part_and_its_options_may_come_in_any_order():
    part = CacheConfig(page_size=8)
    for options in ({"kv_dtype": "int8", "cache": part}, {"cache": part, "kv_dtype": "int8"}):
        config = EngineConfig().with_options(options)
        assert (config.cache.page_size, config.cache.kv_dtype) == (8, "int8")


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda: LLM("demo", "tensor=2"), "config='tensor=2' must be an EngineConfig"),
        (lambda: AsyncEngine("demo", {"mesh": "tensor=2"}), "must be an EngineConfig"),
        (lambda: LLM("demo", parallel="tensor=2"), "parallel='tensor=2' must be a ParallelConfig"),
        (lambda: EngineConfig(cache=None), "cache=None must be a CacheConfig"),
    ],
)
def test_a_configuration_of_another_type_is_named(load, words):
    with pytest.raises(ConfigError, match=words):
        load()


def test_an_old_option_is_unknown_where_the_new_one_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        run(["generate", "--memory-gib", "4"])
    assert "is now called" not in capsys.readouterr().err

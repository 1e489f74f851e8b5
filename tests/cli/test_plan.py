"""jaxmoe plan for people, as JSON and as a picture."""

from __future__ import annotations

import json

import pytest

from jaxmoe.families import read_config
from jaxmoe.planner.hardware import hardware_names
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config, preset_configs

from .commands import jaxmoe


def plan(capsys, *arguments):
    outcome = jaxmoe(capsys, "plan", *arguments, "--json")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1), outcome.err
    return json.loads(outcome.out)


def test_the_rule_of_thumb_is_the_users(capsys):
    words = ["plan", "deepseek-v3.1", "--hardware", "b200", "--weights-dtype", "fp8", "--rule-of-thumb"]
    outcome = jaxmoe(capsys, *words)
    assert outcome.code == 0
    assert "8 bits / 8 x 671 billion parameters x 1.8 = 1,208 GB -> 1,440 GB = 8 x b200" in outcome.out


def test_the_rule_of_thumb_asks_for_no_load(capsys):
    assert "rule of thumb" in jaxmoe(capsys, "plan", "demo", "--hardware", "h100", "--rule-of-thumb").out


def test_json_holds_the_plan_its_memory_and_its_reasons(capsys):
    found = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", "--devices", "4", "--price", "2")
    chosen, memory = found["plan"], found["memory"]
    assert chosen["tokens_per_s"] == pytest.approx(4 * chosen["tokens_per_s_per_device"])
    assert chosen["tokens_per_s_per_user"] == pytest.approx(1e3 / chosen["tpot_ms"])
    assert sum(chosen["turn_ms"].values()) >= 0.999 * chosen["tpot_ms"]
    assert chosen["dollars_per_million_tokens"] == pytest.approx(8 / 3600 / chosen["tokens_per_s"] * 1e6)
    assert sum(memory["weights_by_part"].values()) == memory["weights"]
    assert memory["weights"] + memory["pages"] + memory["step"] < memory["limit"]
    assert memory["pool_tokens"] >= chosen["concurrency"] * 2048
    assert found["arguments"].startswith(f"--mesh {chosen['mesh']}")
    assert found["reasons"]
    assert chosen["tokens_per_s_per_device"] == pytest.approx(found["front"][-1]["tokens_per_s_per_device"], rel=0.05)


def test_the_arguments_run_elsewhere(capsys):
    """What is to be pasted is understood where it is pasted."""
    found = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", "--devices", "8")
    words = found["arguments"].split()
    again = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", *words, "--chunk-tokens", found["plan"]["chunk_tokens"])
    assert again["plan"] == found["plan"]


def test_without_devices_the_fewest_worthwhile_are_taken(capsys):
    """Four B200 hold the weights and little else: each would serve a fifth."""
    found = plan(capsys, "deepseek-v3.1", "--hardware", "b200", "--kv-dtype", "fp8")
    assert (found["devices"], found["nodes"]) == (8, 1)
    assert plan(capsys, "llama-3.1-8b", "--hardware", "h100")["devices"] == 1


def test_people_see_the_plan_a_table_and_reasons_and_a_picture(capsys, tmp_path):
    path = tmp_path / "plan.svg"
    outcome = jaxmoe(capsys, "plan", "llama-3.1-8b", "--hardware", "v5e", "--devices", "8", "--plot", path)
    assert outcome.code == 0
    for words in ("llama-3.1-8b on 8 x v5e", "--mesh ", "tokens/s", "memory of a device", "What binds:", "the front"):
        assert words in outcome.out
    assert path.read_text(encoding="utf-8").startswith("<?xml")


def test_a_users_own_hardware_is_planned_for(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[hardware]\npreset = "h100"\ndevice = "mine"\nhbm_gib = 20\n', encoding="utf-8")
    found = plan(capsys, "llama-3.1-8b", "--hardware", path, "--devices", "2")
    assert found["hardware"] == "mine"
    assert found["memory"]["limit"] == 20 * 2**30


@pytest.mark.parametrize("name", preset_configs())
def test_every_preset_model_reads(name):
    assert read_config(read_json(find_config(name))).num_hidden_layers > 0


@pytest.mark.parametrize("name", hardware_names())
def test_every_preset_of_hardware_plans(capsys, name):
    load = ["--isl", "64", "--osl", "64", "--chunk-tokens", "512"]
    found = plan(capsys, "demo", "--hardware", name, "--devices", "4", *load)
    assert found["plan"]["tokens_per_s"] > 0

"""jaxmoe plan for people, as JSON and as a picture."""

from __future__ import annotations

import errno
import json
import shlex

import pytest

from jaxmoe.aot.request import InspectRequest
from jaxmoe.cli.options import given_options
from jaxmoe.errors import ConfigError
from jaxmoe.families import read_config
from jaxmoe.planner.hardware import hardware_names
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config, preset_configs

from .commands import jaxmoe, parsed


def plan(capsys, *arguments):
    outcome = jaxmoe(capsys, "plan", *arguments, "--json")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1), outcome.err
    return json.loads(outcome.out)


def test_the_rule_of_thumb_is_the_users(capsys):
    words = ["plan", "deepseek-v3.1", "--hardware", "b200", "--weights-dtype", "fp8", "--rule-of-thumb"]
    outcome = jaxmoe(capsys, *words)
    assert outcome.code == 0
    assert "8 bits / 8 x 671 billion parameters x 1.8 = 1,208 GB -> 1,440 GB = 8 x b200" in outcome.out


def test_the_rule_of_thumb_asks_for_no_load_and_keeps_decimals_of_small_models(capsys):
    printed = jaxmoe(capsys, "plan", "demo", "--hardware", "h100", "--rule-of-thumb").out
    assert "bits / 8 x 0.0" in printed
    assert "= 0 GB" not in printed
    found = json.loads(jaxmoe(capsys, "plan", "demo", "--hardware", "h100", "--rule-of-thumb", "--json").out)
    assert found["gb"] == pytest.approx(found["bits"] / 8 * found["billions"] * 1.8, rel=0.01)
    assert found["devices"] == 1


@pytest.mark.parametrize(
    ("model", "weights_dtype", "bits"),
    [
        ("deepseek-v3.1", None, 8), ("deepseek-v3.1", "bfloat16", 16), ("llama-3.1-8b", "fp8", 8),
        ("gpt-oss-20b", "mxfp4", 4), ("gpt-oss-20b", "float32", 32), ("deepseek-v3.1-nvfp4", None, 4),
    ],
)  # fmt: skip
def test_the_rule_of_thumb_counts_the_bits_that_were_chosen(capsys, model, weights_dtype, bits):
    words = ["plan", model, "--hardware", "b200", "--rule-of-thumb", "--json"]
    printed = jaxmoe(capsys, *words, *(["--weights-dtype", weights_dtype] if weights_dtype else []))
    assert json.loads(printed.out)["bits"] == bits


def test_json_holds_the_plan_its_memory_and_its_reasons(capsys):
    found = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", "--devices", "4", "--price", "2")
    chosen, memory = found["plan"], found["memory"]
    assert chosen["tokens_per_s"] == pytest.approx(4 * chosen["tokens_per_s_per_device"])
    assert chosen["tokens_per_s_per_user"] == pytest.approx(1e3 / chosen["tpot_ms"])
    assert sum(chosen["step_ms"].values()) >= 0.999 * chosen["tpot_ms"]
    assert chosen["dollars_per_million_tokens"] == pytest.approx(8 / 3600 / chosen["tokens_per_s"] * 1e6)
    assert sum(memory["weights_by_part"].values()) == memory["weights"]
    assert sum(memory["step_by_part"].values()) == memory["step"]
    assert memory["weights"] + memory["pages"] + memory["step"] + memory["left"] == pytest.approx(memory["limit"])
    rows = memory["pages"] / memory["kv_bytes_per_token"] / 2048  # of a rank
    assert chosen["max_num_seqs"] / 4 <= rows <= chosen["max_num_seqs"]
    assert memory["left"] >= 0
    assert memory["pool_tokens"] >= memory["max_requests"] * 2048 >= chosen["max_num_seqs"] * 2048
    assert {"activations", "logits"} <= set(memory["step_by_part"])
    assert (found["model"], found["config"]) == ("qwen3-30b-a3b", "qwen3-30b-a3b")
    asked = {"max_num_seqs": chosen["max_num_seqs"], "context": 2048, "chunk_tokens": chosen["chunk_tokens"]}
    assert found["engine"] == asked
    assert found["arguments"].startswith(f"--mesh {chosen['mesh']}")
    assert found["reasons"]
    assert chosen["tokens_per_s_per_device"] == pytest.approx(found["front"][-1]["tokens_per_s_per_device"], rel=0.05)


def test_the_arguments_run_elsewhere(capsys):
    """What is to be pasted is understood where it is pasted."""
    found = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", "--devices", "8")
    words = found["arguments"].split()
    again = plan(capsys, "qwen3-30b-a3b", "--hardware", "h100", *words, "--chunk-tokens", found["plan"]["chunk_tokens"])
    assert again["plan"] == found["plan"]


@pytest.mark.parametrize(
    ("model", "options", "left_out"),
    [
        ("deepseek-v3.1", ["--weights-dtype", "fp8", "--kv-dtype", "fp8"], ["--weights-dtype"]),
        ("gpt-oss-20b", ["--weights-dtype", "mxfp4"], ["--weights-dtype"]),
        ("llama-3.1-8b", ["--weights-dtype", "fp8", "--dtype", "bfloat16"], []),
    ],
)
def test_what_is_pasted_is_taken_by_the_other_commands(capsys, model, options, left_out):
    """Those that read a config.json check it in one place."""
    found = plan(capsys, model, "--hardware", "b200", "--nodes", "1", *options)
    words = found["arguments"].split()
    assert all((option in words) != (option in left_out) for option in options[::2])
    given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    given = {name: int(value) if value.isdigit() else value for name, value in given.items()}
    engine = found["engine"]
    question = InspectRequest.of(
        model=model, max_num_seqs=engine["max_num_seqs"], context=engine["context"],
        chunk_tokens=engine["chunk_tokens"],
        **given_options(given),
    )  # fmt: skip
    assert question.checked_model()[0].quantization is not None
    asked = InspectRequest.of(model=model, mesh="data=1", max_num_seqs=1, context=1, weights_dtype=options[1])
    assert asked.checked_model()[0].quantization is not None


@pytest.mark.parametrize(
    ("model", "options", "hosts"),
    [
        ("qwen3-30b-a3b", ["--hardware", "h100", "--devices", "4", "--kv-dtype", "fp8"], 1),
        ("deepseek-v3.1", ["--hardware", "b200", "--nodes", "2", "--layout", "tp-ep", "--dispatch", "all_gather"], 2),
        ("llama-3.1-8b", ["--hardware", "v5e", "--devices", "96", "--mesh", "data=12,pipeline=2,tensor=4",
                          "--virtual-stages", "2", "--isl", "64", "--osl", "64"], 12),
    ],
)  # fmt: skip
def test_every_host_has_its_command(capsys, model, options, hosts):
    found = plan(capsys, model, *options)
    chosen, engine = found["plan"], found["engine"]
    assert len(found["launch"]) == hosts
    for index, line in enumerate(found["launch"]):
        given, joining = parsed(line)
        assert (given["model"], given["prompt"], given["devices"]) == ("CHECKPOINT", "Hello", None)
        assert (given["mesh"], given["layout"]) == (chosen["mesh"], chosen["layout"])
        assert given["max_num_seqs"] == engine["max_num_seqs"]
        assert (given["dispatch"] or "all_to_all") == chosen["dispatch"]
        assert given["virtual_stages"] == chosen["virtual_stages"]
        assert given["kv_dtype"] == ("fp8" if "--kv-dtype" in options else None)
        several = ("HOST0:PORT", hosts, index) if hosts > 1 else (None, None, None)
        assert (joining["coordinator"], joining["num_processes"], joining["process_id"]) == several
    printed = jaxmoe(capsys, "plan", model, *options).out.splitlines()
    shown = [text.strip() for text in printed if "jaxmoe generate" in text or text.strip() == "..."]
    lines = found["launch"]
    assert shown == (lines if hosts <= 8 else [*lines[:2], "...", lines[-1]])
    where = f" on every {found['node']}" if hosts > 1 else ""
    assert f"  start it{where}:" in printed
    assert f"    CHECKPOINT is a directory or hub id with the weights of {model}" in printed
    assert ("    HOST0:PORT is the address of the first host and a free port there" in printed) == (hosts > 1)


def test_the_command_of_one_host_runs(capsys):
    load = ["--isl", "64", "--osl", "64", "--chunk-tokens", "512", "--max-num-seqs", "8", "--dtype", "float32"]
    (line,) = plan(capsys, "demo", "--hardware", "cpu-8", "--nodes", "1", *load)["launch"]
    assert "--devices 8" in line
    outcome = jaxmoe(capsys, *shlex.split(line)[1:], "--max-tokens", "2", "--no-native")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Hello")


def test_emulated_hosts_emulate_their_own_devices(capsys):
    load = ["--isl", "64", "--osl", "64", "--max-num-seqs", "8", "--mesh", "data=2,expert=8"]
    lines = plan(capsys, "demo", "--hardware", "cpu-8", *load)["launch"]
    assert [(parsed(line)[0]["devices"], parsed(line)[1]["process_id"]) for line in lines] == [(8, 0), (8, 1)]


def test_a_model_that_cannot_run_has_no_command(capsys):
    words = ["deepseek-v3.2", "--hardware", "b200", "--nodes", "2", "--mesh", "expert=16", "--isl", "64", "--osl", "64"]
    assert plan(capsys, *words)["launch"] == []
    assert "start it" not in jaxmoe(capsys, "plan", *words).out


def test_a_path_is_called_by_its_model(capsys, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(find_config("llama-3.1-8b").read_text())
    outcome = jaxmoe(capsys, "plan", folder / "config.json", "--hardware", "h100", "--devices", "1")
    assert outcome.out.startswith("mine on 1 x h100: one device\n  --mesh data=1\n  engine: max_num_seqs=")
    assert "1 engines" not in outcome.out
    assert "1 requests" not in outcome.out
    (line,) = [text.strip() for text in outcome.out.splitlines() if "jaxmoe generate" in text]
    assert parsed(line)[0]["model"] == str(folder)


def test_limits_that_few_devices_miss_are_met_by_more(capsys):
    """One H100 decodes Llama-3.1-8B in some ms a token; four layers' weights on each of several take less."""
    alone = plan(capsys, "llama-3.1-8b", "--hardware", "h100", "--devices", "8", "--max-num-seqs", "1")
    limit = 1.1 * alone["plan"]["tpot_ms"]
    small = ["--objective", "latency", "--max-num-seqs", "1", "--sla-tpot-ms", limit]
    found = plan(capsys, "llama-3.1-8b", "--hardware", "h100", *small)
    assert found["devices"] > 1
    assert found["plan"]["tpot_ms"] <= limit


def test_hosts_of_tpus_are_no_nodes(capsys):
    found = jaxmoe(capsys, "plan", "llama-3.1-8b", "--hardware", "v5e", "--devices", "16", "--isl", "64", "--osl", "64")
    assert "on 16 x v5e (2 hosts)" in found.out


def test_nvfp4_is_planned_with_by_its_own_bits(capsys):
    """Half the bytes and twice the products of the same model in fp8."""
    half, whole = (
        plan(capsys, name, "--hardware", "b200", "--mesh", "expert=8", "--kv-dtype", "fp8")
        for name in ("deepseek-v3.1-nvfp4", "deepseek-v3.1")
    )
    assert (half["weights_dtype"], whole["weights_dtype"]) == ("nvfp4", "fp8")
    experts = [one["memory"]["weights_by_part"]["experts"] for one in (half, whole)]
    assert experts[0] / experts[1] == pytest.approx(4.5 / 8, rel=0.01)
    assert half["plan"]["tokens_per_s"] > whole["plan"]["tokens_per_s"]


def test_without_devices_the_fewest_worthwhile_are_taken(capsys):
    """Four B200 hold the weights and little else: each would serve a fifth."""
    found = plan(capsys, "deepseek-v3.1", "--hardware", "b200", "--kv-dtype", "fp8")
    assert (found["devices"], found["nodes"]) == (8, 1)
    assert plan(capsys, "llama-3.1-8b", "--hardware", "h100")["devices"] == 1


def test_cost_takes_the_cheapest_number_of_devices(capsys):
    """Four H100 serve Qwen3-30B-A3B 5% cheaper than two, and two 57% cheaper than one."""
    words = ["qwen3-30b-a3b", "--hardware", "h100", "--objective", "cost", "--price", "2"]
    dollars = [plan(capsys, *words, "--devices", count)["plan"]["dollars_per_million_tokens"] for count in (2, 4)]
    found = plan(capsys, *words)
    assert found["plan"]["dollars_per_million_tokens"] <= 1.03 * min(dollars)


@pytest.mark.parametrize(("hardware", "devices"), [("h200-8", 8), ("b200-2x8", 16), ("h200", 1)])
def test_nodes_that_hardware_names_are_all_planned_for(capsys, hardware, devices):
    assert plan(capsys, "demo", "--hardware", hardware, "--isl", "32", "--osl", "32")["devices"] == devices


@pytest.mark.parametrize(("model", "runs"), [("deepseek-v3.2", False), ("deepseek-v3.1-nvfp4", False), ("demo", True)])
def test_models_that_other_commands_refuse_are_planned_only(capsys, model, runs):
    length = ["--isl", "32", "--osl", "32", "--mesh", "expert=8"]
    said = plan(capsys, model, "--hardware", "b200", *length)["reasons"]
    assert (
        any(line.startswith("Planned only: generate, inspect, compile and map do not support") for line in said) != runs
    )
    read = InspectRequest.of(model=model, mesh="data=1", max_num_seqs=1, context=1)
    if runs:
        assert read.checked_model()
    elif model != "deepseek-v3.2":  # whose layers refuse it, later
        with pytest.raises(ConfigError):
            read.checked_model()


def test_of_one_token_no_time_between_tokens_is_told_or_limited(capsys):
    words = ["llama-3.1-70b", "--hardware", "h100", "--devices", "8", "--isl", "4096", "--osl", "1"]
    free, limited = plan(capsys, *words), plan(capsys, *words, "--sla-tpot-ms", "20")
    assert free["plan"] == limited["plan"]
    assert free["plan"]["tpot_ms"] is None
    assert free["plan"]["tokens_per_s_per_user"] == pytest.approx(1e3 / free["plan"]["ttft_ms"])
    out = jaxmoe(capsys, "plan", *words).out
    assert "ms per token;" not in out
    assert "ms; " in out


def test_small_rates_keep_their_digits(capsys):
    out = jaxmoe(capsys, "plan", "llama-3.1-8b", "--hardware", "cpu-8", "--weights-dtype", "int8").out
    assert "x cpu-8" in out
    assert " 0 a device" not in out
    assert " 0.0 per user" not in out


def test_a_picture_that_cannot_be_written_leaves_none(capsys, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("jaxmoe.engine.trace.os.replace", full)
    words = ["demo", "--hardware", "h100", "--devices", "2", "--isl", "32", "--osl", "32"]
    outcome = jaxmoe(capsys, "plan", *words, "--plot", tmp_path / "p.svg")
    assert outcome.code == 2
    assert f"--plot '{tmp_path / 'p.svg'}' cannot be written: File too large" in outcome.err
    assert not list(tmp_path.iterdir())


def test_people_see_the_plan_a_table_and_reasons_and_a_picture(capsys, tmp_path):
    path = tmp_path / "plan.svg"
    outcome = jaxmoe(capsys, "plan", "llama-3.1-8b", "--hardware", "v5e", "--devices", "8", "--plot", path)
    assert outcome.code == 0
    for words in (
        "llama-3.1-8b on 8 x v5e",
        "--mesh ",
        "tokens/s",
        "memory per device",
        "Bottleneck:",
        "Pareto front",
    ):
        assert words in outcome.out
    assert path.read_text(encoding="utf-8").startswith("<?xml")


def test_a_users_own_hardware_is_planned_for(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[hardware]\npreset = "h100"\ndevice = "mine"\nhbm_gib = 20\n', encoding="utf-8")
    found = plan(capsys, "llama-3.1-8b", "--hardware", path, "--devices", "2")
    assert found["hardware"] == "mine"
    assert found["memory"]["limit"] == 20 * 2**30


@pytest.mark.parametrize("name", preset_configs(planned=True))
def test_every_preset_model_reads_and_runs_but_for_those_that_are_only_planned(name):
    raw = read_json(find_config(name))
    config = read_config(raw, planned=True)
    assert config.num_hidden_layers > 0
    runs = config.indexer is None and (
        config.checkpoint_quantization is None or config.checkpoint_quantization.method != "modelopt"
    )
    assert runs == (name in preset_configs())
    if config.checkpoint_quantization is not None and config.checkpoint_quantization.method == "modelopt":
        with pytest.raises(ConfigError, match="can be sized and planned"):
            read_config(raw)


def test_what_is_not_understood_is_said_and_planned_without(capsys, tmp_path):
    raw = read_json(find_config("demo")) | {"attn_gate": 2, "is_causal": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    words = [tmp_path, "--hardware", "h100", "--devices", "1", "--isl", "64", "--osl", "64"]
    found = plan(capsys, *words)
    assert found["not_understood"] == ["is_causal = False", "attn_gate = 2"]
    assert found["plan"] == plan(capsys, "demo", *words[1:])["plan"]
    assert any(reason.startswith("Planned only") for reason in found["reasons"])
    thumb = jaxmoe(capsys, "plan", *words[:3], "--rule-of-thumb")
    assert (thumb.code, thumb.out.splitlines()[:2]) == (
        0, ["not understood: is_causal = False", "not understood: attn_gate = 2"]
    )  # fmt: skip


@pytest.mark.parametrize("name", hardware_names())
def test_every_preset_of_hardware_plans(capsys, name):
    load = ["--isl", "64", "--osl", "64", "--chunk-tokens", "512"]
    found = plan(capsys, "demo", "--hardware", name, "--devices", "4", *load)
    assert found["plan"]["tokens_per_s"] > 0


def test_devices_that_have_room_for_fewer_requests_are_not_faster_for_it(capsys):
    """One H100 has room for two requests so long, where four a device are assumed; two have room for eight."""
    long = ["--isl", "120000", "--osl", "1000", "--objective", "latency"]
    found = plan(capsys, "llama-3.1-8b", "--hardware", "h100", *long)
    assert found["devices"] > 1
    assert found["plan"]["max_num_seqs"] == 4 * found["devices"]

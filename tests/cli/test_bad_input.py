"""Every mistake of a person's: one line that names it, exit code 2, nothing on standard output, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from .commands import jaxmoe

ROOT = Path(__file__).parent.parent.parent
ALL = "data=2,tensor=2,expert=2"


@pytest.fixture
def work(tmp_path, tiny_dir, monkeypatch) -> Path:
    """The working directory: a good checkpoint (of 128 tokens' context and 97 ids), files of prompts."""
    directory = tmp_path / "work"
    shutil.copytree(tiny_dir("llama_mha"), directory / "good")
    for name, text in {
        "ids": "[1, 2, 3]\n",
        "long": json.dumps([1] * 129),
        "full": json.dumps([1] * 128),
        "empty_prompt": "[]\n",
        "range": "[1, 2]\n[1, 97]\n",
        "negative": "[-1]\n",
        "float": "[1, 2.0]\n",
        "text": '["a"]\n',
        "bool": "[true]\n",
        "object": '{"ids": [1]}\n',
        "broken": "[1, 2]\n[1, 2\n",
        "digits": f"[{'9' * 5000}]\n",
        "nothing": "\n\n",
    }.items():
        (directory / f"{name}.jsonl").write_text(text)
    (directory / "latin.jsonl").write_bytes(b"[1] \xff")
    (directory / "page.html").write_text("{}")
    monkeypatch.chdir(directory)
    return directory


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def _files(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in directory.rglob("*")}


def _assert_refused(capsys, work: Path, arguments: list[str], words: list[str]) -> None:
    before = _files(work)
    outcome = jaxmoe(capsys, *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("jaxmoe: error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert _files(work) == before


GENERATE = ["generate", "good", "--prompt-ids", "ids.jsonl"]
COMPILE = ["compile", "good", "--context", "64", "--target", "v5p:2x2x1", "--mesh", "tensor=4"]
MAP = ["map", "good", "--mesh", "data=4,expert=16,tensor=2", "-o", "map.html"]
INSPECT = ["inspect", "good", "--mesh", "tensor=8"]

COMMAND_LINES: list[tuple[list[str], list[str]]] = [
    # the command itself
    (["frobnicate"], ["No such command", "frobnicate"]),
    (["generate", "good", "--frobnicate"], ["No such option", "--frobnicate"]),
    (["generate", "good", "more", "--prompt", "x"], ["more"]),
    (["score", "good"], ["Missing option", "--ids"]),
    (["score"], ["Missing argument", "MODEL"]),
    ([*GENERATE, "--max-tokens", "many"], ["--max-tokens", "many"]),
    ([*GENERATE, "--devices", "eight"], ["--devices", "eight"]),
    # prompts
    (["generate", "good"], ["no prompt", "--prompt-ids"]),
    ([*GENERATE, "--prompt", "x"], ["--prompt and --prompt-ids were both given"]),
    ([*GENERATE, "--chat"], ["--chat needs --prompt"]),
    (["generate", "good", "--prompt", ""], ["the prompt is empty", "at least one character"]),
    (["generate", "good", "--prompt", "x"], ["no tokenizer.json", "give token ids"]),
    (["generate", "good", "--prompt", "x", "--chat"], ["no tokenizer.json"]),
    ([*GENERATE, "--stop", "x"], ["stop strings need a tokenizer.json"]),
    (["generate", "good", "--prompt-ids", "none.jsonl"], ["none.jsonl cannot be read", "No such file"]),
    (["generate", "good", "--prompt-ids", "good"], ["good cannot be read", "Is a directory"]),
    (["generate", "good", "--prompt-ids", "latin.jsonl"], ["latin.jsonl cannot be read"]),
    (["generate", "good", "--prompt-ids", "nothing.jsonl"], ["nothing.jsonl holds no lines"]),
    (["generate", "good", "--prompt-ids", "broken.jsonl"], ["broken.jsonl line 2 is not JSON"]),
    (["generate", "good", "--prompt-ids", "digits.jsonl"], ["digits.jsonl line 1 is not JSON"]),
    (["generate", "good", "--prompt-ids", "object.jsonl"], ["object.jsonl line 1 holds", "a JSON list of token ids"]),
    (["generate", "good", "--prompt-ids", "empty_prompt.jsonl"], ["prompt 0 is empty", "at least one token"]),
    (["generate", "good", "--prompt-ids", "long.jsonl"], ["prompt 0 has 129 tokens", "127", "shorten it"]),
    (["generate", "good", "--prompt-ids", "full.jsonl"], ["prompt 0 has 128 tokens", "127", "shorten it"]),
    (["score", "good", "--ids", "long.jsonl"], ["prompt 0 has 129 tokens", "128", "shorten it"]),
    (["generate", "good", "--prompt-ids", "range.jsonl"], ["prompt 1 has token id 97 at position 1", "[0, 97)"]),
    (["score", "good", "--ids", "range.jsonl"], ["prompt 1 has token id 97 at position 1", "[0, 97)"]),
    (["score", "good", "--ids", "negative.jsonl"], ["token id -1", "[0, 97)"]),
    (["score", "good", "--ids", "float.jsonl"], ["token id 2.0 at position 1", "whole numbers"]),
    (["score", "good", "--ids", "text.jsonl"], ["token id 'a'", "whole numbers"]),
    (["score", "good", "--ids", "bool.jsonl"], ["token id True", "whole numbers"]),
    # sampling
    ([*GENERATE, "--max-tokens", "0"], ["max_tokens=0 must be at least 1"]),
    ([*GENERATE, "--max-tokens", "-3"], ["max_tokens=-3 must be at least 1"]),
    ([*GENERATE, "--temperature", "nan"], ["temperature=nan must be a finite number"]),
    ([*GENERATE, "--temperature", "inf"], ["temperature=inf must be a finite number"]),
    ([*GENERATE, "--temperature", "-1"], ["temperature=-1.0 must be 0 (greedy) or lie in"]),
    ([*GENERATE, "--top-p", "0"], ["top_p=0.0 must lie in (0, 1]"]),
    ([*GENERATE, "--top-p", "1.5"], ["top_p=1.5 must lie in (0, 1]"]),
    ([*GENERATE, "--min-p", "2"], ["min_p=2.0 must lie in [0, 1]"]),
    ([*GENERATE, "--top-k", "-2"], ["top_k=-2 must lie in"]),
    ([*GENERATE, "--seed", str(-(2**63) - 1)], [f"seed={-(2**63) - 1} must lie in"]),
    ([*GENERATE, "--seed", str(2**64)], [f"seed={2**64} must lie in"]),
    ([*GENERATE, "--stop", ""], ["stop=('',) must be non-empty strings"]),
    # plans
    (
        ["plan", "deepsek-v3", "--hardware", "b200"],
        ["config 'deepsek-v3' is not a config.json", "did you mean deepseek-v3"],
    ),
    (["plan", "deepseek-v3", "--hardware", "b20"], ["hardware 'b20' is no preset", "did you mean b200"]),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--nodes", "1", "--devices", "8"],
        ["nodes=1 and devices=8 both set"],
    ),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "0"], ["devices=0 must lie in [1, 8192]"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--isl", "0"], ["isl=0 must lie in [1, 131072]"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--isl", "131072"], ["isl=131072 + osl=1024 must not exceed"]),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--max-num-seqs", "0"],
        ["max_num_seqs=0 must be a whole number of at least 1"],
    ),
    (["plan", "demo", "--hardware", "h100", "--max-num-seqs", "99999999"], ["max_num_seqs=99999999 must lie in [1, "]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--sla-tpot-ms", "-1"], ["sla_tpot_ms=-1.0 must be above 0"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--sla-ttft-ms", "nan"], ["sla_ttft_ms=nan must be above 0"]),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--sla-ttft-ms", "inf"],
        ["inf must be above 0, and at most 1e+12"],
    ),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--price", "-1"], ["price=-1.0 must be above 0, and at most"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--price", "nan"], ["price=nan must be above 0, and at most"]),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "1", "--sla-tpot-ms", "0.1"],
        ["--sla-tpot-ms 0.1 cannot be met by 1 x h100", "the lowest TPOT is"],
    ),
    (
        ["plan", "llama-3.1-405b", "--hardware", "h100", "--nodes", "1"],
        ["8 x h100: the weights take at least", "16 devices would do"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "1", "--max-num-seqs", "100000"],
        [
            "there is no room for 100000 requests of 2048 tokens",
            "devices would do, or fewer requests (--max-num-seqs, at ",
        ],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "1", "--max-num-seqs", "16777216"],
        ["GiB; fewer requests (--max-num-seqs, at most 224), or a shorter --weights-dtype or --kv-dtype may do"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "8", "--mesh", "tensor=4"],
        ["mesh tensor=4 has 4 devices, but 8 were requested"],
    ),
    (["plan", "llama-3.1-8b", "--hardware", "gb200", "--nodes", "8192"], ["589824 devices of gb200 were requested"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--kv-dtype", "int4"], ["kv_dtype='int4' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--weights-dtype", "fp6"], ["weights_dtype='fp6' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--dispatch", "post"], ["dispatch='post' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--layout", "fastest"], ["layout 'fastest' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--skew", "-1"], ["skew=-1.0 must lie in [0, 4]"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--plot", "plan.txt"], ["must end in .png or .svg"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--objective", "fun"], ["--objective", "fun"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--mesh", ""], ["mesh '' is neither axes"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--layout", ""], ["layout '' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", "h100", "--dtype", ""], ["dtype='' must be one of"]),
    (["plan", "llama-3.1-8b", "--hardware", ""], ["hardware '' is no preset"]),
    (
        ["plan", "llama-3.1-8b", "--hardware", "~nobody-of-this-name/h.toml"],
        ["~nobody-of-this-name/h.toml' is not a valid path"],
    ),
    (
        ["plan", "~nobody-of-this-name/config.json", "--hardware", "h100"],
        ["~nobody-of-this-name/config.json' is not a valid path"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--rule-of-thumb", "--plot", "x.png"],
        ["--rule-of-thumb has no plot: leave --plot out"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--mesh", "pipeline=64"],
        ["pipeline=64 needs at least 64 identical consecutive layers", "use fewer stages"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--mesh", "tensor=2", "--virtual-stages", "2"],
        ["virtual_stages=2 needs stages: the mesh has pipeline=1"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--devices", "1", "--virtual-stages", "2"],
        ["virtual_stages=2 needs stages: no mesh of 1 device has any"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--dispatch", "all_gather"],
        ["dispatch=all_gather sends tokens to experts, but llama has no experts: leave it out"],
    ),
    (
        ["plan", "qwen3-30b-a3b", "--hardware", "h100", "--mesh", "expert=16", "--dispatch", "ragged_all_to_all"],
        ["dispatch=ragged_all_to_all reaches 8 GPUs at most, experts are exchanged among 16: use all_to_all"],
    ),
    (
        ["plan", "qwen3-30b-a3b", "--hardware", "h100", "--devices", "1", "--dispatch", "all_gather"],
        ["dispatch=all_gather exchanges tokens between expert-parallel ranks, but this mesh and layout exchange none"],
    ),
    (
        ["plan", "qwen3-30b-a3b", "--hardware", "h100", "--mesh", "expert=8", "--dispatch", "hierarchical"],
        ["dispatch=hierarchical needs two or more expert axes, but experts are exchanged along"],
    ),
    (
        ["plan", "llama-3.1-8b", "--hardware", "h100", "--sla-tpot-ms", "0.01"],
        ["any number of h100 up to", "the lowest TPOT is"],
    ),
    (["probe", "-o", "~nobody-of-this-name/x.toml"], ["--output '~nobody-of-this-name/x.toml'"]),
    # devices, mesh, numbers, kernels
    ([*GENERATE, "--devices", "0"], ["devices=0 must lie in [1, 512]"]),
    ([*GENERATE, "--devices", "-8"], ["devices=-8 must lie in [1, 512]"]),
    ([*GENERATE, "--devices", "100000"], ["devices=100000 must lie in [1, 512]"]),
    (["verify", "good", "--devices", "0"], ["devices=0 must lie in [1, 512]"]),
    ([*GENERATE, "--mesh", "data=9"], ["data=9", "needs 9 devices and there are 8", "--devices 9"]),
    ([*GENERATE, "--mesh", "data=4,tensor=4"], ["needs 16 devices and there are 8"]),
    ([*GENERATE, "--mesh", "model=8"], ["unknown mesh axis 'model'", "data, tensor, pipeline, expert"]),
    ([*GENERATE, "--mesh", "data=0,tensor=8"], ["mesh axis data=0", "at least 1"]),
    ([*GENERATE, "--mesh", "data=2,data=4"], ["names axis 'data' twice"]),
    ([*GENERATE, "--mesh", "data=-8"], ["'data=-8' must read axis=size"]),
    ([*GENERATE, "--mesh", "data=two"], ["'data=two' must read axis=size"]),
    ([*GENERATE, "--mesh", "data=8,"], ["must read axis=size"]),
    ([*GENERATE, "--mesh", "pipeline=8"], ["pipeline=8 needs at least 8 identical", "use fewer stages"]),
    ([*GENERATE, "--virtual-stages", "0"], ["virtual_stages=0 must be a whole number of at least 1"]),
    ([*GENERATE, "--virtual-stages", "2"], ["virtual_stages=2 needs stages: the mesh has pipeline=1"]),
    ([*GENERATE, "--layout", "fastest"], ["layout 'fastest' must be one of ep-tp, tp-ep, dp-ep, tp", "the parts are"]),
    (
        [*GENERATE, "--layout", "batch=data+expert+tensor,split=tensor"],
        ["axis 'tensor' twice in batch, split, context"],
    ),
    ([*GENERATE, "--mesh", "cpu-9"], ["'cpu-9' is neither axes", "presets: ", "cpu-8"]),
    ([*GENERATE, "--mesh", ""], ["mesh '' is neither axes"]),
    ([*GENERATE, "--mesh", "v5p-64"], ["needs 64 devices and there are 8"]),
    ([*GENERATE, "--dtype", "float8"], ["dtype='float8' must be one of float32, bfloat16, float16"]),
    ([*GENERATE, "--dispatch", "teleport"], ["teleport", "all_to_all", "all_gather"]),
    ([*GENERATE, "--grouped", "magic"], ["magic", "blocks", "ragged", "dense"]),
    ([*GENERATE, "--layers", "magic"], ["layers='magic'", "scan", "unroll"]),
    ([*GENERATE, "--pointwise", "magic"], ["pointwise='magic'", "xla", "native"]),
    ([*GENERATE, "--sampling", "magic"], ["sampling='magic'", "xla", "native"]),
    ([*GENERATE, "--no-native", "--layers", "magic"], ["layers='magic'", "scan", "unroll"]),
    ([*GENERATE, "--max-num-seqs", "0"], ["max_num_seqs=0", "at least 1"]),
    # what is asked of verify and bench
    (["verify", "good", "--max-tokens", "0"], ["--max-tokens", "0 is not in the range"]),
    (["verify", "good", "--layout", "fastest"], ["layout 'fastest' must be one of ep-tp, tp-ep, dp-ep, tp"]),
    (["bench", "good", "--cases", "1x4"], ["case '1x4' must read REQUESTSxPROMPTxNEW"]),
    (["bench", "good", "--cases", "0x4x2"], ["case '0x4x2' must read"]),
    (["bench", "good", "--cases", ""], ["case '' must read"]),
    (["bench", "good", "--cases", "1x120x20"], ["case 1x120x20 needs 140 tokens of context, the model has 128"]),
    (["bench", "good", "--repeats", "0"], ["--repeats", "0 is not in the range"]),
    # what is asked of compile
    ([*COMPILE, "--dtype", "float8"], ["dtype='float8' must be one of float32, bfloat16, float16"]),
    ([*COMPILE, "--kv-dtype", "int4"], ["kv_dtype='int4' must be one of float32, bfloat16, fp8, int8"]),
    ([*COMPILE, "--dispatch", "teleport"], ["dispatch='teleport' must be one of all_to_all, all_gather"]),
    ([*COMPILE, "--chunk-tokens", "0"], ["chunk_tokens=0 must be a whole number of at least 1"]),
    ([*COMPILE, "--max-num-seqs", "0"], ["max_num_seqs=0 must be a whole number of at least 1"]),
    ([*COMPILE, "--context", "129"], ["context=129 must lie in [1, 128]"]),
    ([*COMPILE[:-1], "tensor=8"], ["has 8 devices, target v5p:2x2x1 has 4"]),
    (["compile", "none", *COMPILE[2:]], ["config 'none' is not a config.json, a folder with one, or a preset (demo, "]),
    # what is asked of inspect
    (["inspect", "good"], ["Missing option", "--mesh"]),
    ([*INSPECT, "--layout", "fastest"], ["layout 'fastest' must be one of ep-tp, tp-ep, dp-ep, tp"]),
    ([*INSPECT, "--mesh", "pipeline=8"], ["pipeline=8 needs at least 8 identical", "use fewer stages"]),
    ([*INSPECT, "--mesh", "tensor=16"], ["tensor=16 needs 16 devices and there are 8", "--devices 16"]),
    ([*INSPECT, "--mesh", "rows=8"], ["unknown mesh axis 'rows'"]),
    ([*INSPECT, "--virtual-stages", "2"], ["virtual_stages=2 needs stages"]),
    ([*INSPECT, "--dtype", "float8"], ["dtype='float8' must be one of"]),
    ([*INSPECT, "--kv-dtype", "int4"], ["kv_dtype='int4' must be one of"]),
    ([*INSPECT, "--dispatch", "teleport"], ["dispatch='teleport' must be one of"]),
    ([*INSPECT, "--max-num-seqs", "0"], ["max_num_seqs=0 must be a whole number of at least 1"]),
    ([*INSPECT, "--context", "129"], ["context=129 must lie in [1, 128]"]),
    ([*INSPECT, "--devices", "0"], ["devices=0 must lie in [1, 512]"]),
    (["inspect", "none", *INSPECT[2:]], ["config 'none' is not a config.json, a folder with one, or a preset (demo, "]),
    (["inspect", "ids.jsonl", *INSPECT[2:]], ["ids.jsonl holds a JSON list, but must hold an object"]),
    # what is asked of map
    (MAP[:4], ["--json prints the data, -o writes the page: give one of them"]),
    ([*MAP, "--json"], ["--json prints the data, -o writes the page: give one of them"]),
    ([*MAP, "--compiled", "x.json", "--target", "v5p:4x4x8"], ["--compiled and --target were both given"]),
    ([*MAP, "--compiled", "none.json"], ["none.json cannot be read", "No such file"]),
    ([*MAP, "--compiled", "broken.jsonl"], ["broken.jsonl is not JSON"]),
    ([*MAP, "--compiled", "ids.jsonl"], ["ids.jsonl is not an output of jaxmoe compile --json"]),
    ([*MAP, "--hardware", "b2000"], ["hardware 'b2000' is no preset", "did you mean b200"]),
    ([*MAP, "--hardware", "ids.jsonl"], ["ids.jsonl line 1: not TOML"]),
    ([*MAP, "--hardware", "v5p", "--target", "h100:16x8"], ["hardware v5p and target h100:16x8 differ"]),
    ([*MAP, "--target", "h100:1x8"], ["has 128 devices, target h100:1x8 has 8"]),
    ([*MAP, "--target", "z9:1"], ["unknown device 'z9'"]),
    ([*MAP, "--mesh", "rows=8"], ["unknown mesh axis 'rows'"]),
    ([*MAP, "--mesh", "b200-2x9"], ["'b200-2x9' is neither axes", "b200-2x8"]),
    ([*MAP, "--mesh", "data=100000"], ["has 100000 devices, the map draws at most 1024"]),
    ([*MAP, "--micro-batches", "4"], ["micro_batches=4 needs stages"]),
    ([*MAP, "--layout", "fastest"], ["layout 'fastest' must be one of ep-tp"]),
    ([*MAP, "--context", "129"], ["context=129 must lie in [1, 128]"]),
    ([*MAP, "--max-num-seqs", "0"], ["max_num_seqs=0 must be a whole number of at least 1"]),
    ([*MAP, "--hardware", ""], ["hardware '' is no preset"]),
    ([*MAP, "--hardware", "~nobody-of-this-name/h.toml"], ["hardware '~nobody-of-this-name/h.toml' is not a valid"]),
    ([*MAP, "--hardware", "a100", "--target", "v5e:16x8"], ["hardware a100 and target v5e:16x8 differ"]),
    ([*MAP[:-1], "map.txt"], ["output map.txt must end in .html"]),
    ([*MAP[:-1], "ids.jsonl"], ["output ids.jsonl must end in .html"]),
    ([*MAP[:-1], "page.html", "--compiled", "page.html"], ["output page.html is an input of the map"]),
    (["map", "page.html", *MAP[2:-1], "page.html"], ["output page.html is an input of the map"]),
    ([*MAP[:-1], "none/map.html"], ["output none/map.html cannot be written: none is not a writable folder"]),
    ([*MAP[:-1], "good"], ["output good is a folder: name a file"]),
    ([*MAP[:-1], "ids.jsonl/map.html"], ["cannot be written: ids.jsonl is not a writable folder"]),
    (["map", "goood", *MAP[2:]], ["config 'goood' is not a config.json", "did you mean good?"]),
    # which model
    (["generate", "", "--prompt", "x"], ["model '' is not an existing directory, a preset", "hub id"]),
    (["verify", ""], ["model '' is not an existing directory"]),
    (["generate", "/no/such/place", "--prompt", "x"], ["'/no/such/place' is not an existing directory", "hub id"]),
    (["generate", "ids.jsonl", "--prompt", "x"], ["ids.jsonl is a file", "give the directory"]),
    (["score", "good", "--ids", "ids.jsonl", "--revision", "v1"], ["revision 'v1'", "local", "leave it out"]),
    (["generate", ".", "--prompt", "x"], ["has no config.json", "Hugging Face checkpoint directory"]),
]


@pytest.mark.parametrize(("arguments", "words"), COMMAND_LINES, ids=lambda value: " ".join(value)[:60])
def test_a_command_line_that_cannot_be(capsys, work, arguments, words):
    _assert_refused(capsys, work, arguments, words)


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["lacks 1 of 1 weight files: model.safetensors"]),
    "truncated": (lambda d: _cut_in_half(d / "model.safetensors"), ["model.safetensors", "fetch it again"]),
    "no safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"x" * 100),
        ["model.safetensors has 100 bytes"],
    ),
    "empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), ["model.safetensors has 0 bytes"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["has no config.json"]),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json is not readable JSON"]),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), ["holds a JSON list, but must hold an object"]),
    "unknown family": (lambda d: _edit(d / "config.json", model_type="gpt2"), ["'gpt2'", "supported: deepseek_v2"]),
    "other maths": (lambda d: _edit(d / "config.json", hidden_act="gelu"), ["'hidden_act' = 'gelu'", "'silu'"]),
    "unknown key": (lambda d: _edit(d / "config.json", softcap=30.0), ["'softcap' = 30.0", "--ignore-config-key"]),
    "other geometry": (
        lambda d: _edit(d / "config.json", num_hidden_layers=3, intermediate_size=80),
        ["missing: model.layers.2.", "misshapen: ", "[84, 48] instead of [80, 48]", "config.json"],
    ),
    "odd eos": (
        lambda d: _edit(d / "generation_config.json", eos_token_id="2"),
        ["generation_config.json has eos_token_id '2'", "whole number"],
    ),
    "odd eos list": (lambda d: _edit(d / "generation_config.json", eos_token_id=[2, None]), ["[2, None]"]),
    "generation_config": (lambda d: (d / "generation_config.json").write_text("{,"), ["generation_config.json is not"]),
    "tokenizer": (lambda d: (d / "tokenizer.json").write_text('{"a"'), ["tokenizer.json is not a readable tokenizer"]),
    "tokenizer_config": (lambda d: (d / "tokenizer_config.json").write_text("x"), ["tokenizer_config.json is not"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(capsys, work, damage):
    harm, words = DAMAGES[damage]
    harm(work / "good")
    _assert_refused(capsys, work, ["score", "good", "--ids", "ids.jsonl", "--devices", "8"], words)


def test_a_number_of_devices_that_xla_flags_contradict(capsys, work, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    _assert_refused(capsys, work, [*GENERATE, "--devices", "8"], ["devices=8", "XLA_FLAGS already sets 4"])


def test_devices_asked_for_too_late(capsys, work):
    assert jax.device_count() == 8
    _assert_refused(capsys, work, [*GENERATE, "--devices", "4"], ["devices=4"])


def test_help_and_version_are_no_mistakes(capsys):
    assert jaxmoe(capsys, "--help").code == 0
    assert jaxmoe(capsys, "generate", "--help").out.count("--mesh") >= 1
    assert jaxmoe(capsys, "--version").out.startswith("jaxmoe, version ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*GENERATE, "--devices", "2", "--mesh", "tensor=8"], ["tensor=8", "needs 8 devices and there are 2"]),
        ([*GENERATE, "--temperature", "nan"], ["temperature=nan"]),
        (["score", "truncated", "--ids", "ids.jsonl", "--devices", "1"], ["model.safetensors", "fetch it again"]),
    ],
)
def test_in_a_process_of_its_own(work, arguments, words):
    shutil.copytree(work / "good", work / "truncated")
    _cut_in_half(work / "truncated" / "model.safetensors")
    before = _files(work)
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(work / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "jaxmoe", *arguments]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxmoe: error: ")
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words)
    assert _files(work) == before


def test_a_folder_without_a_config_is_not_offered_in_its_own_place(capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = jaxmoe(capsys, "plan", empty, "--hardware", "h100")
    assert outcome.code == 2
    assert f"config '{empty}' is not a config.json" in outcome.err
    assert "did you mean" not in outcome.err

"""jaxmoe convert: what it prints, and every mistake as one line, exit code 2, nothing written, the source untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe.weights import store
from jaxmoe.weights.checkpoint import open_tensors
from jaxmoe.weights.manifest import MANIFEST
from jaxmoe.weights.shards import ShardSink
from jaxmoe.weights.verify import problems

from ..tiny.cases import CASES_BY_NAME
from ..weights.hf_checkpoints import contents, random_tensor, write_checkpoint_dir, write_file
from .commands import jaxmoe

ROOT = Path(__file__).parent.parent.parent
CASE = "mixtral_window"


@pytest.fixture
def work(tmp_path, tiny_dir, monkeypatch) -> Path:
    """The working directory, with a good checkpoint of a known family."""
    shutil.copytree(tiny_dir(CASE), tmp_path / "work" / "good")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def _assert_refused(capsys, arguments: list[str], *words: str) -> None:
    before = contents(Path())
    outcome = jaxmoe(capsys, "convert", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("jaxmoe: error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert contents(Path()) == before


def test_there_and_back(capsys, work):
    outcome = jaxmoe(capsys, "convert", "good", "orbax", "--mesh", "expert=2", "--ram-gib", "1")
    assert outcome.code == 0
    assert "shapes agree" in outcome.out
    assert "orbax: " in outcome.out
    outcome = jaxmoe(capsys, "convert", "orbax", "hf", "--verify", "--json")
    found = json.loads(outcome.out)
    assert (outcome.code, found["kind"], found["resumed_tensors"], found["verified"]) == (0, "hf", 0, True)
    assert found["bytes_per_second"] > 0
    assert 0 < found["buffer_bytes"] <= found["budget_bytes"] == 2 << 30
    assert found["peak_rss_bytes"] >= found["rss_before_bytes"] > 0
    assert problems(work / "hf") == []
    (work / "ids.jsonl").write_text("[1, 2, 3]\n")
    asked = ["--prompt-ids", "ids.jsonl", "--dtype", "float32", "--max-tokens", "3", "--json"]
    expected = json.loads(jaxmoe(capsys, "generate", "good", *asked).out)["token_ids"]
    for kind in ("orbax", "hf"):
        found = jaxmoe(capsys, "generate", kind, *asked, "--verify")
        assert json.loads(found.out)["token_ids"] == expected


def test_verify_says_what_differs_and_exits_1(capsys, work):
    assert jaxmoe(capsys, "convert", "good", "orbax").code == 0
    outcome = jaxmoe(capsys, "convert", "orbax", "--verify")
    assert (outcome.code, outcome.err) == (0, "")
    assert "every tensor and file matches its checksum" in outcome.out
    chunk = work / "orbax" / "model.norm.weight" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\x55")
    outcome = jaxmoe(capsys, "convert", "orbax", "--verify")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert outcome.err.startswith("jaxmoe: error: ")
    assert "tensor 'model.norm.weight' differs from its checksum" in outcome.err
    found = json.loads(jaxmoe(capsys, "convert", "orbax", "--verify", "--json").out)
    assert (found["whole"], len(found["problems"])) == (False, 1)
    _assert_refused(capsys, ["orbax", "hf", "--verify"], "model.norm.weight")
    outcome = jaxmoe(capsys, "convert", "orbax", "hf")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "tensor 'model.norm.weight' of the source differs" in outcome.err
    assert "(finished tensors are saved in hf.partial)" in outcome.err
    assert not (work / "hf").exists()
    outcome = jaxmoe(capsys, "generate", "orbax", "--prompt", "x", "--verify")
    assert outcome.code == 2
    (work / "orbax" / MANIFEST).write_bytes((work / "orbax" / MANIFEST).read_bytes().replace(b"F32", b"F16", 1))
    for arguments in (["orbax", "--verify"], ["orbax", "hf"]):
        _assert_refused(capsys, arguments, f"{MANIFEST} is not as jaxmoe convert wrote it")


COMMANDS: list[tuple[list[str], list[str]]] = [
    ([], ["Missing argument"]),
    (["good"], ["DST is missing", "--verify to check SRC"]),
    (["good", "--verify"], ["good has no jaxmoe_manifest.json", "only checkpoints written by jaxmoe convert"]),
    (["good", "--verify", "--mesh", "tensor=2"], ["leave --mesh out"]),
    (["none", "out"], ["'none' is not an existing directory"]),
    (["good", "good"], ["destination", "good exists", "name another"]),
    (["good", "~nobody-of-this-name/out"], ["DST '~nobody-of-this-name/out' is not a valid path"]),
    (["good", "/"], ["destination / exists", "name another"]),
    (["good", "good/out"], ["lies inside the source"]),
    (["good", "none/out"], ["none, which is not a directory", "create it first"]),
    (["good", "good/config.json/out"], ["is not a directory"]),
    (["good", "out", "--to", "zip"], ["to='zip' must be one of orbax, hf"]),
    (["good", "out", "--mesh", "rows=2"], ["unknown mesh axis 'rows'"]),
    (
        ["good", "out", "--mesh", "expert=99999999999999999999"],
        ["has 99999999999999999999 devices", "at most 1048576"],
    ),
    (
        ["good", "out", "--to", "hf", "--mesh", "expert=8"],
        ["mesh='expert=8' sets the chunks of an orbax", "leave it out"],
    ),
    (["good", "out", "--ignore-config-key", "nokey"], ["--ignore-config-key 'nokey' is not a key of config.json"]),
    (["good", "out", "--weights-dtype", "int4"], ["weights_dtype='int4' must be one of float32, bfloat16, float16"]),
    (["good", "out", "--weights-dtype", "int8-block"], ["int8-block has no checkpoint format", "int8, fp8, fp8-block"]),
    (["good", "out", "--ram-gib", "0"], ["ram_gib=0.0 must lie in [0.125,"]),
    (["good", "out", "--ram-gib", "nan"], ["ram_gib=nan must lie in"]),
    (["good", "out", "--ram-gib", "much"], ["--ram-gib", "much"]),
    (["good", "out", "--revision", "main"], ["only hub models have revisions"]),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS, ids=[" ".join(line) or "-" for line, _ in COMMANDS])
def test_bad_command_lines(arguments, words, capsys, work):
    _assert_refused(capsys, arguments, *words)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _shards(weight_map: dict[str, str], **files: str) -> Callable[[Path], None]:
    """An index, and files (a is a.safetensors) of the tensors named by letters."""

    def change(good: Path) -> None:
        rng = np.random.default_rng(0)
        for name, letters in files.items():
            tensors = {letter: random_tensor(rng, "F32", 2, 2) for letter in letters}
            write_file(good / f"{name}.safetensors", tensors)
        (good / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def _remove(pattern: str) -> Callable[[Path], None]:
    def change(good: Path) -> None:
        for path in good.glob(pattern):
            path.unlink()

    return change


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda good: _edit(good / "config.json", **changes)


def _folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("")


def _cut(good: Path) -> None:
    path = next(good.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def _only_pickles(good: Path) -> None:
    for path in good.glob("*.safetensors*"):
        path.unlink()
    (good / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def _header(length: int) -> Callable[[Path], None]:
    def change(good: Path) -> None:
        next(good.glob("*.safetensors")).write_bytes(length.to_bytes(8, "little") + b"{}" * 50)

    return change


def _dtype(name: str) -> Callable[[Path], None]:
    def change(good: Path) -> None:
        for path in good.glob("*.safetensors"):
            path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"%s"' % name.encode()))

    return change


def _raw_header(good: Path, fields: dict[str, object], num_bytes: int) -> None:
    text = json.dumps(fields).encode()
    for path in good.glob("*.safetensors*"):
        path.unlink()
    (good / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))


def _named(name: str, dtype: str = "F32", shape: tuple[int, ...] = (1,), num_bytes: int = 4) -> Callable[[Path], None]:
    def change(good: Path) -> None:
        _raw_header(good, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}, num_bytes)
        _edit(good / "config.json", model_type="none")

    return change


def _link(name: str, target: str) -> Callable[[Path], None]:
    def link(good: Path) -> None:
        (good / name).unlink(missing_ok=True)
        (good / name).symlink_to(target)

    return link


IN_A, IN_B = {"a": "a.safetensors"}, {"b": "b.safetensors"}
ETC = "/etc/hostname"
SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (_remove("config.json"), ["no config.json"]),
    "config is no JSON": (lambda good: (good / "config.json").write_text("{"), ["config.json is not readable JSON"]),
    "no weights": (_remove("*.safetensors*"), ["lacks 1 of 1 weight files"]),
    "pickles alone": (_only_pickles, ["only pickled weights (pytorch_model.bin)", "never loaded", "safetensors"]),
    "a missing shard": (_shards(IN_A | IN_B, a="a"), ["lacks 1 of 2 weight files: b.safetensors"]),
    "an absent tensor": (_shards({**IN_A, "b": "a.safetensors"}, a="a"), ["names 1 tensors that the files lack: b"]),
    "a tensor twice": (_shards(IN_A | IN_B, a="ab", b="b"), ["'b' is in both a.safetensors and b.safetensors"]),
    "an index that leaves": (_shards({"a": "../a.safetensors"}), ["files outside its directory", "../a.safetensors"]),
    "cut short": (_cut, [".safetensors"]),
    "a header of 2^60": (_header(2**60), ["header length of 1152921504606846976"]),
    "a header of 2^64 - 1": (_header(2**64 - 1), ["header length of"]),
    "integers for floats": (_dtype("I32"), ["has dtype I32"]),
    "an unknown dtype": (_named("x", "F4"), ["tensor 'x' has dtype F4; supported: F64"]),
    "a dtype of another width": (_named("x", "I64"), ["tensor 'x' of shape [1] and dtype I64 needs 8 bytes, has 4"]),
    "a name that leaves": (_named("../x"), ["tensor name '../x' cannot be a folder name"]),
    "an absolute name": (_named("/x"), ["tensor name '/x'"]),
    "a name of dots": (_named(".."), ["tensor name '..'"]),
    "a name of a file of ours": (_named("_METADATA"), ["tensor name '_METADATA'"]),
    "a name of a side file": (_named("config.json"), ["tensor name 'config.json'", "is also the name of a file"]),
    "a long name": (_named("x" * 300), ["of 1 to 240 bytes"]),
    "no tensors": (lambda good: _raw_header(good, {}, 0), ["holds no tensors"]),
    "shapes": (_config(vocab_size=98), ["misshapen", "model.embed_tokens.weight"]),
    "names that steer a terminal": (
        _shards({**IN_A, "\x1b[31m": "a.safetensors", "\u202eb": "a.safetensors"}, a="a"),
        ["names 2 tensors that the files lack: '\\x1b[31m', '\\u202eb'"],
    ),
    "many dims": (_named("x", shape=(1,) * 140), ["tensor 'x' has 140 dims", "may have 32", "--to hf"]),
    "too few layers": (_config(num_hidden_layers=1), ["unused"]),
    "a config key": (_config(new_gate=3), ["new_gate"]),
    "a link that leaves": (_link("tokenizer.json", ETC), ["tokenizer.json is a link that leaves the directory", ETC]),
    "weights behind a link": (_link("model.safetensors", "../other.safetensors"), ["is a link that leaves"]),
    "a link to itself": (_link("merges.txt", "merges.txt"), ["merges.txt is a broken link (merges.txt)"]),
    "a link to nothing": (_link("merges.txt", "gone"), ["merges.txt is a broken link (gone)"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_bad_sources(name, capsys, work):
    spoil, words = SOURCES[name]
    (work / "other.safetensors").write_bytes(b"")
    spoil(work / "good")
    _assert_refused(capsys, ["good", "out"], *words)
    assert not (work / "out").exists()
    assert not (work / "out.partial").exists()
    assert not (work / "good" / "pwned").exists()


def test_links_that_leave_are_refused_whoever_reads(capsys, work):
    assert jaxmoe(capsys, "convert", "good", "orbax").code == 0
    for name, commands in {
        MANIFEST: [["convert", "orbax", "--verify"], ["info", "orbax"]],
        "config.json": [["info", "orbax"], ["info", "orbax/config.json"]],
    }.items():
        (work / "orbax" / name).rename(work / name)
        (work / "orbax" / name).symlink_to(work / name)
        for command in commands:
            outcome = jaxmoe(capsys, *command)
            assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
            assert f"{name} is a link that leaves the directory" in outcome.err
        (work / "orbax" / name).unlink()
        (work / name).rename(work / "orbax" / name)


def test_names_of_what_is_left_behind_are_shown_as_they_are(capsys, work):
    for name in ("[bold]x.bin", "\x1b[31m.bin"):
        (work / "good" / name).write_bytes(b"")
    outcome = jaxmoe(capsys, "convert", "good", "out")
    assert outcome.code == 0
    assert "not copied: '\\x1b[31m.bin', [bold]x.bin" in " ".join(outcome.err.split())


def test_quantized_checkpoints_of_unknown_kinds_go_through_and_are_not_cast(capsys, work):
    rng = np.random.default_rng(0)
    tensors = {"w": random_tensor(rng, "F8_E4M3", 8, 8), "w_scale_inv": random_tensor(rng, "F32", 1, 1)}
    config = CASES_BY_NAME[CASE].config | {"quantization_config": {"quant_method": "fp8"}}
    write_checkpoint_dir(work / "fp8", tensors, **config)
    _assert_refused(capsys, ["fp8", "out", "--weights-dtype", "bfloat16"], "has weight_block_size null")
    outcome = jaxmoe(capsys, "convert", "fp8", "out", "--json")
    assert json.loads(outcome.out)["config_check"].startswith("not checked: config key 'quantization_config' has ")
    assert (work / "out" / "w" / "0.0").read_bytes() == tensors["w"][2]


@pytest.mark.parametrize("settings", [{"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [8, 8]}])
def test_quantized_ones_must_have_a_config_that_can_be_all_the_same(settings, capsys, work):
    _edit(work / "good" / "config.json", quantization_config=settings, num_local_experts="x")
    _assert_refused(capsys, ["good", "out"], "'num_local_experts' = 'x' must be a whole number")
    _edit(work / "good" / "config.json", num_local_experts=6, new_gate=3)
    _assert_refused(capsys, ["good", "out"], "'new_gate' = 3")


@pytest.mark.parametrize("model_type", [[], {}])
def test_a_model_type_that_is_none(model_type, capsys, work):
    _edit(work / "good" / "config.json", model_type=model_type)
    outcome = jaxmoe(capsys, "convert", "good", "out", "--json")
    assert json.loads(outcome.out)["config_check"] == (f"not checked: model_type '{model_type}' is not supported")


def test_a_hub_snapshot_may_link_to_its_blobs(capsys, work):
    repo = work / "models--org--good"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / "0123"
    shutil.copytree("good", snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert jaxmoe(capsys, "convert", str(snapshot), "out").code == 0
    assert not any(path.is_symlink() for path in (work / "out").rglob("*"))


def test_a_full_disk_is_said_before_anything_is_written(capsys, work, monkeypatch):
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    for to in ("orbax", "hf"):
        _assert_refused(capsys, ["good", "out", "--to", to], "needs 0.0", "GiB more", "0.001 GiB free", "make room")
    assert os.listdir() == ["good"]


def test_a_disk_without_room_for_the_files(capsys, work, monkeypatch):
    tensors = len(open_tensors(work / "good"))
    disk = os.statvfs(work)
    counts = [(0, 0), (10**6, 3 * tensors), (10**6, 3 * tensors + 20)]  # 0 of 0: made as they are needed
    disks = [SimpleNamespace(f_files=total, f_favail=free, f_frsize=disk.f_frsize, f_bavail=disk.f_bavail,
                             f_blocks=disk.f_blocks, f_bfree=disk.f_bfree) for total, free in counts]  # fmt: skip
    monkeypatch.setattr(os, "statvfs", lambda path: disks[1])
    words = f"needs {3 * tensors + 12} more files and its disk has room for {3 * tensors}"
    _assert_refused(capsys, ["good", "out"], words, "choose another disk")
    for number in (0, 2):
        monkeypatch.setattr(os, "statvfs", lambda path, number=number: disks[number])
        assert jaxmoe(capsys, "convert", "good", f"out{number}").code == 0


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_disk_that_fills_up_meanwhile(to, capsys, work, monkeypatch):
    count, before = [0], contents(work / "good")

    def full(file, part):
        count[0] += 1
        if count[0] > 20:
            raise OSError(28, "No space left on device", str(work / "out.partial"))
        file.write(part)

    with monkeypatch.context() as patched:
        for module in (store, sys.modules[ShardSink.__module__]):
            patched.setattr(module, "write_all", full)
        outcome = jaxmoe(capsys, "convert", "good", "out", "--to", to)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "No space left on device; fix that and run the same command again" in outcome.err
    assert contents(work / "good") == before
    assert not (work / "out").exists()
    for name in ("out.partial", "out.partial/whole"):
        refused = jaxmoe(capsys, "generate", name, "--prompt", "x")
        assert (refused.code, refused.out) == (2, "")
    outcome = jaxmoe(capsys, "convert", "good", "out", "--to", to)
    assert outcome.code == 0
    assert "were converted before" in outcome.out
    assert sorted(os.listdir()) == ["good", "out"]


def test_a_destination_that_cannot_be_written(capsys, work, monkeypatch):
    (work / "shut").mkdir(mode=0o555)
    if os.access(work / "shut", os.W_OK):  # root may all the same
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut")
    _assert_refused(capsys, ["good", "shut/out"], "shut, which is not writable")
    monkeypatch.undo()

    def read_only(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.chdir(work)
    monkeypatch.setattr(Path, "mkdir", read_only)
    _assert_refused(capsys, ["good", "out"], "Read-only file system")


@pytest.mark.parametrize(
    "make",
    [
        lambda path: _folder_with_a_file(path), lambda path: path.write_text(""), lambda path: path.symlink_to("gone"),
    ],
    ids=["folder", "file", "link"],
)  # fmt: skip
def test_work_in_the_way(make, capsys, work):
    make(work / "out.partial")
    _assert_refused(capsys, ["good", "out"], "out.partial exists and is not a resumable conversion")


@pytest.mark.parametrize(("script", "kind"), [("convert_hf_to_orbax", "orbax"), ("convert_orbax_to_hf", "hf")])
def test_scripts_are_the_command(script, kind, work):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"scripts.{script}", str(work / "good"), str(work / "out"), "--json"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == kind

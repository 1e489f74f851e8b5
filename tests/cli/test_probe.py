"""jaxmoe probe: what it writes and says, and what it refuses before it measures."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import jax
import pytest

from jaxmoe.planner.hardware import read_hardware
from jaxmoe.probe import probe as probing
from jaxmoe.probe import timed
from jaxmoe.probe.probe import DeviceRates

from .commands import jaxmoe
from .test_process import environment

QUICK = ["probe", "--mesh", "data=2,tensor=4", "--max-mib", "0.0005", "--repeats", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Two iterations of each collective, and rates at once, in a folder of its own."""
    monkeypatch.setattr(timed, "num_iterations", lambda num_bytes: 2)
    monkeypatch.setattr(probing, "_rates", lambda *_: DeviceRates(tflops={"bf16": 2.0, "f32": 1.0}, hbm_gbps=100.0))
    monkeypatch.chdir(tmp_path)


def test_a_file_a_table_and_a_picture(capsys, tmp_path):
    outcome = jaxmoe(capsys, *QUICK, "--devices", 8, "--name", "mine", "--plot", "mine.svg")
    assert outcome.code == 0, outcome.err
    hardware = read_hardware("hardware.toml")
    assert (hardware.device, hardware.hbm_gbps, list(hardware.collectives["all-to-all"])) == ("mine", 100, [2, 4])
    assert "matmuls bf16 2, f32 1 Tflop/s; memory 100 GB/s" in outcome.out
    assert "collective-permute" in outcome.out
    assert "scale_out_gbps: not measured: set to the rate inside a node" in outcome.out
    assert "hardware.toml describes this hardware" in outcome.out
    assert "</svg>" in (tmp_path / "mine.svg").read_text()
    text = (tmp_path / "hardware.toml").read_text()
    assert text.startswith("# 8 cpu devices in 1 process, measured by jaxmoe probe")
    assert "[axes]\ndata = 2\ntensor = 4\n" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hardware.toml", "mine.svg"]


def test_one_json_object_and_a_file_replaced_when_told(capsys, tmp_path):
    (tmp_path / "mine.toml").write_text("old")
    refused = jaxmoe(capsys, *QUICK, "-o", "mine.toml", "--json")
    assert (refused.code, refused.out) == (2, "")
    assert "--output 'mine.toml' exists: name another file, or replace it with --force" in refused.err
    assert (tmp_path / "mine.toml").read_text() == "old"
    found = json.loads(jaxmoe(capsys, *QUICK, "-o", "mine.toml", "--force", "--json").out)
    hardware = read_hardware("mine.toml")
    assert found["file"] == "mine.toml"
    assert found["hardware"]["scale_up_gbps"] == hardware.scale_up_gbps
    assert found["tflops"] == hardware.tflops
    assert found["left_out"] == []
    assert len(found["collectives"]) == 10
    for one in found["collectives"]:
        assert one["gbps"] == pytest.approx(one["num_bytes"] / one["us"] / 1e3)
        assert ((one["num_bytes"], one["us"]),) == hardware.collectives[one["op"]][one["ranks"]]


def test_one_device_is_said_to_have_no_collectives(capsys, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_, first=jax.devices()[:1]: first)
    outcome = jaxmoe(capsys, "probe", "--max-mib", 0.001, "--plot", "one.png")
    assert outcome.code == 0, outcome.err
    assert "one device: there are no collectives to measure" in outcome.out
    assert "scale_up_gbps: not measured: set to the memory bandwidth" in outcome.out
    assert read_hardware("hardware.toml").collectives == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "nowhere/mine.toml"], "'nowhere/mine.toml': its folder does not exist"),
        (["-o", "mine.yaml"], "must end in .toml"),
        (["-o", "folder.toml"], "is a folder"),
        (["-o", "/proc/mine.toml"], "'/proc/mine.toml': its folder cannot be written: "),
        (["--mesh", "tensor=9"], "needs 9 devices and there are 8"),
        (["--mesh", "model=8"], "unknown mesh axis 'model'"),
        (["--mesh", "nothing"], "'nothing' is neither axes"),
        (["--devices", "0"], "devices=0 must lie in [1, 512]"),
        (["--devices", "-3"], "devices=-3 must lie in [1, 512]"),
        (["--devices", "4"], "devices=4 must be set before JAX starts its devices"),
        (["--max-mib", "0"], "--max-mib 0 must lie above 0"),
        (["--max-mib", "-1"], "--max-mib -1 must lie above 0"),
        (["--max-mib", "nan"], "--max-mib nan must lie above 0"),
        (["--max-mib", "0.0001"], "largest message 104 bytes must lie in [512, "),
        (["--max-mib", "999999"], "a program holds up to 6 of them in"),
        (["--repeats", "0"], "--repeats"),
        (["--name", ""], "--name '' must consist of printable characters"),
        (["--name", "a\nb"], "must consist of printable characters"),
        (["--plot", "mine.pdf"], "must end in .png or .svg"),
        (["--num-processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", "localhost:1"], "process_id=None must lie in [0, num_processes=None)"),
        (
            ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
            "process_id=2 must lie in [0, ",
        ),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "0"], "'here' must be HOST:PORT or auto"),
        (["--coordinator", "auto", "--devices", "0"], "devices=0 must lie in [1, 512]"),
        (["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "0"], "processes cannot join at"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(capsys, tmp_path, arguments, words):
    (tmp_path / "folder.toml").mkdir()
    outcome = jaxmoe(capsys, "probe", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.toml"]


@pytest.mark.sweep
def test_processes_measure_together_and_the_first_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    base = [sys.executable, "-m", "jaxmoe", *QUICK[:1], *QUICK[3:], "--devices", "2", "--num-processes", "2", "--json"]
    started = [
        subprocess.Popen(
            [*base, "--coordinator", address, "--process-id", str(rank), "-o", f"rank{rank}.toml"], cwd=tmp_path,
            env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (out, err), (out_of_second, _) = (process.communicate(timeout=300) for process in started)
    assert [process.returncode for process in started] == [0, 0], err
    assert out_of_second == ""
    assert {(one["op"], one["ranks"]) for one in json.loads(out)["collectives"]} == {
        (op, ranks) for op in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
        for ranks in (2, 4)
    }  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.toml")] == ["rank0.toml"]
    hardware = read_hardware(str(tmp_path / "rank0.toml"))
    assert (hardware.nodes, hardware.devices_per_node) == (1, 4)  # both processes are on this host

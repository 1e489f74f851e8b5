"""Every command and every Python example of README.md and docs/guide runs and does what its page says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmoe.assets import asset_dir
from jaxmoe.cli.main import run
from jaxmoe.planner.hardware import read_hardware
from jaxmoe.report import verify
from jaxmoe.weights.convert import convert

from ..weights.hf_checkpoints import contents

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
SHELL_LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]
COMMANDS = list(dict.fromkeys(SHELL_LINES))  # a command that several pages show runs once
EXAMPLES = list(dict.fromkeys(text for kind, text in BLOCKS if kind == "python"))
LINKS = [
    (page.relative_to(ROOT).as_posix(), target)
    for page in DOCUMENTS
    for target in dict.fromkeys(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")))
]


def writers_of_input(command: str) -> list[str]:
    """Return the earlier commands that write the checkpoint which a command reads: `jaxmoe convert SRC DST`."""
    source = shlex.split(command)[2]
    earlier = [one for one in COMMANDS[: COMMANDS.index(command)] if one.startswith("jaxmoe convert ")]
    return [one for one in earlier if shlex.split(one)[3] == source]


def make_dry_run(target: str) -> str:
    """What `make target` would run in a newcomer's shell, once its environment is there."""
    stamps = [arg for name in ("core", "dev") for arg in ("-o", f".venv/{name}.stamp")]
    command = ["make", "--dry-run", "--no-print-directory", *stamps, target]
    # Tests that make itself started inherit what it was told, such as VENV=.venv-oldest.
    inherited = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON", "PYTEST_JOBS")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_pages_name_their_commands():
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert {command.split()[0] for command in COMMANDS} == {"make", "jaxmoe"}
    assert len(README.read_text("utf-8").splitlines()) <= 120
    linked = {target for page, target in LINKS if page == "README.md"}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"} <= linked


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("jaxmoe ") and " launch " not in c])
def test_command(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for earlier in writers_of_input(command):
        with pytest.raises(SystemExit):
            run(shlex.split(earlier)[1:])
        capsys.readouterr()
    if " verify" in command:  # one of the twenty meshes: `make test-all` runs them all
        monkeypatch.setattr(verify, "all_meshes", lambda num_devices: [{"data": 2, "tensor": 2, "expert": 2}])
    with pytest.raises(SystemExit) as stopped:
        run(shlex.split(command)[1:])
    out, err = capsys.readouterr()
    if " compile" in command and importlib.util.find_spec("libtpu") is None:  # what a user without the extra is told
        assert stopped.value.code == 2
        assert "pip install jaxmoe[aot-tpu]" in err
        return
    assert stopped.value.code == 0
    if "--json" in command:
        assert len(json.loads(out)["token_ids"]) > 0
    elif " compile" in command:
        assert "fits; compiled" in out
    elif " verify" in command:
        assert "placements match one device" in out
    elif " inspect" in command:
        assert "prefill and decode: collectives match the plan" in out
    elif " map " in command:
        assert (tmp_path / "map.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    elif " plan " in command:
        assert "deepseek-v3.1 on 8 x b200: EP8" in out
        assert "Bottleneck: " in out
    elif " info" in command:
        assert "5,453,184" in out
    elif " balance" in command:
        assert "8 experts in 12 expert slots on 4 ranks; balancedness" in out
        assert "after" in out
    elif " probe" in command:
        assert "eight.toml describes this hardware" in out
        assert list(read_hardware(str(tmp_path / "eight.toml")).collectives["all-to-all"]) == [8]
    elif " convert" in command:
        written = command.split()[3] if "--verify" not in command else "demo-orbax"
        count = 307 if "fp8" in command else 167  # 140 matrices with scales
        assert (
            f"{tmp_path / written}: {count} tensors" in out
            or "demo-orbax: every tensor and file matches its checksum" in out
        )
        assert (tmp_path / written / "jaxmoe_manifest.json").exists()
    elif " generate" in command:
        prompt = shlex.split(command)[shlex.split(command).index("--prompt") + 1]
        assert out.startswith(prompt)
        assert len(out) > len(prompt) + 10
        if "--trace" in command:
            assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]
            assert (tmp_path / "run.html").exists()
    else:
        assert "2x16x4" in out


def in_a_shell() -> dict[str, str]:
    """The environment of a user's process, which has one device."""
    return {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if " launch " in c])
def test_launch_command(command, tmp_path):
    """The text of process 0 alone is printed; the mesh has the devices of both. A conversion gives the same files."""
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=tmp_path, env=in_a_shell(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if " convert " in command:
        convert(asset_dir("checkpoints") / "demo", tmp_path / "one", mesh="expert=8")
        assert contents(tmp_path / "demo-orbax-2") == contents(tmp_path / "one")
        return
    assert done.stdout.startswith("import os")
    assert len(done.stdout) > len("import os") + 10
    assert "data=2 x tensor=2 x expert=2 on 8 cpu devices" in done.stderr
    assert "[1]" not in done.stderr


@pytest.mark.sweep
def test_verify_on_every_mesh(capsys):
    """The guide's command as it stands, on the nineteen meshes that have no more stages than the model has layers."""
    (command,) = [command for command in COMMANDS if command.startswith("jaxmoe verify")]
    with pytest.raises(SystemExit) as stopped:
        run(shlex.split(command)[1:])
    assert stopped.value.code == 0
    assert "19 of 19 placements match one device" in capsys.readouterr().out


def test_make_demo(tmp_path):
    """The recipe of `make demo`, run as a newcomer's shell would run it."""
    recipe = make_dry_run("demo")
    assert recipe.startswith(".venv/bin/jaxmoe generate --devices 8 --mesh data=2,tensor=2,expert=2")
    arguments = shlex.split(recipe)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "jaxmoe", *arguments], capture_output=True, text=True, cwd=tmp_path, env=in_a_shell()
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr
    assert "data=2 x tensor=2 x expert=2 on 8 cpu devices" in done.stderr
    assert done.stdout.startswith("def ")
    assert done.stdout.count("\n") > 3


def test_make_test_and_check_run_what_they_say():
    everything, optimized = make_dry_run("test").splitlines()
    assert everything.endswith('-m pytest -n 2 --dist worksteal -m "not sweep and not oracle and not browser"')
    assert "-m pytest -n 2 --dist worksteal -m optimized tests/" in optimized
    assert [line.split("/")[-1].split()[0] for line in make_dry_run("check").splitlines()] == [
        "ruff", "ruff", "mypy", "lint-imports", "python",
    ]  # fmt: skip


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "jaxmoe.join(" not in code])
def test_python_example(code, tmp_path):
    """In a process of its own, with the one device a user's has."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=in_a_shell(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


# The library behind collectives on CPUs prints to the standard output of the process, from several threads.
_STDOUT_OF_PYTHON = "import os, sys; sys.stdout = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)\n"


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "jaxmoe.join(" in code])
def test_python_example_of_two_processes(code, tmp_path):
    """Each runs the example, and prints the same text and token ids."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _STDOUT_OF_PYTHON + code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=in_a_shell() | {"COORDINATOR": address, "PROCESS_ID": str(process_id)},
        )
        for process_id in range(2)
    ]  # fmt: skip
    done = [(*child.communicate(), child.returncode) for child in children]
    assert [code for _, _, code in done] == [0, 0], [err for _, err, _ in done]
    printed = [out for out, _, _ in done]
    assert printed[0] == printed[1]
    ids = json.loads(printed[0][printed[0].rindex("[") :])
    assert len(ids) == 8


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page, target):
    assert ((ROOT / page).parent / target).exists()


def test_the_architecture_names_every_module():
    package, floor, named = ROOT / "jaxmoe", "", set()
    for line in (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## All modules")[1].splitlines():
        if line.startswith("### "):
            floors = re.findall(r"`([a-z_/]+/)`", line)
            floor = floors[0] if len(floors) == 1 else ""
        elif line.startswith("| `"):
            named |= {floor + name for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert {name for name in modules if not name.endswith(("__init__.py", "__main__.py"))} <= named
    assert [name for name in named if not list(package.glob(name))] == []

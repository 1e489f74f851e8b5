"""Check that the tests find faults: seed one fault at a time in a copy of the tree and run what `make test` runs.

    python -m scripts.mutation_check [--jobs N] [--only NAME]... [--json FILE] [--stale]

scripts/mutation_faults.py lists the faults. For each fault, the test files most likely to find it run first, up to the
first failure. If they pass, everything that `make test` selects runs. A test that also fails without the fault does not
count. Exit status: 0 if every fault is found, 1 if one is not, 2 if a fault is stale or unknown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.mutation_faults import FAULTS, GROUPS, Fault

ROOT = Path(__file__).resolve().parent.parent
SELECTION = "not sweep and not oracle and not browser"
NATIVE = "jaxmoe/ops/native/"
_NONE_COLLECTED = 5  # exit status of pytest
# A pytest plugin: the first failing example is enough, and shrinking it takes minutes.
_NO_SHRINKING = """from hypothesis import Phase, settings
settings.register_profile("no shrinking", phases=[Phase.explicit, Phase.generate])
settings.load_profile("no shrinking")
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Hold the outcome of one fault.

    found_by: node id of a failing test. first_guess: whether it is in the likely test files. why: the reason if the
    fault was not found.
    """

    name: str
    group: str
    file: str
    found_by: str | None
    first_guess: bool
    seconds: float
    why: str = ""


@dataclass(frozen=True)
class Run:
    """Hold the outcome of one pytest process: its exit status (None after a timeout) and failed tests' node ids."""

    status: int | None
    failed: tuple[str, ...]
    tail: str


def stale_faults(faults: Sequence[Fault]) -> list[str]:
    """Return one line for each fault that cannot be seeded as written; empty if all can."""
    lines = [f"{name}: the name is used {n} times" for name, n in Counter(f.name for f in faults).items() if n > 1]
    for fault in faults:
        path = ROOT / fault.file
        count = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else 0
        if count != 1:
            lines.append(f"{fault.name}: its old text occurs {count} times in {fault.file}, it must occur exactly once")
        if fault.old == fault.new or fault.group not in GROUPS:
            lines.append(f"{fault.name}: it changes no text, or its group is unknown")
    return lines


def copy_tree(to: Path) -> None:
    """Copy the files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def environment(tree: Path, *, own_kernels: bool) -> dict[str, str]:
    """Return the environment for the tests of a tree: its own package, and a shared compilation cache."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(ROOT / ".cache" / "tests")
    paths = f"{tree}{os.pathsep}{tree / '.cache'}"
    env = os.environ | {"PYTHONPATH": paths, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONDONTWRITEBYTECODE": "1"}
    return env | {"XDG_CACHE_HOME": str(tree / ".cache" / "home")} if own_kernels else env


def run_pytest(tree: Path, arguments: Sequence[str], env: dict[str, str], timeout: float) -> Run:
    """Run pytest in a tree."""
    report = tree / ".cache" / "report.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    (tree / ".cache" / "no_shrinking.py").write_text(_NO_SHRINKING, encoding="utf-8")
    plugins = ["-p", "no:cacheprovider", "-p", "no_shrinking"]
    command = [sys.executable, "-m", "pytest", *plugins, "--tb=line", f"--junitxml={report}"]
    process = subprocess.Popen(
        [*command, *arguments], cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        process.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return Run(None, (), f"timed out after {timeout:.0f} s")
        raise
    failed = _failed(report) if report.is_file() else ()
    return Run(process.returncode, failed, " ".join(output.strip().splitlines()[-3:])[-300:])


def _failed(report: Path) -> tuple[str, ...]:
    """Return the node ids of the tests that failed, from a JUnit report."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            found.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
    return tuple(found)


def make_test(tree: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Return the pytest runs of `make test` as arguments and environment, one process each."""
    dry = subprocess.run(
        ["make", "--dry-run", "test", "PYTEST_JOBS="], cwd=tree, capture_output=True, text=True, check=True
    )
    runs = []
    for line in dry.stdout.splitlines():
        words = shlex.split(line)
        if "pytest" not in words:
            continue
        env = dict(word.split("=", 1) for word in words[: next(i for i, word in enumerate(words) if "=" not in word)])
        runs.append((words[words.index("pytest") + 1 :], env))
    if not runs:
        raise SystemExit("make --dry-run test shows no pytest run: fix scripts/mutation_check.py")
    return runs


def check_fault(fault: Fault, timeout: float) -> Result:
    """Seed one fault in a copy of the tree and run tests until one fails."""
    started = time.perf_counter()

    def result(found_by: str | None, first_guess: bool, why: str = "") -> Result:
        return Result(
            name=fault.name, group=fault.group, file=fault.file, found_by=found_by, first_guess=first_guess,
            seconds=round(time.perf_counter() - started, 1), why=why,
        )  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="jaxmoe-mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = tree / fault.file
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        env = environment(tree, own_kernels=fault.file.startswith(NATIVE))
        likely = [test for test in fault.tests if not test.startswith("tests/") or (tree / test).exists()]
        runs = [(words, env | more, False) for words, more in make_test(tree)]
        if any(test.startswith("tests/") for test in likely):
            runs.insert(0, (["-m", SELECTION, *likely], env, True))
        for arguments, its_env, first_guess in runs:
            run = run_pytest(tree, ["-x", *arguments], its_env, timeout)
            if run.status == 1 and run.failed:
                return result(run.failed[0], first_guess)
            if run.status != 0 and not (first_guess and run.status == _NONE_COLLECTED):
                return result(None, first_guess, f"tests do not run: {run.tail}")
    return result(None, False, "every test passes")


def failing_anyway(tests: Sequence[str], timeout: float) -> set[str]:
    """Return the tests that fail without any fault."""
    if not tests:
        return set()
    with tempfile.TemporaryDirectory(prefix="jaxmoe-unmutated-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        files = sorted({test.split("::")[0] for test in tests})
        run = run_pytest(tree, ["-m", SELECTION, *tests], environment(tree, own_kernels=False), timeout)
        if run.status == 4:  # pytest does not accept a reported node id: run its whole file
            run = run_pytest(tree, ["-m", SELECTION, *files], environment(tree, own_kernels=False), timeout)
        if run.status not in (0, 1):
            raise SystemExit(f"the tests that found faults do not run without them: {run.tail}")
    return set(run.failed) & set(tests)


def report(result: Result) -> None:
    """Print one line for a result."""
    word = f"found by {result.found_by}" if result.found_by else f"NOT FOUND: {result.why}"
    where = "" if result.first_guess or not result.found_by else " (beyond the first guess)"
    print(f"{result.group:10} {result.name}: {word}{where}, {result.seconds:.0f} s", flush=True)


def write(results: Sequence[Result], path: Path | None) -> None:
    """Write the results so far as JSON, if a file is given."""
    if path is not None:
        path.write_text(json.dumps([asdict(one) for one in results], indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="faults checked at once")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a fault or a group; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="SECONDS", help="time limit of one pytest process"
    )
    parser.add_argument("--stale", action="store_true", help="only check that every fault can be seeded")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that copies of the tree are removed
    if unknown := set(asked.only) - {fault.name for fault in FAULTS} - set(GROUPS):
        parser.error(f"--only {sorted(unknown)[0]} is neither a fault nor one of {', '.join(GROUPS)}")
    faults = [fault for fault in FAULTS if not asked.only or {fault.name, fault.group} & set(asked.only)]
    if lines := stale_faults(FAULTS):
        print("\n".join(lines), file=sys.stderr)
        return 2
    if asked.stale:
        return 0
    results = []
    with ThreadPoolExecutor(asked.jobs) as workers:
        for result in workers.map(lambda fault: check_fault(fault, asked.timeout), faults):
            results.append(result)
            report(result)
            write(results, asked.json)
    anyway = failing_anyway(sorted({one.found_by for one in results if one.found_by}), asked.timeout)
    for number, one in enumerate(results):
        if one.found_by in anyway:
            why = f"{one.found_by} fails without the fault, too"
            results[number] = Result(**(asdict(one) | {"found_by": None, "why": why}))
            report(results[number])
    write(results, asked.json)
    num_found = sum(one.found_by is not None for one in results)
    print(f"{num_found} of {len(results)} faults found in {sum(one.seconds for one in results):.0f} s of tests")
    return 0 if num_found == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare the planner with published measurements: python -m scripts.score_planner [ROWS.csv] [--worst N] [--all].

Without a file, it scores the rows of tests/planner/data, with calibration rows and held-out rows apart.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from jaxmoe.config import ModelConfig
from jaxmoe.errors import JaxmoeError
from jaxmoe.families import read_config
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config, preset_configs
from scripts.planner_validation import MeasuredRow, held_out, predict, read_rows, score

DATA = Path(__file__).parent.parent / "tests" / "planner" / "data"
SAMPLE, MORE, LOADS = (DATA / f"published_{name}.csv" for name in ("sample", "more", "loads"))


@cache
def config_of(model: str) -> ModelConfig:
    """Return the preset that a table's model name refers to; Llama-3.3-70B has the sizes of Llama-3.1-70B."""
    name = model.lower().removeprefix("meta-").replace("llama-3.3", "llama-3.1").replace("_", "-")
    name = name.split("/")[-1]
    near = [preset for preset in preset_configs() if name.startswith(preset) or preset.startswith(name)]
    return read_config(read_json(find_config(max(near, key=len) if near else name)))


def main(arguments: list[str] | None = None) -> int:
    """Print the scores, also by metric, and the worst rows; with --all, also every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?")
    parser.add_argument("--worst", type=int, default=10)
    parser.add_argument("--all", action="store_true", help="print every row")
    options = parser.parse_args(arguments)
    if options.rows is not None:
        sets = {str(options.rows): list(predicted(options.rows))}
    else:
        more = list(predicted(MORE))
        sets = {
            "sample": list(predicted(SAMPLE)),
            "calibration": [row for row in more if not held_out(row.facts)],
            "held out": [row for row in more if held_out(row.facts)],
            "other loads": list(predicted(LOADS)),
        }
    found = [row for rows in sets.values() for row in rows]
    if options.all:
        _table(found)
    _scores({name: rows for name, rows in sets.items() if rows})
    metrics = defaultdict(list)
    for name, rows in sets.items():
        for row in rows:
            metrics[f"{name}: {row.facts['metric']}"].append(row)
    print()
    _scores({name: metrics[name] for name in sorted(metrics)})
    print("\nworst:\n")
    _table(sorted(found, key=lambda row: -abs(math.log(row.predicted / row.measured)))[: options.worst])
    return 0


def predicted(path: Path) -> Iterator[MeasuredRow]:
    """Yield the predictions of a file's rows; print the rows that cannot be predicted to stderr."""
    for facts in read_rows(path):
        try:
            yield predict(facts, config_of)
        except JaxmoeError as error:
            print(f"skipped: {facts['model']} on {facts['num_gpus']} x {facts['hardware']}: {error}", file=sys.stderr)


def _scores(sets: Mapping[str, Sequence[MeasuredRow]]) -> None:
    print("| rows | number | MAPE | rank | regret | light: MAPE | rank | regret |\n|---|---|---|---|---|---|---|---|")
    for name, rows in sets.items():
        cells = []
        for of in (lambda row: row.predicted, lambda row: row.speed_of_light):
            one = score(rows, of=of)
            cells += [f"{one.mape:.1%}", f"{one.rank:.3f}" if one.rows > 2 else "-"]
            cells.append("-" if one.regret is None else f"{one.regret:.1%}")
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


def _table(rows: Sequence[MeasuredRow]) -> None:
    print("| model | hardware | split | precision | isl / osl | load | metric | measured | predicted | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        facts = row.facts
        spread = " + attention DP" if "attention_dp" in facts["parallelism"] else ""
        split = facts["parallelism"].split(" (")[0].split(" + ")[0] + spread
        print(
            f"| {facts['model']} | {facts['num_gpus']} x {facts['hardware']} | {split} | {facts['precision']} | "
            f"{facts['isl']} / {facts['osl']} | {facts['batch_or_concurrency'].split(' (')[0]} | {facts['metric']} | "
            f"{row.measured:,.4g} | {row.predicted:,.4g} | {row.error:+.0%} |"
        )


if __name__ == "__main__":
    raise SystemExit(main())

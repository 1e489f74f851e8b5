"""Hold the planner against published measurements: python -m scripts.score_planner [ROWS.csv] [--worst N]."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

from jaxmoe.config import ModelConfig
from jaxmoe.errors import JaxmoeError
from jaxmoe.families import read_config
from jaxmoe.planner.against import Row, predict, read_rows, score
from jaxmoe.weights.checkpoint import read_json
from jaxmoe.weights.source import find_config, preset_configs

SAMPLE = Path(__file__).parent.parent / "tests" / "planner" / "data" / "published_sample.csv"


@cache
def config_of(model: str) -> ModelConfig:
    """The preset that a table means by a model's name: Llama-3.3-70B has the sizes of Llama-3.1-70B."""
    name = model.lower().removeprefix("meta-").replace("llama-3.3", "llama-3.1").replace("_", "-")
    name = name.split("/")[-1]
    near = [preset for preset in preset_configs() if name.startswith(preset) or preset.startswith(name)]
    return read_config(read_json(find_config(max(near, key=len) if near else name)))


def main(arguments: list[str] | None = None) -> int:
    """Print each row, the worst, and the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="?", default=SAMPLE)
    parser.add_argument("--worst", type=int, default=5)
    options = parser.parse_args(arguments)
    found: list[Row] = []
    for facts in read_rows(options.rows):
        try:
            found.append(predict(facts, config_of))
        except JaxmoeError as error:
            print(f"left out: {facts['model']} on {facts['num_gpus']} x {facts['hardware']}: {error}", file=sys.stderr)
    print("| model | hardware | split | precision | isl / osl | metric | measured | predicted | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        print(_line(row))
    print("\nworst:")
    for row in sorted(found, key=lambda row: -abs(row.error))[: options.worst]:
        print(_line(row))
    for name, of in (("planner", lambda row: row.predicted), ("speed of light", lambda row: row.speed_of_light)):
        one = score(found, of=of)
        regret = "-" if one.regret is None else f"{one.regret:.1%}"
        print(f"{name}: {one.rows} rows, MAPE {one.mape:.1%}, rank correlation {one.rank:.3f}, top-1 regret {regret}")
    return 0


def _line(row: Row) -> str:
    facts = row.facts
    split = facts["parallelism"].split(" (")[0] + (" + attention DP" if "attention_dp" in facts["parallelism"] else "")
    return (
        f"| {facts['model']} | {facts['num_gpus']} x {facts['hardware']} | {split} | {facts['precision']} | "
        f"{facts['isl']} / {facts['osl']} | {facts['metric']} | {row.measured:,.0f} | {row.predicted:,.0f} | "
        f"{row.error:+.0%} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())

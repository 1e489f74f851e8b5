"""Regenerate tests/golden/*.json from transformers, and record the reason. Needs torch and transformers.

python -m scripts.refresh_goldens [--case NAME] --reason TEXT
"""

import argparse
import datetime
import math
import tempfile
from pathlib import Path

import torch
import transformers

from tests.tiny.cases import CASES, CASES_BY_NAME, Case
from tests.tiny.checkpoint import write_checkpoint
from tests.tiny.golden import GOLDEN_DIR, Reference, save_golden
from tests.tiny.oracle import reference

# Far above the change of a logit from another order of float32 sums. Sigmoids are closer together than logits, and
# groups add a second choice, so that routers with groups come closer to a tie.
MIN_LOGIT_GAP = 5e-3
MIN_ROUTER_GAP, MIN_SIGMOID_GAP = 1e-3, 1e-4


def min_router_gap(case: Case) -> float:
    """Return the smallest accepted router gap of a case."""
    return MIN_SIGMOID_GAP if "n_group" in case.config else MIN_ROUTER_GAP


def check_gaps(case: Case, taken: Reference) -> None:
    """Raise ValueError if a choice of `case` is too close to a tie to be the same on another backend."""
    for name, gap, limit in (
        ("logit", taken.min_logit_gap, MIN_LOGIT_GAP),
        ("router", taken.min_router_gap, min_router_gap(case)),
    ):
        if gap is not None and gap < limit:
            raise ValueError(
                f"case {case.name}: {name} gap {gap:.1e} is under {limit}; choose another seed than {case.seed}"
            )


def main() -> None:
    """Regenerate the goldens from the command line."""
    parser = argparse.ArgumentParser(description="Regenerate tests/golden/*.json from transformers.")
    parser.add_argument("--case", choices=CASES_BY_NAME, metavar="NAME", help="regenerate one case; default: all cases")
    parser.add_argument("--reason", required=True, help="why the goldens change; recorded in tests/golden/README.md")
    arguments = parser.parse_args()

    for case in [CASES_BY_NAME[arguments.case]] if arguments.case else CASES:
        with tempfile.TemporaryDirectory() as directory:
            taken = reference(case, write_checkpoint(case, Path(directory)))
        try:
            check_gaps(case, taken)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        path = save_golden(case, taken)
        print(f"{path.name}  logit gap {taken.min_logit_gap:.4f}  router gap {taken.min_router_gap or math.nan:.4f}")

    row = (
        datetime.date.today().isoformat(),
        arguments.case or "all",
        transformers.__version__,
        torch.__version__,
        arguments.reason,
    )
    with (GOLDEN_DIR / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(f"| {' | '.join(row)} |\n")


if __name__ == "__main__":
    main()

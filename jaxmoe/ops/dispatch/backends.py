"""Backends of dispatch and combine.

- all_to_all: every rank receives every token once, with the weights of its own experts. A token that is routed to
  several experts of one rank is still sent once. Shapes are static and must hold the worst case, so (N - 1) T rows
  travel each way.
- all_gather: all-gathers the tokens with all their weights and reduce-scatters the results. Moves as many rows.
- ragged_all_to_all: a rank receives only the tokens that are routed to one of its experts, each once. Shapes hold the
  worst case, so it uses as much memory as the other backends, but it moves fewer rows. XLA:CPU has no ragged
  all-to-all; there a static all-to-all gives the same result.
- hierarchical: exchanges along the outermost axis first, then along the other axes. A token is sent once to each group
  of inner ranks (a node), and then distributed inside the group. If the outer axis connects nodes, (nodes - 1) T rows
  leave a node instead of (N - inner) T; the number of rows that arrive is the same. Along a single axis it equals
  all_to_all. hierarchical_ragged is ragged along the other axes.
"""

from __future__ import annotations

from typing import Any

from jaxmoe.ops.backend import KernelBackend, backends_by_name
from jaxmoe.ops.dispatch import all_gather, all_to_all, hierarchical, ragged_all_to_all
from jaxmoe.ops.dispatch.spec import DispatchBackend

HIERARCHICAL: tuple[DispatchBackend, ...] = ("hierarchical", "hierarchical_ragged")


def _backend(name: DispatchBackend, module: Any) -> KernelBackend:
    return KernelBackend(op="dispatch", name=name, kernels={"dispatch": module.dispatch, "combine": module.combine})


BACKENDS = backends_by_name(
    _backend("all_to_all", all_to_all),
    _backend("all_gather", all_gather),
    _backend("ragged_all_to_all", ragged_all_to_all),
    *(_backend(name, hierarchical) for name in HIERARCHICAL),
)

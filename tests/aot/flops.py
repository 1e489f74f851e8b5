"""Parse the matmuls of a compiled program from its HLO text, with the FLOPs of each run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = [a-z]\w*\[(?P<shape>[\d,]*)\]")
_HEADER_PARAM = re.compile(r"([\w.-]+): [a-z]\w*\[([\d,]*)\]")
_DOT = re.compile(r" dot\((?P<operands>.*?)\), ")
_NAME = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class MatmulCost:
    """Describe one dot instruction. depth: number of products summed in each entry of the result."""

    result_shape: tuple[int, ...]
    depth: int

    @property
    def flops(self) -> int:
        """Return the floating-point operations of one run."""
        return 2 * self.depth * math.prod(self.result_shape)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def matmuls(compiled_text: str) -> list[MatmulCost]:
    """List every dot in the text of a compiled program. Loop bodies count once.

    Raises: ValueError for a dot if the text lacks the shapes of its operands.
    """
    dots, shapes = [], {}
    for line in compiled_text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):  # names are local to a computation
            shapes = {name: _shape(shape) for name, shape in _HEADER_PARAM.findall(line)}
        definition = _DEFINITION.match(line)
        if definition is None:
            continue
        shapes[definition["name"]] = _shape(definition["shape"])
        dot = _DOT.search(line)
        if dot is None:
            continue
        left = _NAME.findall(dot["operands"])[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        if left not in shapes or contracted is None:
            raise ValueError(f"dot not understood: {line.strip()[:200]}")
        depth = math.prod(shapes[left][dim] for dim in _shape(contracted[1]))
        dots.append(MatmulCost(result_shape=shapes[definition["name"]], depth=depth))
    return dots

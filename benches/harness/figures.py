"""Figures that were measured more than once, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Figure:
    """The median of several measurements, with its ends."""

    median: float
    min: float
    max: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Figure:
        """The figure of at least one value."""
        values = list(values)
        return Figure(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 0) -> str:
        """As people read it: the median, and the ends in brackets."""
        return f"{self.median:,.{digits}f} [{self.min:,.{digits}f}-{self.max:,.{digits}f}]"

    def json(self) -> dict[str, float]:
        """As a JSON object."""
        return asdict(self)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a heading as aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same as a table for a document."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])

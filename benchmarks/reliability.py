#!/usr/bin/env python3
"""The reliability diagram and Brier score of the confidences that `accuracy.py` measured.

    python benchmarks/reliability.py      # reads results/accuracy.json, writes results/reliability.{svg,md}

The run shown is leave-one-family-out in the file's own order, where there is one, else the one as shipped:
how often a pair was right (with a 95 % interval) against how sure the engine was of it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0001)
SIZE, MARGIN = 360, 50


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of like confidence.

    Args:
        low, high: the range of confidence, low included.
        mean: mean confidence of its pairs.
        right, pairs: how many were right, of how many.
    """

    low: float
    high: float
    mean: float
    right: int
    pairs: int

    @property
    def share(self) -> float:
        """Share of right pairs."""
        return self.right / self.pairs

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval for the share of right pairs."""
        n, p = self.pairs, self.share
        centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def bins_of(histogram: Sequence[Sequence[float]], edges: Sequence[float] = EDGES) -> list[Bin]:
    """Gather (confidence, right, pairs) rows into the bins between ``edges``; empty ones are left out."""
    found = []
    for low, high in pairwise(edges):
        rows = [row for row in histogram if low <= row[0] < high]
        pairs = sum(row[2] for row in rows)
        if pairs:
            mean = sum(row[0] * row[2] for row in rows) / pairs
            found.append(Bin(low, min(high, 1.0), mean, int(sum(row[1] for row in rows)), int(pairs)))
    return found


def svg(bins: Sequence[Bin], title: str) -> str:
    """The diagram: the diagonal is perfect calibration, a dot's area is the logarithm of its number of pairs."""

    def x(value: float) -> float:
        return MARGIN + value * SIZE

    def y(value: float) -> float:
        return MARGIN + (1 - value) * SIZE

    full = SIZE + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {full}" font-family="sans-serif" font-size="11" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{full}" height="{full}" fill="#fff"/>',
        f'<path d="M{x(0)} {y(0)}H{x(1)}V{y(1)}H{x(0)}Z" fill="none" stroke="#999"/>',
        f'<path d="M{x(0)} {y(0)}L{x(1)} {y(1)}" stroke="#999" stroke-dasharray="4 4"/>',
    ]
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        lines.append(f'<text x="{x(tick):.1f}" y="{y(0) + 16}" text-anchor="middle">{tick:g}</text>')
        lines.append(f'<text x="{x(0) - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for one in bins:
        low, high = one.interval()
        lines.append(f'<path d="M{x(one.mean):.1f} {y(low):.1f}V{y(high):.1f}" stroke="#1f5fa8" stroke-width="1.5"/>')
        radius = 2 + 1.2 * math.log10(one.pairs)
        lines.append(f'<circle cx="{x(one.mean):.1f}" cy="{y(one.share):.1f}" r="{radius:.1f}" fill="#1f5fa8" fill-opacity=".7"/>')
    middle = full / 2
    lines.append(f'<text x="{middle}" y="{full - 12}" text-anchor="middle">confidence</text>')
    lines.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">share of right pairs</text>')
    lines.append(f'<text x="{middle}" y="26" text-anchor="middle" font-size="13">{title}</text></svg>')
    return "\n".join(lines) + "\n"


def choose(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run to show.

    Raises:
        SystemExit: there is none of automatch in the file's own order.
    """
    own = [run for run in runs if run["tool"] == "automatch" and run["order"] == "file"]
    if not own:
        raise SystemExit("no run of automatch in the file's own order; run benchmarks/accuracy.py first")
    return min(own, key=lambda run: run["tables"] != "left-out")


def page(run: Mapping[str, Any], bins: Sequence[Bin]) -> str:
    """The table beside the diagram."""
    found = run["figures"]
    lines = [
        "# Reliability of the confidence",
        "",
        f"{_title(run)}: {found['right'] + found['wrong']} pairs of {found['cases']} cases, Brier score {found['brier']:.5f}, "
        f"expected calibration error {found['ece']:.5f} (ten equal bins). Made by `python benchmarks/reliability.py`.",
        "",
        "![Reliability diagram](reliability.svg)",
        "",
        "| confidence | pairs | wrong | mean confidence | share right | 95 % interval |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for one in bins:
        low, high = one.interval()
        share = f"{one.mean:.4f} | {one.share:.4f} | {low:.4f} – {high:.4f}"
        lines.append(f"| {one.low:g} – {one.high:g} | {one.pairs} | {one.pairs - one.right} | {share} |")
    return "\n".join(lines) + "\n"


def _title(run: Mapping[str, Any]) -> str:
    return "leave-one-family-out" if run["tables"] == "left-out" else "as shipped (fitted on the same families)"


def main(argv: list[str] | None = None) -> None:
    """Write the diagram and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", type=Path, default=RESULTS / "accuracy.json")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory to write to")
    args = parser.parse_args(argv)
    run = choose(json.loads(args.accuracy.read_text())["runs"])
    bins = bins_of(run["histogram"])
    (args.output / "reliability.svg").write_text(svg(bins, f"Reliability, {_title(run)}"))
    (args.output / "reliability.md").write_text(page(run, bins))
    print(page(run, bins))


if __name__ == "__main__":
    main()

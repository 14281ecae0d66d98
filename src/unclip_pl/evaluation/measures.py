"""Name what a comparison reports: the table in ``measures.yaml``, and how its numbers are printed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from unclip_pl.metrics.interval import Interval, share_interval


class Measure(NamedTuple):
    """One column of the report."""

    group: str
    label: str
    better: Literal["higher", "lower", "neither"]
    what: str  # a sentence for the reader
    percent: bool = False
    digits: int = 3
    any_space: bool = False  # whether samples in the spaces of two CLIPs may be compared by it
    delta: float | None = None  # largest difference that makes none, see docs/comparison.md
    distance: bool = False  # whether that is a tenth of the way from the perfect prior to z_t instead
    judge: bool = False  # whether it looks through the judge
    oracle: bool = False  # whether it needs data whose truth is known

    def show(self, value: float | None) -> str:
        """Return the number in the report's digits; a dash where there is none, as of a prior that diverged."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.percent else f"{value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """Return a difference in the report's digits, with its sign."""
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.{self.digits}f}"

    def interval(self, value: dict[str, float | None]) -> str:
        """Return the interval in brackets; empty where there is none."""
        low, high = value["low"], value["high"]
        return "" if low is None or high is None else f"[{self.show(low)}, {self.show(high)}]"

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}{' %' if self.percent else ''}"

    @property
    def heading(self) -> str:
        """Label, unit and direction."""
        arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[self.better]
        return f"{self.title}{arrow}"


def _measures() -> dict[str, Measure]:
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {name: Measure(**row) for name, row in table.items()}


MEASURES = _measures()
#: The first captions alone are asked for what takes a pass of its own: more and less of z_i·z_t, and likelihood.
ASKED, OF_ASKED = 512, ("dot_obedience", "nats")
GROUPS = tuple(dict.fromkeys(measure.group for measure in MEASURES.values()))


def plain(interval: Interval) -> dict[str, float | None]:
    """Return an interval as JSON takes it, which knows no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}


def within_shares(interval: Interval, count: int) -> Interval:
    """Return the interval of a share inside [0, 1].

    Args:
        interval: mean and ends, which may lie outside.
        count: captions behind it, where they are counted one by one. If all of them were answered alike, the interval
            is Wilson's: no spread is no certainty.
    """
    mean, low, high = interval
    if count > 1 and low == high and mean in (0.0, 1.0):
        mean, low, high = share_interval(mean, count)
    return Interval(mean, low if math.isnan(low) else max(0.0, low), high if math.isnan(high) else min(1.0, high))


def end_of_grid(tried: Iterable[str], chosen: str | float) -> str:
    """Return "smallest" or "largest" where that was chosen of what was tried, so that the best may lie beyond it."""
    values = sorted(map(float, tried))
    if len(values) < 2:
        return ""
    return {values[0]: "smallest", values[-1]: "largest"}.get(float(chosen), "")

"""``unclip report``: draw a run's or a study's report again."""

from pathlib import Path

from unclip_pl.report import draw, summary


def report(run: str = "runs/quickstart") -> None:
    """Draw report.json, report.md, report.html and plots/ from what was measured; nothing is sampled again.

    Args:
        run: folder with cells/: a run that was compared, or a study.
    """
    folder = Path(run)
    summary(folder, draw(folder))

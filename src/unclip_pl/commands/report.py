"""``unclip report``: draw a run's report again."""

from pathlib import Path

from unclip_pl.evaluation.report import print_summary, render


def report(run: str = "runs/quickstart") -> None:
    """Draw report.md, report.html and plots/ from a run's report.json; nothing is computed again.

    Args:
        run: folder of the run.
    """
    print_summary(Path(run), render(Path(run)))

"""``unclip report``: draw a run's or a study's report again."""

from pathlib import Path

from unclip_pl.evaluation.study import CELLS
from unclip_pl.report.report import print_summary, render
from unclip_pl.report.study_page import print_study, render_study


def report(run: str = "runs/quickstart") -> None:
    """Draw report.md, report.html and plots/ from what was measured; nothing is computed again.

    Args:
        run: folder of a run with a report.json, or of a study with cells/.
    """
    folder = Path(run)
    if (folder / CELLS).is_dir():
        print_study(folder, render_study(folder))
    else:
        print_summary(folder, render(folder))

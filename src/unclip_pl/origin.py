"""Where a run comes from: the commit of the running code, and the file that notes it."""

import subprocess
from pathlib import Path

#: File beside a run's config: the command that made it, and the commit.
COMMAND = "command.json"


def commit() -> str:
    """Return the commit of the working tree that this code belongs to, marked where the tree has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = [subprocess.run([*git, *words], capture_output=True, text=True, timeout=10) for words in _QUESTIONS]
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if any(answer.returncode for answer in run):
        return "unknown"
    commit, changes, _ = (answer.stdout.strip() for answer in run)
    return f"{commit} with local changes" if changes else commit


_QUESTIONS = (
    ["rev-parse", "--short=12", "HEAD"],
    # A study writes its cells into results/ as they come: that changes no number of the next one.
    ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"],
    ["ls-files", "--error-unmatch", Path(__file__).name],
)

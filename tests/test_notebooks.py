"""Run the notebooks on a fresh clone, and check that what is committed of them was run from top to bottom."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_it_runs(path: Path, mini_run: Path, tmp_path: Path) -> None:
    """Run a notebook's cells as one script in a plain process.

    A Jupyter kernel would depend on the machine: it binds five ports that somebody else chose for it, and nbclient
    answers a SIGINT or SIGTERM of this process by shutting the kernel down under the running cell ("Kernel died").
    """
    notebook = nbformat.read(path, as_version=4)
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    environment = {**os.environ, "UNCLIP_RUN": str(mini_run), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, script], cwd=path.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_notebook
def test_what_is_committed_was_run_in_order_and_names_no_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells), "timings and editors' settings make noise in every diff"
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    said = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not re.search(r"(?<!\S)['\"]?/\w+/", "\n".join(said)), "an absolute path"
    assert any("image/png" in output.get("data", {}) for output in outputs)

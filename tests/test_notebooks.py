"""Run the notebooks on a fresh clone, and check that what is committed of them was run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from matplotlib import pyplot as plt

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # matplotlib's, about tensors
@each_notebook
def test_it_runs(path: Path, mini_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook's cells one after the other, with few steps, in this process.

    A Jupyter kernel would depend on the machine: it binds five ports that another process chose for it, and nbclient
    answers a SIGINT or SIGTERM of its process by shutting the kernel down under the running cell ("Kernel died").
    """
    monkeypatch.setenv("UNCLIP_RUN", str(mini_run))
    monkeypatch.chdir(path.parent)
    plt.switch_backend("agg")
    names = {"__name__": "__main__"}
    with plt.rc_context(), torch.random.fork_rng(), torch.enable_grad():
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                source = re.sub(r"\bsteps=\d+", "steps=4", cell.source)
                exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")


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

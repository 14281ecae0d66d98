"""Runs notebooks from top to bottom and keeps what they show, without timings: ``python notebooks/run.py [PATH …]``."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm misses ipywidgets
if "UNCLIP_RUN" in os.environ:  # a notebook works in its own folder, as in Jupyter
    os.environ["UNCLIP_RUN"] = os.path.abspath(os.environ["UNCLIP_RUN"])

for path in [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("*.ipynb")):
    print(path)
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=folder).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not which one
    nbformat.write(notebook, path)

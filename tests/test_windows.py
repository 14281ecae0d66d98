"""The package imports and draws without what Windows lacks."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

CODE = """
import importlib, os, pkgutil, signal, sys
import lightning, torch  # they look at sys.platform

sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource", "termios"])  # None: cannot be imported
for module, names in ((signal, "SIGALRM SIGHUP SIGUSR2"), (os, "fork killpg getuid setsid")):
    for name in names.split():
        delattr(module, name)

import unclip_pl
from unclip_pl.cli import main

for module in pkgutil.walk_packages(unclip_pl.__path__, "unclip_pl."):
    importlib.import_module(module.name)
sys.exit(main(["sample", "a red star", "--run", sys.argv[1], "--num", "1", "--guidance", "1", "--out", sys.argv[2]]))
"""


def test_it_imports_and_draws_without_unix(tmp_path: Path) -> None:
    out = tmp_path / "star.png"
    done = subprocess.run([sys.executable, "-c", CODE, "shapes", out], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.format == "PNG"

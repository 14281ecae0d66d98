"""The wheel gives everything: outside of a clone a recipe runs to its end with the configs of the package."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
#: Options that make the quickstart's recipe small.
SMALL = {
    "pack": "--train 96 --val 16 --heldout 24",
    "fit": "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 16",
    "test": (
        "--model.init_args.captions 8 --model.init_args.diversity_captions 2 --model.init_args.diversity_samples 2 "
        "--model.init_args.grid_rows 2 --model.init_args.resamples 20"
    ),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``unclip`` from the wheel, in an environment whose other packages are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    words = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    (packages,) = folder.rglob("site-packages")
    # The system's packages are those of the Python below this environment: name this environment's own beside them.
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return python.with_name("unclip")


def run(program: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([program, *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_has_the_files_of_the_tree(wheel: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "configs", "data/prompts"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix("unclip_pl/"): archive.read(name) for name in archive.namelist()}
    shipped = {name.removeprefix("shipped/"): content for name, content in inside.items() if "shipped/" in name}
    assert shipped == {name: (ROOT / name).read_bytes() for name in listed}
    code = [path for path in (ROOT / "src" / "unclip_pl").rglob("*.*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT / "src" / "unclip_pl").as_posix() for path in code} <= inside.keys()


def test_configs_are_found_outside_of_the_clone(program: Path, tmp_path: Path) -> None:
    listed = run(program, tmp_path, "configs").stdout
    assert "prior/tiny.yaml" in listed
    assert len(listed.splitlines()) == len(list((ROOT / "configs").glob("*/*.yaml")))
    tried = run(
        program, tmp_path, "reproduce", "--config", "reproduce/shapes.yaml", "--run", "run", "--dry_run", "true"
    )
    assert tried.returncode == 0, tried.stderr
    assert "10 of 10 stages would run" in tried.stdout
    assert "not written yet" not in tried.stdout  # what a recipe says of a config that is not there
    assert f"{tmp_path}" not in tried.stdout


@pytest.mark.slow  # eleven processes, each of which imports torch
def test_a_recipe_runs_to_its_end_outside_of_the_clone(program: Path, tmp_path: Path) -> None:
    assert run(program, tmp_path, "configs", "copy", "configs", "reproduce/shapes.yaml").returncode == 0
    copy = tmp_path / "configs" / "reproduce" / "shapes.yaml"
    recipe = yaml.safe_load(copy.read_text())
    for stage in recipe["stages"].values():
        stage["run"] += " " + SMALL.get(stage["run"].split()[0], "")
    copy.write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = run(program, tmp_path, "reproduce", "--config", "reproduce/shapes.yaml", "--run", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    words = ["--prompts", "shapes.txt", "--num", "1", "--run", "run", "--out", "grid.png"]
    assert run(program, tmp_path, "sample", *words).returncode == 0
    assert (tmp_path / "grid.png").is_file()

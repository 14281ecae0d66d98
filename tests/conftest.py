"""One miniature run of the whole recipe, made once and shared by every test that needs trained parts."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

# One thread for each worker and for what it starts, before torch is imported: workers share the cores.
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent / "src")}

import pytest
import torch
import yaml
from lightning_utilities.core.rank_zero import rank_zero_only

from unclip_pl import report
from unclip_pl.cli import NOISE, main
from unclip_pl.commands import reproduce as module
from unclip_pl.commands.reproduce import Stage, reproduce
from unclip_pl.files import alone

ROOT = Path(__file__).parent.parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start shall stop at Ctrl-C
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

#: What makes the quickstart's recipe a matter of seconds: nothing but sizes.
SHRINK = {
    "data": "--train 96 --val 16 --heldout 24",
    "fit": (
        "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.init_args.batch_size 16 "
        "--trainer.enable_model_summary false"
    ),
    "test": (
        "--model.init_args.captions 8 --model.init_args.diversity_captions 2 --model.init_args.diversity_samples 2 "
        "--model.init_args.grid_rows 2 --model.init_args.resamples 20"
    ),
}


@pytest.fixture(autouse=True)
def _first_rank() -> None:
    """Let every test speak as the first of several processes, also after one that was the second."""
    rank_zero_only.rank = 0  # for good: Lightning sets it once, at its import, which may happen in any test


def pytest_configure(config: pytest.Config) -> None:
    """Warnings that the command line hides are hidden here too."""
    for message in NOISE:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs name each other relative to the project's root."""
    monkeypatch.chdir(ROOT)


class InProcess:
    """Stands in for a stage's process and runs its words here: a process imports for five seconds."""

    def __init__(self, words: list[str], *_: object) -> None:
        self._status = main(words)

    def poll(self) -> int:
        return self._status


class Undrawn(InProcess):
    """Runs a stage here, but leaves out the report of the comparison: the recipe draws it at its end."""

    def __init__(self, words: list[str], *_: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("draw", "summary", "log", "show"):
                patch.setattr(report, name, lambda *_: {})
            super().__init__(words)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of recipes run in the test's own process."""
    monkeypatch.setattr(module, "Process", InProcess)


#: The comparison of the quickstart, which also says how its run samples.
COMPARE = "configs/compare/tiny.yaml"


def mini_compare(folder: Path) -> str:
    """The quickstart's comparison, as a file in a run's folder."""
    text = (ROOT / COMPARE).read_text().replace("../data/", f"{ROOT}/configs/data/")
    folder.mkdir()
    (folder / "compare.yaml").write_text(text)
    return str(folder / "compare.yaml")


def mini_stages() -> dict[str, Stage]:
    """The stages of configs/reproduce/shapes.yaml, shrunk."""
    recipe = yaml.safe_load((ROOT / "configs/reproduce/shapes.yaml").read_text())
    stages = {}
    for name, stage in recipe["stages"].items():
        extra = SHRINK.get(name) or SHRINK.get(stage["run"].split()[0], "")
        stages[name] = Stage(**stage | {"run": f"{stage['run'].replace(COMPARE, '{run}/compare.yaml')} {extra}"})
    return stages


@pytest.fixture(scope="session")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for FID's Inception: the real ones are 90 MB from the network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inception, "load_state_dict", lambda *_: None)  # of the empty file
        torch.manual_seed(0)
        net = Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for name, tensor in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def mini_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run: useless pictures, every file in its place.

    The first worker of pytest-xdist that needs it makes it. Each worker has a copy, which its tests may change.
    """
    base, here = tmp_path_factory.getbasetemp(), os.getcwd()
    first = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mini"
    with alone(first.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        if not first.is_dir():
            patch.setattr(module, "Process", Undrawn)
            try:
                os.chdir(ROOT)
                reproduce(mini_stages(), str(first), compare=mini_compare(first))
            finally:
                os.chdir(here)
    return Path(shutil.copytree(first, tmp_path_factory.mktemp("runs") / "mini"))


#: The smallest of every part. What is tested with them does not depend on sizes.
SMALL = {
    "prior": "net.init_args.width 16 net.init_args.layers 1 net.init_args.heads 2",
    "ar_prior": "net.init_args.width 16 net.init_args.layers 1 net.init_args.heads 2",
    "decoder": "net.init_args.channels 8 net.init_args.head_channels 8",
    "upsampler": "net.init_args.channels 8",
    "clip": "",
}


@pytest.fixture
def small(mini_run: Path) -> Callable[..., list[str]]:
    """Makes the options of a fit: a part's tiny config, smaller, on the miniature run's data, 6 steps an epoch."""

    def options(part: str, out: Path, *more: str) -> list[str]:
        line = ["--config", f"configs/{part}/tiny.yaml", "--data.init_args.source", f"{mini_run}/data"]
        line += ["--trainer.max_steps", "13", "--trainer.val_check_interval", "4", "--data.init_args.batch_size", "16"]
        line += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        line += ["--trainer.logger.init_args.save_dir", str(out)]
        if part != "clip":
            line += ["--data.init_args.eval_batch_size", "8", "--data.init_args.store", f"{mini_run}/store"]
            line += ["--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
        if part == "ar_prior":
            line += ["--model.init_args.codec", f"{mini_run}/codec.safetensors"]
        settings = iter(SMALL[part].split())
        return [*line, *(word for key in settings for word in (f"--model.init_args.{key}", next(settings))), *more]

    return options

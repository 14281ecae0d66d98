"""The study on embeddings alone, on pairs whose best predictor is known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from unclip_pl.cli import main
from unclip_pl.commands.plan import Stage
from unclip_pl.commands.reproduce import reproduce
from unclip_pl.metrics import FrechetDistance
from unclip_pl.nn.ridge import fit_ridge
from unclip_pl.report.claims import UNMEASURED

RECIPE = Path(__file__).parent.parent.parent / "configs" / "reproduce" / "rematch-embeddings.yaml"
#: Power of the noise as a share of the signal's.
NOISE = 0.5


class Known:
    """z_t ~ N(0, Λ) with a spectrum that decays; z_i = Q z_t + noise, with Q a fixed rotation."""

    def __init__(self, width: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.width = width
        self.spectrum = torch.arange(1, width + 1, dtype=torch.double).pow(-0.5)
        self.spectrum /= self.spectrum.sum()
        self.rotation = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.double))[0]
        self.generator = g

    def pairs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        z_t, noise = torch.randn(2, count, self.width, generator=self.generator, dtype=torch.double)
        z_t, noise = z_t * self.spectrum.sqrt(), noise * (NOISE / self.width) ** 0.5
        return z_t @ self.rotation.T + noise, z_t

    @property
    def best_cosine(self) -> float:
        """The cosine of z_i to its conditional mean Q z_t, where norms concentrate."""
        return (1 + NOISE) ** -0.5

    @property
    def distance_of_means(self) -> float:
        """Fréchet distance of unit-norm conditional means to unit-norm z_i: both are diagonal in Q's axes."""
        truth = (self.spectrum + NOISE / self.width) / (1 + NOISE)
        return (truth.sqrt() - self.spectrum.sqrt()).square().sum().item()


@pytest.mark.parametrize("width", [512, 64])
def test_the_linear_prior_reaches_the_best_cosine_and_distance(width: int) -> None:
    """Fit 20,000 pairs; the squared distance of the mean to the truth is 1 − cos², its variance."""
    known = Known(width)
    weight, bias = fit_ridge(*reversed(known.pairs(20_000)), ridge=1e-3)
    z_i, z_t = known.pairs(20_000)
    mean, truth = F.normalize(z_t, dim=-1) @ weight.T + bias, F.normalize(z_i, dim=-1)
    drawn = F.normalize(mean, dim=-1)
    assert (drawn * truth).sum(-1).mean().item() == pytest.approx(known.best_cosine, abs=0.01)
    assert (mean - truth).square().sum(-1).mean().item() == pytest.approx(1 - known.best_cosine**2, rel=0.05)
    if width == 512:
        return  # of 20,000 samples, half of a Fréchet distance in 512 dimensions is bias
    distance = FrechetDistance(width)
    distance.update(truth, real=True)
    distance.update(drawn, real=False)
    # Finite samples, and norms that do not quite concentrate; that of z_t itself is a hundred times as large.
    assert distance.compute().item() == pytest.approx(known.distance_of_means, rel=0.25)


SMALL = {
    "fit": (
        "--trainer.max_steps 2 --trainer.val_check_interval 2 --model.init_args.net.init_args.width 16 "
        "--model.init_args.net.init_args.layers 1 --model.init_args.net.init_args.heads 2"
    ),
    "test": "--model.init_args.resamples 20",
}


@pytest.mark.usefixtures("in_process")
def test_a_study_of_embeddings_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No CLIP, no pictures: the report renders, and the linear prior's cosine in it is the best one."""
    monkeypatch.setattr("unclip_pl.report.plots.DPI", 30)  # nobody looks
    known = Known(64)
    for name, values in zip(("img_emb", "text_emb"), known.pairs(6_000), strict=True):
        np.save(tmp_path / f"{name}.npy", values.numpy().astype(np.float16))
    assert main(["import", "embeddings", str(tmp_path), "--out", str(tmp_path / "store")]) == 0
    stages = {name: Stage(**stage) for name, stage in yaml.safe_load(RECIPE.read_text())["stages"].items()}
    one = {"diffusion": [1], "ar": [1], "matched": [1], "reference": [1]}
    stages = {
        name: replace(
            stages[name],
            run=f"{stages[name].run} {SMALL.get(stages[name].run.split()[0], '')}",
            matrix=stages[name].matrix | ({"seed": one[name]} if name in one else {}),
        )
        for name in ("codec", "linear", *one)
    }
    reproduce(stages, str(tmp_path / "run"), str(tmp_path / "store"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["priors"]) == {"diffusion", "ar", "linear", "text", "ceiling"}
    linear = report["priors"]["linear"]["metrics"]
    assert linear["cos_true"]["mean"] == pytest.approx(known.best_cosine, abs=0.02)
    assert report["priors"]["text"]["metrics"]["cos_true"]["mean"] == pytest.approx(0, abs=0.1)
    assert not {name for row in report["priors"].values() for name in row["metrics"]} & {"fd_judge", "clip_score"}
    assert any(claim["verdict"] == UNMEASURED for claim in report["claims"])
    assert "FD, embeddings" in (tmp_path / "run" / "report.html").read_text()
    assert not (tmp_path / "run" / "plots" / "grid.png").exists()
    shutil.rmtree(tmp_path / "run" / "plots")
    assert main(["report", "--run", str(tmp_path / "run")]) == 0

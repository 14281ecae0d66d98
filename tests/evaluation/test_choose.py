"""The rule that chooses a prior's settings, on trials whose best is known."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.choose import Choice, Trial, best
from unclip_pl.generation.priors import Prior, PriorSpec, TextEmbeddingSpec
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures


@dataclass(frozen=True)
class NoisySpec(PriorSpec):
    guidance: float = 1.0
    loaded: list[tuple[str, float]] = field(default_factory=list)

    def load(self, root: Path, device: str = "cpu") -> "Noisy":
        self.loaded.append((str(root), self.guidance))
        return Noisy(self, float(root.name))


class Noisy(Prior):
    """True embeddings, of other captions below guidance 1; off by its folder's number, more so with guidance."""

    def __init__(self, spec: NoisySpec, noise: float) -> None:
        super().__init__(spec)
        self.guidance = spec.guidance
        self.noise = noise

    def embed(self, text: TextFeatures, *, generator: torch.Generator | None = None) -> Tensor:
        raise AssertionError("A choice embeds batches.")

    def embed_batch(self, batch: PriorBatch, *, generator: torch.Generator | None = None) -> Tensor:
        true = F.normalize(batch.image_embed, dim=-1).roll(int(self.guidance < 1), dims=0)
        return true + self.noise * self.guidance * torch.randn(true.shape, generator=generator)


def choose(batches: list[EvaluationBatch], prior: PriorSpec, folder: Path, guidance: list[float]) -> None:
    weights = {"0.001": str(folder / "w" / "0.03"), "0.002": str(folder / "w" / "0.01")}
    choice = Choice(
        "elsewhere", ClipSpec("tiny-rn"), {"mine": prior}, weights, guidance, str(folder / "best/mine.json")
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    torch.manual_seed(0)
    trainer.validate(choice, DataLoader([pairs(batch) for batch in batches], batch_size=None), verbose=False)


def pairs(batch: EvaluationBatch) -> PriorBatch:
    """Captions whose embeddings say much of the image's, as those of a random CLIP do not; in few dimensions."""
    z_i = torch.randn_like(batch.image_embed) * (torch.arange(batch.image_embed.shape[1]) < 8)
    return PriorBatch(z_i, batch.text._replace(embed=z_i + 0.5 * torch.randn_like(z_i)))


def test_the_closest_network_and_then_the_guidance_that_fits_its_captions(
    batches: list[EvaluationBatch], tmp_path: Path
) -> None:
    prior = NoisySpec()
    choose(batches, prior, tmp_path, [0.5, 1.0, 4.0])
    found = json.loads((tmp_path / "best" / "mine.json").read_text())
    rates, scales = found["learning_rates"], found["guidance"]
    assert rates["0.002"]["joint_fd"] < rates["0.001"]["joint_fd"]
    assert scales["1"] == rates["0.002"]  # the same trial: same weights, noise and guidance
    assert scales["0.5"]["embed_fd"] < scales["1"]["embed_fd"] < scales["4"]["embed_fd"]  # blind to whose they are
    assert scales["1"]["joint_fd"] < min(scales["0.5"]["joint_fd"], scales["4"]["joint_fd"])
    assert all(trial["joint_fd"] > trial["embed_fd"] for trial in scales.values())  # a projection brings sets closer
    assert found["chosen"] == {"lr": 0.002, "guidance": 1.0}
    assert scales["0.5"]["retrieval_r10"] < 0.5 < scales["1"]["retrieval_r10"]
    assert found["captions"] == 48
    assert [guidance for _, guidance in prior.loaded] == [1, 1, 0.5, 1, 4]
    assert {Path(folder).parent for folder, _ in prior.loaded} == {tmp_path / "w"}  # not below the run of the CLIP


def test_who_does_not_read_captions_is_out_of_the_running() -> None:
    """The case that was met: samples surer than right, so that another caption's embedding fits the joint better."""
    trials = {"blind": Trial(0.276, 0.069, 0.03, 0.03), "a": Trial(0.285, 0.080, 0.80, 0.40)}
    assert best(trials) == "a"
    assert best({**trials, "b": Trial(0.280, 0.080, 0.80, 0.21)}) == "b"  # reads them well enough: the distance decides
    assert best({"blind": trials["blind"]}) == "blind"


def test_what_was_chosen_is_a_config_to_lay_over_others(batches: list[EvaluationBatch], tmp_path: Path) -> None:
    choose(batches, NoisySpec(), tmp_path, [1.0])
    training, sampling = (
        yaml.safe_load((tmp_path / "best" / f"mine-{kind}.yaml").read_text()) for kind in ("training", "sampling")
    )
    assert training == {"model": {"init_args": {"optimization": {"lr": 0.002}}}}
    assert sampling == {"model": {"init_args": {"priors": {"mine": {"init_args": {"guidance": 1.0}}}}}}


def test_one_prior_with_guidance_is_expected(tmp_path: Path) -> None:
    for priors in ({}, {"text": TextEmbeddingSpec()}, {"a": NoisySpec(), "b": NoisySpec()}):
        with pytest.raises(ValueError, match="one prior, with a setting `guidance`"):
            Choice("run", ClipSpec("tiny-rn"), priors, {}, [1.0], str(tmp_path / "x.json"))

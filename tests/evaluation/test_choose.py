"""The rule that chooses a prior's settings, on trials whose best is known."""

import json
from pathlib import Path
from typing import Self

import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.choose import Choice, Trial, choose_guidance
from unclip_pl.priors import Prior, TextEmbedding
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures


class Noisy(Prior):
    """The true embedding, farther off where its folder's number is higher; guidance draws it to the caption."""

    def __init__(self, guidance: float = 1.0) -> None:
        self.guidance = guidance
        self.loaded: list[tuple[str, float]] = []

    def load(self, root: Path, device: str = "cpu") -> Self:
        self.noise = float(root.name)
        self.loaded.append((str(root), self.guidance))
        return self

    def embed(self, text: TextFeatures, *, generator: torch.Generator | None = None) -> Tensor:
        raise AssertionError("A choice embeds batches.")

    def embed_batch(self, batch: PriorBatch, *, generator: torch.Generator | None = None) -> Tensor:
        true, said = F.normalize(batch.image_embed, dim=-1), F.normalize(batch.text.embed, dim=-1)
        return true + self.noise * torch.randn(true.shape, generator=generator) + 0.01 * self.guidance**4 * said


def choose(batches: list[EvaluationBatch], prior: Prior, folder: Path, guidance: list[float]) -> None:
    weights = {"0.001": str(folder / "w" / "0.03"), "0.002": str(folder / "w" / "0.01")}
    choice = Choice(
        "elsewhere", ClipSpec("tiny-rn"), {"mine": prior}, weights, guidance, str(folder / "best/mine.json")
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    pairs = DataLoader([PriorBatch(batch.image_embed, batch.text) for batch in batches], batch_size=None)
    trainer.validate(choice, pairs, verbose=False)


def test_the_closest_network_and_then_the_caption_within_a_tenth(
    batches: list[EvaluationBatch], tmp_path: Path
) -> None:
    prior = Noisy()
    choose(batches, prior, tmp_path, [1.0, 1.1, 4.0])
    found = json.loads((tmp_path / "best" / "mine.json").read_text())
    rates, scales = found["learning_rates"], found["guidance"]
    assert rates["0.002"]["embed_fd"] < rates["0.001"]["embed_fd"]
    assert scales["1"] == rates["0.002"]  # the same trial: same weights, noise and guidance
    assert scales["1.1"]["embed_fd"] < 1.1 * scales["1"]["embed_fd"] < scales["4"]["embed_fd"]
    assert scales["1"]["text_cos"] < scales["1.1"]["text_cos"] < scales["4"]["text_cos"]
    assert found["chosen"] == {"lr": 0.002, "guidance": 1.1}
    assert found["captions"] == 48
    assert [guidance for _, guidance in prior.loaded] == [1, 1, 1, 1.1, 4]
    assert {Path(folder).parent for folder, _ in prior.loaded} == {tmp_path / "w"}  # not below the run of the CLIP


def test_what_was_chosen_is_a_config_to_lay_over_others(batches: list[EvaluationBatch], tmp_path: Path) -> None:
    choose(batches, Noisy(), tmp_path, [1.0])
    training, sampling = (
        yaml.safe_load((tmp_path / "best" / f"mine-{kind}.yaml").read_text()) for kind in ("training", "sampling")
    )
    assert training == {"model": {"init_args": {"optimization": {"lr": 0.002}}}}
    assert sampling == {"model": {"init_args": {"priors": {"mine": {"init_args": {"guidance": 1.0}}}}}}


def test_guidance_of_equal_distance_goes_to_the_caption_and_a_far_one_never_wins() -> None:
    trials = {1.0: Trial(0.0100, 0.70), 1.5: Trial(0.0109, 0.75), 2.0: Trial(0.0111, 0.90), 1.25: Trial(0.0100, 0.72)}
    assert choose_guidance(trials) == 1.5


def test_one_prior_with_guidance_is_expected(tmp_path: Path) -> None:
    for priors in ({}, {"text": TextEmbedding()}, {"a": Noisy(), "b": Noisy()}):
        with pytest.raises(ValueError, match="one prior, with an attribute `guidance`"):
            Choice("run", ClipSpec("tiny-rn"), priors, {}, [1.0], str(tmp_path / "x.json"))

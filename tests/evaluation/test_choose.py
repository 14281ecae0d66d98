"""The rule that chooses a prior's settings, on trials whose best is known."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.errors import InputError
from unclip_pl.evaluation.choose import Choice, Trial, standard_error, validation_loss, within_noise
from unclip_pl.evaluation.measures import end_of_grid
from unclip_pl.generation.priors import Prior, PriorSpec
from unclip_pl.report.tables import choice_table
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


def choose(
    batches: list[EvaluationBatch], prior: PriorSpec, folder: Path, guidance: list[float], *, skip: int = 0,
    rate: Literal["lr", "muon_lr"] = "lr",
) -> None:  # fmt: skip
    noises = {"0.001": ("0.03", "0.04"), "0.002": ("0.01", "0.011")}
    weights = {rate: [str(folder / "w" / noise) for noise in both] for rate, both in noises.items()}
    out = str(folder / "best/mine.json")
    words = (weights, guidance, out, skip)
    choice = Choice("elsewhere", ClipSpec("tiny-rn"), {"mine": prior}, *words, resamples=5, rate=rate)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    torch.manual_seed(0)
    step = trainer.test if skip else trainer.validate
    step(choice, DataLoader([pairs(batch) for batch in batches], batch_size=None), verbose=False)


def pairs(batch: EvaluationBatch) -> PriorBatch:
    """Captions whose embeddings say much of the image's, as those of a random CLIP do not; in few dimensions."""
    z_i = torch.randn_like(batch.image_embed) * (torch.arange(batch.image_embed.shape[1]) < 8)
    return PriorBatch(z_i, batch.text._replace(embed=z_i + 0.5 * torch.randn_like(z_i)))


def test_the_closest_networks_and_then_the_guidance_that_fits_their_captions(
    batches: list[EvaluationBatch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = NoisySpec()
    choose(batches, prior, tmp_path, [0.5, 1.0, 4.0])
    found = json.loads((tmp_path / "best" / "mine.json").read_text())
    rates, scales = found["learning_rates"], found["guidance"]
    assert rates["0.002"]["joint_fd"] < rates["0.001"]["joint_fd"]
    assert scales["1"] == rates["0.002"]  # the same trials: same weights, noise and guidance
    assert len(scales["1"]["joint_fd_of_seeds"]) == 2
    assert sum(scales["1"]["joint_fd_of_seeds"]) / 2 == pytest.approx(scales["1"]["joint_fd"])
    assert scales["1"]["joint_fd"] < min(scales["0.5"]["joint_fd"], scales["4"]["joint_fd"])
    assert found["chosen"] == {"lr": 0.002, "guidance": 1.0}
    assert scales["0.5"]["retrieval_r10"] < 0.5 < scales["1"]["retrieval_r10"]
    assert (found["captions"], scales["1"]["val_loss"]) == (48, None)  # this prior has no Task
    assert [guidance for _, guidance in prior.loaded] == [1] * 4 + [0.5, 0.5, 1, 1, 4, 4]
    assert {Path(folder).parent for folder, _ in prior.loaded} == {tmp_path / "w"}  # not below the run of the CLIP
    said = capsys.readouterr().out
    assert "mine: learning rate 0.002 is the largest that was tried: try one beyond it." in said
    assert "guidance 1 is" not in said


def test_held_out_captions_that_no_cell_is_measured_on(batches: list[EvaluationBatch], tmp_path: Path) -> None:
    choose(batches, NoisySpec(), tmp_path, [1.0], skip=20)
    assert json.loads((tmp_path / "best" / "mine.json").read_text())["captions"] == 28
    with pytest.raises(InputError, match="leave out fewer"):
        choose(batches, NoisySpec(), tmp_path, [1.0], skip=47)


def test_within_one_standard_error_the_likeliest_is_taken() -> None:
    def trials(*distances: float) -> list[Trial]:
        return [Trial(distance, 0, 0, 0, 0) for distance in distances]

    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    assert standard_error([1.0]) == 0
    tried = {"a": trials(0.9, 1.0, 1.1), "b": trials(1.04, 1.05, 1.06), "c": trials(1.06, 1.07, 1.08)}
    assert within_noise(tried, {"a": 3, "b": 2, "c": 1}) == "b"  # c is one standard error away, 0.058, and a bit
    assert within_noise(tried, {"a": 1, "b": 2, "c": 3}) == "a"
    assert within_noise(tried, dict.fromkeys(tried, 0)) == "a"  # nobody knows the likelihood: the distance decides
    alone = {name: own[:1] for name, own in tried.items()}
    assert within_noise(alone, {"a": 3, "b": 2, "c": 1}) == "c"  # one seed: no distance is told from noise
    assert within_noise(alone, dict.fromkeys(alone, 0)) == "a"
    # A training that diverged is never chosen, wherever it stands in the list.
    for broken in ({"x": trials(torch.nan, 1.0), **tried}, {**tried, "x": trials(torch.nan, 1.0)}):
        assert within_noise(broken, {"x": 0, "a": 3, "b": 2, "c": 1}) == "b"
    with pytest.raises(InputError, match="Got none of x: try lower"):
        within_noise({"x": trials(torch.nan)}, {"x": 0})


def test_the_ends_of_a_grid_are_named() -> None:
    assert [end_of_grid(["0.1", "0.02", "1"], x) for x in ("0.02", 0.1, 1)] == ["smallest", "", "largest"]
    assert end_of_grid(["1"], 1) == ""


def test_the_validation_loss_is_the_trainings_with_every_caption(batches: list[EvaluationBatch]) -> None:
    class Half:
        text_drop = 0.5

        def loss(self, batch: PriorBatch, generator: torch.Generator) -> Tensor:
            return batch.image_embed.sum() + self.text_drop + torch.rand((), generator=generator)

    prior = Noisy(NoisySpec(), 0.0)
    vars(prior)["part"] = Half()  # a stand-in, with what the validation loss asks for
    ones = [PriorBatch(torch.ones(n, 1), batches[0].text.rows(slice(n))) for n in (4, 2)]
    noise = [torch.rand((), generator=torch.Generator().manual_seed(i)).item() for i in (0, 1)]
    expected = (4 * (4 + noise[0]) + 2 * (2 + noise[1])) / 6
    assert validation_loss(prior, ones) == pytest.approx(expected)
    assert torch.isnan(torch.tensor(validation_loss(Noisy(NoisySpec(), 0.0), ones)))


@pytest.mark.parametrize(("rate", "words"), [("lr", "learning rate"), ("muon_lr", "learning rate of Muon")])
def test_what_was_chosen_is_a_config_to_lay_over_others(
    batches: list[EvaluationBatch], tmp_path: Path, rate: Literal["lr", "muon_lr"], words: str
) -> None:
    choose(batches, NoisySpec(), tmp_path, [1.0], rate=rate)
    training, sampling = (
        yaml.safe_load((tmp_path / "best" / f"mine-{kind}.yaml").read_text()) for kind in ("training", "sampling")
    )
    assert training == {"model": {"init_args": {"optimization": {rate: 0.002}}}}
    assert sampling == {"model": {"init_args": {"priors": {"mine": {"init_args": {"guidance": 1.0}}}}}}
    table = choice_table({"choices": [json.loads((tmp_path / "best" / "mine.json").read_text()) | {"file": "mine"}]})
    assert table is not None
    assert [row[1].text for row in table.rows] == [words, words, "guidance"]


def test_one_prior_is_expected_with_networks(tmp_path: Path) -> None:
    for priors in ({}, {"a": NoisySpec(), "b": NoisySpec()}):
        with pytest.raises(ValueError, match=r"Expected one prior\. Got"):
            Choice("run", ClipSpec("tiny-rn"), priors, {"0.1": ["run"]}, [1.0], str(tmp_path / "x.json"))
    for weights in ({}, {"0.1": []}):
        with pytest.raises(ValueError, match="networks of every learning rate"):
            Choice("run", ClipSpec("tiny-rn"), {"a": NoisySpec()}, weights, [1.0], str(tmp_path / "x.json"))


def test_an_overlay_takes_the_place_of_the_one_before_whole(tmp_path: Path) -> None:
    choice = Choice("run", None, {"a": NoisySpec()}, {"0.1": ["run"]}, [1.0], str(tmp_path / "best" / "ä.json"))
    choice._overlay("sampling", {"old": 1})
    path = tmp_path / "best" / "ä-sampling.yaml"
    os.link(path, tmp_path / "reading")
    choice._overlay("sampling", {})
    assert yaml.safe_load((tmp_path / "reading").read_text(encoding="utf-8"))["model"]["init_args"] == {"old": 1}
    assert path.read_text(encoding="utf-8").startswith("# Chosen on validation data, see ä.json.\n")


@dataclass(frozen=True)
class PlainSpec(PriorSpec):
    """A prior that guidance cannot change."""

    def load(self, root: Path, device: str = "cpu") -> Noisy:
        return Noisy(NoisySpec(), float(root.name))


def test_without_guidance_the_learning_rate_alone_is_chosen(
    batches: list[EvaluationBatch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choose(batches, PlainSpec(), tmp_path, [1.0, 2.0])
    found = json.loads((tmp_path / "best/mine.json").read_text())
    assert (found["chosen"], found["guidance"]) == ({"lr": 0.002}, {})
    assert yaml.safe_load((tmp_path / "best/mine-sampling.yaml").read_text()) == {"model": {"init_args": {}}}
    table = choice_table({"choices": [found | {"file": "mine"}]})
    assert table is not None
    assert [row[1].text for row in table.rows] == ["learning rate"] * 2
    assert "mine: learning rate 0.002: " in capsys.readouterr().out

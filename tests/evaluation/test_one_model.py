"""Scores of one model, against what they must be."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unclip_pl.clip import ClipSpec
from unclip_pl.evaluation.fid import load_inception
from unclip_pl.evaluation.one_model import ImageEvaluation, PriorEvaluation
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.pictures import to_bytes
from unclip_pl.generation.priors import PriorSpec, TrueEmbeddingSpec
from unclip_pl.types import EvaluationBatch, PriorBatch, TextFeatures

CLIP, JUDGE = ClipSpec("tiny-rn"), ClipSpec("tiny-judge")
Batches = list[EvaluationBatch]


def test(module: LightningModule, batches: list[object], folder: Path) -> dict[str, float]:
    torch.manual_seed(1)  # of the random encoders
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
    (scores,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    return dict(scores)


test.__test__ = False  # type: ignore[attr-defined]


class TensorDataset(Dataset[Tensor]):
    """What torch-fidelity asks of a set of pictures."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pairs(batches: Batches) -> list[object]:
    return [PriorBatch(batch.image_embed, batch.text) for batch in batches]


def select(batch: EvaluationBatch, rows: slice) -> EvaluationBatch:
    text = batch.text.rows(rows)
    return EvaluationBatch(batch.image[rows], batch.image_embed[rows], text, batch.captions[rows], batch.metadata[rows])


def join(parts: Batches) -> EvaluationBatch:
    image, image_embed, text, captions, metadata = zip(*parts, strict=True)
    return EvaluationBatch(
        torch.cat(image), torch.cat(image_embed), TextFeatures.cat(text), [*chain(*captions)], [*chain(*metadata)]
    )


def test_true_embeddings_are_at_no_distance(batches: Batches, tmp_path: Path) -> None:
    scores = test(PriorEvaluation(str(tmp_path), CLIP, TrueEmbeddingSpec()), pairs(batches), tmp_path)
    assert scores["embed_fd"] == pytest.approx(0, abs=1e-6)
    for name in ("precision", "recall", "cos_true", "cos_samples"):
        assert scores[name] == pytest.approx(1, abs=1e-5), name


def test_chance_is_told_from_truth(batches: Batches, chance: PriorSpec, tmp_path: Path) -> None:
    scores = test(PriorEvaluation(str(tmp_path), CLIP, chance), pairs(batches), tmp_path)
    assert scores["embed_fd"] > 0.1
    assert abs(scores["cos_true"]) < 0.1
    assert scores["precision"] < 0.5


def test_perfect_decoder_scores_perfectly(batches: Batches, lookup: DecoderSpec, tmp_path: Path) -> None:
    module = ImageEvaluation(str(tmp_path), CLIP, JUDGE, lookup)
    scores = test(module, list(batches), tmp_path)
    assert scores["fd_judge"] == pytest.approx(0, abs=1e-6)
    assert (scores["precision"], scores["recall"], scores["retrieval_r10"]) == (1, 1, 1)
    assert "fid" not in scores  # that name is Inception's
    assert not module.state_dict()


def test_pipeline_is_scored_with_its_prior(
    batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path: Path
) -> None:
    scores = test(ImageEvaluation(str(tmp_path), CLIP, JUDGE, lookup, chance), list(batches), tmp_path)
    assert scores["fd_judge"] > 1e-6
    assert scores["retrieval_r10"] < 1


def test_scores_depend_on_the_seed_and_not_on_the_batches(
    batches: Batches, lookup: DecoderSpec, chance: PriorSpec, tmp_path: Path
) -> None:
    """Pairs draw their own noise: in reverse order, and in batches of 5, they draw the same."""
    pair = [select(batch, slice(i, i + 1)) for batch in batches for i in range(16)][::-1]
    fives = [join(pair[i : i + 5]) for i in range(0, len(pair), 5)]
    for kind in (pairs, list):

        def scores(parts: Batches, seed: int, kind: Any = kind) -> dict[str, float]:
            if kind is pairs:
                return test(PriorEvaluation(str(tmp_path), CLIP, chance, seed=seed), pairs(parts), tmp_path)
            return test(ImageEvaluation(str(tmp_path), CLIP, JUDGE, lookup, chance, seed=seed), list(parts), tmp_path)

        first = scores(batches, 3)
        assert scores(fives, 3) == pytest.approx(first, rel=1e-5, abs=1e-6)
        assert scores(batches, 4) != pytest.approx(first, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_fid_is_torch_fidelitys(
    batches: Batches, lookup: DecoderSpec, chance: PriorSpec, inception: Path, tmp_path: Path
) -> None:
    """Their extractor, dataset, statistics and distance on the same pictures and the same random Inception."""
    few = [select(batch, slice(2)) for batch in batches[:2]]
    shown: list[Tensor] = []

    class Watched(type(lookup.load(tmp_path))):  # type: ignore[misc]
        def decode(self, *args: Any, **kwargs: Any) -> Tensor:
            shown.append(super().decode(*args, **kwargs))
            return shown[-1]

    class WatchedSpec(type(lookup)):  # type: ignore[misc]
        def load(self, root: Path, device: str = "cpu") -> Any:
            return Watched(self, self._batches)

    watched = WatchedSpec("none", 32, _batches=batches)
    module = ImageEvaluation(str(tmp_path), CLIP, JUDGE, watched, chance, inception_weights=str(inception))
    scores = test(module, list(few), tmp_path)
    real = to_bytes(torch.cat([batch.image for batch in few]))
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorDataset(to_bytes(torch.cat(shown))),
        input2=TensorDataset(real),
        fid=True,
        cuda=False,
        verbose=False,
        cache=False,
        batch_size=4,
        feature_extractor_weights_path=str(inception),
    )
    expected = theirs["frechet_inception_distance"]
    assert expected > 1e-3
    assert scores["fid"] == pytest.approx(expected, rel=1e-3)


def test_judge_must_be_another_clip(lookup: DecoderSpec) -> None:
    with pytest.raises(ValueError, match="another CLIP"):
        ImageEvaluation("run", CLIP, CLIP, lookup)


def test_bytes_are_those_of_an_image_file() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(values.float().div(127.5).sub(1)), values)


def test_inception_takes_nothing_but_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No Inception weights"):
        load_inception(str(tmp_path / "none.pth"))
    torch.save({"trap": Path("x")}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="no plain weights"):
        load_inception(str(tmp_path / "trap.pth"))

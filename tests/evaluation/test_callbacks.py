"""Scores while a part trains: they change nothing, they are true, and the best checkpoint goes by them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unclip_pl.cli import main
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.errors import InputError
from unclip_pl.evaluation.callbacks import DecoderScores, PriorScores, ValidationScores
from unclip_pl.files import read_checkpoint
from unclip_pl.generation.decoding import Decoder
from unclip_pl.training.cli import UnclipCLI, build
from unclip_pl.training.resume import StepCheckpoint, random_state

Small = Callable[..., list[str]]
FOREMOST = {"prior": "val/embed_fd", "ar_prior": "val/embed_fd", "decoder": "val/stated_match"}


def fit(line: list[str], *, scored: bool) -> UnclipCLI:
    cli = build([*line, "--trainer.max_steps", "8"])
    if not scored:
        cli.trainer.callbacks[:] = [c for c in cli.trainer.callbacks if not isinstance(c, ValidationScores)]
        next(c for c in cli.trainer.callbacks if isinstance(c, StepCheckpoint)).monitor = None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


@pytest.mark.parametrize("part", FOREMOST)
def test_a_fit_with_scores_ends_in_the_same_weights(part: str, small: Small, tmp_path: Path) -> None:
    scored, name = fit(small(part, tmp_path / "with"), scored=True), FOREMOST[part]
    drawn = random_state()
    plain = fit(small(part, tmp_path / "without"), scored=False)
    same = random_state()
    assert torch.equal(drawn.pop("torch"), same.pop("torch"))
    assert drawn == same
    theirs = plain.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in scored.model.state_dict().items())
    assert name in scored.trainer.callback_metrics
    assert name not in plain.trainer.callback_metrics

    # The best file's score, measured again, is the score that it is the best by.
    checkpoint = scored.trainer.checkpoint_callback
    assert Path(checkpoint.best_model_path).name == "best.ckpt"
    assert read_checkpoint(checkpoint.best_model_path)["global_step"] in (4, 8)
    again = build(small(part, tmp_path / "again"))
    path = checkpoint.best_model_path
    found = again.trainer.validate(again.model, again.datamodule, ckpt_path=path, verbose=False)[0][name]
    assert found == pytest.approx(checkpoint.best_model_score.item(), abs=1e-6)


def test_the_best_is_found_by_name(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = small("prior", tmp_path)
    assert main(["validate", *line, "--ckpt_path", "best"]) == 1
    assert "best.ckpt of an earlier fit" in capsys.readouterr().err
    fit(line, scored=True)
    assert main(["validate", *line, "--ckpt_path", "best"]) == 0
    assert "random" not in capsys.readouterr().err


def test_a_score_that_nothing_logs_keeps_no_best(small: Small, tmp_path: Path) -> None:
    cli = build(small("prior", tmp_path))
    next(c for c in cli.trainer.callbacks if isinstance(c, StepCheckpoint)).monitor = "val/emded_fd"
    with pytest.warns(UserWarning, match=r"keeps no best.ckpt.*'val/emded_fd', but .*val/embed_fd"):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert next(tmp_path.rglob("last.ckpt")).is_file()
    assert not list(tmp_path.rglob("best.ckpt"))


def test_scores_of_the_truth_itself() -> None:
    true = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    scores = PriorScores().score(3 * true[:, None].repeat(1, 2, 1), 5 * true)
    assert scores["embed_fd"].item() == pytest.approx(0, abs=1e-6)
    for name in ("cos_true", "cos_samples", "retrieval_r1", "retrieval_r10"):
        assert scores[name].item() == pytest.approx(1)
    collapsed = PriorScores().score(true.mean(0).expand(50, 2, 8), true)  # its nearest is one and the same picture
    assert collapsed["retrieval_r1"].item() == pytest.approx(1 / 50)
    assert collapsed["cos_samples"].item() == pytest.approx(1)
    assert collapsed["calibration_gap"] < 0


def everything(store: EmbeddingStore) -> RowBatch:
    rows = store.rows(Split.VAL)
    return RowBatch(rows, np.zeros(len(rows), np.uint64))


def test_a_decoder_that_draws_the_true_picture_is_right(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = build(small("decoder", tmp_path))

    def decode(_: Decoder, image_embed: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
        batch = cli.datamodule.embeddings.evaluation_batch(everything(cli.datamodule.embeddings))
        return batch.image[torch.cdist(image_embed, batch.image_embed).argmin(1)]

    monkeypatch.setattr(Decoder, "decode", decode)
    found = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]
    assert found["val/stated_match"] == 1
    assert found["val/captions_right"] == 1
    assert found["val/residual"] < 0.05


def test_what_cannot_be_scored_is_refused(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = build(small("prior", tmp_path))
    cli.trainer.datamodule, store = cli.datamodule, cli.datamodule.embeddings
    with pytest.raises(InputError, match=r"Expected DecoderTask and .*Got DiffusionPriorTask"):
        DecoderScores().setup(cli.trainer, cli.model, "fit")
    with monkeypatch.context() as nameless:
        nameless.setattr(type(cli.model), "spec", None)
        with pytest.raises(InputError, match=r"a Task that names its prior's `spec` .*leave PriorScores out"):
            PriorScores().setup(cli.trainer, cli.model, "fit")
    monkeypatch.setattr(store, "rows", lambda _: np.array([3]))
    with pytest.raises(InputError, match=r"at least 2 validation images .*Got 1"):
        PriorScores().setup(cli.trainer, cli.model, "fit")
    monkeypatch.setattr(store, "metadata", lambda _: [{}])
    with pytest.raises(InputError, match="leave it out"):
        DecoderScores().check(cli.datamodule, [3])

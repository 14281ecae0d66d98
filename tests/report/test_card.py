"""The model card says where weights come from, what may be done with them, and how they score, or that nobody knows."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from unclip_pl.cli import main
from unclip_pl.errors import InputError
from unclip_pl.evaluation.measures import MEASURES
from unclip_pl.report.card import model_card

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "results" / "shapes-32px" / "report.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run without its networks: a description, a report, a stage, and shards with licences."""
    folder, shards = tmp_path / "stars", tmp_path / "shards"
    (folder / "decoder").mkdir(parents=True)
    (folder / "stages").mkdir()
    shards.mkdir()
    decoder = {"class_path": "unclip_pl.generation.decoding.DecoderSpec"}
    prior = {
        "class_path": "unclip_pl.generation.priors.LinearPriorSpec",
        "init_args": {"checkpoint": "map.safetensors"},
    }
    described = {
        "clip": {"name": "tiny-rn", "pretrained": "clip/checkpoints/last.ckpt"},
        "decoder": decoder | {"init_args": {"checkpoint": "decoder/checkpoints/last.ckpt", "image_size": 48}},
        "priors": {"linear": prior},
    }
    (folder / "run.json").write_text(json.dumps(described))
    stage = {"command": "linear --source {source}", "commits": ["0123456789ab"], "ended": "2026-11-27T00:00:00+00:00"}
    (folder / "stages" / "linear.json").write_text(json.dumps(stage))
    shutil.copy(REPORT, folder / "report.json")
    config = {"data": {"class_path": "x", "init_args": {"source": str(shards)}}}
    (folder / "decoder" / "config.yaml").write_text(yaml.safe_dump(config))
    (shards / "README.md").write_text("# Stars\n\nThree of them.\n")
    with tarfile.open(shards / "train-000000.tar", "w") as tar:
        for key, meta in {"a": {"license": "MIT"}, "b": {"license": "MIT"}, "c": {"license": None}}.items():
            for suffix, content in (("png", b"x"), ("txt", b"a star"), ("json", json.dumps(meta).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def test_it_has_what_is_known(run: Path, tmp_path: Path) -> None:
    card = model_card(run, "draw(run)")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "text-to-image"
    for part in (
        "# stars\n",
        "```\ndraw(run)\n```",
        "image_size 48",
        "commit 0123456789ab",
        "unclip linear --source {source}",
    ):
        assert part in card
    for part in ("Licence of 2 pictures: MIT.", "1 pictures name no licence", "> # Stars", "Intended use and limits"):
        assert part in card
    assert str(tmp_path) not in card


def test_it_has_every_score_with_its_interval(run: Path) -> None:
    card = model_card(run, "")
    priors = json.loads(REPORT.read_text())["priors"]
    shown = 0
    for name, measure in MEASURES.items():
        for row in priors.values():
            value = row["metrics"].get(name)
            if value and value["mean"] is not None:
                assert f"{measure.show(value['mean'])}** {measure.interval(value)}" in card or (
                    f"{measure.show(value['mean'])} {measure.interval(value)}".strip() in card
                )
                shown += 1
    assert shown > 50


def test_a_card_without_a_report_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "report.json").unlink()
    assert "Nothing was measured: the run has no report." in model_card(run, "")
    assert caplog.text.count("\n") == 1
    assert "its card has no scores" in caplog.text


def test_a_bundle_keeps_the_card_that_it_came_with(run: Path) -> None:
    (run / "report.json").unlink()
    (run / "bundle.json").write_text('{"run": "stars"}')
    (run / "README.md").write_text("The card.")
    assert model_card(run, "") == "The card."


@pytest.mark.parametrize("text", ["{", "[1]", '{"priors": {}}'])
def test_a_broken_report_is_one_line_and_no_bundle(
    text: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.json").write_text(text)
    with pytest.raises(InputError, match=r"report\.json.*run `unclip report` again"):
        model_card(run, "")
    monkeypatch.setattr("unclip_pl.commands.bundle.write_checkpoint", lambda *_: None)
    monkeypatch.setattr("unclip_pl.clip.ClipSpec.load", lambda *_: None)
    assert main(["bundle", str(run), "--out", str(tmp_path / "x.zip")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x.zip").exists()

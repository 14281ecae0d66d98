"""A run in one file draws what the run draws, up to half precision, and nothing in it can run."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unclip_pl.cli import main
from unclip_pl.commands.bundle import _provenance
from unclip_pl.files import read_checkpoint, write_json
from unclip_pl.generation import bundle as bundles
from unclip_pl.generation import run as runs
from unclip_pl.generation.bundle import NOTES, read_notes, unpack
from unclip_pl.generation.manipulation import Manipulator
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.run import Origin, base_hash, find_run, read_run
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.shapes.oracle import ShapesOracle
from unclip_pl.shapes.render import BACKGROUNDS, COLORS, SHAPES, SIZES


@pytest.fixture(scope="module")
def bundle(mini_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "mini.zip"
    assert main(["bundle", str(mini_run), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def pair(mini_run: Path, bundle: Path) -> tuple[Unclip, Unclip]:
    return Unclip.load(mini_run), Unclip.load(bundle)


@pytest.mark.parametrize("prior", ["diffusion", "ar", "linear", "text"])
def test_it_draws_what_the_run_draws(pair: tuple[Unclip, Unclip], prior: str) -> None:
    captions = ["a large red star on a navy background", "a ring", ""]
    ours, theirs = (unclip.generate(captions, prior=prior, seed=3) for unclip in pair)
    cosine = torch.nn.functional.cosine_similarity(ours.image_embed, theirs.image_embed, dim=-1)
    # A code drawn at the edge of two of the AR prior's buckets may fall on the other side.
    assert cosine.min() > (0.9 if prior == "ar" else 0.9999)
    torch.testing.assert_close(theirs.images, ours.images, rtol=0, atol=0.01)


def test_it_sees_what_the_run_sees(pair: tuple[Unclip, Unclip]) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = (unclip.clip.encode_image(images) for unclip in pair)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2 * float(ours.abs().max()))
    assert pair[0].clip.fingerprint == pair[1].clip.fingerprint
    ours, theirs = (Manipulator(unclip).reconstruct(images, steps=20).psnr for unclip in pair)
    assert theirs.min() > 30


def test_matrices_are_halves_and_vectors_what_they_were(mini_run: Path, bundle: Path, tmp_path: Path) -> None:
    unpack(bundle, tmp_path)
    path = "prior/checkpoints/last.ckpt"
    whole, again = (read_checkpoint(root / path) for root in (mini_run, tmp_path))
    with safe_open(tmp_path / path, "pt") as file:
        for name, value in whole["state_dict"].items():
            matrix = name.startswith("net.") and value.ndim > 1
            stored = file.get_tensor(f"state_dict.{name}").dtype
            assert stored == (torch.half if matrix else value.dtype), name
            assert torch.equal(again["state_dict"][name], value.half().float() if matrix else value), name
    assert torch.equal(again["posterior_mse"], whole["posterior_mse"])
    assert again["global_step"] == whole["global_step"]


def test_words_that_no_caption_has_are_named_once(
    pair: tuple[Unclip, Unclip], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["a shiny red star turquoise!", "On the LEFT, a small cyan ring, shiny"]
    assert pair[0].unknown_words(captions) == []
    assert pair[1].unknown_words(captions) == ["shiny", "turquoise", "!"]
    table = pair[1].clip.model.token_embedding.weight
    assert table.shape == pair[0].clip.model.token_embedding.weight.shape
    assert 10 < table.any(dim=1).sum() < 100
    words = ["sample", *captions, "--run", str(bundle), "--num", "1", "--out", str(tmp_path / "x.png")]
    assert main(words) == 0
    assert capsys.readouterr().out.count("shiny, turquoise, !") == 1


def test_it_names_no_path_of_this_machine(mini_run: Path, bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        assert not [name for name in archive.namelist() if str(mini_run).encode() in archive.read(name)]
        told = json.loads(archive.read(NOTES))
        card = archive.read("README.md").decode()
    assert f"# {mini_run.name}\n" in card
    assert "--run mini.zip" in card
    assert told["run"] == mini_run.name
    assert told["commits"]
    assert told["recipe"]["linear"].split()[:4] == ["unclip", "linear", "--source", "{source}"]


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"meta": {"hardware": ["2 × A, 1 threads", "1 × B"]}}, "2 × A, 1 threads; 1 × B"),
        ({"meta": {"hardware": "2 × A, 1 threads"}}, "2 × A, 1 threads"),  # as reports said before
        ({"meta": {}}, "4 × C"),
        ({}, "4 × C"),
    ],
)
def test_the_origin_names_machines_as_a_report_does(report: dict, told: str, tmp_path: Path) -> None:
    write_json(tmp_path / NOTES, {"hardware": "4 × C"})
    write_json(tmp_path / "report.json", report)
    write_json(tmp_path / NOTES, _provenance(tmp_path))
    assert Origin.of(tmp_path, tmp_path).text.endswith(f" minutes on {told}")


def test_a_study_s_base_is_a_run_again(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, run = tmp_path / "base.zip", tmp_path / "runs" / "base"
    assert main(["bundle", str(mini_run), "--out", str(bundle), "--for_study"]) == 0
    assert main(["unbundle", str(bundle), str(run)]) == 0
    assert main(["unbundle", str(bundle), str(run)]) == 1
    assert "exists already: name another folder" in capsys.readouterr().err
    whole, base = read_run(mini_run), read_run(run)
    assert list(base.priors) == ["linear", "text", "ceiling"]
    assert base.store == ""
    codecs = [EmbeddingCodec(str(root / "codec.safetensors")) for root in (mini_run, run)]
    assert torch.equal(codecs[0].mean, codecs[1].mean)
    for a, b, root in ((whole.clip, base.clip, run), (whole.judge, base.judge, run)):
        assert a is not None
        assert b is not None
        assert a.within(mini_run).load().fingerprint == b.within(root).load().fingerprint
    images = [Unclip.load(root).generate(["a ring"], prior="linear").images for root in (mini_run, run)]
    torch.testing.assert_close(*images, rtol=0, atol=0.01)
    assert base_hash(run) == base_hash(find_run(bundle)) != base_hash(mini_run)


def test_a_bundle_of_an_unpacked_bundle_says_the_same(bundle: Path, tmp_path: Path) -> None:
    assert main(["unbundle", str(bundle), str(tmp_path / "run")]) == 0
    assert main(["bundle", str(tmp_path / "run"), "--out", str(tmp_path / "again.zip")]) == 0
    first, second = (zipfile.ZipFile(path) for path in (bundle, tmp_path / "again.zip"))
    assert first.namelist() == second.namelist()
    told = [json.loads(archive.read(NOTES)) | {"bundled": ""} for archive in (first, second)]
    assert told[0] == told[1]


def test_others_may_read_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert bundle.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_without_a_run_the_package_draws(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(bundle, weights / "shapes.zip")
    shutil.copy(bundle, weights / "mine.zip")
    monkeypatch.setattr(runs, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()  # no run: the name is that of the weights
    for words in ([], ["--run", "mine"]):
        assert main(["sample", "a small green ring on a black background", "--num", "1", *words]) == 0
        said = capsys.readouterr().out
        assert "drawn with the weights in this package: of the run mini, trained at commit" in said
    assert main(["sample", "a small green ring on a black background", "--run", "yours"]) == 1
    assert "weights of this package (mine, shapes)" in capsys.readouterr().err
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path / "nowhere")
    assert main(["sample", "a small green ring on a black background"]) == 1
    assert "No run at runs/quickstart" in capsys.readouterr().err


def test_what_the_package_draws_is_what_the_caption_says() -> None:
    """Read back by the oracle: 16 pictures, two attributes that training has shown together and three."""
    assert runs.packaged()["shapes"].stat().st_size <= 20e6
    unclip = Unclip.load("shapes")
    drawn = unclip.generate(["a small green ring on a black background", "a large red star"], num=8, seed=0).images
    shape, color, size, _, background = ShapesOracle(32)(drawn).indices.view(2, 8, -1).unbind(-1)
    names = (list(SHAPES), list(COLORS), list(SIZES), list(BACKGROUNDS))
    ring = zip((shape[0], color[0], size[0], background[0]), names, ("ring", "green", "small", "black"), strict=True)
    star = zip((shape[1], color[1], size[1]), names[:3], ("star", "red", "large"), strict=True)
    right = torch.cat([read == known.index(said) for read, known, said in (*ring, *star)])
    assert right.float().mean() > 0.9


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 64]) + data[middle + 64 :]


@pytest.mark.parametrize(
    "damage", [lambda data: b"no bundle", lambda data: data[: len(data) // 2], lambda data: b"", flipped]
)
def test_a_damaged_bundle_is_one_line(
    damage: Callable[[bytes], bytes], bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(damage(bundle.read_bytes()))
    assert main(["sample", "a star", "--run", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"{path} is no bundle of a run, or damaged" in said
    assert said.count("\n") == 1


def rewritten(bundle: Path, path: Path, changes: dict[str, bytes | None]) -> Path:
    """The bundle with other members; None leaves one out."""
    with zipfile.ZipFile(bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def test_a_bundle_that_was_zipped_again_is_one(bundle: Path, tmp_path: Path) -> None:
    """Such a file has entries for folders."""
    path = rewritten(bundle, tmp_path / "x.zip", {"decoder/": b"", "decoder/checkpoints/": b""})
    bundles.unbundle(path, tmp_path / "run")
    assert (tmp_path / "run/decoder/checkpoints/last.ckpt").is_file()


def test_nothing_in_a_bundle_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(bundle) as archive:
        run, notes = (json.loads(archive.read(name)) for name in ("run.json", NOTES))
    run["priors"]["diffusion"] = {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}
    torch.save({"state_dict": {}}, tmp_path / "pickle")
    pickle = (tmp_path / "pickle").read_bytes()
    outside = b"{}"
    monkeypatch.setattr(bundles, "GROWTH", 0)
    with zipfile.ZipFile(bundle) as archive:
        monkeypatch.setattr(bundles, "TABLE", 2**19 + sum(member.file_size for member in archive.infolist()))
    for changes, expected in (
        ({"run.json": json.dumps(run).encode()}, "names 'subprocess.Popen'"),
        ({"run.json": None}, "is no bundle of a run, or damaged"),
        ({"./run.json": json.dumps(run).encode()}, "outside of its folder"),
        ({"RUN.json": json.dumps(run).encode()}, "two files of one name"),
        ({NOTES: b"[]"}, "is no bundle of a run, or damaged"),
        ({NOTES: json.dumps(notes | {"format": 2}).encode()}, "in format 1. Got 2: install the version"),
        ({"decoder/checkpoints/last.ckpt": pickle}, "is no bundle of a run, or damaged"),
        ({"../outside.json": outside}, "outside of its folder"),
        ({"/outside.json": outside}, "outside of its folder"),
        ({"a\\..\\outside.json": outside}, "outside of its folder"),
        ({"zeros.json": bytes(2**20)}, "times its size"),
    ):
        path = rewritten(bundle, tmp_path / "x.zip", changes)
        assert main(["sample", "a star", "--run", str(path)]) == 1
        said = capsys.readouterr().err
        assert expected in said
        assert said.count("\n") == 1
    assert not list(tmp_path.parent.glob("outside*"))


def test_one_run_at_a_time(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], [str(mini_run), str(mini_run)], [str(tmp_path)]):
        assert main(["bundle", *words]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "Expected one run" in said[0]
    assert "Expected one run" in said[1]
    assert "No run at" in said[2]


def test_the_first_bar_does_not_wait_for_torch() -> None:
    code = "import sys, unclip_pl.commands.sample, unclip_pl.commands.edit; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


BASES = sorted((Path(__file__).parents[2] / "results").glob("*/base.zip"))
#: What the bases of studies with decoders of their own keep; the others have all parts.
KEPT_PARTS = {"words": ["clip"], "binding": ["clip", "judge"]}


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.parent.name)
def test_a_committed_base_has_all_that_a_study_measures_with(path: Path) -> None:
    assert path.stat().st_size <= 25e6
    root = find_run(path)
    base, parts = read_run(root), KEPT_PARTS.get(path.parent.name, ["clip", "judge", "decoder", "codec"])
    files = {"clip": base.clip.pretrained, "decoder": base.decoder.checkpoint, "codec": "codec.safetensors"}
    files |= {"judge": base.judge.pretrained} if base.judge else {}
    assert all((root / files[part]).is_file() for part in parts)
    told = read_notes(root)
    assert told["commits"]
    assert {*parts} <= told["recipe"].keys()

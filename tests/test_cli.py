"""The command line as a user meets it: help at once, one clear line for a mistake, no traceback, nothing lost."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from unclip_pl.cli import COMMANDS, TRAINER, _spelt_out, call, main
from unclip_pl.clip.encoder import build_clip
from unclip_pl.errors import InputError, MissingFileError


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *fragments: str) -> None:
    """One line on stderr that says all of that and names --debug, and a non-zero exit."""
    assert main(words) != 0
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "--debug" in said
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("policy", ["", "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(policy: str) -> None:
    """In a process of ours, before torch is there, and in what such a process starts."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    child = "import os; print(os.environ['OMP_WAIT_POLICY'])"
    code = f"""
import subprocess, sys, unclip_pl
assert "torch" not in sys.modules
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == (policy or "PASSIVE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("trim", ["", "0"])
def test_freed_memory_is_used_again_unless_the_user_says_otherwise(trim: str) -> None:
    """Filling 64 MiB a second time touches no new page."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"MALLOC_TRIM_THRESHOLD_": trim} if trim else {}
    code = """
import resource, unclip_pl
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes([n]) * 2**23 for n in range(1, 9)]
    del blocks
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) > 32 if trim else int(done.stdout) < 8


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = "import sys, unclip_pl.cli as m; m.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in TRAINER | COMMANDS:
        assert f"  {word} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: unclip" in capsys.readouterr().out


COMPLETE = """
source "$1"
COMP_WORDS=(unclip {words}); COMP_CWORD={last}
_shtab_unclip; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_shell_completes_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print_completion", "bash"]) == 0
    (tmp_path / "unclip.bash").write_text(capsys.readouterr().out)
    for words, found in {
        "re": {"reconstruct", "report", "reproduce"},
        "pack ''": {"shapes", "folder", "coco"},
        "sample --prior_s": {"--prior_solver", "--prior_steps"},
        "sample --solver D": {"DDIM", "DPMSolver"},
        "fit --con": {"--config"},
    }.items():
        script = COMPLETE.format(words=words, last=len(words.split()))
        done = subprocess.run(["bash", "-c", script, "-", tmp_path / "unclip.bash"], capture_output=True, text=True)
        assert set(done.stdout.split()) - {"-h", "--help"} >= found, words
    refused(["--print_completion"], capsys, "Got ''", "name one of these shells")
    refused(["--print_completion", "cmd"], capsys, "bash", "Got 'cmd'")


def test_completion_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused(["--print_completion", "bash"], capsys, "pip install shtab")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["trian"], capsys, "unknown command 'trian'")


def test_unknown_config_key(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "configs/prior/tiny.yaml", "--model.init_args.text_dorp", "0.2"]
    refused(words, capsys, "text_dorp")


def test_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    refused(["fit", "--config", "configs/nowhere.yaml"], capsys, "No config at configs/nowhere.yaml")


@pytest.mark.parametrize("kind", [KeyError, TypeError, ValueError, AttributeError])
def test_an_error_of_the_program_shows_its_traceback(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise kind("stated_match")

    monkeypatch.setattr("unclip_pl.cli.call", broken)
    with pytest.raises(kind, match="stated_match"):
        main(["linear"])


@pytest.mark.parametrize("kind", [InputError, MissingFileError, OSError, yaml.YAMLError])
def test_a_mistake_of_the_user_is_one_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise kind("Expected a star.\nGot a moon.")

    monkeypatch.setattr("unclip_pl.cli.call", refuse)
    assert main(["linear"]) == 1
    assert capsys.readouterr().err == "error: Expected a star. Got a moon. (--debug shows the traceback)\n"
    with pytest.raises(kind):
        main(["linear", "--debug"])


def test_a_class_that_moved_is_one_line_with_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", "configs/prior/tiny.yaml", "--trainer.callbacks", "unclip_pl.callbacks.WarmupEMA"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "unclip_pl.callbacks.WarmupEMA is now unclip_pl.training.callbacks.WarmupEMA" in said


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["sample", "a red star", "--run", str(tmp_path)], capsys, "No run at", "reproduce")


def test_no_such_device(mini_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "a star", "--run", str(mini_run), "--device"]
    refused([*words, "abacus"], capsys, "a device of this machine. Got 'abacus'")
    if not torch.cuda.is_available():
        refused([*words, "cuda"], capsys, "Got 'cuda'")


def test_no_caption(mini_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["sample", "--run", str(mini_run)], capsys, "Expected a caption")


def test_unknown_prior(mini_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["sample", "x", "--run", str(mini_run), "--prior", "best"], capsys, "'best'", "diffusion, ar")


def test_from_is_left_out_before_paths_alone() -> None:
    def pack(paths: list[str], out: str) -> object:
        """Pack."""
        return paths, out

    def draw(captions: list[str], from_embedding: str = "") -> object:
        """Draw."""
        return captions, from_embedding

    assert call("pack", pack, ["--from", "a", "b", "--out", "c"]) == (["a", "b"], "c")
    words = ["a star", "--from", "z.safetensors"]
    assert _spelt_out(words, draw) == words  # the parser's to answer


def test_a_flag_takes_no_caption() -> None:
    def draw(captions: list[str], json: bool = False) -> object:
        """Draw."""
        return captions, json

    assert call("draw", draw, ["--json", "a red star"]) == (["a red star"], True)
    for word, value in (("true", True), ("no", False)):
        assert call("draw", draw, ["--json", word, "a red star"]) == (["a red star"], value)


def test_empty_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["precompute", "--source", str(tmp_path), "--store", str(tmp_path / "s"), "--clip.name", "tiny-rn"]
    refused(words, capsys, str(tmp_path))


def test_embeddings_of_another_clip(mini_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (mini_run / "store").iterdir()}
    words = [
        "precompute",
        "--source",
        str(mini_run / "data"),
        "--store",
        str(mini_run / "store"),
        "--clip.name",
        "tiny-rn",
    ]
    refused(words, capsys, "tiny-rn-")
    assert {path: path.read_bytes() for path in (mini_run / "store").iterdir()} == before


def test_sample_draws_the_same_bytes_for_the_same_seed(mini_run: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        words = ["sample", "a red star", "", "--run", str(mini_run), "--num", "2", "--seed", seed, "--guidance", "1.5"]
        assert main([*words, "--out", str(file)]) == 0
    a, b, c = (file.read_bytes() for file in files)
    assert a == b
    assert a != c
    assert Image.open(files[0]).text["captions"].startswith("a red star")


@pytest.mark.parametrize("out", ["one.png", "grid.png", "folder"])
def test_sample_tells_scripts_what_it_drew(
    out: str, mini_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON alone is on stdout; the score is the cosine by which candidates are chosen."""
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: shown.append(uri) or out != "folder")
    captions = ["a red star"] if out == "one.png" else ["a red star", "a blue ring"]
    num = 1 if out == "one.png" else 2
    words = ["sample", *captions, "--run", str(mini_run), "--num", str(num), "--seed", "3", "--candidates", "1"]
    assert main([*words, "--out", str(tmp_path / out), "--json", "--open"]) == 0
    said = capfd.readouterr()
    told = json.loads(said.out)
    pictures = told["pictures"]
    assert [(p["caption"], p["seed"]) for p in pictures] == [(c, 3 + i) for c in captions for i in range(num)]
    grid = {"one.png": None, "grid.png": str(tmp_path / out), "folder": f"{tmp_path / out}/grid.png"}[out]
    assert told["grid"] == grid
    assert [p["file"] is None for p in pictures] == [out == "grid.png"] * len(pictures)
    for picture in pictures:
        assert -1 <= picture["text_cos"] <= 1
        if picture["file"]:
            assert Image.open(picture["file"]).text["seed"] == str(picture["seed"])
    assert shown == [Path(grid or pictures[0]["file"]).as_uri()]
    assert "wrote" in said.err
    assert ("no program here opens" in said.err) == (out == "folder")
    from unclip_pl.generation.pipeline import Unclip

    unclip = Unclip.load(mini_run)
    z_i = unclip.generate(captions, num=num, seed=3, candidates=1).image_embed
    z_t = unclip.clip.describe(captions).embed.repeat_interleave(num, 0)
    expected = torch.nn.functional.cosine_similarity(z_i, z_t).tolist()
    assert [p["text_cos"] for p in pictures] == pytest.approx(expected, abs=1e-4)


def test_a_caption_that_is_too_long_is_cut_with_a_warning(
    mini_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["sample", "a red star " * 30, "--run", str(mini_run), "--num", "1", "--out", str(tmp_path / "x.png")]
    assert main(words) == 0
    assert "cut to CLIP's 16 tokens" in caplog.text


def fit_words(mini_run: Path, out: Path) -> list[str]:
    """One step of the tiny prior on the miniature run's data."""
    data = {"source": "data", "store": "store", "clip.pretrained": "clip/checkpoints/last.ckpt"}
    words = [
        "fit",
        "--config",
        "configs/prior/tiny.yaml",
        "--trainer.max_steps",
        "1",
        "--data.init_args.batch_size",
        "16",
    ]
    for key, value in data.items():
        words += [f"--data.init_args.{key}", f"{mini_run}/{value}"]
    return [*words, "--trainer.logger.init_args.save_dir", str(out)]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 143)])
def test_a_signal_is_no_traceback(
    name: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"{name} is not a signal of this system")
    number, before = signal.Signals[name], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("unclip_pl.cli.call", lambda *_: signal.raise_signal(number))
    for command in ("precompute", "linear"):
        assert main([command]) == status
        assert ("the same command goes on" in capsys.readouterr().err) == (command == "precompute")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_nohup_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("unclip_pl.cli.call", lambda *_: signal.raise_signal(signal.SIGHUP))
    try:
        assert main(["linear"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_bar(mini_run: Path, tmp_path: Path) -> None:
    assert main([*fit_words(mini_run, tmp_path), "--trainer.enable_progress_bar", "false"]) == 0


def test_what_lightning_refuses_is_one_line(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused([*fit_words(mini_run, tmp_path), "--trainer.limit_train_batches", "1.5"], capsys, "1.5")


def test_resuming_from_another_part(mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, fragment in (("decoder", "another network"), ("clip", "a DiffusionPriorTask")):
        checkpoint = f"{mini_run}/{part}/checkpoints/last.ckpt"
        refused([*fit_words(mini_run, tmp_path), "--ckpt_path", checkpoint], capsys, "checkpoint", fragment)
    refused([*fit_words(mini_run, tmp_path), "--ckpt_path", "nowhere.ckpt"], capsys, "No checkpoint at nowhere.ckpt")


def test_evaluation_on_embeddings_of_another_clip(
    mini_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = str(mini_run / "data"), str(tmp_path / "other.pt")
    torch.save(build_clip("tiny-rn").state_dict(), other)  # the same architecture with other weights
    words = ["precompute", "--source", source, "--store", str(tmp_path / "store"), "--clip.name", "tiny-rn"]
    assert main([*words, "--clip.pretrained", other]) == 0
    words = ["test", "--config", "configs/evaluate/prior.yaml", "--model.init_args.run", str(mini_run)]
    words += ["--data.init_args.source", source, "--data.init_args.store", str(tmp_path / "store")]
    words += ["--data.init_args.clip.pretrained", other, "--trainer.logger.init_args.save_dir", str(tmp_path)]
    refused(words, capsys, "embedding store", "tiny-rn-")

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from unclip_pl import tasks
from unclip_pl.clip.encoder import ClipSpec
from unclip_pl.diffusion import DDIM, Ancestral
from unclip_pl.errors import InputError
from unclip_pl.generation.decoding import DecoderSpec
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.unet import UNet
from unclip_pl.parts import load_part
from unclip_pl.parts.loading import part_of
from unclip_pl.tasks import ARPriorTask, ClipTask, DecoderTask, DiffusionPriorTask, EmbeddingTask, Task
from unclip_pl.training.cli import only_plain
from unclip_pl.training.resume import CheckpointFiles


def test_a_checkpoint_rebuilds_without_the_files_it_was_made_from(mini_run: Path, tmp_path: Path) -> None:
    for stage, kind in {"prior": DiffusionPriorTask, "ar_prior": ARPriorTask, "decoder": DecoderTask}.items():
        lonely = tmp_path / f"{stage}.ckpt"
        lonely.write_bytes((mini_run / stage / "checkpoints" / "last.ckpt").read_bytes())
        task = load_part(lonely, kind)
        assert not task.training
        assert task.space.embed_dim == 64
        assert task.space.fingerprint.startswith("tiny-rn-")
        assert task.record is not None
        assert task.record.steps == 2
        assert task.record.samples > 0
        assert task.record.seconds > 0


def test_every_task_has_the_part_of_its_name_and_every_prior_its_spec() -> None:
    trained = [getattr(tasks, name) for name in tasks.__all__ if name.endswith("Task")]
    trained = [kind for kind in trained if kind not in (Task, EmbeddingTask, ClipTask)]
    assert len(trained) == 6
    for kind in trained:
        part = part_of(f"unclip_pl.tasks.{kind.__name__}")
        assert part is not None
        assert issubclass(kind, part)
        assert not issubclass(part, Task)
        spec = getattr(kind, "spec", None)
        assert (spec is not None) == kind.__name__.endswith("PriorTask")
        assert spec is None or spec.part is part
    for other in ("unclip_pl.tasks.Task", "unclip_pl.tasks.ClipTask", "somebody.tasks.DecoderTask", 3):
        assert part_of(other) is None


def test_the_wrong_task(mini_run: Path) -> None:
    with pytest.raises(InputError, match=r"holds a DecoderTask\. Expected a DiffusionPriorTask"):
        load_part(mini_run / "decoder" / "checkpoints" / "last.ckpt", DiffusionPriorTask)


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        load_part(tmp_path / "none.ckpt", DecoderTask)
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_part(tmp_path / "junk.ckpt", DecoderTask)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="written by `unclip fit`"):
        load_part(tmp_path / "foreign.ckpt", DecoderTask)


class Trap:
    """Pickled, it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "sprung"))


def test_a_pickle_does_not_run(mini_run: Path, tmp_path: Path) -> None:
    sprung, crafted = tmp_path / "sprung", tmp_path / "crafted.ckpt"
    checkpoint = torch.load(mini_run / "prior" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"optimizer_states": Trap(sprung)}, crafted)
    for read in (lambda: load_part(crafted, DiffusionPriorTask), lambda: CheckpointFiles().load_checkpoint(crafted)):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            read()
    with pytest.raises(ValueError, match="no plain CLIP weights"):
        ClipSpec("tiny-rn", str(crafted)).load()
    sharded = FSDPStrategy()
    only_plain(sharded)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        sharded.load_checkpoint(crafted)
    with pytest.raises(ValueError, match="folder of shards"):
        sharded.load_checkpoint(tmp_path)
    assert not sprung.exists()


EVIL = "evil_module_of_a_test.Net"


@pytest.mark.parametrize(
    "settings",
    [
        {"net": {"class_path": EVIL, "init_args": {}}},
        {"net": EVIL},
        {"net": f" '{EVIL}' "},
        {"net": f"{{class_path: {EVIL}}}"},
        {"diffusion": {"class_path": "unclip_pl.diffusion.GaussianDiffusion", "init_args": {"schedule": EVIL}}},
        {"diffusion": {"class_path": "subprocess.Popen", "dict_kwargs": {"args": ["touch", "sprung"]}}},
        {"diffusion": {"class_path": "unclip_pl.cli.dispatch", "init_args": {"words": ["pack"]}}},
        {"diffusion": {"class_path": "unclip_pl.generation.provenance.subprocess.Popen"}},
        {"optimization": {"lr": {"class_path": EVIL}}},
        {"_class_path": EVIL},
        {"_class_path": "torch.nn.Linear"},
        {"_class_path": ["unclip_pl.tasks.DiffusionPriorTask"]},
        {"_class_path": "unclip_pl.nowhere.Task"},
    ],
    ids=str,
)
def test_a_checkpoint_does_not_say_what_is_called(
    settings: dict[str, Any], mini_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module_of_a_test.py").write_text("open('sprung', 'w')\nclass Net: pass")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(mini_run / "prior" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= settings
    torch.save(checkpoint, tmp_path / "crafted.ckpt")
    with pytest.raises(ValueError, match=r"crafted\.ckpt: the checkpoint (names|holds)"):
        load_part(tmp_path / "crafted.ckpt", DiffusionPriorTask)
    assert not (tmp_path / "sprung").exists()
    assert "evil_module_of_a_test" not in sys.modules


@pytest.mark.parametrize("net", ["unclip_pl.training.cli.UnclipCLI", "unclip_pl.nn.unet.UNet", 3, None])
def test_a_class_of_ours_in_the_wrong_place(net: Any, mini_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(mini_run / "prior" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["net"] = {"class_path": net} if isinstance(net, str) else net
    torch.save(checkpoint, tmp_path / "crafted.ckpt")
    with pytest.raises(ValueError, match="does not fit its DiffusionPriorTask"):
        load_part(tmp_path / "crafted.ckpt", DiffusionPriorTask)


class OwnNet(PriorTransformer):
    """A user's."""


class OwnTask(DiffusionPriorTask):
    """A user's."""


def test_own_classes_load_where_they_are_imported(
    mini_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or ModuleType(__name__))
    for cls in (OwnNet, OwnTask):
        monkeypatch.setattr(sys.modules[__name__], cls.__name__, cls, raising=False)
    checkpoint = torch.load(mini_run / "prior" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = f"{__name__}.OwnTask"
    checkpoint["hyper_parameters"]["net"]["class_path"] = f"{__name__}.OwnNet"
    torch.save(checkpoint, tmp_path / "own.ckpt")
    task = load_part(tmp_path / "own.ckpt", DiffusionPriorTask)
    assert (type(task).__name__, type(task.net).__name__) == ("OwnTask", "OwnNet")


def test_weights_of_another_network(mini_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(mini_run / "prior" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["net"]["init_args"]["width"] = 96
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt: The checkpoint is of another network.*size mismatch"):
        load_part(tmp_path / "other.ckpt", DiffusionPriorTask)


def test_the_average_is_what_is_loaded(mini_run: Path) -> None:
    path = mini_run / "prior" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    task = load_part(path, DiffusionPriorTask)
    name = "net.out_proj.weight"
    assert torch.equal(task.state_dict()[name], checkpoint["state_dict"][name])
    assert "current_model_state" in checkpoint


def test_no_clip_in_a_checkpoint(mini_run: Path) -> None:
    for stage in ("prior", "ar_prior", "decoder"):
        state = torch.load(mini_run / stage / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert not [name for name in state if "token_embedding" in name or "visual" in name]


def test_weights_of_another_clips_space_do_not_go_on(mini_run: Path) -> None:
    path = mini_run / "prior" / "checkpoints" / "last.ckpt"
    task, checkpoint = load_part(path, DiffusionPriorTask), torch.load(path, weights_only=True)
    task.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"]["space.fingerprint_bytes"] = torch.tensor(list(b"other-clip"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="of CLIP 'other-clip', but the data are of 'tiny-rn-"):
        task.on_load_checkpoint(checkpoint)


def test_a_sampler_of_more_steps_than_training_is_refused(mini_run: Path) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 1000 steps, the training steps\. Got 1001"):
        DiffusionPriorSpec("prior/checkpoints/last.ckpt", Ancestral(1001)).load(mini_run)
    with pytest.raises(ValueError, match=r"from 1 to 1000 steps, the training steps\. Got 1001"):
        DecoderSpec("decoder/checkpoints/last.ckpt", 32, DDIM(1001)).load(mini_run)


@pytest.mark.parametrize("name", ["text_drop", "image_drop"])
@pytest.mark.parametrize("share", [10.0, -0.1])
def test_a_share_that_is_none_is_refused(name: str, share: float) -> None:
    """10, meant as 10 %, would drop every caption."""
    net = UNet(channels=8, channel_mult=[1], attention_levels=[], embed_dim=4)
    with pytest.raises(InputError, match=rf"0 <= {name} <= 1\. Got {share}: give a share, such as 0\.1"):
        DecoderTask(net, **{name: share})


def test_a_decoder_does_not_take_a_priors_scaling() -> None:
    with pytest.raises(ValueError, match="Got 'standardize'"):
        DecoderTask(UNet(channels=8, channel_mult=[1], attention_levels=[], embed_dim=4), scaling="standardize")

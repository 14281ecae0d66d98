from pathlib import Path

import pytest
import torch

from unclip_pl.diffusion import DDIM, Ancestral, LinearSchedule
from unclip_pl.nn.unet import UNet
from unclip_pl.pipeline import Decoder
from unclip_pl.priors import DiffusionPrior
from unclip_pl.tasks import ARPriorTask, DecoderTask, DiffusionPriorTask, load_task


def test_a_checkpoint_rebuilds_without_the_files_it_was_made_from(mini_run: Path, tmp_path: Path) -> None:
    for stage, kind in {"prior": DiffusionPriorTask, "ar_prior": ARPriorTask, "decoder": DecoderTask}.items():
        lonely = tmp_path / f"{stage}.ckpt"
        lonely.write_bytes((mini_run / stage / "checkpoints" / "last.ckpt").read_bytes())
        task = load_task(lonely, kind)
        assert not task.training
        assert task.space.embed_dim == 64
        assert task.space.fingerprint.startswith("tiny-rn-")
        assert task.record is not None
        assert task.record.steps == 2
        assert task.record.seconds > 0


def test_the_wrong_task(mini_run: Path) -> None:
    with pytest.raises(TypeError, match=r"holds a DecoderTask\. Expected a DiffusionPriorTask"):
        load_task(mini_run / "decoder" / "checkpoints" / "last.ckpt", DiffusionPriorTask)


def test_no_file_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        load_task(tmp_path / "none.ckpt", DecoderTask)
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_task(tmp_path / "junk.ckpt", DecoderTask)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by `unclip fit`"):
        load_task(tmp_path / "foreign.ckpt", DecoderTask)


def test_the_average_is_what_is_loaded(mini_run: Path) -> None:
    path = mini_run / "prior" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    task = load_task(path, DiffusionPriorTask)
    name = "net.out_proj.weight"
    assert torch.equal(task.state_dict()[name], checkpoint["state_dict"][name])
    assert "current_model_state" in checkpoint


def test_no_clip_in_a_checkpoint(mini_run: Path) -> None:
    for stage in ("prior", "ar_prior", "decoder"):
        state = torch.load(mini_run / stage / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert not [name for name in state if "token_embedding" in name or "visual" in name]


def test_weights_of_another_clips_space_do_not_go_on(mini_run: Path) -> None:
    path = mini_run / "prior" / "checkpoints" / "last.ckpt"
    task, checkpoint = load_task(path, DiffusionPriorTask), torch.load(path, weights_only=True)
    task.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"]["space.fingerprint_bytes"] = torch.tensor(list(b"other-clip"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="of CLIP 'other-clip', but the data are of 'tiny-rn-"):
        task.on_load_checkpoint(checkpoint)


def test_a_sampler_of_other_noise_levels_is_refused(mini_run: Path) -> None:
    with pytest.raises(ValueError, match=r"'CosineSchedule', 1000.*Got \('LinearSchedule', 1000"):
        DiffusionPrior("prior/checkpoints/last.ckpt", Ancestral(4, schedule=LinearSchedule())).load(mini_run)
    with pytest.raises(ValueError, match=r"'CosineSchedule', 1000.*Got \('CosineSchedule', 500"):
        Decoder("decoder/checkpoints/last.ckpt", 32, DDIM(4, train_steps=500)).load(mini_run)


def test_a_decoder_cannot_ask_priors_for_the_norm() -> None:
    with pytest.raises(ValueError, match="without its norm"):
        DecoderTask(UNet(channels=8, channel_mult=[1], attention_levels=[], embed_dim=4), scaling="standardize")

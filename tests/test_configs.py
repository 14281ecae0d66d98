"""Every config parses with the real parser; every tiny one trains a few steps and reloads from its checkpoint alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file, save_file

from unclip_pl.cli import main
from unclip_pl.data.shards import index_shard
from unclip_pl.parts import count_parameters, load_part
from unclip_pl.tasks import Task
from unclip_pl.training.cli import LINKS, build
from unclip_pl.training.resume import StepCheckpoint
from unclip_pl.types import TextFeatures

SLURM = "configs/trainer/slurm.yaml"
CONFIGS = Path(__file__).parent.parent / "configs"
PARTS = ("prior", "ar_prior", "decoder", "upsampler")
TRAINING = [CONFIGS / part / "tiny.yaml" for part in PARTS]
TRAINING += [CONFIGS / part / "flow.yaml" for part in ("prior", "decoder")]
TRAINING += [CONFIGS / part / "karlo-tiny.yaml" for part in ("clip", "prior")]
TRAINING += [CONFIGS / "clip" / f"{name}.yaml" for name in ("emoji", "emoji-judge", "tiny", "tiny-judge")]
WHOLE = [*CONFIGS.glob("evaluate/*.yaml"), *CONFIGS.glob("predict/*.yaml")]
#: They need upsamplers, a set of images or imported embeddings: test_cascade.py, test_fid.py and
#: tests/interop/test_embeddings.py.
WHOLE = sorted(path for path in WHOLE if path.stem not in ("cascade", "coco-30k", "embeddings"))
#: Contenders that are laid over configs/ar_prior/matched.yaml, and those that no other test trains.
CODES, NEW = {"ar", "mixture"}, {"mixture", "flow", "mlp", "regression", "eclipse"}
#: Parameters of the diffusion prior of the rematch.
MATCHED = 1_344_064


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_tiny_config_trains_and_reloads(path: Path, mini_run: Path, tmp_path: Path) -> None:
    """What is loaded from the checkpoint alone is what was trained, to the last bit."""
    words = ["--config", str(path), "--trainer.max_steps", "3", "--data.init_args.source", f"{mini_run}/data"]
    words += ["--data.init_args.batch_size", "8", "--trainer.enable_model_summary", "false"]
    words += ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.logger.init_args.version", ""]
    words += ["--trainer.logger.init_args.name", "part", "--trainer.enable_progress_bar", "true"]
    if path.parent.name != "clip":
        clip = f"{mini_run}/clip/checkpoints/last.ckpt"
        words += ["--data.init_args.store", f"{mini_run}/store", "--data.init_args.clip.pretrained", clip]
        words += ["--data.init_args.clip.name", "tiny-rn"]
    if path.parent.name == "ar_prior":
        words += ["--model.init_args.codec", f"{mini_run}/codec.safetensors"]
    cli = build(words)
    first = {name: value.clone() for name, value in cli.model.state_dict().items()}
    cli.fit(model=cli.model, datamodule=cli.datamodule)
    trained = cli.model.state_dict()
    assert not all(torch.equal(value, first[name]) for name, value in trained.items())

    task = load_part(tmp_path / "part" / "checkpoints" / "last.ckpt", Task)
    assert task.record is not None
    assert task.record.steps == 3
    loaded = task.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("contenders/*.yaml")))
def test_a_contender_is_as_large_as_the_others_trains_and_draws(name: str, mini_run: Path, tmp_path: Path) -> None:
    """Laid over the matched config, as the recipe does; drawn as its arm says."""
    part = "ar_prior" if name in CODES else "prior"
    words = ["--config", f"configs/{part}/matched.yaml", "--config", f"configs/contenders/{name}.yaml"]
    data = ["--data.init_args.source", f"{mini_run}/data", "--data.init_args.store", f"{mini_run}/store"]
    data += ["--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
    codec = ["--model.init_args.codec", f"{mini_run}/codec.safetensors"] if part == "ar_prior" else []
    words += [*data, *codec, "--data.init_args.batch_size", "8", "--data.init_args.eval_batch_size", "8"]
    words += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2"]
    words += ["--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]
    cli = build(words)
    assert count_parameters(cli.model.net) == pytest.approx(MATCHED, rel=0.05)
    if name not in NEW:
        return
    cli.fit(model=cli.model, datamodule=cli.datamodule)
    compare = ["--config", "configs/compare/rematch-shapes.yaml", "--config", f"configs/arms/{name}.yaml"]
    prior = build([*compare, *data]).model.priors[name].load(tmp_path)
    batch = next(iter(cli.datamodule.val_dataloader()))
    drawn = [prior.embed(batch.text, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    torch.testing.assert_close(drawn[0].norm(dim=-1), torch.ones(len(batch.text.embed)))
    assert prior.num_parameters == count_parameters(cli.model.net)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_config_writes_what_is_linked(path: Path) -> None:
    linked = {target.rsplit(".", 1)[1] for _, target in LINKS} - {"name"}

    def keys(node: object) -> set[str]:
        if isinstance(node, dict):
            return set(node) | {key for value in node.values() for key in keys(value)}
        return {key for value in node for key in keys(value)} if isinstance(node, list) else set()

    assert not keys(yaml.safe_load(path.read_text())) & linked


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_several_processes_are_lightnings(
    small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = small("prior", tmp_path, "--trainer.accelerator", "cpu")
    trainer = build([*line, "--config", "configs/trainer/ddp.yaml"]).trainer
    assert isinstance(trainer.strategy, DDPStrategy)
    ids = {"LOCALID": "1", "PROCID": "3", "NODEID": "1", "NTASKS": "4", "NTASKS_PER_NODE": "2", "JOB_NAME": "fit"}
    for name, value in (ids | {"JOB_ID": "7", "NODELIST": "here", "NNODES": "2"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    # As a job's process reads it: the part's config first.
    cli = build(["--config", "configs/prior/tiny.yaml", *line[2:], "--trainer.devices", "2", "--config", SLURM])
    trainer = cli.trainer
    assert (trainer.num_nodes, trainer.world_size, trainer.global_rank, trainer.local_rank) == (2, 4, 3, 1)
    environment = trainer.strategy.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    assert (trainer.logger.name, trainer.logger.version) == ("prior-tiny", "")
    assert any(isinstance(callback, StepCheckpoint) for callback in trainer.callbacks)


def judge_weights(mini_run: Path, folder: Path) -> Path:
    """The judge's weights as open_clip would save them."""
    state = torch.load(mini_run / "judge" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    save_file(
        {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}, folder / "judge.safetensors"
    )
    return folder / "judge.safetensors"


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_evaluation_and_prediction_run(path: Path, mini_run: Path, inception: Path, tmp_path: Path) -> None:
    verb = "test" if path.parent.name == "evaluate" else "predict"
    words = [verb, "--config", str(path), "--model.init_args.run", str(mini_run), "--data.init_args.batch_size", "12"]
    words += ["--data.init_args.source", f"{mini_run}/data", "--data.init_args.store", f"{mini_run}/store"]
    words += ["--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"]
    words += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    if verb == "predict":
        words += ["--model.init_args.out", str(tmp_path / "out")]
    if path.stem == "fid":  # any open_clip model may judge, by its file: here one of ours
        words += [
            "--model.init_args.judge",
            f'{{"name": "tiny-judge", "pretrained": "{judge_weights(mini_run, tmp_path)}"}}',
        ]
        words += ["--model.init_args.inception_weights", str(inception), "--data.init_args.batch_size", "2"]
        words += ["--trainer.limit_test_batches", "2"]
    assert main(words) == 0
    if path.stem == "prior" and verb == "predict":
        (file,) = (tmp_path / "out").iterdir()
        embeds = load_file(file)["image_embed"]
        assert embeds.shape == (24, 64)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(24))
    if path.stem == "images":
        (shard,) = (tmp_path / "out").glob("*.tar")
        assert len(index_shard(shard).entries) == 24


def test_a_prior_of_ones_own_enters_by_its_class_path(mini_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(CONFIGS.parent / "examples")
    line = ["--config", "configs/compare/tiny.yaml", "--config", "examples/noisy_linear.yaml"]
    line += ["--data.init_args.source", f"{mini_run}/data", "--data.init_args.store", f"{mini_run}/store"]
    cli = build([*line, "--data.init_args.clip.pretrained", f"{mini_run}/clip/checkpoints/last.ckpt"])
    linear, noisy = (prior.load(mini_run) for prior in cli.model.priors.values())
    text = TextFeatures(torch.zeros(500, 0), torch.zeros(500, 0, 128), torch.zeros(500, 0), torch.randn(500, 64))
    mean, draws = linear.embed(text), [noisy.embed(text, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*draws)
    assert (mean * draws[0]).sum(-1).mean().item() == pytest.approx((1 + noisy.spec.noise**2) ** -0.5, abs=0.01)
    noisy.spec = replace(noisy.spec, noise=0.0)
    torch.testing.assert_close(noisy.embed(text), mean)

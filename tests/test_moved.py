"""A class path that changed is explained by its new one, and the table of them is right."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from unclip_pl.moved import MOVED, moved_in, new_name

ROOT = Path(__file__).parent.parent
#: Every class that a config, run.json or checkpoint could name before the classes moved.
BEFORE = [
    "callbacks.CompiledBlocks",
    "callbacks.SampleGrid",
    "callbacks.WarmupEMA",
    "data.datamodule.PairDataModule",
    "data.datamodule.UnclipDataModule",
    "data.text_embedding.TextEmbeddingDataModule",
    "diffusion.Ancestral",
    "diffusion.DDIM",
    "diffusion.GaussianDiffusion",
    "diffusion.LinearSchedule",
    "diffusion.PowerTime",
    "evaluation.cascade.CascadeEvaluation",
    "evaluation.cell.Cell",
    "evaluation.choose.Choice",
    "evaluation.comparison.Comparison",
    "evaluation.prediction.ImagePrediction",
    "evaluation.prediction.PriorPrediction",
    "evaluation.task.ImageEvaluation",
    "evaluation.task.PriorEvaluation",
    "nn.ar_prior.ARPriorTransformer",
    "nn.ar_prior.CosineHead",
    "nn.ar_prior.PerPositionHead",
    "nn.ar_prior.TableCodeEmbedding",
    "nn.prior.PriorTransformer",
    "nn.text.TextTransformer",
    "nn.unet.UNet",
    "nn.unet.UpsamplerUNet",
    "pipeline.Decoder",
    "pipeline.Upsampler",
    "priors.ARPrior",
    "priors.DiffusionPrior",
    "priors.LinearPrior",
    "priors.RoundTrip",
    "priors.TextEmbedding",
    "priors.TrueEmbedding",
    "resume.StepCheckpoint",
    "shapes.oracle.ShapesOracle",
    "sharding.ActivationCheckpointing",
    "sharding.FullySharded",
    "sharding.ShardedEMA",
    "tasks.ARPriorTask",
    "tasks.ClipTask",
    "tasks.DecoderTask",
    "tasks.DiffusionPriorTask",
    "tasks.UpsamplerTask",
    "tasks.corruption.BSRDegradation",
    "tasks.corruption.GaussianBlur",
    "tasks.corruption.LightBSRDegradation",
    "tasks.corruption.Sometimes",
]


def exists(path: str) -> bool:
    """Whether a dotted path is a module, or something in one."""
    module, _, name = path.rpartition(".")
    try:
        return hasattr(import_module(module), name)
    except ImportError:
        return False


@pytest.mark.parametrize("path", BEFORE)
def test_what_was_there_is_there_or_in_the_table(path: str) -> None:
    path = f"unclip_pl.{path}"
    new = new_name(path)
    assert exists(path) if new is None else (new.startswith("(") or exists(new))


@pytest.mark.parametrize("old", MOVED)
def test_the_table_leads_somewhere(old: str) -> None:
    assert not exists(old)
    new = MOVED[old]
    assert new.startswith("(") or exists(new) or import_module(new)


def test_the_changelog_has_the_same_table() -> None:
    rows = re.findall(r"^\| `(unclip_pl\.[\w.]+)` \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert {old: new.strip("`") for old, new in rows} == {old: new.strip("`()") for old, new in MOVED.items()}


def test_a_message_is_explained() -> None:
    assert moved_in("No module named 'unclip_pl.priors.DiffusionPrior'").startswith(
        "unclip_pl.priors.DiffusionPrior is now unclip_pl.generation.priors.DiffusionPriorSpec. "
    )
    assert moved_in("unclip_pl.tasks.ClipTask is fine") == ""

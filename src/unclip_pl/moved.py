"""Class paths that changed: a config, ``run.json`` or checkpoint that names an old one learns its new name."""

import re

#: Old path of a module, or of something in it -> its new path. A text in parentheses says why there is none.
#: CHANGELOG.md has the same table.
MOVED = {
    "unclip_pl.bundle": "unclip_pl.generation.bundle",
    "unclip_pl.callbacks": "unclip_pl.training.callbacks",
    "unclip_pl.checkpoint": "unclip_pl.files",
    "unclip_pl.data.atomic": "unclip_pl.files",
    "unclip_pl.data.samples": "unclip_pl.packing.samples",
    "unclip_pl.data.sources": "unclip_pl.data.shards",
    "unclip_pl.decoding": "unclip_pl.generation.decoding",
    "unclip_pl.diffusion.sampling": "unclip_pl.diffusion.solvers",
    "unclip_pl.evaluation.comparison.Comparison": "unclip_pl.evaluation.cell.Cell",
    "unclip_pl.evaluation.extractors": "unclip_pl.evaluation.fid",
    "unclip_pl.evaluation.flops": "unclip_pl.evaluation.costs",
    "unclip_pl.evaluation.provenance": "unclip_pl.generation.provenance",
    "unclip_pl.evaluation.report": "(`unclip_pl.report` has `draw`, `summary` and `log`)",
    "unclip_pl.evaluation.study": "unclip_pl.report.study",
    "unclip_pl.evaluation.task": "unclip_pl.evaluation.one_model",
    "unclip_pl.manipulation": "unclip_pl.generation.manipulation",
    "unclip_pl.nn.ar_prior.PerPositionHead": "(no config used it: take SharedHead or CosineHead)",
    "unclip_pl.nn.ar_prior.TableCodeEmbedding": "(it overfits small data: take FourierCodeEmbedding)",
    "unclip_pl.nn.files": "unclip_pl.files",
    "unclip_pl.nn.packed": "unclip_pl.nn.kernels",
    "unclip_pl.nn.recorded": "unclip_pl.nn.kernels",
    "unclip_pl.pictures": "unclip_pl.generation.pictures",
    "unclip_pl.pipeline": "unclip_pl.generation.pipeline",
    "unclip_pl.pipeline.Decoder": "unclip_pl.generation.decoding.DecoderSpec",
    "unclip_pl.pipeline.Upsampler": "unclip_pl.generation.decoding.UpsamplerSpec",
    "unclip_pl.priors": "unclip_pl.generation.priors",
    "unclip_pl.priors.ARPrior": "unclip_pl.generation.priors.ARPriorSpec",
    "unclip_pl.priors.DiffusionPrior": "unclip_pl.generation.priors.DiffusionPriorSpec",
    "unclip_pl.priors.LinearPrior": "unclip_pl.generation.priors.LinearPriorSpec",
    "unclip_pl.priors.RoundTrip": "unclip_pl.generation.priors.RoundTripSpec",
    "unclip_pl.priors.TextEmbedding": "unclip_pl.generation.priors.TextEmbeddingSpec",
    "unclip_pl.priors.TrueEmbedding": "unclip_pl.generation.priors.TrueEmbeddingSpec",
    "unclip_pl.resume": "unclip_pl.training.resume",
    "unclip_pl.sharding": "unclip_pl.training.sharding",
    "unclip_pl.sharding.ShardedEMA": "unclip_pl.training.callbacks.WarmupEMA",
    "unclip_pl.trainer_cli": "unclip_pl.training.cli",
}

_PATH = re.compile(r"\bunclip_pl(?:\.\w+)+")


def new_name(path: str) -> str | None:
    """Return the new path of a class or module, or None where the path did not change.

    Args:
        path: dotted path, such as ``unclip_pl.callbacks.WarmupEMA``.

    Returns:
        The new dotted path, or the reason in parentheses for which there is none.
    """
    parts = path.split(".")
    for length in range(len(parts), 1, -1):
        new = MOVED.get(".".join(parts[:length]))
        if new is not None:
            rest = ".".join(["", *parts[length:]])
            return new if new.startswith("(") else new_name(new + rest) or new + rest
    return None


def moved_in(message: str) -> str:
    """Return one sentence for each moved class path that a message names; empty where it names none.

    Args:
        message: text of an error, or any other text.
    """
    found = [(path, new_name(path)) for path in dict.fromkeys(_PATH.findall(message))]
    return " ".join(
        f"{path} is gone {new}." if new.startswith("(") else f"{path} is now {new}. Write the new path."
        for path, new in found
        if new is not None
    )

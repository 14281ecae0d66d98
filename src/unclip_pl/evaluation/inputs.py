"""What test-modules begin with: checks of their settings, the networks of a run, and the noise of each pair."""

from hashlib import blake2b
from typing import Any

import torch

from unclip_pl.clip import ClipEncoder, ClipSpec
from unclip_pl.data.datamodule import StoreDataModule
from unclip_pl.errors import InputError
from unclip_pl.generation.run import Parts, open_parts
from unclip_pl.types import EvaluationBatch, PriorBatch


def check_seeds(seeds: int) -> None:
    """Refuse fewer than two samples of a caption.

    Raises:
        InputError: there are fewer.
    """
    if seeds < 2:
        raise InputError(f"Expected seeds >= 2, for the cosine between two samples. Got {seeds}: give 2 or more.")


def check_judge(judge: ClipSpec | None, clip: ClipSpec | None) -> None:
    """Refuse a judge that conditions what it is to judge.

    Raises:
        InputError: judge and CLIP are the same.
    """
    if judge is not None and judge == clip:
        raise _same(clip)


def _same(clip: ClipSpec) -> InputError:
    return InputError(f"Expected another CLIP as judge than the conditioning one. Got {clip}: name a second one.")


def judge_of(module: Any, conditioning: str) -> tuple[ClipEncoder, ...]:
    """Load the judge that a test-module names, if any. A tuple keeps it out of the module tree, and of state dicts.

    Raises:
        InputError: its weights are those of the CLIP that the module's parts are conditioned by.
    """
    specs = [] if module.judge is None else [module.judge]
    judges = tuple(spec.within(module.run).load().to(module.device) for spec in specs)
    if any(judge.fingerprint == conditioning for judge in judges):
        raise _same(module.judge)
    return judges


def parts_of(module: Any, **named: Any) -> Parts:
    """Load the networks that a test-module names, and refuse to mix CLIPs, also with the embeddings that it is given.

    Args:
        module: LightningModule with a ``run`` and a ``clip``.
        **named: specs and folders, see :func:`unclip_pl.generation.run.open_parts`.
    """
    data = getattr(module.trainer, "datamodule", None)  # Lightning attaches it without declaring it
    store = data.embeddings.fingerprint if isinstance(data, StoreDataModule) else None
    return open_parts(module.run, module.clip, device=module.device, store_fingerprint=store, **named)


def streams_for(batch: PriorBatch | EvaluationBatch, *numbers: int) -> list[torch.Generator]:
    """Return a generator for each pair of a batch, which its embeddings and some numbers alone decide.

    A pair draws the same in any batch, on any rank.
    """
    pairs = torch.cat([batch.image_embed, batch.text.embed], dim=-1).float().cpu().numpy()
    key = repr(numbers).encode()
    seeds = [int.from_bytes(blake2b(pair.tobytes(), digest_size=8, key=key).digest()) for pair in pairs]
    return [torch.Generator().manual_seed(seed) for seed in seeds]

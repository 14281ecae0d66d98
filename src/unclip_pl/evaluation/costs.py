"""What a prior costs: floating-point operations, counted and not estimated, and how it was trained.

A multiply-add is two operations.
"""

import copy
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unclip_pl.generation.priors import Prior
from unclip_pl.parts import load_part
from unclip_pl.settings import read_yaml
from unclip_pl.tasks import EmbeddingTask
from unclip_pl.types import PriorBatch

#: First pairs over which operations are counted.
CAPTIONS = 8


class Cost(NamedTuple):
    """What a prior's embeddings took on this machine."""

    seconds: float = 0.0
    embeddings: int = 0
    flops: int = 0  # of one embedding

    def plus(self, seconds: float, embeddings: int) -> "Cost":
        """Return the cost with more embeddings counted in."""
        return Cost(self.seconds + seconds, self.embeddings + embeddings, self.flops)


class Training(NamedTuple):
    """How a checkpoint was trained, from the ``config.yaml`` of its fit."""

    lr: float | None = None  # Muon's, where it trains the matrices
    config_hash: str | None = None  # of model, batch size and seed; where files lie changes nothing


def training_of(folder: Path) -> Training:
    """Read how the checkpoints of a folder were trained; nothing is known where there is no ``config.yaml``."""
    path = folder / "config.yaml"
    if not path.is_file():
        return Training()
    config = read_yaml(path)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    told = {"model": model, "batch_size": data.get("batch_size"), "seed": data.get("seed")}
    rates = model.get("optimization") or {}
    return Training(rates.get("muon_lr") or rates.get("lr"), settings_hash(told))


def settings_hash(config: Any) -> str:
    """Return a hash of plain data without the files that it names."""

    def bare(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: bare(value) for key, value in node.items()}
        return "" if isinstance(node, str) and "/" in node else node

    return sha256(json.dumps(bare(config), sort_keys=True, default=str).encode()).hexdigest()[:12]


def costs_of(prior: Prior, cost: Cost, pairs: PriorBatch) -> dict[str, Any]:
    """Return what a prior's training and sampling took, as cells keep it.

    Args:
        prior: a loaded prior.
        cost: measured cost of its embeddings.
        pairs: captions and embeddings on the prior's device, for counting the operations of a training step.
    """
    record = prior.record
    task = task_of(prior.part) if prior.part is not None and record.steps else None
    flops = 0 if task is None else training_flops(task, pairs)
    return {
        "parameters": prior.num_parameters,
        "training_steps": record.steps,
        "training_samples": record.samples,
        "training_seconds": record.seconds,
        "training_flops": flops * record.samples,
        "evaluations": prior.evaluations,
        "flops_per_embedding": cost.flops,
        "seconds_per_embedding": cost.seconds / max(1, cost.embeddings),
    }


def task_of(part: Any) -> Any:
    """Return the Task that trained a part, for its loss, on the part's device.

    Args:
        part: loaded part, or what has a loss already, which is returned as it is.
    """
    if hasattr(part, "loss"):
        return part
    kind: Any = EmbeddingTask  # the checkpoint names a class of that kind
    return load_part(part.checkpoint, kind).to(part.space.mean.device)


def count_flops(work: Callable[[], Any]) -> int:
    """Return the operations of all matrix products and convolutions that ``work`` computes.

    Attention runs as plain matrix products meanwhile: PyTorch's counter passes over the fused kernels of a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def sampling_flops(prior: Prior, pairs: PriorBatch) -> int:
    """Return the operations of one embedding, counted over the first few captions."""
    few = first_pairs(pairs, CAPTIONS)
    work = count_flops(lambda: prior.embed_batch(few, generator=torch.Generator().manual_seed(0)))
    return work // len(few.image_embed)


def training_flops(task: EmbeddingTask, pairs: PriorBatch) -> int:
    """Return the operations of one training sample, forward and backward, counted over the first few pairs."""
    with torch.inference_mode(False), torch.enable_grad():
        # A test runs in inference mode, whose tensors know no gradients: copies do.
        copied = copy.deepcopy(task)
        few = first_pairs(pairs, CAPTIONS)
        few = PriorBatch(few.image_embed.clone(), type(few.text)(*(part.clone() for part in few.text)))
        work = count_flops(lambda: copied.loss(few, torch.Generator().manual_seed(0)).backward())
    return work // len(few.image_embed)


def first_pairs(pairs: PriorBatch, n: int) -> PriorBatch:
    """Return the first n pairs."""
    return PriorBatch(pairs.image_embed[:n], pairs.text.rows(slice(n)))

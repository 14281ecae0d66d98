"""Guided sampling of the diffusion prior against diffusers' PriorTransformer with the same weights.

Both run what their users run: ours ``DiffusionPrior.embed``, theirs the loop of UnCLIPPipeline, whose scheduler draws
the same noise from the same generator. Karlo's shape scaled to fit: 512 × 6, 77 + 4 tokens, CLIP of 768.
"""

from collections.abc import Callable

import torch
from measure import Row, expect_equal, faster, fastest, floor, flops, growth, show, side_by_side
from parts import stored_space
from peers import KarloPrior
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.diffusion import Ancestral
from unclip_pl.generation.priors import DiffusionPrior, DiffusionPriorSpec
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.types import TextFeatures

D, CONTEXT, WIDTH, LAYERS, HEADS = 768, 77, 512, 6, 8
GUIDANCE = 4.0


def captions(n: int, length: int = CONTEXT) -> TextFeatures:
    """Features of n captions that fill the context."""
    g = torch.Generator().manual_seed(n)
    states, embed = torch.randn(n, length, D, generator=g), torch.randn(n, D, generator=g)
    return TextFeatures(
        torch.ones(n, length, dtype=torch.int64), states, torch.ones(n, length, dtype=torch.bool), embed
    )


def task() -> DiffusionPriorTask:
    """With random weights."""
    net = PriorTransformer(D, D, CONTEXT, WIDTH, LAYERS, HEADS)
    return DiffusionPriorTask(net, stored_space(D, D)).eval()


def sampler(prior_task: DiffusionPriorTask, steps: int, candidates: int = 1) -> DiffusionPrior:
    """Ours, ready to embed."""
    return DiffusionPrior(DiffusionPriorSpec("", Ancestral(steps), GUIDANCE, candidates), prior_task)


def ours(prior: DiffusionPrior, text: TextFeatures) -> Callable[[], Tensor]:
    return lambda: prior.embed(text, generator=torch.Generator().manual_seed(0))


def against_diffusers(prior_task: DiffusionPriorTask, batch: int, steps: int, target: float) -> Row:
    text = captions(batch)
    space = prior_task.space
    theirs = KarloPrior(prior_task.net, steps, GUIDANCE)
    scaled, null = space.scale_text(text), space.scale_text(space.null_text)
    call = ours(sampler(prior_task, steps), text)

    def peer() -> Tensor:
        return F.normalize(theirs.sample(scaled, null, torch.Generator().manual_seed(0)), dim=-1)

    equal = expect_equal(call(), peer(), 1e-4)
    seconds = side_by_side({"ours": call, "diffusers": peer}, rounds=2)
    speed = floor().flops(flops(call) / seconds["ours"])
    return faster(f"prior sampling, batch {batch}, {steps} steps", seconds, "diffusers", target, f"{equal}; {speed}")


def rows() -> list[Row]:
    """Time of z_i for a batch of captions, and how it grows with steps, candidates and batch."""
    prior_task = task()
    measured = [
        against_diffusers(prior_task, 8, 25, 10),
        against_diffusers(prior_task, 8, 64, 12),
        against_diffusers(prior_task, 1, 25, 4),
        against_diffusers(prior_task, 1, 64, 4),
    ]
    grids = {
        "steps (batch 8)": [(8, n, 1) for n in (16, 32, 64)],
        "candidates (batch 8, 25 steps)": [(8, 25, n) for n in (1, 2, 4, 8)],
        "batch (25 steps)": [(n, 25, 1) for n in (4, 8, 16, 32)],
    }
    for index, (what, settings) in zip((1, 2, 0), grids.items(), strict=True):
        seconds = [fastest(ours(sampler(prior_task, s, c), captions(b)), rounds=1) for b, s, c in settings]
        measured.append(growth(f"prior sampling with {what}", [setting[index] for setting in settings], seconds))
    return measured


if __name__ == "__main__":
    show(rows)

"""A training step of the diffusion prior on the same tokens: diffusers' PriorTransformer with the same weights, and
dalle2-pytorch's DiffusionPrior of the same size.

Forward, backward and AdamW, every caption with all 77 tokens and one draw of noise. Karlo's shape scaled to fit:
512 × 6, 77 + 4 tokens, CLIP of 512, which is also the only width dalle2-pytorch can have.
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import Row, expect_equal, faster, floor, flops, limits, show, side_by_side
from parts import stored_space, training_step
from peers import KarloPrior, dalle2_prior
from torch import Tensor, nn

from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.parts import count_parameters
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.types import PriorBatch, TextFeatures

D, CONTEXT, WIDTH, LAYERS, HEADS, BATCH = 512, 77, 512, 6, 8, 16


def batch() -> PriorBatch:
    """Captions that fill the context."""
    g = torch.Generator().manual_seed(2)
    states, embed, image = (torch.randn(BATCH, *shape, generator=g) for shape in ((CONTEXT, D), (D,), (D,)))
    mask = torch.ones(BATCH, CONTEXT, dtype=torch.bool)
    return PriorBatch(image, TextFeatures(mask.long(), states, mask, embed))


def outputs_equal(task: DiffusionPriorTask, theirs: KarloPrior, given: PriorBatch) -> str:
    """Say how far our network's outputs lie from diffusers' at the same noised embeddings; refuse if they differ."""
    index = torch.linspace(0, 999, BATCH)
    text = given.text
    with torch.no_grad():
        ours = task.net(given.image_embed[:, None], index[:, None], task.net.encode_prefix(text))[:, 0]
        peer = theirs(given.image_embed, index, text)
    return expect_equal(ours, peer, 1e-4)


def rows() -> list[Row]:
    """Milliseconds of a step, in float32 and in bfloat16."""
    task = DiffusionPriorTask(PriorTransformer(D, D, CONTEXT, WIDTH, LAYERS, HEADS), stored_space(D, D))
    theirs = KarloPrior(task.net, 25, 1.0)
    dalle2 = dalle2_prior(count_parameters(task.net), D, LAYERS, HEADS, CONTEXT)
    given = batch()
    equal = outputs_equal(task, theirs, given)

    def dalle2_loss(module: Any, given: PriorBatch) -> Tensor:
        return module(
            image_embed=given.image_embed.clone(), text_embed=given.text.embed, text_encodings=given.text.states
        )

    sides: dict[str, tuple[nn.Module, Callable[[Any, PriorBatch], Tensor]]] = {
        "ours": (task, lambda module, given: module.loss(given)),
        "diffusers": (theirs, lambda module, given: module.loss(given)),
        "dalle2-pytorch": (dalle2, dalle2_loss),
    }
    sizes = f"{count_parameters(task.net) / 1e6:.1f} M parameters against {count_parameters(dalle2) / 1e6:.1f} M"
    measured = []
    for bf16 in (False, True):
        steps = {name: training_step(*side, given, bf16=bf16) for name, side in sides.items()}
        work = flops(steps["ours"])
        for name in ("diffusers", "dalle2-pytorch"):
            steps[name]()
        seconds = side_by_side(steps, rounds=6)
        speed = floor().flops(work / seconds["ours"], bf16=bf16)
        kind = "bf16" if bf16 else "float32"
        limit = f"{sizes}; {limits(steps['ours'], seconds, 'dalle2-pytorch')}"
        for peer, target, note in (("diffusers", 1.05, f"{equal}; {speed}"), ("dalle2-pytorch", 1.35, limit)):
            measured.append(
                faster(
                    f"prior training step, {kind}, batch {BATCH} × 81 tokens, against {peer}",
                    seconds,
                    peer,
                    target,
                    note,
                )
            )
    return measured


if __name__ == "__main__":
    show(rows)

"""The decoder against diffusers' UNet2DConditionModel with the same weights and dalle2-pytorch's Unet of the same size.

A training step is forward, backward and AdamW. Each side runs in the precision and memory format that is fastest for
it, found here first. Sampling is 27 steps with guidance, compared in float32 and timed in each side's fastest
precision. Karlo's shape scaled to fit: 64 channels × 1, 2, 3, 4, one residual block a level.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from measure import Row, clock, expect_equal, faster, fastest, floor, flops, growth, limits, shares, show, side_by_side
from parts import stored_space, training_step
from peers import KarloDecoder, dalle2_decoder
from torch import Tensor, nn

from unclip_pl.diffusion import Ancestral
from unclip_pl.generation.decoding import Decoder, DecoderSpec
from unclip_pl.nn.unet import UNet
from unclip_pl.parts import count_parameters
from unclip_pl.tasks import DecoderTask
from unclip_pl.types import DecoderBatch, TextFeatures

D, CONTEXT, HEAD, LENGTH, BATCH, GUIDANCE = 256, 192, 64, 13, 8, 2.0
STEPS = 27
PRECISIONS: tuple[Literal["32-true", "bf16-mixed"], ...] = ("32-true", "bf16-mixed")


def task() -> DecoderTask:
    """With random weights, drawing by the mean alone as both peers are set to."""
    net = UNet(
        out_channels=3,
        channels=64,
        res_blocks=1,
        embed_dim=D,
        text_width=D,
        context_width=CONTEXT,
        text_embed_in_time=True,
        dropout=0.0,
    )
    return DecoderTask(net, stored_space(D, D), scaling="raw")


def batch(side: int) -> DecoderBatch:
    g = torch.Generator().manual_seed(2)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    states, embed = torch.randn(BATCH, LENGTH, D, generator=g), torch.randn(BATCH, D, generator=g)
    image = torch.randn(BATCH, 3, side, side, generator=g).clamp(-1, 1)
    return DecoderBatch(image, torch.randn(BATCH, D, generator=g), TextFeatures(mask.long(), states, mask, embed))


def training(
    module: nn.Module, loss: Callable[[Any, DecoderBatch], Tensor], given: DecoderBatch, bf16: bool, format: Any
) -> Callable[[], None]:
    """A training step in a memory format."""
    given = given._replace(image=given.image.contiguous(memory_format=format))
    return training_step(copy.deepcopy(module).to(memory_format=format), loss, given, bf16=bf16)


def best_step(
    module: nn.Module, loss: Callable[[Any, DecoderBatch], Tensor], given: DecoderBatch
) -> tuple[str, Callable[[], None]]:
    """The fastest of two precisions and two memory formats, and its name."""
    found = {}
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    for bf16, (name, format) in product((False, True), formats.items()):
        step = training(module, loss, given, bf16, format)
        step()
        start = clock()
        step()
        found[clock() - start] = (f"{'bf16' if bf16 else 'float32'} {name}", step)
    return found[min(found)]


def losses(ours: DecoderTask, side: int, theirs: KarloDecoder) -> dict[str, tuple[nn.Module, Callable[..., Tensor]]]:
    dalle2 = dalle2_decoder(count_parameters(ours.net), side, D, CONTEXT, HEAD)

    def dalle2_loss(module: Any, given: DecoderBatch) -> Tensor:
        return module(given.image, image_embed=given.image_embed, text_encodings=given.text.states)

    return {
        "ours": (ours, lambda module, given: module.loss(given)),
        "diffusers": (theirs, lambda module, given: module.loss(given)),
        "dalle2-pytorch": (dalle2, dalle2_loss),
    }


def training_rows(ours: DecoderTask, theirs: KarloDecoder, side: int, rounds: int) -> tuple[list[Row], float]:
    given = batch(side)
    index = torch.linspace(0, 999, BATCH)
    with torch.no_grad():
        condition = ours.net.encode_condition(given.image_embed, given.text, torch.ones(BATCH, dtype=torch.bool))
        out = theirs(given.image, index, given.image_embed, given.text)
        equal = expect_equal(ours.net(given.image, index, condition), out, 1e-4)
    sides = losses(ours, side, theirs)
    work = {name: flops(training(*pair, given, False, torch.contiguous_format)) for name, pair in sides.items()}
    found = {name: best_step(*pair, given) for name, pair in sides.items()}
    seconds = side_by_side({name: step for name, (_, step) in found.items()}, rounds)
    share, _ = shares(found["ours"][1])
    speed = floor().flops(work["ours"] / seconds["ours"], bf16="bf16" in found["ours"][0])
    notes = {
        "diffusers": f"{equal}; {found['ours'][0]} against {found['diffusers'][0]}; {speed}",
        "dalle2-pytorch": f"{found['dalle2-pytorch'][0]}; {count_parameters(ours.net) / 1e6:.1f} M parameters "
        f"against {count_parameters(sides['dalle2-pytorch'][0]) / 1e6:.1f} M; "
        + limits(found["ours"][1], seconds, "dalle2-pytorch"),
    }
    targets = {"diffusers": 1.15, "dalle2-pytorch": 1.3}
    name = f"decoder training step, {side} px, batch {BATCH}, against "
    rows = [faster(name + peer, seconds, peer, targets[peer], note) for peer, note in notes.items()]
    ours_work, their_work = work["ours"] / 1e9, work["dalle2-pytorch"] / 1e9
    speeds = (ours_work / seconds["ours"], their_work / seconds["dalle2-pytorch"])
    note = f"a network's shape decides it, and ours is Karlo's; {speeds[0]:.0f} against {speeds[1]:.0f} GFLOP/s"
    by_flop = their_work / ours_work
    rows.append(Row(f"{name}dalle2-pytorch, by FLOP", ours_work, their_work, "GFLOP", by_flop, 1.3, note))
    what = f"decoder training step, {side} px: share outside convolutions and matmuls"
    rows.append(Row(what, 100 * (1 - share), None, "%", None, 20, found["ours"][0]))
    return rows, seconds["ours"]


def sampling_rows(ours: DecoderTask, theirs: KarloDecoder, side: int) -> list[Row]:
    given = batch(side)
    dalle2 = dalle2_decoder(count_parameters(ours.net), side, D, CONTEXT, HEAD).eval()
    decoders = {
        how: Decoder(DecoderSpec("", side, Ancestral(STEPS), GUIDANCE, precision=how), ours.eval())
        for how in PRECISIONS
    }
    theirs.eval()
    space = ours.space
    z_i, text, null = space.scale(given.image_embed), space.scale_text(given.text), space.scale_text(space.null_text)

    def draw(precision: str) -> Tensor:
        stream = torch.Generator().manual_seed(0)
        return decoders[precision].decode(given.image_embed, given.text, generator=stream)

    def draw_diffusers(precision: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return theirs.sample(z_i, text, null, side, STEPS, GUIDANCE).clamp(-1, 1)

    def draw_dalle2(precision: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return dalle2.sample(image_embed=given.image_embed, text_encodings=given.text.states, cond_scale=GUIDANCE)

    # The first step divides by α = 5e-5 and clips: rounding decides the side that a few values of it fall on.
    same = ((draw("32-true") - draw_diffusers("32-true")).abs() < 1e-3).float().mean().item()
    assert same > 0.99, f"only {same:.1%} of the values drawn are equal to 1e-3"
    sides = {"ours": draw, "diffusers": draw_diffusers, "dalle2-pytorch": draw_dalle2}
    calls = {(name, how): partial(call, how) for how, (name, call) in product(PRECISIONS, sides.items())}
    every = side_by_side(calls, rounds=1)
    best = {name: min(PRECISIONS, key=lambda how, name=name: every[name, how]) for name in sides}
    seconds = {name: every[name, how] for name, how in best.items()}
    work = {name: flops(partial(call, "32-true")) for name, call in sides.items()}
    speed = floor().flops(work["ours"] / seconds["ours"], bf16=best["ours"] == "bf16-mixed")
    name = f"decoder sampling, {side} px, batch {BATCH}, {STEPS} steps guided, against "
    notes = {
        "diffusers": f"{same:.1%} of the values equal to 1e-3 in float32; "
        f"{best['ours']} against {best['diffusers']}; {speed}",
        "dalle2-pytorch": f"{best['dalle2-pytorch']}; as many parameters, "
        f"{work['ours'] / 1e9:,.0f} GFLOP against {work['dalle2-pytorch'] / 1e9:,.0f}; "
        + limits(calls["ours", best["ours"]], seconds, "dalle2-pytorch"),
    }
    targets = {"diffusers": 1.15, "dalle2-pytorch": 1.5}
    return [faster(name + peer, seconds, peer, targets[peer], note) for peer, note in notes.items()]


def rows() -> list[Row]:
    """Milliseconds of a training step and of drawing a batch, and how a step grows with the side."""
    ours = task()
    theirs = KarloDecoder(ours.net, 1, CONTEXT, HEAD)
    measured, times = [], []
    for side, rounds in ((32, 4), (64, 2)):
        more, seconds = training_rows(ours, theirs, side, rounds)
        measured += more
        times.append(seconds)
    measured += sampling_rows(ours, theirs, 32)
    _, smallest = best_step(*losses(ours, 16, theirs)["ours"], batch(16))
    times.insert(0, fastest(smallest))
    measured.append(growth("decoder training step with pixels (batch 8)", [16**2, 32**2, 64**2], times))
    return measured


if __name__ == "__main__":
    show(rows)

"""Token states on the fly: what encoding a batch's captions costs beside the training step of a prior.

Captions have 12 tokens. FLOPs are counted without computing anything. At the size of configs/prior/small.yaml both
sides are also timed, in seconds of the processor.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import Row, flops, show
from open_clip.transformer import Transformer

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec, architecture
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.types import TextFeatures

BATCH, TOKENS, ROUNDS = 32, 12, 3
#: CLIP of a config, its width, layers, heads and draws of a caption.
SIZES: dict[str, tuple[str, int, int, int, int]] = {
    "paper": ("paper-vit-h-16", 2048, 24, 32, 1),
    "small": ("ViT-B-32", 512, 12, 8, 4),
}


def step(size: str) -> Callable[[], None]:
    """Return a call that does forward and backward of a prior's network, on the present device."""
    name, width, layers, heads, draws = SIZES[size]
    spec = ClipSpec(name)
    net = PriorTransformer(spec.embed_dim, spec.text_width, spec.context_length, width, layers, heads)
    text = captions(spec)

    def train() -> None:
        x_t, index = torch.zeros(BATCH, draws, spec.embed_dim), torch.zeros(BATCH, draws)
        net(x_t, index, net.encode_prefix(text)).sum().backward()

    return train


def captions(spec: ClipSpec) -> TextFeatures:
    """Captions of one length, on the present device."""
    tokens = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    tokens[:, -1] = 49407  # CLIP's end
    states, embed = torch.zeros(BATCH, TOKENS, spec.text_width), torch.zeros(BATCH, spec.embed_dim)
    return TextFeatures(tokens, states, torch.ones(BATCH, TOKENS, dtype=torch.bool), embed)


def share_of_flops(size: str) -> float:
    """FLOPs of a text tower's forward pass, as a share of the prior's forward and backward."""
    text: dict[str, Any] = architecture(SIZES[size][0])["text_cfg"]
    with torch.device("meta"):
        tower = Transformer(text["width"], text["layers"], text["heads"])
        states = torch.zeros(BATCH, TOKENS, text["width"])
        return flops(lambda: tower(states)) / flops(step(size))


def share_of_time() -> float:
    """Processor seconds of encoding a batch's captions, as a share of those of the small prior's step."""
    train, spec = step("small"), ClipSpec("ViT-B-32")
    encoder, text = ClipEncoder(spec), captions(spec)
    calls: list[Callable[[], Any]] = [lambda: encoder.with_states(text), train]
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS + 1):  # the sides take turns; the first turn warms up
        for call, found in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
    encoding, training = (min(found[1:]) for found in seconds)
    return encoding / training


def rows() -> list[Row]:
    """Shares of a step."""
    note = "text tower's forward / prior's forward and backward, 12 tokens a caption"
    paper, small = (Row(f"states on the fly, {s}", share_of_flops(s), None, "FLOPs", None, None, note) for s in SIZES)
    note = f"encoding / training step of {BATCH} captions, processor seconds"
    return [paper, small, Row("states on the fly, small", share_of_time(), None, "time", None, None, note)]


if __name__ == "__main__":
    show(rows)

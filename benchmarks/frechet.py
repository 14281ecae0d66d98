"""Fréchet distance of 2,048 features and 10,000 samples a side against torchmetrics' FrechetInceptionDistance.

Both start from the features: the Inception network in front costs both the same and has nothing to do with it.
"""

import itertools

import torch
from measure import Row, clock, floor, show
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from unclip_pl.metrics import FrechetDistance

FEATURES, SAMPLES, BATCH = 2048, 10_000, 500


class Given(nn.Module):
    """Stands where torchmetrics wants Inception: the "images" are features already."""

    num_features = FEATURES

    def forward(self, x: Tensor) -> Tensor:
        return x


def features(seed: int) -> Tensor:
    """Correlated and of decaying variance, as those of a network are."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, FEATURES + 1) ** -0.5
    mix = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0)))[0]
    return (torch.randn(SAMPLES, FEATURES, generator=g) * scale) @ mix + 0.1 * seed


def rows() -> list[Row]:
    """Seconds of update and compute together, and of each."""
    real, fake = features(1), features(2)
    theirs: FrechetInceptionDistance = FrechetInceptionDistance(Given(), input_img_size=(FEATURES,), normalize=True)
    ours = FrechetDistance(FEATURES)
    turns: dict[str, list[tuple[float, float, float]]] = {"ours": [], "torchmetrics": []}
    for _, (name, metric) in itertools.product(range(2), (("ours", ours), ("torchmetrics", theirs))):
        metric.reset()
        start = clock()
        for side, is_real in ((real, True), (fake, False)):
            for batch in side.split(BATCH):
                metric.update(batch, real=is_real)
        middle = clock()
        value = metric.compute()
        turns[name].append((clock() - start, middle - start, value.item()))
    a, b = (min(turn) for turn in turns.values())
    difference = abs(a[2] - b[2]) / b[2]
    assert difference < 1e-4, f"distances {a[2]} and {b[2]} differ by {difference:.1e}"
    seen = 2 * 2 * SAMPLES * FEATURES**2  # of which ours, being symmetric, does half
    note = f"equal to {difference:.0e}; update {a[1]:.2f} against {b[1]:.2f} s (theirs {floor().flops(seen / b[1])}), "
    note += f"compute {a[0] - a[1]:.2f} against {b[0] - b[1]:.2f} s; all in float64"
    return [Row("Fréchet distance, 2,048 × 10,000", a[0], b[0], "s", b[0] / a[0], 2.8, note)]


if __name__ == "__main__":
    show(rows)

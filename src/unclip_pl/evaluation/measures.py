"""Name what a comparison reports: labels, directions, and how each number is printed."""

import math
from typing import Literal, NamedTuple

from unclip_pl.metrics.interval import Interval, share_interval


class Measure(NamedTuple):
    """One column of the report."""

    group: str
    label: str
    better: Literal["higher", "lower", "neither"]
    what: str  # a sentence for the reader
    percent: bool = False
    digits: int = 3
    any_space: bool = False  # whether samples in the spaces of two CLIPs may be compared by it

    def show(self, value: float) -> str:
        """Return the number in the report's digits."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """Return a difference in the report's digits, with its sign."""
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.{self.digits}f}"

    def interval(self, value: dict[str, float | None]) -> str:
        """Return the interval in brackets; empty where there is none."""
        low, high = value["low"], value["high"]
        return "" if low is None or high is None else f"[{self.show(low)}, {self.show(high)}]"

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label}{' %' if self.percent else ''}"

    @property
    def heading(self) -> str:
        """Label, unit and direction."""
        arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[self.better]
        return f"{self.title}{arrow}"


MEASURES: dict[str, Measure] = {
    "stated_match": Measure(
        "Caption match",
        "stated attributes",
        "higher",
        "Share of the attributes stated by a caption that the oracle reads back from its image.",
        percent=True,
    ),
    "captions_right": Measure(
        "Caption match",
        "captions right",
        "higher",
        "Share of the captions of which every stated attribute is right.",
        percent=True,
    ),
    "unseen_match": Measure(
        "Caption match",
        "unseen pairs",
        "higher",
        "Stated attributes again, of the captions alone that state a (shape, colour) pair which training never showed.",
        percent=True,
    ),
    "clip_score": Measure(
        "Caption match",
        "CLIP score",
        "higher",
        "100 · cos of image and caption, in the eyes of the judge: a CLIP that no part was trained with.",
        digits=1,
    ),
    "retrieval_r1": Measure("Caption match", "R@1", "higher", "R@10 with the true image nearest of all.", percent=True),
    "retrieval_r5": Measure(
        "Caption match", "R@5", "higher", "R@10 with the true image among the five nearest.", percent=True
    ),
    "retrieval_r10": Measure(
        "Caption match",
        "R@10",
        "higher",
        "Share of the images by which the judge finds the caption's true image among the ten nearest real ones. A "
        "caption that leaves much open has many right images, of which only one is the true one.",
        percent=True,
    ),
    "residual": Measure(
        "Realism",
        "residual",
        "lower",
        "RMS distance (pixels in [0, 1]) to the nearest picture that the renderer can draw.",
        digits=4,
    ),
    "fd_judge": Measure(
        "Realism",
        "FD, judge",
        "lower",
        "Fréchet distance between decoded and real images, in the judge's unit-norm features. Not FID, and comparable "
        "only at this number of images.",
        digits=4,
    ),
    "precision": Measure(
        "Realism",
        "precision",
        "higher",
        "Share of decoded images inside the k = 3 nearest-neighbour balls of the real ones (judge's features).",
        percent=True,
    ),
    "density": Measure(
        "Realism",
        "density",
        "higher",
        "How many of the real images' balls hold a decoded image, over k: precision that weighs how dense the real "
        "images lie there; about 1 where decoded images lie as real ones do.",
    ),
    "recall": Measure(
        "Diversity",
        "recall",
        "higher",
        "Share of real images inside the k = 3 nearest-neighbour balls of the decoded ones (judge's features).",
        percent=True,
    ),
    "coverage": Measure(
        "Diversity",
        "coverage",
        "higher",
        "Share of the real images' balls with a decoded image inside: recall that outliers do not raise.",
        percent=True,
    ),
    "diversity_gap": Measure(
        "Diversity",
        "diversity gap",
        "lower",
        "How far the unstated attributes of the images of one caption are distributed from the truth (total "
        "variation), less what as many true draws would score: 0 is as diverse as the data.",
    ),
    "vendi": Measure(
        "Diversity",
        "Vendi score",
        "higher",
        "Effective number of different images among those of one caption (judge's features).",
        digits=2,
    ),
    "intra_distance": Measure(
        "Diversity",
        "distance within",
        "higher",
        "1 − mean cosine of two different images of one caption (judge's features). More is not truer.",
    ),
    "embed_fd": Measure(
        "Embeddings",
        "FD, embeddings",
        "lower",
        "Fréchet distance between sampled and true unit-norm embeddings of all held-out rows: no decoder involved.",
        digits=4,
    ),
    "probe_match": Measure(
        "Embeddings",
        "stated, by probes",
        "higher",
        "Share of the stated attributes that linear probes, fitted on real embeddings, read from a sampled one.",
        percent=True,
        any_space=True,
    ),
    "text_cos": Measure(
        "Embeddings",
        "cos to caption",
        "neither",
        "Mean z_i·z_t of a sample and its caption, in the CLIP that conditions. Real pairs lie well below 1.",
    ),
    "cos_true": Measure(
        "Embeddings",
        "cos to true",
        "neither",
        "Mean cosine of a sample and the true embedding. More is not better: the mean of all right answers, which is "
        "no answer, has the highest. A calibrated prior has cos to true = cos between samples.",
    ),
    "cos_samples": Measure(
        "Embeddings",
        "cos between samples",
        "neither",
        "Mean cosine of two samples of one caption, an estimate of ‖E[z | caption]‖²; 1 is a deterministic prior.",
    ),
    "mean_norm": Measure(
        "Embeddings",
        "norm of the mean",
        "neither",
        "‖E[z | caption]‖, from the cosine between samples: the cosine to the true embedding that the mean itself has "
        "for a calibrated prior.",
    ),
    "cos_mean": Measure(
        "Embeddings",
        "cos of the mean",
        "neither",
        "Cosine of the mean of a caption's S samples and the true embedding. Calibrated: its square is cos to true, as "
        "S grows; S times that, over 1 + (S − 1) · cos between samples, with few.",
    ),
    "calibration_gap": Measure(
        "Embeddings",
        "gap",
        "neither",
        "cos to true − cos between samples: 0 is calibrated, below 0 too sure of itself, above 0 too spread.",
    ),
}
GROUPS = tuple(dict.fromkeys(measure.group for measure in MEASURES.values()))


def plain(interval: Interval) -> dict[str, float | None]:
    """Return an interval as JSON takes it, which knows no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}


def within_shares(interval: Interval, count: int) -> Interval:
    """Return the interval of a share inside [0, 1].

    Args:
        interval: mean and ends, which may lie outside.
        count: captions behind it, where they are counted one by one. If all of them were answered alike, the interval
            is Wilson's: no spread is no certainty.
    """
    mean, low, high = interval
    if count > 1 and low == high and mean in (0.0, 1.0):
        mean, low, high = share_interval(mean, count)
    return Interval(mean, low if math.isnan(low) else max(0.0, low), high if math.isnan(high) else min(1.0, high))

"""What the paper (and its best-known successor) says of priors, each beside what this run found.

A verdict comes from a 95 % interval: "agrees" or "disagrees" where it leaves the balance point out, else "undecided".
"""

from typing import Any, Literal, NamedTuple

Verdict = Literal["agrees", "disagrees", "undecided", "not measured"]


class Claim(NamedTuple):
    """One line of the report."""

    claim: str
    source: str
    paper: str
    ours: str
    verdict: Verdict


def claims(report: dict[str, Any]) -> list[dict[str, str]]:
    """All claims that the report can speak to.

    Args:
        report: as :func:`unclip_pl.evaluation.assemble.assemble` makes it.
    """
    found = [_codec(report)]
    if report["head_to_head"]:
        ours = [_training(report), _text(report), _linear(report), _cosine(report)]
        found = [*_table_1(report), *_distances(report), *ours, *found]
    return [claim._asdict() for claim in found if claim]


def verdict(interval: dict[str, float | None] | None, balance: float, *, above: bool) -> Verdict:
    """Does the interval lie wholly on the claimed side of the balance point?"""
    if interval is None or interval["low"] is None or interval["high"] is None:
        return "not measured"
    if interval["low"] > balance:
        return "agrees" if above else "disagrees"
    if interval["high"] < balance:
        return "disagrees" if above else "agrees"
    return "undecided"


def _table_1(report: dict[str, Any]) -> list[Claim]:
    """Table 1 has each prior against GLIDE; differences of its rows are ours, the rows taken as independent."""
    first, rates = report["head_to_head"]["first"], report["head_to_head"]["win_rates"]
    rows = (
        ("Photorealism: the diffusion prior is better", "+1.8 ± 4.4 points (48.9 against 47.1 %)", "residual"),
        (
            "Caption similarity: the diffusion prior is better",
            "+4.2 ± 4.2 points (45.3 against 41.1 %)",
            "stated_match",
        ),
        ("Caption similarity, by a judge", "the same", "clip_score"),
        ("Diversity: the diffusion prior is better", "+7.9 ± 4.1 points (70.5 against 62.6 %)", "vendi"),
        ("Diversity, against the true distribution", "the same", "diversity_gap"),
    )
    return [
        Claim(
            claim,
            "Table 1, wins over GLIDE",
            paper,
            f"{first} wins {_percent(rates[name])} of captions head to head ({name})",
            verdict(rates[name], 0.5, above=True),
        )
        for claim, paper, name in rows
        if name in rates
    ]


def _distances(report: dict[str, Any]) -> list[Claim]:
    first, second = report["head_to_head"]["first"], report["head_to_head"]["second"]
    found = []
    for measure, what in (("fd_judge", "of images"), ("embed_fd", "of embeddings, which no decoder can hide")):
        values = [report["priors"][name]["metrics"][measure]["mean"] for name in (first, second)]
        difference = report["differences"][measure][f"{first} - {second}"]
        found.append(
            Claim(
                f"Fréchet distance {what}: the diffusion prior is lower",
                "Table 2, zero-shot FID",
                "10.39 against 10.63, no interval given",
                f"{values[0]:.4f} against {values[1]:.4f}, paired difference {_signed(difference)}",
                verdict(difference, 0.0, above=False),
            )
        )
    return found


def _training(report: dict[str, Any]) -> Claim:
    """What the configs allot is no measurement of what a prior needs: that takes curves at matched quality."""
    first, second = (report["priors"][report["head_to_head"][side]] for side in ("first", "second"))
    times = first["training_seconds"], second["training_seconds"]
    samples = first["seconds_per_embedding"], second["seconds_per_embedding"]
    return Claim(
        "The diffusion prior needs less training compute",
        "Table 3",
        "600 K against 1 M iterations at equal batch size; no FLOPs, no wall clock",
        f"{times[0]:.0f} s against {times[1]:.0f} s of training, as the configs set it; "
        f"{1e3 * samples[0]:.1f} ms against {1e3 * samples[1]:.1f} ms an embedding",
        "not measured",
    )


def _text(report: dict[str, Any]) -> Claim | None:
    """§5.1."""
    first = report["head_to_head"]["first"]
    difference = report["differences"]["fd_judge"].get(f"text - {first}")
    if difference is None:
        return None
    values = [report["priors"][name]["metrics"]["fd_judge"]["mean"] for name in ("text", first)]
    return Claim(
        "A prior is better than feeding the decoder the text embedding",
        "§5.1, FID",
        "16.55 without a prior, 7.99 with one",
        f"Fréchet distance {values[0]:.4f} without, {values[1]:.4f} with; paired difference {_signed(difference)}",
        verdict(difference, 0.0, above=True),
    )


def _linear(report: dict[str, Any]) -> Claim | None:
    """Kandinsky's surprise."""
    first = report["head_to_head"]["first"]
    difference = report["differences"]["fd_judge"].get(f"linear - {first}")
    if difference is None:
        return None
    values = [report["priors"][name]["metrics"]["fd_judge"]["mean"] for name in ("linear", first)]
    return Claim(
        "A linear map is the prior with the lowest FID",
        "Kandinsky, arXiv 2310.03502",
        "8.03 against 9.86 of the diffusion prior, which has the better CLIP score and human votes",
        f"Fréchet distance {values[0]:.4f} against {values[1]:.4f}; paired difference {_signed(difference)}",
        verdict(difference, 0.0, above=False),
    )


def _cosine(report: dict[str, Any]) -> Claim | None:
    """Not of the paper: a closed form that many replications stumble over."""
    priors, first = report["priors"], report["head_to_head"]["first"]
    if "linear" not in priors:
        return None
    linear, sampled = (priors[name]["metrics"]["cos_true"] for name in ("linear", first))
    apart = {"low": linear["low"] - sampled["high"], "high": linear["high"] - sampled["low"]}
    return Claim(
        "The cosine to the true embedding is highest for the prior that answers with the mean",
        "identity: E cos = ‖m‖² for samples, ‖m‖ for their mean m",
        "the paper gives no cosine",
        f"linear {linear['mean']:.3f}, {first} {sampled['mean']:.3f}",
        verdict(apart, 0.0, above=True),
    )


def _codec(report: dict[str, Any]) -> Claim | None:
    codec = report["codec"]
    if codec is None:
        return None
    axes, width = codec["axes_for_99"], codec["embed_dim"]
    few = f"{axes} of {width} do" if axes else f"{codec['code_length']} of {width} do not"
    return Claim(
        "A third of the principal components holds 99 % of the variance of z_i",
        "§2.2",
        "319 of 1,024 lose < 1 %, with a CLIP trained by SAM",
        f"{few}; the codec keeps {codec['code_length']} and loses {100 * codec['pca_error']:.2f} %, "
        f"round-trip cosine {codec['roundtrip_cosine']:.4f} with {codec['buckets']} buckets",
        "agrees" if axes and axes <= 0.4 * width else "disagrees",
    )


def _percent(interval: dict[str, float]) -> str:
    return f"{100 * interval['mean']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _signed(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"

"""Each claim of the paper beside what a study measured. A verdict comes from a 95 % interval over training seeds and
captions: it holds, or does not, where the interval leaves the balance point out; else it cannot be told at this scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
UNMEASURED = "not measured in this study"


class StudyClaim(NamedTuple):
    """One line of the claims table."""

    claim: str
    source: str
    paper: str
    ours: str
    verdict: str
    why: str


def study_claims(report: dict[str, Any]) -> list[dict[str, str]]:
    """Every claim; what was not measured cannot be told.

    Args:
        report: as :func:`unclip_pl.evaluation.study.study_report` makes it.
    """
    makers: tuple[Callable[[dict[str, Any]], StudyClaim], ...] = (
        _realism, _caption, _diversity, _distance, _compute, _text, _trained_on_text, _zero_shot_text, _caption_only,
        _x0, _best_of_two, _dot_half, _axes, _sam, _prior_guidance, _analytic, _linear, _cosine,
    )  # fmt: skip
    return [maker(report)._asdict() for maker in makers]


def verdict(interval: dict[str, Any] | None, *, above: bool, balance: float = 0.0) -> str:
    """Does the interval lie wholly on the claimed side of the balance point?"""
    if not interval or interval.get("low") is None:
        return OPEN
    if interval["low"] > balance:
        return HOLDS if above else FAILS
    if interval["high"] < balance:
        return FAILS if above else HOLDS
    return OPEN


def _won(report: dict[str, Any], measures: tuple[str, ...], claim: str, paper: str, why: str) -> StudyClaim:
    """By head-to-head win rates on the first measure there is."""
    best, matched = report["head_to_head"], report["head_to_head_matched"]
    name = next((name for name in measures if best and name in best["win_rates"]), None)
    if best is None or name is None:
        return StudyClaim(claim, "Table 1, wins over GLIDE", paper, UNMEASURED, OPEN, why)
    rate = best["win_rates"][name]
    ours = f"{name}: the diffusion prior wins {_percent(rate)} of the captions, each prior at its best (sign test p = "
    ours += f"{rate['p']:.2g})"
    if matched and name in matched["win_rates"]:
        ours += f"; {_percent(matched['win_rates'][name])} matched"
    return StudyClaim(claim, "Table 1, wins over GLIDE", paper, ours, verdict(rate, above=True, balance=0.5), why)


def _realism(report: dict[str, Any]) -> StudyClaim:
    return _won(
        report,
        ("residual",),
        "Photorealism: the diffusion prior's images are preferred",
        "48.9 against 47.1 %: +1.8 ± 4.4 points",
        "An exact oracle measures how far an image is from anything the renderer draws, where the paper asked "
        "humans. The decoder is shared, so only what the embedding asks for differs. Without an oracle nobody can "
        "say.",
    )


def _caption(report: dict[str, Any]) -> StudyClaim:
    return _won(
        report,
        ("stated_match", "clip_score"),
        "Caption similarity: the diffusion prior's images are preferred",
        "45.3 against 41.1 %: +4.2 ± 4.2 points",
        "Stated attributes are read back where there is an oracle, else a judge CLIP scores; most captions are ties, "
        "which draw the rate to a half.",
    )


def _diversity(report: dict[str, Any]) -> StudyClaim:
    return _won(
        report,
        ("diversity_gap", "vendi"),
        "Diversity: the diffusion prior's images are preferred",
        "70.5 against 62.6 %: +7.9 ± 4.1 points",
        "Where the true distribution is known, diverse means distributed as it is; a prior can also be too diverse, "
        "which humans beside a grid cannot see. Guidance chosen on validation data costs either prior diversity.",
    )


def _apart(
    report: dict[str, Any], measure: str, a: str, b: str, claim: str, source: str, paper: str, why: str, *, above: bool
) -> StudyClaim:
    """By the paired difference a − b of two rows."""
    difference = report["differences"].get(measure, {}).get(f"{a} - {b}")
    if difference is None:
        return StudyClaim(claim, source, paper, UNMEASURED, OPEN, why)
    values = [_row(report, name)["metrics"][measure] for name in (a, b)]
    first, second = a.rpartition("/")[2], b.rpartition("/")[2]
    ours = f"{measure}: {first} {_number(values[0])}, {second} {_number(values[1])}, difference {_signed(difference)}"
    return StudyClaim(claim, source, paper, ours, verdict(difference, above=above), why)


def _distance(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "diffusion", "ar",
        "Images drawn through the diffusion prior have the lower FID", "Table 2, zero-shot",
        "10.39 against 10.63, no interval",
        "A judge's features instead of Inception's, which knows neither our shapes nor emoji; equal numbers of "
        "images.",
        above=False,
    )  # fmt: skip


def _compute(report: dict[str, Any]) -> StudyClaim:
    """More efficient: no worse after less arithmetic, at equally many samples."""
    claim, source, paper = (
        "The diffusion prior needs less training compute", "§5.1, Table 3",
        "600 K against 1 M iterations at equal batch size; no FLOPs, no wall clock",
    )  # fmt: skip
    names = [
        name if name in report["priors"] else name.partition(" (")[0]
        for name in ("diffusion (matched)", "ar (matched)")
    ]
    why = (
        "Matched: equally many samples, parameters within 10 %. A training FLOP count includes attention. How the "
        "quality of either grows with more compute is not measured, only this budget."
    )
    if any(name not in report["priors"] for name in names):
        return StudyClaim(claim, source, paper, UNMEASURED, OPEN, why)
    ours, theirs = (report["priors"][name] for name in names)
    difference = report["differences"]["embed_fd"].get(f"{names[0]} - {names[1]}")
    if not theirs["training_flops"] or difference is None:
        return StudyClaim(claim, source, paper, UNMEASURED, OPEN, why)
    ratio = ours["training_flops"] / theirs["training_flops"]
    text = (
        f"{ours['training_samples']:,.0f} against {theirs['training_samples']:,.0f} samples cost "
        f"{ours['training_flops']:.2g} "
        f"against {theirs['training_flops']:.2g} FLOPs ({ratio:.2f}×), {ours['training_seconds']:.0f} against "
        f"{theirs['training_seconds']:.0f} s; embed_fd differs by {_signed(difference)}. A sample costs "
        f"{ours['flops_per_embedding']:.2g} against {theirs['flops_per_embedding']:.2g} FLOPs"
    )
    better = verdict(difference, above=False)
    if better == OPEN:
        return StudyClaim(claim, source, paper, text, OPEN, why)
    # Less arithmetic and better: it holds. More and worse: it does not. Else two things pull two ways.
    agree = (better == HOLDS) == (ratio < 1)
    return StudyClaim(claim, source, paper, text, better if agree else OPEN, why)


def _text(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "text", "diffusion",
        "A prior is better than feeding the decoder the text embedding", "§5.1",
        "FID 16.55 without a prior, 7.99 with one",
        "The same decoder, trained on z_i; z_t lies elsewhere in the space.", above=True,
    )  # fmt: skip


def _trained_on_text(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "need/decoder trained on z_t", "need/generated z_i",
        "A prior and a decoder of z_i are better than a decoder trained on z_t", "§5.1", "FID 9.16 against 7.99",
        "Two decoders of one budget, each given the embeddings it was trained on, whitened by their own "
        "statistics.", above=True,
    )  # fmt: skip


def _zero_shot_text(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "need/z_t in place of z_i", "need/decoder trained on z_t",
        "A decoder must be trained on z_t to be fed with it", "§5.1", "FID 16.55 untrained, 9.16 trained",
        "The same two decoders.", above=True,
    )  # fmt: skip


def _caption_only(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "need/caption only", "need/z_t in place of z_i",
        "The caption alone, z_i dropped, draws worst of all", "§5.1, Fig. 8", "shown, no number",
        "z_i is dropped from a tenth of training only, and kept from captions of which half are dropped "
        "as well: this arm had the least training, here as in the paper.", above=True,
    )  # fmt: skip


def _ablated(
    report: dict[str, Any], title: str, measures: tuple[str, ...], claim: str, source: str, paper: str, why: str
) -> StudyClaim:
    """By an ablation's paired difference, of the first measure there is."""
    found = next((line for line in report["ablations"] if line["title"] == title), None)
    name = next((name for name in measures if found and name in found["measures"]), None)
    if found is None or name is None:
        return StudyClaim(claim, source, paper, UNMEASURED, OPEN, why)
    line = found["measures"][name]
    ours = (
        f"{name}: {found['paper']} {_number(line['paper'])}, {found['other']} {_number(line['other'])}, difference "
        f"{_signed(line['difference'])} over {len(found['seeds'])} training seeds"
    )
    better_above = name in ("probe_match", "stated_match", "clip_score")
    return StudyClaim(claim, source, paper, ours, verdict(line["difference"], above=better_above), why)


def _x0(report: dict[str, Any]) -> StudyClaim:
    return _ablated(
        report, "prediction", ("embed_fd",),
        "Predicting z_i itself is better than predicting the noise", "§2.2", "said, no number",
        "Same network, data, noise levels and steps.",
    )  # fmt: skip


def _best_of_two(report: dict[str, Any]) -> StudyClaim:
    return _ablated(
        report, "best of 2", ("probe_match", "embed_fd"),
        "Keeping the sample with the larger z_i·z_t of two improves quality", "§2.2", "said, no number",
        "Read as caption match where attributes are known. It makes samples of one caption more alike, which a "
        "distance between distributions may not forgive.",
    )  # fmt: skip


def _dot_half(report: dict[str, Any]) -> StudyClaim:
    return _ablated(
        report, "dot token above 50 or 95 %", ("embed_fd",),
        "The dot-product token is best drawn from its top half", "§2.2, footnote",
        "50 % best of 50, 70, 85, 95 % in all runs",
        "Judged by the embeddings' distribution, against the far end of the paper's sweep; the curve has the points "
        "between.",
    )  # fmt: skip


def _analytic(report: dict[str, Any]) -> StudyClaim:
    return _ablated(
        report, "analytic variance, 8 steps", ("embed_fd",),
        "The analytic variance serves a sampler of few steps better than a fixed one", "App. C",
        "used at 64 steps, no number",
        "At 8 steps, where a variance matters; c_t from validation errors, without guidance.",
    )  # fmt: skip


def _prior_guidance(report: dict[str, Any]) -> StudyClaim:
    return _ablated(
        report, "prior guidance, diffusion", ("embed_fd",),
        "Guiding the prior hurts", "§5.5", "said of aesthetic quality, no number",
        "Aesthetics are not measured: this is the distribution of embeddings at guidance 1 against 2. Caption match "
        "may well rise meanwhile, see the curve.",
    )  # fmt: skip


def _axes(report: dict[str, Any]) -> StudyClaim:
    """By the spectrum alone: no interval, so only a clear answer counts."""
    claim, paper = (
        "A third of the principal axes holds 99 % of the variance of z_i",
        "319 of 1,024, CLIP trained with SAM",
    )
    why = "One CLIP, of far fewer dimensions and much simpler pictures than the paper's."
    space = report["spaces"].get("the study's CLIP")
    if not space:
        return StudyClaim(claim, "§2.2", paper, UNMEASURED, OPEN, why)
    share = space["axes_for_99"] / space["embed_dim"]
    ours = f"{space['axes_for_99']} of {space['embed_dim']} axes ({share:.0%})"
    ours += f"; effective rank {space['effective_rank']:.1f}"
    return StudyClaim(claim, "§2.2", paper, ours, HOLDS if share <= 0.35 else FAILS if share >= 0.5 else OPEN, why)


def _sam(report: dict[str, Any]) -> StudyClaim:
    """One CLIP on either side has no interval: a change of less than a fifth cannot be told from another seed's."""
    claim, paper = "CLIP trained with SAM spans a space of drastically lower rank", "said, no number without SAM"
    why = "One CLIP with SAM and one without, of equally many steps: what another seed would change is not in it."
    found = [report["spaces"].get(name) for name in ("with SAM", "without SAM")]
    if not all(found):
        return StudyClaim(claim, "§2.2", paper, UNMEASURED, OPEN, why)
    ranks = [space["effective_rank"] for space in found if space]
    axes = [space["axes_for_99"] for space in found if space]
    ours = f"effective rank {ranks[0]:.1f} with, {ranks[1]:.1f} without; axes for 99 %: {axes[0]} and {axes[1]}"
    ratio = ranks[0] / ranks[1]
    return StudyClaim(claim, "§2.2", paper, ours, HOLDS if ratio < 0.8 else FAILS if ratio > 1.0 else OPEN, why)


def _linear(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "fd_judge", "linear", "diffusion",
        "A linear map is the prior with the lower FID", "Kandinsky, arXiv 2310.03502",
        "8.03 against 9.86 of the diffusion prior, which has the better CLIP score and human votes",
        "Not of this paper, but it questions whether a prior must sample at all. The map answers with the mean.",
        above=False,
    )  # fmt: skip


def _cosine(report: dict[str, Any]) -> StudyClaim:
    return _apart(
        report, "cos_true", "linear", "diffusion",
        "Cosine to the true embedding is highest for a prior that answers with the mean", "identity: ‖m‖ against ‖m‖²",
        "the paper gives no cosine; replications report little else",
        "Cosine alone rewards collapse: read it beside the cosine between samples.", above=True,
    )  # fmt: skip


def _row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return report["need"][name.removeprefix("need/")] if name.startswith("need/") else report["priors"][name]


def _percent(interval: dict[str, Any]) -> str:
    return f"{100 * interval['mean']:.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _number(interval: dict[str, Any]) -> str:
    return f"{interval['mean']:.4f}"


def _signed(interval: dict[str, Any]) -> str:
    if interval["low"] is None:
        return "unknown"
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"

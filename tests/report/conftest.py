"""A study whose truth is known, written as cells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unclip_pl.evaluation.sheet import FORMAT, Sheet

CAPTIONS, MANY, RESAMPLES = 40, 6, 20
#: Mean of each per-caption measure for the diffusion prior, and how much less good the AR prior is.
VALUES = {
    "stated_match": (0.95, -0.03), "captions_right": (0.85, -0.06), "clip_score": (65.0, -2.0),
    "residual": (0.05, 0.004), "retrieval_r1": (0.2, -0.02), "precision": (0.9, -0.02), "recall": (0.8, 0.02),
}  # fmt: skip
SPREAD = {"vendi": (4.0, 0.3), "diversity_gap": (0.1, -0.01), "intra_distance": (0.4, 0.05)}
EMBEDDED = {
    "embed_fd": (0.010, 0.003), "fd_judge": (0.04, 0.01), "cos_true": (0.70, -0.06), "cos_samples": (0.78, -0.09),
    "kid_judge": (1e-3, 4e-4), "embed_kid": (3e-4, 1e-4), "told_apart": (0.60, 0.06), "dot_obedience": (0.1, 0.0),
    "nats": (40.0, 1.0),
    "cos_mean": (0.80, -0.02), "calibration_gap": (-0.08, 0.03), "text_cos": (0.8, -0.04), "probe_match": (0.97, -0.02),
}  # fmt: skip
SIZES = {"diffusion": (1.92e6, 3.0e13, 1.3e9, 128), "ar": (1.9e6, 5.0e13, 1.6e8, 33)}
ROWS = ["a <b>red</b> star", "a ring", "a big & blue heart"]


def arm(name: str, seed: int, worse: float = 0.0, *, drawn: bool = True) -> dict[str, Any]:
    """Measurements of one arm: ``worse`` 0 is the diffusion prior, 1 the AR prior. Captions share their difficulty."""
    shared = torch.Generator().manual_seed(99)
    hard, own = torch.randn(CAPTIONS, generator=shared), torch.Generator().manual_seed(1000 * seed + len(name))
    values, resamples = {}, {}
    for measure, (mean, apart) in {**VALUES, **SPREAD}.items():
        size = MANY if measure in SPREAD else CAPTIONS
        noise = hard[:size] + torch.randn(size, generator=own) + torch.randn(1, generator=own)
        values[measure] = (mean + worse * apart + 0.1 * abs(apart) * noise).tolist()
    for measure, (mean, apart) in EMBEDDED.items():
        noise = torch.randn(1, generator=own) + torch.cat([torch.zeros(1), torch.randn(RESAMPLES, generator=shared)])
        resamples[measure] = (mean + worse * apart + 0.1 * abs(apart) * noise).tolist()
    parameters, training, sampling, evaluations = SIZES.get(name, (0, 0.0, 0, 0))
    return {
        "values": values if drawn else {}, "resamples": resamples, "class": "Prior", "reference": name == "ceiling",
        "parameters": parameters, "training_steps": 940 if parameters else 0,
        "training_samples": 60160 if parameters else 0,
        "training_seconds": 130.0 + seed, "training_flops": training, "lr": 1e-3 if parameters else None,
        "config_hash": f"hash of {name}" if parameters else None, "evaluations": evaluations,
        "flops_per_embedding": sampling, "seconds_per_embedding": 0.01,
        "sampling": {"class": "Prior", "guidance": 1.5, "candidates": 2} if parameters else {"class": "Prior"},
    }  # fmt: skip


def write_cell(folder: Path, file: str, seed: int, arms: dict[str, Any], **fields: Any) -> None:
    """One file, with a picture where something was drawn.

    Args:
        folder: folder of the study.
        file: name of the cell.
        seed: its training seed.
        arms: its arms by name.
        **fields: other fields of the cell.
    """
    drawn = any(found["values"] for found in arms.values())
    pictures = {"grid": {"rows": ROWS, "columns": ["real", *arms]}} if drawn else {}
    for labels in pictures.values():
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(3, len(labels["columns"]), 3, 8, 8, generator=generator) * 2 - 1
        Sheet(images, **labels).save(folder / "cells" / f"{file}.png")
    cell = {
        "format": FORMAT, "kind": "prior", "title": "", "series": "", "x": None, "seed": seed, "base": "base",
        "counts": {
            "rows": 64, "captions": CAPTIONS if drawn else 0, "many": MANY, "seeds": 2, "resamples": RESAMPLES,
            "many_samples": 4,
        },
        "pictures": pictures, "settings": {"decoder": {"class": "DecoderSpec", "guidance": 2.0}},
        "space": {"embed_dim": 64, "axes_for_99": 20, "effective_rank": 20.0}, "foundations": None, "arms": arms,
        "meta": {"commit": "0123456789ab", "hardware": "2 × Example CPU", "versions": {"python": "3.11"}},
        **fields,
    }  # fmt: skip
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "cells" / f"{file}.json").write_text(json.dumps(cell))


def write_study(folder: Path, seeds: int = 3) -> Path:
    """Cells of every kind."""
    for seed in range(seeds):
        for kind in ("matched", "prior"):
            for name, worse in (("diffusion", 0.0), ("ar", 1.0)):
                write_cell(folder, f"{kind}-{name}-{seed}", seed, {name: arm(name, seed, worse)}, kind=kind)
        references = (("linear", 0.3), ("text", 3.0), ("ceiling", -0.5))
        write_cell(folder, f"reference-{seed}", seed, {name: arm(name, seed, worse) for name, worse in references})
        needs = {"caption only": 4.0, "z_t in place of z_i": 3.0, "decoder trained on z_t": 1.0, "generated z_i": 0.5}
        for name, worse in needs.items():
            fields = {"kind": "table", "title": "Is a prior needed?", "series": name}
            write_cell(folder, f"need-{name}-{seed}", seed, {"text": arm("text", seed, worse)}, **fields)
        for title, series, points in (
            ("prior guidance", "diffusion", {"1": 0.0, "2": 0.5, "4": 2.0}),
            ("prior guidance", "ar", {"1": 1.0, "2": 0.9}),
            ("sampling steps", "fixed", {"1": -2.0, "8": 1.0, "64": 0.0}), ("sampling steps", "analytic", {"8": 0.4}),
            ("candidates", "diffusion", {"1": 0.3, "2": 0.0}),
            ("dot quantile", "ar", {"0": 1.0, "0.5": 0.9, "0.7": 1.1, "0.85": 1.2, "0.95": 1.4}),
        ):  # fmt: skip
            arms = {x: arm(x, seed, worse, drawn=False) for x, worse in points.items()}
            fields = {"kind": "curve", "title": title, "series": series}
            write_cell(folder, f"curve-{title}-{series}-{seed}", seed, arms, **fields)
        for title, ours, theirs in (("prediction", "x0", "eps"), ("SAM", "with SAM", "without SAM")):
            for name, worse in ((ours, 0.0), (theirs, 1.0)):
                space = {"embed_dim": 64, "axes_for_99": 20, "effective_rank": 12.0 if name == "with SAM" else 20.0}
                fields = {"kind": "ablation", "title": title, "series": name, "space": space}
                fields |= {"base": name} if title == "SAM" else {}
                arms = {"diffusion": arm(name, seed, worse, drawn=False)}
                write_cell(folder, f"{title}-{name}-{seed}", seed, arms, **fields)
    best = folder / "best"
    best.mkdir(exist_ok=True)
    trial = {"joint_fd": 0.02, "embed_fd": 0.01, "text_cos": 0.7, "retrieval_r10": 0.4}
    choice = {"prior": "diffusion", "learning_rates": {"0.001": trial}, "guidance": {"1": trial, "1.5": trial}}
    (best / "diffusion.json").write_text(json.dumps({**choice, "chosen": {"lr": 0.001, "guidance": 1.5}}))
    return folder


@pytest.fixture(name="write_cell", scope="session")
def _write_cell() -> Callable[..., None]:
    return write_cell


@pytest.fixture(name="arm", scope="session")
def _arm() -> Callable[..., dict[str, Any]]:
    return arm


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"))

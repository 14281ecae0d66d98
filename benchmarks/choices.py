"""Measure choices of the paper beside their alternatives on a run of the quickstart; writes results/choices.

python benchmarks/choices.py variance   # variance of the reverse steps: small, large, analytic
python benchmarks/choices.py buckets    # buckets of the AR prior's codec: uniform, quantile
python benchmarks/choices.py rank --clip plain=PATH sam=PATH   # rank of CLIP's space, with checkpoints of ClipTask
"""

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unclip_pl.clip import ClipSpec
from unclip_pl.data.pairs import PairStore
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion import Ancestral
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.generation.provenance import provenance
from unclip_pl.metrics import FrechetDistance
from unclip_pl.metrics.clip_score import retrieval_recall
from unclip_pl.nn.codec import EmbeddingCodec
from unclip_pl.parts import load_part
from unclip_pl.tasks import ClipTask

OUT = Path(__file__).parent.parent / "results" / "choices"


def batches_of(rows: np.ndarray) -> list[RowBatch]:
    """In order, first captions."""
    return [RowBatch(part, np.zeros(len(part), np.uint64)) for part in np.array_split(rows, -(-len(rows) // 256))]


def variance(run: Path) -> list[dict[str, Any]]:
    """``embed_fd`` of one sample for each of 4,096 captions in 5 steps, by variance; the same noise for all three.

    Captions of the training split: a distance between 1,024 held-out embeddings is mostly the bias of so few.
    """
    prior = DiffusionPriorSpec("prior/checkpoints/last.ckpt", candidates=1).load(run)
    task, store = prior.part, EmbeddingStore(run / "store", str(run / "data"), image_size=1)
    if task.diffusion.posterior_mse is None:  # a checkpoint from before it was kept: estimate it as validation does
        task.draws_per_caption = 8
        unseen = [store.prior_batch(rows) for rows in batches_of(store.rows(Split.VAL))]
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.validate(task, DataLoader(unseen, batch_size=None), verbose=False)
    train = store.rows(Split.TRAIN)
    batches, others = ([store.prior_batch(rows) for rows in batches_of(part)] for part in (train[:4096], train[-4096:]))
    floor = FrechetDistance(task.space.embed_dim)
    for real, parts in ((True, batches), (False, others)):
        for batch in parts:
            floor.update(F.normalize(batch.image_embed.float(), dim=-1), real=real)
    rows: list[dict[str, Any]] = [{"embed_fd": floor.compute().item(), "of": "4,096 other true embeddings"}]
    for seed, kind in product(range(2), ("small", "large", "analytic")):
        prior.sampler = Ancestral(5, kind)  # type: ignore[arg-type]
        metric, generator, cosines = FrechetDistance(task.space.embed_dim), torch.Generator().manual_seed(seed), []
        for batch in batches:
            z_i = prior.embed(batch.text, generator=generator)
            true = F.normalize(batch.image_embed.float(), dim=-1)
            metric.update(true, real=True)
            metric.update(z_i, real=False)
            cosines.append((z_i * true).sum(-1))
        row = {"steps": 5, "variance": kind, "seed": seed, "embed_fd": metric.compute().item()}
        rows.append({**row, "cos_true": torch.cat(cosines).mean().item()})
        print(rows[-1], flush=True)
    return rows


def buckets(run: Path) -> list[dict[str, Any]]:
    """Round trip of embeddings that the codec was not fitted on, by spacing and number of buckets; 32 axes."""
    store = EmbeddingStore(run / "store", str(run / "data"), image_size=1)
    unseen = torch.cat([image for split in (Split.VAL, Split.HELDOUT) for image, _ in store.embed_chunks(split)])
    rows = []
    for count, spacing in product((16, 64, 256, 1024), ("uniform", "quantile")):
        codec = EmbeddingCodec.fit(
            lambda: store.embed_chunks(Split.TRAIN),
            fingerprint=store.fingerprint,
            code_length=32,
            buckets=count,
            spacing=spacing,  # type: ignore[arg-type]
        )
        codes, cosine = codec.encode(unseen), codec.roundtrip_cosine(unseen)
        used = torch.stack([column.bincount(minlength=count) for column in codes.T]).double() / len(codes)
        rows.append(
            {
                "buckets": count,
                "spacing": spacing,
                "pca_error": codec.pca_error(unseen).item(),
                "quantisation_error": codec.quantisation_error(unseen).item(),
                "roundtrip_cosine": cosine.mean().item(),
                "roundtrip_cosine_worst_percent": cosine.quantile(0.01).item(),
                "bits_per_code": -(used * used.clamp(min=1e-12).log2()).sum(1).mean().item(),
            }
        )
        print(rows[-1])
    return rows


@torch.no_grad()
def rank(run: Path, clips: dict[str, Path]) -> list[dict[str, Any]]:
    """How many dimensions the image embeddings of the validation split fill, and how well they find their captions."""
    clip = ClipSpec("tiny-rn")
    store = PairStore(str(run / "data" / "val-*.tar"), clip.load().tokenize, image_size=clip.image_size)
    rows = []
    for name, path in clips.items():
        task = load_part(path, ClipTask)
        image, text, losses = [], [], []
        for batch in map(store.batch, batches_of(store.rows(Split.VAL))):
            z_i, z_t, _ = task.net(task.preprocess(batch.image), batch.tokens)
            image.append(z_i)
            text.append(z_t)
            losses.append(task.loss(batch))
        rows.append(
            {
                "clip": name,
                "sam_rho": task.sam_rho,
                "steps": task.record.steps,
                "val_loss": torch.stack(losses).mean().item(),
                "retrieval_at_1": float(retrieval_recall(torch.cat(image), torch.cat(text), 1)),
                "images": spectrum(torch.cat(image)),
                "captions": spectrum(torch.cat(text)),
            }
        )
        print(rows[-1])
    return rows


def spectrum(embed: Tensor) -> dict[str, float]:
    """Return participation ratio (Σλ)² / Σλ² and dimensions for shares of the variance, of centred unit embeddings."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(F.normalize(embed.double(), dim=-1).T)).flip(0).clamp(min=0)
    held = eigenvalues.cumsum(0) / eigenvalues.sum()
    dimensions = {f"dimensions_{share:.0%}": int((held < share).sum()) + 1 for share in (0.95, 0.99)}
    return {"participation_ratio": (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item(), **dimensions}


def pairs(words: list[str]) -> Iterator[tuple[str, Path]]:
    for word in words:
        name, _, path = word.partition("=")
        yield name, Path(path)


def main() -> None:
    """Measure one choice and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choice", choices=["variance", "buckets", "rank"])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--clip", nargs="*", default=[], help="NAME=CHECKPOINT, for rank")
    options = parser.parse_args()
    measure = {"variance": variance, "buckets": buckets, "rank": lambda run: rank(run, dict(pairs(options.clip)))}
    meta = provenance(torch.device("cpu"))
    content = {"meta": meta, "rows": measure[options.choice](options.run)}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{options.choice}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

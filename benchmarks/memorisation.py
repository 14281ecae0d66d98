"""Ask how near a run's samples come to its training pictures, and what resolution its decoder is worth.

python benchmarks/memorisation.py runs/emoji-64px --source DIR --out results/emoji-64px

The judge of the run looks at every picture. It writes memorisation.json, and two pictures: samples with the training
pictures that lie nearest to them, and a hundred samples.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.clip import ClipEncoder
from unclip_pl.data.sampler import RowBatch
from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.generation.decoding import resize
from unclip_pl.generation.pictures import Row, grid, save_png
from unclip_pl.generation.pipeline import Unclip
from unclip_pl.generation.provenance import provenance
from unclip_pl.generation.run import read_run
from unclip_pl.metrics.clip_score import retrieval_recall
from unclip_pl.metrics.frechet import frechet_interval
from unclip_pl.types import EvaluationBatch

#: Pictures of a batch.
BATCH = 256
#: Samples beside their nearest training pictures, and how many of these each has.
SHOWN, NEAREST = 8, 3
#: Beginnings of the licences under which training pictures may be shown.
LICENSES = ("MIT", "Apache")
#: Side that true pictures are shrunk to, and enlarged from again.
SHRUNK = 32


def batches(rows: np.ndarray) -> list[RowBatch]:
    parts = np.array_split(rows, -(-len(rows) // BATCH))
    return [RowBatch(part, np.zeros(len(part), np.uint64)) for part in parts]


def features(judge: ClipEncoder, images: Tensor) -> Tensor:
    """Return the judge's unit-norm features of (N, 3, H, H) pictures, (N, F), on the CPU."""
    device = judge.preprocess.mean.device
    seen = [judge.encode_image(part.to(device)).float() for part in images.split(BATCH)]
    return F.normalize(torch.cat(seen), dim=-1).cpu()


def nearest(seen: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine to the nearest training pictures and their places, (N, NEAREST) each."""
    return torch.topk(seen @ training.T, NEAREST, dim=1)


def memorised(samples: Tensor, heldout: Tensor, training: Tensor) -> dict[str, float]:
    """Say how much nearer samples come to training pictures than held-out pictures do; row i is of one caption.

    A model that knows the distribution and no picture by heart has 50 % in the first line and 5 % in the second.
    """
    ours, theirs = nearest(samples, training)[0][:, 0], nearest(heldout, training)[0][:, 0]
    return {
        "nearer_than_own_heldout": ((ours > theirs).double() + (ours == theirs).double() / 2).mean().item(),
        "nearer_than_95_percent_of_heldout": (ours > theirs.quantile(0.95)).double().mean().item(),
        "cosine_of_samples": ours.mean().item(),
        "cosine_of_heldout": theirs.mean().item(),
    }


def distances(true: Tensor, **others: Tensor) -> dict[str, Any]:
    """Return the Fréchet distance of each set to the true pictures, with its 95 % interval over captions."""
    found = frechet_interval(true, others, generator=torch.Generator().manual_seed(0))
    return {name: interval._asdict() for name, interval in found.items()}


def measure(run: Path, source: str, out: Path, device: str) -> None:
    unclip, description = Unclip.load(run, device=device), read_run(run)
    if description.judge is None:
        raise ValueError(f"{run} has no judge.")
    judge = description.judge.within(run).load().to(device)
    unclip.decoder.upsamplers.clear()  # the judge looks at pictures of its own size
    size = unclip.decoder.image_size
    store = EmbeddingStore(run / description.store, source, image_size=size)
    true = [store.evaluation_batch(rows) for rows in batches(store.rows(Split.HELDOUT))]
    known = [store.evaluation_batch(rows) for rows in batches(store.rows(Split.TRAIN))]
    samples, decoded = drawn(unclip, true)
    heldout, training = (torch.cat([batch.image for batch in part]) for part in (true, known))
    seen = {"samples": samples, "decoded": decoded, "heldout": heldout, "training": training}
    seen["shrunk"] = resize(resize(heldout, SHRUNK), size)
    f = {name: features(judge, images) for name, images in seen.items()}
    content = {
        "run": unclip.origin.run,
        "pictures": len(heldout),
        "training_pictures": len(training),
        "memorised": memorised(f["samples"], f["heldout"], f["training"]),
        "fd_judge": distances(f["heldout"], decoded=f["decoded"], shrunk=f["shrunk"]),
        "retrieval_r10": {name: retrieval_recall(f[name], f["heldout"], 10).item() for name in ("samples", "decoded")},
        "meta": provenance(torch.device(device)),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "memorisation.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content, indent=2))
    facts = {"run": unclip.origin.run, "commit": provenance(torch.device(device))["commit"]}
    captions = [caption for batch in true for caption in batch.captions]
    licences = [str(sample.get("license", "")) for batch in known for sample in batch.metadata]
    rows = beside(samples, training, captions, nearest(f["samples"], f["training"])[1], licences)
    if rows:
        save_png(grid(rows, ["sample", *["training"] * NEAREST]), out / "nearest.png", facts)
    hundred = samples[:: max(1, len(samples) // 100)][:100]
    save_png(grid([("", list(row)) for row in hundred.split(10)]), out / "hundred.png", facts)


def drawn(unclip: Unclip, true: list[EvaluationBatch]) -> tuple[Tensor, Tensor]:
    """Draw each held-out caption through the diffusion prior, and each held-out picture from its true embedding."""
    samples, decoded = [], []
    for batch in true:
        samples.append(unclip.generate(batch.captions, batch_size=BATCH).images.cpu())
        embed = F.normalize(batch.image_embed.float(), dim=-1)
        decoded.append(unclip.decode(embed, batch.captions, batch_size=BATCH).images.cpu())
    return torch.cat(samples), torch.cat(decoded)


def beside(samples: Tensor, training: Tensor, captions: list[str], places: Tensor, licences: list[str]) -> list[Row]:
    """Return rows of a sample and its nearest training pictures, the first whose pictures may all be shown."""
    free = [i for i, row in enumerate(places.tolist()) if all(licences[place].startswith(LICENSES) for place in row)]
    return [(captions[i], [samples[i], *training[places[i]]]) for i in free[:SHOWN]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--source", required=True, help="folder of the run's shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    measure(given.run, given.source, given.out, given.device)

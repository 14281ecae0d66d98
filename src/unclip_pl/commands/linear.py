"""``unclip linear``: fit the linear prior on a store."""

import time
from pathlib import Path

import torch
from jsonargparse.typing import NonNegativeFloat

from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.errors import InputError
from unclip_pl.nn.ridge import fit_ridge, save_linear_prior


def linear(store: str, out: str, *, source: str = "", ridge: NonNegativeFloat = 1e-2) -> None:
    """Fit ridge regression from z_t to z_i on the training split, in closed form.

    Args:
        store: folder of the embeddings.
        out: safetensors file to write.
        source: shards that the store was made of, where not all of the store is to be used.
        ridge: penalty, in units of the text embeddings' mean variance per coordinate.
    """
    started = time.perf_counter()
    embeddings = EmbeddingStore(store, source)
    chunks = list(embeddings.embed_chunks(Split.TRAIN))
    if not chunks:
        raise InputError(f"Expected training pairs in {store}. Got none: give a store of shards with a train split.")
    image, text = zip(*chunks, strict=True)
    weight, bias = fit_ridge(torch.cat(text), torch.cat(image), ridge)
    seconds = time.perf_counter() - started
    save_linear_prior(Path(out), weight, bias, fingerprint=embeddings.fingerprint, seconds=seconds)
    print(f"linear prior of {weight.numel() + bias.numel():,} numbers in {seconds:.1f} s: {out}")

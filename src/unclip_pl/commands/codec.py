"""``unclip codec``: fit the AR prior's codec on a store."""

from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from unclip_pl.data.shards import Split
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.nn.codec import EmbeddingCodec, Spacing


def codec(
    store: str,
    out: str,
    *,
    source: str = "",
    code_length: PositiveInt | None = None,
    buckets: PositiveInt = 1024,
    dot_buckets: PositiveInt = 256,
    spacing: Spacing = "quantile",
) -> None:
    """Fit PCA and buckets to the training split's embeddings, and print their loss on validation embeddings.

    Args:
        store: folder of the embeddings.
        out: safetensors file to write.
        source: shards that the store was made of, where not all of the store is to be used.
        code_length: principal axes to keep; without it, the fewest that lose less than 1 % of held-out variance.
        buckets: buckets of each axis (paper: 1,024).
        dot_buckets: buckets of the dot-product token; 1 leaves it out.
        spacing: buckets of equal counts (quantile) or equal widths (uniform).
    """
    embeddings = EmbeddingStore(store, source)
    fitted = EmbeddingCodec.fit(
        lambda: embeddings.embed_chunks(Split.TRAIN),
        fingerprint=embeddings.fingerprint,
        code_length=code_length,
        buckets=buckets,
        dot_buckets=dot_buckets,
        spacing=spacing,
    )
    fitted.save(Path(out))
    unseen = [image for image, _ in embeddings.embed_chunks(Split.VAL)]
    if unseen:
        z_i = torch.cat(unseen)
        print(
            f"codec of {fitted.code_length} codes × {fitted.buckets} buckets: PCA loses {fitted.pca_error(z_i):.2%} of "
            f"the variance of validation embeddings, quantisation {fitted.quantisation_error(z_i):.2%}; "
            f"round-trip cosine {fitted.roundtrip_cosine(z_i).mean():.4f}: {out}"
        )

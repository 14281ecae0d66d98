"""``unclip precompute``: frozen CLIP features of every shard of a source."""

from unclip_pl.data.precompute import precompute

__all__ = ["precompute"]

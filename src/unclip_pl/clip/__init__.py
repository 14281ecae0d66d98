"""Frozen CLIP: any of open_clip's, and our tiny architectures."""

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec

__all__ = ["ClipEncoder", "ClipSpec"]

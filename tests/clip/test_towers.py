"""Our reading of open_clip's towers against open_clip's own."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from unclip_pl.clip.encoder import ClipEncoder, ClipSpec

CAPTIONS = ["", "a red circle", "a small green ring on a black background, at the top", "word " * 100]
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}


def build(folder: Path, **changes: Any) -> ClipEncoder:
    """A CLIP of random weights in open_clip's own folder layout."""
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | changes.pop("text", {})} | changes
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return ClipSpec(f"local-dir:{folder}").load()


@pytest.mark.parametrize(
    "changes", [{}, {"custom_text": True}, {"custom_text": True, "text": {"no_causal_mask": True}}]
)
@torch.no_grad()
def test_captions_are_encoded_as_open_clip_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Positions of padding are left out where a causal mask hides them, and nowhere else."""
    encoder = build(tmp_path, **changes)
    tokens = encoder.tokenize(CAPTIONS)
    ours = encoder.encode_text(tokens)
    theirs = encoder.model.encode_text(tokens, normalize=False)
    torch.testing.assert_close(ours.embed, theirs, rtol=1e-4, atol=1e-5)
    reads_padding = changes.get("text", {}).get("no_causal_mask", False)
    assert ours.mask.sum(1).tolist() == ([24] * 4 if reads_padding else (tokens.argmax(-1) + 1).tolist())
    alone = [encoder.describe([caption]) for caption in CAPTIONS]
    for row, text in enumerate(alone):
        torch.testing.assert_close(ours.states[row][ours.mask[row]], text.states[0][text.mask[0]], rtol=1e-4, atol=1e-5)

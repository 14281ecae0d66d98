"""The other side of each comparison, built from our weights: diffusers' modules, and the loops its pipelines run."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UnCLIPScheduler
from torch import Tensor

from unclip_pl.interop.diffusers import DiffusersPrior
from unclip_pl.interop.layout import load_weights
from unclip_pl.nn import prior
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.nn.text import cat_text, pad_text, repeat_text
from unclip_pl.types import TextFeatures


def stored_space(embed_dim: int, text_width: int, null_length: int = 2) -> str:
    """A statistics file of made-up embeddings with an empty caption of two tokens, as every CLIP's is."""
    g = torch.Generator().manual_seed(7)
    null = TextFeatures(
        tokens=torch.ones(1, null_length, dtype=torch.int64),
        states=torch.randn(1, null_length, text_width, generator=g),
        mask=torch.ones(1, null_length, dtype=torch.bool),
        embed=torch.randn(1, embed_dim, generator=g),
    )
    path = Path(tempfile.mkdtemp()) / "statistics.safetensors"
    moments = Moments.of(torch.randn(4 * embed_dim, embed_dim, generator=g))
    write_statistics(path, moments=moments, null_text=null, fingerprint="benchmark")
    return str(path)


class KarloPrior:
    """The first stage of diffusers' UnCLIPPipeline: text padded to the context, both halves of guidance in one batch.

    Its random weights are poured into ``net``.
    """

    def __init__(self, net: prior.PriorTransformer, steps: int, guidance: float) -> None:
        blocks: Any = net.transformer.resblocks
        heads = blocks[0].attn.heads
        torch.manual_seed(1)
        self.net = PriorTransformer(
            heads, net.width // heads, len(blocks), embedding_dim=net.embed_dim, num_embeddings=net.context_length
        ).eval()
        for name in ("positional_embedding", "prd_embedding"):  # zeros, as diffusers leaves them
            torch.nn.init.normal_(getattr(self.net, name), std=net.width**-0.5)
        load_weights(net, self.net.state_dict(), DiffusersPrior(heads))
        self.context_length = net.context_length
        self.guidance = guidance
        self.scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample=False, prediction_type="sample"
        )
        self.scheduler.set_timesteps(steps)

    @torch.no_grad()
    def sample(self, text: TextFeatures, null: TextFeatures, generator: torch.Generator) -> Tensor:
        """z_i, scaled, (B, d)."""
        n = len(text.embed)
        both = cat_text(repeat_text(null, n), text)
        both = pad_text(both, self.context_length)
        x = torch.randn(n, text.embed.shape[1], generator=generator)
        times = self.scheduler.timesteps
        for i, t in enumerate(times):
            out = self.net(
                torch.cat([x] * 2),
                timestep=t,
                proj_embedding=both.embed,
                encoder_hidden_states=both.states,
                attention_mask=both.mask,
            ).predicted_image_embedding
            uncond, cond = out.chunk(2)
            out = uncond + self.guidance * (cond - uncond)
            before = None if i + 1 == len(times) else times[i + 1]
            x = self.scheduler.step(out, timestep=t, sample=x, generator=generator, prev_timestep=before).prev_sample
        return x

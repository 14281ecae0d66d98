"""Training of the decoder: its loss, and its sample grid."""

import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM
from unclip_pl.diffusion.loss import hybrid_loss, simple_loss
from unclip_pl.diffusion.process import noise_like
from unclip_pl.parts.decoder import DecoderPart
from unclip_pl.tasks.base import EmbeddingTask, bernoulli, uniform
from unclip_pl.types import DecoderBatch


class DecoderTask(DecoderPart, EmbeddingTask):
    """Trains the decoder by L_simple, or by L_hybrid where the network learns its variance."""

    batch_type = DecoderBatch
    edges = ("net.conv_in", "net.conv_out")

    def loss(self, batch: DecoderBatch, generator: torch.Generator | None = None) -> Tensor:
        """Return L_simple, or L_hybrid where the network learns its variance."""
        x0 = batch.image
        keep_image = self.share(lambda n: bernoulli(n, 1 - self.image_drop, x0.device, generator), len(x0))
        text = self.drop_text(batch.text, generator)
        z_i, level = self.space.scale(batch.image_embed), None
        if self.image_noise:
            level = self.image_noise * self.share(lambda n: uniform(n, x0.device, generator), len(x0))
            z_i = self.noised(z_i, level, self.noise(z_i, generator))
        condition = self.condition(z_i, text, keep_image, level)
        t = self.share(lambda n: self.diffusion.draw_t(n, x0.device, generator), len(x0))
        eps = self.noise(x0, generator)
        x_t = self.diffusion.add_noise(x0, t, eps)
        out = self.net(x_t, self.diffusion.index(t), condition)
        if out.shape[1] == x0.shape[1]:
            return simple_loss(out, self.diffusion.target(x0, eps, t)).mean()
        F, frac_raw = out.chunk(2, dim=1)
        return hybrid_loss(self.diffusion, F, frac_raw, x0, x_t, eps, t).mean()

    @torch.no_grad()
    def draw(self, batch: DecoderBatch, generator: torch.Generator | None = None) -> Tensor:
        """Decode images from a batch's true embeddings, for the sample grid: 25 DDIM steps, guidance 2."""
        x_T = noise_like(batch.image, generator=generator)
        return DDIM(25).sample(self.denoiser(batch.image_embed, batch.text, 2.0), x_T, self.diffusion)

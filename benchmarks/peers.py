"""The peers: diffusers' modules with our weights and the loops of its pipelines, and dalle2-pytorch's modules.

dalle2-pytorch has other layers, so its modules are built with as many parameters as ours.
"""

from typing import Any

import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from torch import Tensor
from torch.nn import functional as F

from unclip_pl.interop.layout import diffusers_prior, diffusers_unet, load_weights
from unclip_pl.nn import prior
from unclip_pl.nn.unet import UNet
from unclip_pl.types import DecoderBatch, PriorBatch, TextFeatures


class KarloPrior(torch.nn.Module):
    """The first stage of diffusers' UnCLIPPipeline: text padded to the context, both halves of guidance in one batch.

    Its random weights are poured into ``net``.
    """

    def __init__(self, net: prior.PriorTransformer, steps: int, guidance: float) -> None:
        super().__init__()
        blocks: Any = net.transformer.resblocks
        heads = blocks[0].attn.heads
        torch.manual_seed(1)
        self.net = PriorTransformer(
            heads, net.width // heads, len(blocks), embedding_dim=net.embed_dim, num_embeddings=net.context_length
        ).eval()
        for name in ("positional_embedding", "prd_embedding"):  # zeros, as diffusers leaves them
            torch.nn.init.normal_(getattr(self.net, name), std=net.width**-0.5)
        load_weights(net, self.net.state_dict(), diffusers_prior(heads))
        self.context_length = net.context_length
        self.guidance = guidance
        self.scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample=False, prediction_type="sample"
        )
        self.scheduler.set_timesteps(steps)
        self.noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def forward(self, x_t: Tensor, index: Tensor, text: TextFeatures) -> Tensor:
        """z_i of captions that fill the context."""
        return self.net(
            x_t,
            timestep=index,
            proj_embedding=text.embed,
            encoder_hidden_states=text.states,
            attention_mask=text.mask,
        ).predicted_image_embedding

    def loss(self, batch: PriorBatch) -> Tensor:
        """Return the loss of the library's training scripts."""
        z_i = batch.image_embed
        eps = torch.randn_like(z_i)
        t = torch.randint(0, 1000, (len(eps),))
        return F.mse_loss(self(self.noise.add_noise(z_i, eps, t), t, batch.text).float(), z_i)

    @torch.no_grad()
    def sample(self, text: TextFeatures, null: TextFeatures, generator: torch.Generator) -> Tensor:
        """z_i, scaled, (B, d)."""
        n = len(text.embed)
        both = TextFeatures.cat([null.repeat(n), text])
        both = both.pad(self.context_length)
        x = torch.randn(n, text.embed.shape[1], generator=generator)
        times = self.scheduler.timesteps
        for i, t in enumerate(times):
            uncond, cond = self(torch.cat([x] * 2), t, both).chunk(2)
            out = uncond + self.guidance * (cond - uncond)
            before = None if i + 1 == len(times) else times[i + 1]
            x = self.scheduler.step(out, timestep=t, sample=x, generator=generator, prev_timestep=before).prev_sample
        return x


class KarloDecoder(torch.nn.Module):
    """The second stage of diffusers' UnCLIPPipeline. Its random weights are poured into ``net``.

    Args:
        net: our U-Net with three output channels and attention on every level but the first.
        res_blocks: residual blocks of each level of ``net``.
        context_width: width of the context tokens of ``net``.
        head_channels: channels of an attention head of ``net``.
    """

    def __init__(self, net: UNet, res_blocks: int, context_width: int, head_channels: int) -> None:
        super().__init__()
        assert net.condition_encoder is not None
        widths = [level.layers[0].block.conv1.out_channels for level in net.down]  # type: ignore[union-attr, index]
        deeper = len(widths) - 1
        torch.manual_seed(1)
        self.unet = UNet2DConditionModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=tuple(widths),
            layers_per_block=res_blocks,
            down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * deeper),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*["SimpleCrossAttnUpBlock2D"] * deeper, "ResnetUpsampleBlock2D"),
            attention_head_dim=head_channels,
            cross_attention_dim=context_width,
            norm_num_groups=32,
            only_cross_attention=False,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
        self.projection = UnCLIPTextProjModel(
            clip_embeddings_dim=len(net.condition_encoder.null_image_embed),
            time_embed_dim=4 * widths[0],
            cross_attention_dim=context_width,
        )
        load_weights(net, self.unet.state_dict() | self.projection.state_dict(), diffusers_unet(head_channels))
        self.noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.image_tokens = net.condition_encoder.image_tokens

    def forward(self, x: Tensor, t: Tensor, z_i: Tensor, text: TextFeatures, *, guided: bool = False) -> Tensor:
        """eps. Guided: x, t and text of 2B rows, the unconditional ones first; z_i of B."""
        context, time_bias = self.projection(
            image_embeddings=z_i,
            prompt_embeds=text.embed,
            text_encoder_hidden_states=text.states,
            do_classifier_free_guidance=guided,
        )
        mask = F.pad(text.mask, (self.image_tokens, 0), value=True)
        return self.unet(x, t, encoder_hidden_states=context, class_labels=time_bias, attention_mask=mask).sample

    def loss(self, batch: DecoderBatch) -> Tensor:
        """Return the loss of the library's training scripts."""
        eps = torch.randn_like(batch.image)
        t = torch.randint(0, 1000, (len(eps),))
        out = self(self.noise.add_noise(batch.image, eps, t), t, batch.image_embed, batch.text)
        return F.mse_loss(out.float(), eps)

    @torch.no_grad()
    def sample(
        self, z_i: Tensor, text: TextFeatures, null: TextFeatures, side: int, steps: int, guidance: float
    ) -> Tensor:
        """Draw (B, 3, side, side) by the loop of the pipeline."""
        generator = torch.Generator().manual_seed(0)
        scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon")
        scheduler.set_timesteps(steps)
        n, times = len(z_i), scheduler.timesteps
        both = TextFeatures.cat([null.repeat(n), text])
        x = torch.randn(n, 3, side, side, generator=generator)
        for i, t in enumerate(times):
            uncond, cond = self(torch.cat([x] * 2), t.expand(2 * n), z_i, both, guided=True).chunk(2)
            out = uncond + guidance * (cond - uncond)
            before = None if i + 1 == len(times) else times[i + 1]
            x = scheduler.step(out, t, x, prev_timestep=before, generator=generator).prev_sample
        return x


def dalle2_decoder(parameters: int, side: int, embed_dim: int, context_width: int, head_channels: int) -> Any:
    """dalle2-pytorch's Decoder around a Unet of about that many parameters: same levels, attention, conditions."""
    from dalle2_pytorch import Decoder, Unet

    def unet(dim: int) -> Any:
        return Unet(
            dim=dim,
            image_embed_dim=embed_dim,
            text_embed_dim=embed_dim,
            cond_dim=context_width,
            dim_mults=(1, 2, 3, 4),
            self_attn=(False, True, True, True),
            attn_dim_head=head_channels,
            attn_heads=4,
            num_resnet_blocks=1,
            cond_on_text_encodings=True,
            cond_on_image_embeds=True,
            max_text_len=16,
        )

    widths = range(32, 128, 8)
    width = min(widths, key=lambda dim: abs(sum(p.numel() for p in unet(dim).parameters()) - parameters))
    torch.manual_seed(1)
    return Decoder(unet(width), image_sizes=(side,), timesteps=1000, sample_timesteps=27, learned_variance=False)


def dalle2_prior(parameters: int, dim: int, layers: int, heads: int, context_length: int) -> Any:
    """dalle2-pytorch's DiffusionPrior of about that many parameters and our schedule: x0, embeddings scaled before."""
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

    def net(ff_mult: float) -> Any:
        return DiffusionPriorNetwork(
            dim=dim,
            num_timesteps=1000,
            max_text_len=context_length,
            depth=layers,
            heads=heads,
            dim_head=dim // heads,
            ff_mult=ff_mult,
        )

    multiples = (2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0)
    ff_mult = min(multiples, key=lambda mult: abs(sum(p.numel() for p in net(mult).parameters()) - parameters))
    torch.manual_seed(1)
    return DiffusionPrior(
        net(ff_mult), image_embed_dim=dim, timesteps=1000, text_cond_drop_prob=0.1, image_embed_scale=1.0
    )

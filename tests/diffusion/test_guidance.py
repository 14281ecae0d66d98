import math

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import Denoise, Denoised, GaussianDiffusion, check_guidance, clip_x0, guided
from unclip_pl.diffusion.schedule import per_sample


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    """A smooth function of x_t and t that is nobody's posterior mean."""
    wave = per_sample(t, x_t)
    return Denoised(torch.sin(2 * x_t + 3 * wave), torch.cos(x_t + wave))


class TestGuidance:
    @staticmethod
    def both(x_t: Tensor, t: Tensor) -> Denoised:
        cond = torch.arange(len(x_t)) < len(x_t) // 2
        sign = torch.where(cond, 1, -1)[:, None]
        x0, frac = random_denoise(x_t, t)
        assert frac is not None
        return Denoised(sign * x0, sign * frac)

    x_t = torch.randn(3, 4, generator=generator())
    t = torch.full((3,), 0.4)

    def test_scale_1_is_conditional(self) -> None:
        guided_once, plain = guided(self.both, 1.0)(self.x_t, self.t), random_denoise(self.x_t, self.t)
        assert torch.equal(guided_once.x0, plain.x0)
        assert guided_once.frac is not None
        assert plain.frac is not None
        assert torch.equal(guided_once.frac, plain.frac)

    @pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
    def test_is_linear_in_the_scale(self, scale: float) -> None:
        x0, frac = guided(self.both, scale)(self.x_t, self.t)
        plain = random_denoise(self.x_t, self.t)
        torch.testing.assert_close(x0, -plain.x0 + scale * 2 * plain.x0)
        assert frac is not None
        assert plain.frac is not None
        assert torch.equal(frac, plain.frac)

    def test_of_x0_is_guidance_of_eps(self) -> None:
        diffusion = GaussianDiffusion(prediction="eps")
        F_cond, F_uncond = torch.randn(2, 3, 4, generator=generator(1)).unbind()

        def both(x_t: Tensor, t: Tensor) -> Denoised:
            return Denoised(diffusion.to_x0(torch.cat([F_cond, F_uncond]), x_t, t))

        expected = diffusion.to_x0(F_uncond + 2.5 * (F_cond - F_uncond), self.x_t, self.t)
        torch.testing.assert_close(guided(both, 2.5)(self.x_t, self.t).x0, expected, rtol=1e-4, atol=1e-5)


def constant(x0: Tensor) -> Denoise:
    return lambda x_t, t: Denoised(x0)


def test_clip() -> None:
    x0 = torch.tensor([[-20.0, 0.5, 20.0]])
    assert clip_x0(constant(x0), 5.0)(x0, torch.ones(1)).x0.tolist() == [[-5.0, 0.5, 5.0]]


def test_a_scale_is_not_negative() -> None:
    assert [check_guidance(scale) for scale in (0.0, 1.0, 4.0)] == [0.0, 1.0, 4.0]
    for scale in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"guidance >= 0.* Got {scale}"):
            check_guidance(scale)

import math

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import (
    DDIM,
    CosineSchedule,
    Denoise,
    Denoised,
    GaussianDiffusion,
    Heun,
    autoguided,
    check_guidance,
    check_interval,
    clip_x0,
    guided,
    in_interval,
    within,
)
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


class TestInterval:
    schedule = CosineSchedule()
    x_T = torch.randn(3, 4, generator=generator())

    @staticmethod
    def strong(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(random_denoise(x_t, t).x0 * 3)

    def drawn(self, interval: tuple[float, float] | None) -> Tensor:
        denoise = within(interval, self.schedule, self.strong, random_denoise)
        return DDIM(8).sample(denoise, self.x_T, GaussianDiffusion())

    def test_of_everything_is_plain_guidance_and_of_nothing_is_none(self) -> None:
        plain, none = (
            DDIM(8).sample(denoise, self.x_T, GaussianDiffusion()) for denoise in (self.strong, random_denoise)
        )
        assert torch.equal(self.drawn((0, math.inf)), plain)
        assert torch.equal(self.drawn(None), plain)
        assert torch.equal(self.drawn((1e6, 1e7)), none)
        assert not torch.equal(plain, none)

    def test_its_ends_belong_to_it(self) -> None:
        """Asked by a solver's own levels, from the third to the fifth of its times."""
        times = torch.tensor(DDIM(8).times(GaussianDiffusion())[:-1], dtype=torch.float64)
        levels = self.schedule.level(times).tolist()
        guided_at: list[float] = []

        def strong(x_t: Tensor, t: Tensor) -> Denoised:
            guided_at.append(t[0].item())
            return random_denoise(x_t, t)

        interval = (levels[4], levels[2])
        DDIM(8).sample(within(interval, self.schedule, strong, random_denoise), self.x_T, GaussianDiffusion())
        assert guided_at == pytest.approx(times[2:5].tolist())
        assert [in_interval(interval, self.schedule, t) for t in times.tolist()] == [False] * 2 + [True] * 3 + [
            False
        ] * 3

    def test_an_end_is_reached_within_float32(self) -> None:
        times = torch.linspace(0.9, 0.999, 100, dtype=torch.float64)
        for t in times.tolist():
            level = self.schedule.level(torch.tensor(t, dtype=torch.float64)).item()
            rounded = torch.tensor(t, dtype=torch.float32).item()
            assert in_interval((0.0, level), self.schedule, rounded)
            assert in_interval((level, math.inf), self.schedule, rounded)

    def test_a_second_look_is_guided_by_its_own_level(self) -> None:
        low = self.schedule.level(torch.tensor(Heun(5).times(GaussianDiffusion())[2], dtype=torch.float64)).item()
        asked: list[str] = []

        def asks(name: str) -> Denoise:
            return lambda x_t, t: (asked.append(name), random_denoise(x_t, t))[1]

        Heun(5).sample(
            within((low, math.inf), self.schedule, asks("strong"), asks("alone")), self.x_T, GaussianDiffusion()
        )
        looks = Heun(5).looks(GaussianDiffusion())
        expected = [in_interval((low, math.inf), self.schedule, t) for t in looks]
        assert asked == ["strong" if inside else "alone" for inside in expected]
        assert expected.count(True) == 5

    def test_its_ends_are_in_order(self) -> None:
        for interval in (None, (0.0, 0.0), (0.2, 3.0)):
            check_interval(interval)
        for low, high in ((3.0, 0.2), (-1.0, 2.0), (math.nan, 1.0)):
            with pytest.raises(ValueError, match=f"0 <= low <= high. Got .{low:g}, {high:g}.: put the lower"):
                check_interval((low, high))


class TestAutoguidance:
    x_t, t = torch.randn(3, 4, generator=generator()), torch.full((3,), 0.4)

    @staticmethod
    def weak(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(x_t.sin())

    def test_is_the_line_from_the_weaker_through_the_stronger(self) -> None:
        weak, strong = self.weak(self.x_t, self.t).x0, random_denoise(self.x_t, self.t)
        for scale in (0.0, 1.0, 2.5):
            x0, frac = autoguided(random_denoise, self.weak, scale)(self.x_t, self.t)
            torch.testing.assert_close(x0, weak + scale * (strong.x0 - weak))
            assert frac is not None
            assert strong.frac is not None
            assert torch.equal(frac, strong.frac)

    def test_by_the_network_without_its_condition_is_classifier_free(self) -> None:
        def strong(x_t: Tensor, t: Tensor) -> Denoised:
            return random_denoise(x_t, t)

        def both(x_t: Tensor, t: Tensor) -> Denoised:
            (one, other), (at, _) = x_t.chunk(2), t.chunk(2)
            return Denoised(torch.cat([strong(one, at).x0, self.weak(other, at).x0]))

        ours, plain = autoguided(strong, self.weak, 2.0)(self.x_t, self.t), guided(both, 2.0)(self.x_t, self.t)
        assert torch.equal(ours.x0, plain.x0)

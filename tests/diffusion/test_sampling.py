import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import sampling
from unclip_pl.diffusion.analytic import PosteriorMSE
from unclip_pl.diffusion.process import Denoised, GaussianDiffusion, Prediction
from unclip_pl.diffusion.sampling import (
    DDIM,
    Ancestral,
    Denoise,
    Grid,
    Sampler,
    Variance,
    check_guidance,
    clip_x0,
    dynamic_threshold,
    guided,
    time_grid,
)
from unclip_pl.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule, per_sample

MEAN, VAR, T = 2.0, 0.25, 1000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_denoise(x_t: Tensor, t: Tensor, schedule: Schedule | None = None) -> Denoised:
    """E[x0 | x_t] for data ~ N(MEAN, VAR)."""
    alpha, sigma = (per_sample(c, x_t) for c in (schedule or CosineSchedule()).alpha_sigma(t))
    gain = alpha * VAR / (alpha.square() * VAR + sigma.square())
    return Denoised(MEAN + gain * (x_t - alpha * MEAN))


def gaussian_posterior_mse() -> Tensor:
    alpha, sigma = CosineSchedule().alpha_sigma(torch.arange(1, T + 1, dtype=torch.float64) / T)
    return VAR * sigma.square() / (alpha.square() * VAR + sigma.square())


def cosine_betas() -> Tensor:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


def random_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    """A smooth function of x_t and t that is nobody's posterior mean."""
    wave = per_sample(t, x_t)
    return Denoised(torch.sin(2 * x_t + 3 * wave), torch.cos(x_t + wave))


def output_moments(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Exact mean and variance of the samples of an affine denoiser.

    The sample is affine in x_T and every draw of noise: row 0 has all of them 0, row 1 has x_T = 1, row 2 + k has the
    k-th draw = 1. The variance is the sum of squared responses.
    """
    rows = sampler.steps + 2
    draws = iter(range(2, rows))

    def impulse(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(draws)), rows).to(x)

    monkeypatch.setattr(sampling, "noise_like", impulse)
    x = sampler.sample(gaussian_denoise, torch.eye(rows, dtype=torch.float64)[1])
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize(
    ("sampler", "variance", "digits"),
    [
        (DDIM(250), 0.2469, 4),
        (DDIM(250, grid="uniform"), 0.2468, 4),
        (Ancestral(5), 0.0924, 4),
        (Ancestral(5, "analytic", posterior_mse=gaussian_posterior_mse()), 0.24996, 5),
        (Ancestral(5, grid="uniform"), 0.1076, 4),
        (Ancestral(5, "analytic", "uniform", posterior_mse=gaussian_posterior_mse()), 0.1723, 4),
    ],
)
def test_variance_of_samples(sampler: Sampler, variance: float, digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, var = output_moments(sampler, monkeypatch)
    assert round(var, digits) == variance
    assert mean == pytest.approx(MEAN, abs=0.01)


@pytest.mark.parametrize("grid", ["strided", "uniform"])
@pytest.mark.parametrize("variance", ["small", "large", "analytic"])
def test_every_variance_is_right_with_all_steps(
    variance: Variance, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Ancestral(T, variance, grid, posterior_mse=gaussian_posterior_mse())
    mean, var = output_moments(sampler, monkeypatch)
    assert mean == pytest.approx(MEAN, abs=1e-3)
    assert var == pytest.approx(VAR, abs=3e-3)


@pytest.mark.parametrize("grid", ["strided", "uniform"])
def test_validation_errors_are_as_good_as_the_formula(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """c_t estimated from draws, as a checkpoint has it: 5 steps come as near to the data's variance."""
    diffusion, errors = GaussianDiffusion(), PosteriorMSE()
    x0 = MEAN + math.sqrt(VAR) * torch.randn(100_000, 8, dtype=torch.float64, generator=generator())
    t = diffusion.draw_t(len(x0), generator=generator(1)).double()
    x_t = diffusion.add_noise(x0, t, torch.randn(x0.shape, dtype=torch.float64, generator=generator(2)))
    errors.update(t, (x0 - gaussian_denoise(x_t, t).x0).square().mean(1))

    estimated = Ancestral(5, "analytic", grid, posterior_mse=errors.compute())
    exact = Ancestral(5, "analytic", grid, posterior_mse=gaussian_posterior_mse())
    (_, ours), (_, best) = (output_moments(sampler, monkeypatch) for sampler in (estimated, exact))
    assert ours == pytest.approx(best, abs=5e-3)
    _, small = output_moments(Ancestral(5, "small", grid), monkeypatch)
    assert abs(ours - VAR) < 0.6 * abs(small - VAR)
    if (
        grid == "strided"
    ):  # a last step from t = 0.2 loses variance, which happens to be what the large one has too much
        _, large = output_moments(Ancestral(5, "large", grid), monkeypatch)
        assert abs(ours - VAR) < 0.6 * abs(large - VAR)


@pytest.mark.parametrize("sampler", [Ancestral(50), DDIM(50), DDIM(50, 0.5)])
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_a_trained_network_draws_the_data(prediction: Prediction, sampler: Sampler) -> None:
    """From regression on `target` to samples: a line in x_t at each time, fitted to draws of the data alone."""
    diffusion, lines = GaussianDiffusion(prediction=prediction), {}
    for time in sampler.times[:-1]:
        x0 = MEAN + math.sqrt(VAR) * torch.randn(20_000, dtype=torch.float64, generator=generator())
        eps, t = torch.randn(20_000, dtype=torch.float64, generator=generator(1)), torch.full((20_000,), time).double()
        x_t = diffusion.add_noise(x0, t, eps)
        inputs = torch.stack([x_t, torch.ones_like(x_t)], dim=1)
        lines[time] = torch.linalg.lstsq(inputs, diffusion.target(x0, eps, t)[:, None]).solution.flatten()

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        slope, offset = lines[t[0].item()]
        return Denoised(diffusion.to_x0(slope * x_t + offset, x_t, t))

    x_T = torch.randn(20_000, 1, dtype=torch.float64, generator=generator(3))
    drawn = sampler.sample(denoise, x_T, generator=generator(4))
    exact = sampler.sample(gaussian_denoise, x_T, generator=generator(4))
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.05)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert drawn.var().item() == pytest.approx(exact.var().item(), abs=0.01)


@pytest.mark.parametrize("grid", ["strided", "uniform"])
@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()])
def test_ddim_with_eta_1_is_ancestral(schedule: Schedule, grid: Grid) -> None:
    x_T = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator())
    ddim = DDIM(20, 1.0, grid, schedule).sample(random_denoise, x_T, generator=generator(1))
    ancestral = Ancestral(20, "small", grid, schedule).sample(random_denoise, x_T, generator=generator(1))
    torch.testing.assert_close(ddim, ancestral)


def test_learned_variance_spans_small_to_large() -> None:
    x_T = torch.randn(4, 6, dtype=torch.float64, generator=generator())

    def run(variance: Variance, frac: float) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            return Denoised(random_denoise(x_t, t).x0, torch.full_like(x_t, frac))

        return Ancestral(10, variance).sample(denoise, x_T, generator=generator(1))

    torch.testing.assert_close(run("learned", 0.0), run("small", 0.0))
    torch.testing.assert_close(run("learned", 1.0), run("large", 1.0))


Network = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def scheduler_sample(scheduler: Any, network: Network, x: Tensor, steps: int) -> Tensor:
    """As diffusers' pipelines walk down, from x_T, with the noise of seed 1."""
    scheduler.set_timesteps(steps)
    g, learned = generator(1), scheduler.variance_type == "learned_range"
    for i, index in enumerate(scheduler.timesteps):
        previous = scheduler.timesteps[i + 1] if i + 1 < steps else None
        F, raw = network(x, int(index))
        output = torch.cat([F, raw], dim=1) if learned else F
        x = scheduler.step(output, int(index), x, previous, generator=g).prev_sample
    return x


def denoiser(network: Network, prediction: Prediction) -> Denoise:
    """The same network as ours see it, x0 clipped to [-1, 1]."""
    diffusion = GaussianDiffusion(prediction=prediction)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        F, raw = network(x_t, round(diffusion.index(t)[0].item()))
        return Denoised(diffusion.to_x0(F, x_t, t), (raw + 1) / 2)

    return clip_x0(denoise)


def unclip_scheduler(prediction: str, variance: Variance, *, exact: bool = True) -> Any:
    """diffusers'; its tables are products of 1,000 float32 numbers unless they are made exact."""
    unclip = pytest.importorskip("diffusers.schedulers.scheduling_unclip")
    kind = {"small": "fixed_small_log", "learned": "learned_range"}[variance]
    scheduler = unclip.UnCLIPScheduler(variance_type=kind, prediction_type=prediction)
    if exact:
        scheduler.betas = cosine_betas()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


PARAMETERISATIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0"}


@pytest.mark.parametrize("prediction", PARAMETERISATIONS)
@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("steps", [2, 25, 64])
def test_equals_unclip_scheduler(prediction: str, variance: Variance, steps: int) -> None:
    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator())

    def network(x_t: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return torch.sin(x_t + index / 100), torch.cos(3 * x_t - index)

    denoise = denoiser(network, PARAMETERISATIONS[prediction])
    ours = Ancestral(steps, variance).sample(denoise, x_T, generator=generator(1))
    theirs = scheduler_sample(unclip_scheduler(prediction, variance), network, x_T, steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", PARAMETERISATIONS)
@pytest.mark.parametrize("variance", ["small", "learned"])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 3, 64, 48), (8, 768)])
def test_equals_unclip_scheduler_in_float32(prediction: str, variance: Variance, shape: tuple[int, ...]) -> None:
    """A smooth network, which does not blow rounding up. What its own float32 tables add is its error, not ours."""
    x_T = torch.randn(shape, generator=generator())

    def network(x_t: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return torch.sin(x_t), torch.cos(3 * x_t)

    denoise = denoiser(network, PARAMETERISATIONS[prediction])
    ours = Ancestral(25, variance).sample(denoise, x_T, generator=generator(1))
    assert ours.dtype == torch.float32
    theirs = scheduler_sample(unclip_scheduler(prediction, variance), network, x_T, 25)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    rounded = scheduler_sample(unclip_scheduler(prediction, variance, exact=False), network, x_T, 25)
    torch.testing.assert_close(ours, rounded, rtol=0, atol=1e-3)
    assert (rounded - theirs).abs().max() > 3 * (ours - theirs).abs().max()


def test_grid_equals_unclip_schedulers() -> None:
    unclip = pytest.importorskip("diffusers.schedulers.scheduling_unclip")
    scheduler = unclip.UnCLIPScheduler()
    for steps in range(2, T + 1):
        scheduler.set_timesteps(steps)
        assert [round(t * T) - 1 for t in time_grid(steps, "strided")[:-1]] == scheduler.timesteps.tolist()


def test_strided_grid_is_the_papers() -> None:
    indices = [round(t * T) - 1 for t in time_grid(64, "strided")[-2::-1]]
    assert indices[:6] == [0, 16, 32, 48, 63, 79]
    assert indices[-4:] == [951, 967, 983, 999]
    assert [round(t * T) - 1 for t in time_grid(25, "strided")[-2::-1]][:4] == [0, 42, 83, 125]
    assert time_grid(1, "strided") == [1.0, 0.0]
    assert time_grid(4, "uniform") == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("sampler", [Ancestral(7), DDIM(7, 0.5), DDIM(1), Ancestral(1), Ancestral(7, "learned")])
def test_same_generator_same_bytes(sampler: Sampler) -> None:
    x_T = torch.randn(3, 5, generator=generator())
    first = sampler.sample(random_denoise, x_T, generator=generator(1))
    assert first.dtype == torch.float32
    assert torch.equal(first, sampler.sample(random_denoise, x_T, generator=generator(1)))
    assert torch.equal(first, pickle.loads(pickle.dumps(sampler)).sample(random_denoise, x_T, generator=generator(1)))
    if sampler.steps > 1:
        assert not torch.equal(first, sampler.sample(random_denoise, x_T, generator=generator(2)))


def test_batch_of_8_is_8_batches() -> None:
    x_T = torch.randn(8, 3, 4, 4, generator=generator())
    sampler = DDIM(9)
    alone = torch.cat([sampler.sample(random_denoise, x[None]) for x in x_T])
    torch.testing.assert_close(sampler.sample(random_denoise, x_T), alone, rtol=0, atol=1e-6)


def test_ends_at_the_last_estimate_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def progress(done: int, steps: int, x0: Tensor) -> None:
        seen.append((done, steps))
        last.append(x0)

    x = Ancestral(4).sample(random_denoise, torch.randn(2, 3), progress=progress)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(x, last[-1])


def test_denoise_sees_the_grid() -> None:
    times: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        times.append(t)
        return Denoised(x_t)

    DDIM(3, train_steps=100).sample(denoise, torch.zeros(2, 1).bfloat16())
    assert [t.shape for t in times] == [(2,)] * 3
    assert times[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(times)[:, 0], torch.tensor([1.0, 0.51, 0.01]))


@pytest.mark.parametrize("sampler", [Ancestral(5), Ancestral(5, "large"), DDIM(5)])
def test_eps_prediction_is_finite_from_t_1(sampler: Sampler) -> None:
    diffusion = GaussianDiffusion(prediction="eps")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.to_x0(torch.zeros_like(x_t), x_t, t))

    x = sampler.sample(clip_x0(denoise), torch.randn(2, 3, 8, 8, generator=generator()), generator=generator(1))
    assert x.isfinite().all()
    assert x.abs().max() <= 1


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


def test_dynamic_threshold() -> None:
    x0 = torch.linspace(-4, 4, 1001).view(1, 7, 11, 13)
    x0 = torch.cat([x0, 0.1 * x0])  # the second is inside [-1, 1]: left alone
    out = dynamic_threshold(constant(x0), 0.9)(x0, torch.ones(2)).x0
    s = x0[0].abs().quantile(0.9)
    torch.testing.assert_close(out[0], (x0[0] / s).clamp(-1, 1), rtol=0, atol=3e-3)
    assert torch.equal(out[1], x0[1])


def test_clip() -> None:
    x0 = torch.tensor([[-20.0, 0.5, 20.0]])
    assert clip_x0(constant(x0), 5.0)(x0, torch.ones(1)).x0.tolist() == [[-5.0, 0.5, 5.0]]


class TestErrors:
    def test_grids(self) -> None:
        for grid in ("strided", "uniform"):
            for steps in (0, 1001):
                with pytest.raises(ValueError, match=f"from 1 to 1000 steps.* Got {steps}"):
                    DDIM(steps, grid=grid)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leading"):
            DDIM(5, grid="leading")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="eta"):
            DDIM(5, eta=1.5)

    def test_variances(self) -> None:
        with pytest.raises(ValueError, match="fixed"):
            Ancestral(5, "fixed")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="predicts its variance"):
            Ancestral(5, "learned").sample(gaussian_denoise, torch.zeros(1, 1))
        with pytest.raises(ValueError, match="with_posterior_mse"):
            Ancestral(5, "analytic").sample(gaussian_denoise, torch.zeros(1, 1))
        with pytest.raises(ValueError, match=r"\(1000,\). Got \(10,\)"):
            Ancestral(5, "analytic").with_posterior_mse(torch.zeros(10))
        with pytest.raises(ValueError, match="finite"):
            Ancestral(5, "analytic", posterior_mse=torch.full((1000,), math.nan))

    def test_guidance(self) -> None:
        assert [check_guidance(scale) for scale in (0.0, 1.0, 4.0)] == [0.0, 1.0, 4.0]
        for scale in (-0.1, math.nan):
            with pytest.raises(ValueError, match=f"guidance >= 0.* Got {scale}"):
                check_guidance(scale)

    def test_what_the_network_was_not_trained_for(self) -> None:
        diffusion = GaussianDiffusion()
        Ancestral(5, "learned").check(diffusion, learns_variance=True)
        for sampler in (
            DDIM(5),
            Ancestral(5, "large"),
            Ancestral(5, "analytic", posterior_mse=gaussian_posterior_mse()),
        ):
            sampler.check(diffusion)
            sampler.check(diffusion, learns_variance=True)
        with pytest.raises(ValueError, match="learned its variance"):
            Ancestral(5, "learned").check(diffusion)
        with pytest.raises(ValueError, match="posterior_mse"):
            Ancestral(5, "analytic").check(diffusion, learns_variance=True)
        with pytest.raises(ValueError, match=r"\('CosineSchedule', 100\).* Got \('CosineSchedule', 1000\)"):
            DDIM(5).check(GaussianDiffusion(steps=100))

    def test_posterior_mse_may_come_later(self) -> None:
        c_t, x_T = gaussian_posterior_mse(), torch.randn(3, 2, generator=generator())
        bare = Ancestral(5, "analytic")
        late = bare.with_posterior_mse(c_t).sample(gaussian_denoise, x_T, generator=generator(1))
        early = Ancestral(5, "analytic", posterior_mse=c_t).sample(gaussian_denoise, x_T, generator=generator(1))
        assert torch.equal(late, early)
        assert bare.posterior_mse is None

import math
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import solvers
from unclip_pl.diffusion.analytic import PosteriorMSE
from unclip_pl.diffusion.guidance import clip_x0
from unclip_pl.diffusion.process import Denoise, Denoised, GaussianDiffusion, Prediction
from unclip_pl.diffusion.schedule import (
    CosineSchedule,
    LinearSchedule,
    Schedule,
    StraightPath,
    VariancePreserving,
    per_sample,
)
from unclip_pl.diffusion.solvers import DDIM, Ancestral, DPMSolver, Grid, Heun, Sampler, Variance, time_grid, time_of

MEAN, VAR, T = 2.0, 0.25, 1000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_denoise(x_t: Tensor, t: Tensor, schedule: Schedule | None = None) -> Denoised:
    """E[x0 | x_t] for data ~ N(MEAN, VAR)."""
    alpha, sigma = (per_sample(c, x_t) for c in (schedule or CosineSchedule()).alpha_sigma(t))
    gain = alpha * VAR / (alpha.square() * VAR + sigma.square())
    return Denoised(MEAN + gain * (x_t - alpha * MEAN))


def of(schedule: Schedule | None) -> GaussianDiffusion:
    """A diffusion on any schedule."""
    return GaussianDiffusion(schedule, "x0")


def gaussian_diffusion(schedule: Schedule | None = None) -> GaussianDiffusion:
    """A diffusion that knows the variance of x0 given x_t."""
    diffusion = of(schedule)
    alpha, sigma = diffusion.schedule.alpha_sigma(torch.arange(1, T + 1, dtype=torch.float64) / T)
    diffusion.posterior_mse = VAR * sigma.square() / (alpha.square() * VAR + sigma.square())
    return diffusion


def cosine_betas() -> Tensor:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


def random_denoise(x_t: Tensor, t: Tensor) -> Denoised:
    """A smooth function of x_t and t that is nobody's posterior mean."""
    wave = per_sample(t, x_t)
    return Denoised(torch.sin(2 * x_t + 3 * wave), torch.cos(x_t + wave))


def output_moments(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch, diffusion: GaussianDiffusion | None = None
) -> tuple[float, float]:
    """Exact mean and variance of the samples of an affine denoiser.

    The sample is affine in x_T and every draw of noise: row 0 has all of them 0, row 1 has x_T = 1, row 2 + k has the
    k-th draw = 1. The variance is the sum of squared responses.
    """
    rows = sampler.steps + 2
    draws = iter(range(2, rows))

    def impulse(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(draws)), rows).to(x)

    diffusion = diffusion or gaussian_diffusion()
    monkeypatch.setattr(solvers, "noise_like", impulse)
    denoise = partial(gaussian_denoise, schedule=diffusion.schedule)
    x = sampler.sample(denoise, torch.eye(rows, dtype=torch.float64)[1], diffusion)
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


@pytest.mark.parametrize(
    ("sampler", "variance", "digits"),
    [
        (DDIM(250), 0.2469, 4),
        (DDIM(250, grid="uniform"), 0.2468, 4),
        (Ancestral(5), 0.0924, 4),
        (Ancestral(5, "analytic"), 0.24996, 5),
        (Ancestral(5, grid="uniform"), 0.1076, 4),
        (Ancestral(5, "analytic", "uniform"), 0.1723, 4),
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
    mean, var = output_moments(Ancestral(T, variance, grid), monkeypatch)
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

    diffusion.posterior_mse = errors.compute()
    sampler = Ancestral(5, "analytic", grid)
    (_, ours), (_, best) = (output_moments(sampler, monkeypatch, known) for known in (diffusion, gaussian_diffusion()))
    assert ours == pytest.approx(best, abs=5e-3)
    _, small = output_moments(Ancestral(5, "small", grid), monkeypatch)
    assert abs(ours - VAR) < 0.6 * abs(small - VAR)
    if grid == "strided":  # on the other, a last step from t = 0.2 loses what the large variance has too much
        _, large = output_moments(Ancestral(5, "large", grid), monkeypatch)
        assert abs(ours - VAR) < 0.6 * abs(large - VAR)


@pytest.mark.parametrize(
    "sampler", [Ancestral(50), DDIM(50), DDIM(50, 0.5), DPMSolver(60), DPMSolver(40, 1.0), Heun(20)]
)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity"])
def test_a_trained_network_draws_the_data(prediction: Prediction, sampler: Sampler) -> None:
    """From regression on `target` to samples: a line in x_t at each time, fitted to draws of the data alone."""
    schedule = StraightPath() if prediction == "velocity" else CosineSchedule()
    diffusion, lines = GaussianDiffusion(schedule, prediction), {}
    for time in sampler.times(diffusion)[:-1]:
        x0 = MEAN + math.sqrt(VAR) * torch.randn(20_000, dtype=torch.float64, generator=generator())
        eps, t = torch.randn(20_000, dtype=torch.float64, generator=generator(1)), torch.full((20_000,), time).double()
        x_t = diffusion.add_noise(x0, t, eps)
        inputs = torch.stack([x_t, torch.ones_like(x_t)], dim=1)
        lines[time] = torch.linalg.lstsq(inputs, diffusion.target(x0, eps, t)[:, None]).solution.flatten()

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        slope, offset = lines[t[0].item()]
        return Denoised(diffusion.to_x0(slope * x_t + offset, x_t, t))

    x_T = torch.randn(20_000, 1, dtype=torch.float64, generator=generator(3))
    drawn = sampler.sample(denoise, x_T, diffusion, generator=generator(4))
    exact = sampler.sample(partial(gaussian_denoise, schedule=schedule), x_T, diffusion, generator=generator(4))
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.05)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.var().item() == pytest.approx(exact.var().item(), abs=0.01)


@pytest.mark.parametrize("grid", ["strided", "uniform"])
@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()])
def test_ddim_with_eta_1_is_ancestral(schedule: Schedule, grid: Grid) -> None:
    x_T = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator())
    diffusion = GaussianDiffusion(schedule)
    ddim = DDIM(20, 1.0, grid).sample(random_denoise, x_T, diffusion, generator=generator(1))
    ancestral = Ancestral(20, "small", grid).sample(random_denoise, x_T, diffusion, generator=generator(1))
    torch.testing.assert_close(ddim, ancestral)


def test_learned_variance_spans_small_to_large() -> None:
    x_T = torch.randn(4, 6, dtype=torch.float64, generator=generator())

    def run(variance: Variance, frac: float) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            return Denoised(random_denoise(x_t, t).x0, torch.full_like(x_t, frac))

        return Ancestral(10, variance).sample(denoise, x_T, GaussianDiffusion(), generator=generator(1))

    torch.testing.assert_close(run("learned", 0.0), run("small", 0.0))
    torch.testing.assert_close(run("learned", 1.0), run("large", 1.0))


def learned_fraction(error: float, t: Tensor, data_var: float = 0.25) -> Tensor:
    """What the bound teaches: the fraction of beta_tilde + c_x0^2 c_t in a training step (Bao et al. 2022, eq. 8).

    Args:
        error: RMS by which the network misses E[x0 | x_t], beside the posterior's own spread.
        t: training times, the first one left out.
        data_var: variance of the data, which are normal.
    """
    schedule = CosineSchedule()
    alpha, sigma = schedule.alpha_sigma(t)
    q = schedule.posterior(t, t - 1 / T)
    c_t = data_var * sigma**2 / (alpha**2 * data_var + sigma**2) + error**2
    return (q.c_x0.square() * c_t / q.beta_tilde).log1p() / (q.beta / q.beta_tilde).log()


@pytest.mark.parametrize("data_var", [0.01, 0.25, 1.0])
def test_an_exact_denoiser_never_asks_for_more_than_beta(data_var: float) -> None:
    """Where data have variance 1 or less, their posterior's is sigma^2 at most, which is what beta leaves room for."""
    frac = learned_fraction(0.0, torch.arange(2, T + 1, dtype=torch.float64) / T, data_var)
    assert frac.min() > 0
    assert frac.max() < 1 + 1e-9


@pytest.mark.parametrize("steps", [2, 8, 25])
def test_a_network_that_misses_x0_by_more_than_the_noise_draws_with_beta_at_most(steps: int) -> None:
    """A network that predicts x0 has an error that does not fall with the noise, so its variance exceeds beta.

    In a training step that is a little more noise. Between the times of 25 steps beta and beta_tilde lie far apart, and
    the same fraction would mean a variance of 1e10.
    """
    x_T = torch.randn(2000, 1, dtype=torch.float64, generator=generator())

    def run(variance: Variance) -> float:
        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            x0 = gaussian_denoise(x_t, t).x0 + 0.2 * math.sqrt(2) * torch.sin(1e5 * x_t)
            return Denoised(x0, learned_fraction(0.2, t[:, None].clamp(min=2 / T)))

        return Ancestral(steps, variance).sample(denoise, x_T, GaussianDiffusion(), generator=generator(1)).var().item()

    assert learned_fraction(0.2, torch.tensor(0.01, dtype=torch.float64)) > 10
    assert run("small") < run("learned") < 1.1 * run("large")


Network = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def scheduler_sample(scheduler: Any, network: Network, x: Tensor, steps: int) -> Tensor:
    """Sample by the loop of diffusers' pipelines, from x_T, with the noise of seed 1."""
    scheduler.set_timesteps(steps)
    g, learned = generator(1), scheduler.variance_type == "learned_range"
    for i, index in enumerate(scheduler.timesteps):
        previous = scheduler.timesteps[i + 1] if i + 1 < steps else None
        F, raw = network(x, int(index))
        output = torch.cat([F, raw], dim=1) if learned else F
        x = scheduler.step(output, int(index), x, previous, generator=g).prev_sample
    return x


def denoiser(network: Network, prediction: Prediction) -> Denoise:
    """Wrap the network for our solvers, with x0 clipped to [-1, 1]."""
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
    ours = Ancestral(steps, variance).sample(denoise, x_T, GaussianDiffusion(), generator=generator(1))
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
    ours = Ancestral(25, variance).sample(denoise, x_T, GaussianDiffusion(), generator=generator(1))
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


@pytest.mark.parametrize(
    "sampler", [Ancestral(7), DDIM(7, 0.5), DDIM(1), Ancestral(1), Ancestral(7, "learned"), DPMSolver(7, 1.0)]
)
def test_same_generator_same_bytes(sampler: Sampler) -> None:
    x_T = torch.randn(3, 5, generator=generator())

    def run(sampler: Sampler, seed: int) -> Tensor:
        return sampler.sample(random_denoise, x_T, GaussianDiffusion(), generator=generator(seed))

    first = run(sampler, 1)
    assert first.dtype == torch.float32
    assert torch.equal(first, run(sampler, 1))
    assert torch.equal(first, run(pickle.loads(pickle.dumps(sampler)), 1))
    if sampler.steps > 1:
        assert not torch.equal(first, run(sampler, 2))


def test_batch_of_8_is_8_batches() -> None:
    x_T = torch.randn(8, 3, 4, 4, generator=generator())
    sampler, diffusion = DDIM(9), GaussianDiffusion()
    alone = torch.cat([sampler.sample(random_denoise, x[None], diffusion) for x in x_T])
    torch.testing.assert_close(sampler.sample(random_denoise, x_T, diffusion), alone, rtol=0, atol=1e-6)


def test_ends_at_the_last_estimate_and_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def progress(done: int, steps: int, x0: Tensor) -> None:
        seen.append((done, steps))
        last.append(x0)

    x = Ancestral(4).sample(random_denoise, torch.randn(2, 3), GaussianDiffusion(), progress=progress)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(x, last[-1])


def test_denoise_sees_the_grid() -> None:
    times: list[Tensor] = []

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        times.append(t)
        return Denoised(x_t)

    DDIM(3).sample(denoise, torch.zeros(2, 1).bfloat16(), GaussianDiffusion(steps=100))
    assert [t.shape for t in times] == [(2,)] * 3
    assert times[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(times)[:, 0], torch.tensor([1.0, 0.51, 0.01]))


@pytest.mark.parametrize("sampler", [Ancestral(5), Ancestral(5, "large"), DDIM(5), DPMSolver(5), Heun(5)])
def test_eps_prediction_is_finite_from_t_1(sampler: Sampler) -> None:
    diffusion = GaussianDiffusion(prediction="eps")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.to_x0(torch.zeros_like(x_t), x_t, t))

    x_T = torch.randn(2, 3, 8, 8, generator=generator())
    x = sampler.sample(clip_x0(denoise), x_T, diffusion, generator=generator(1))
    assert x.isfinite().all()
    assert x.abs().max() <= 1


def textbook(
    sampler: DDIM | Ancestral, denoise: Denoise, x_T: Tensor, diffusion: GaussianDiffusion, g: torch.Generator
) -> Tensor:
    """Either solver, written out from its paper one number at a time: eq. 12 and 16 of DDIM, eq. 7 of DDPM."""

    def level(t: float) -> tuple[float, float]:
        alpha, sigma = diffusion.schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
        return alpha.item(), sigma.item()

    x, times = x_T, time_grid(sampler.steps, sampler.grid, diffusion.steps)
    for t, s in pairwise(times):
        x0, frac = denoise(x, torch.full((len(x),), t))
        if s == 0:
            return x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = level(t), level(s)
        if isinstance(sampler, DDIM):
            std = sampler.eta * sigma_s / sigma_t * math.sqrt(max(0.0, 1 - (alpha_t / alpha_s) ** 2))
            c_xt = math.sqrt(sigma_s**2 - std**2) / sigma_t
            x = (alpha_s - c_xt * alpha_t) * x0 + c_xt * x
            x = x + std * torch.randn(x.shape, generator=g) if sampler.eta > 0 else x
            continue
        q = diffusion.schedule.posterior(*(torch.tensor([u], dtype=torch.float64) for u in (t, s)))
        beta, beta_tilde = q.beta.item(), q.beta_tilde.item()
        variance = beta if sampler.variance in ("large", "learned") else beta_tilde
        if sampler.variance == "analytic":
            assert diffusion.posterior_mse is not None
            c_t = diffusion.posterior_mse.double()
            variance += q.c_x0.square().item() * np.interp(t * T - 1, np.arange(T), c_t.numpy()).item()
        noise = math.sqrt(variance) * torch.randn(x.shape, generator=g)
        if sampler.variance == "learned":
            noise = noise * (0.5 * (q.beta / q.beta_tilde).log().item() * (frac - 1)).exp()
        x = q.c_x0.item() * x0 + q.c_xt.item() * x + noise
    raise AssertionError


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()])
@pytest.mark.parametrize(
    "sampler",
    [
        *(
            DDIM(steps, eta, grid)
            for steps in (1, 15, 64)
            for eta in (0.0, 0.3, 1.0)
            for grid in ("strided", "uniform")
        ),
        *(Ancestral(steps, variance) for steps in (1, 25) for variance in ("small", "large", "learned", "analytic")),
        Ancestral(64, "small", "uniform"),
    ],
    ids=lambda sampler: "-".join(str(value) for value in (type(sampler).__name__, *vars(sampler).values())),
)
def test_it_is_the_textbooks_to_the_last_bit(sampler: DDIM | Ancestral, schedule: Schedule) -> None:
    diffusion, x_T = gaussian_diffusion(schedule), torch.randn(5, 7, generator=generator())
    ours = sampler.sample(random_denoise, x_T, diffusion, generator=generator(1))
    assert torch.equal(ours, textbook(sampler, random_denoise, x_T, diffusion, generator(1)))


@pytest.mark.parametrize("sampler", [DDIM(250, grid="uniform"), DDIM(250, 0.5, "uniform"), Ancestral(1000)])
def test_solvers_follow_another_path(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, var = output_moments(sampler, monkeypatch, gaussian_diffusion(StraightPath()))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert var == pytest.approx(VAR, abs=0.01)


class Preserved(VariancePreserving):
    """A straight path divided by sqrt(alpha^2 + sigma^2): log-SNR 2 log((1 - sigma) / sigma)."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * ((1 - t) / (self.shift * t)).log()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(12),
        DDIM(12, 0.6, "uniform"),
        *(Ancestral(12, variance) for variance in ("small", "large", "analytic")),
        DPMSolver(12),
        DPMSolver(12, 1.0),
        DPMSolver(12, grid="karras"),
        Heun(12),
    ],
    ids=lambda sampler: "-".join(str(value) for value in (type(sampler).__name__, *vars(sampler).values())),
)
def test_a_straight_path_is_a_variance_preserving_one(
    sampler: Sampler, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to t = 0.999 each solver draws the same after rescaling, from a denoiser that is no posterior mean."""
    straight, preserved = of(StraightPath(shift)), of(Preserved(shift))
    for diffusion in (straight, preserved):
        diffusion.posterior_mse = torch.linspace(0.01, 1, T)
    times = [min(t, 0.999) for t in sampler.times(straight)]
    monkeypatch.setattr(sampler, "times", lambda _: times)

    def rescaled(x_t: Tensor, t: Tensor) -> Denoised:
        return random_denoise(x_t * per_sample(straight.schedule.power(t).sqrt(), x_t), t)

    x_T = torch.randn(4, 6, dtype=torch.float64, generator=generator())
    drawn = sampler.sample(random_denoise, x_T, straight, generator=generator(1))
    counterpart = sampler.sample(rescaled, x_T, preserved, generator=generator(1))
    torch.testing.assert_close(drawn, counterpart, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [DDIM(5), DDIM(5, 1.0), DPMSolver(5), DPMSolver(5, 1.0), Heun(5), Ancestral(5)])
def test_a_straight_path_begins_without_signal(sampler: Sampler) -> None:
    """At t = 1 alpha is 0, and a network of zeros says that the velocity is 0."""
    diffusion = GaussianDiffusion(StraightPath(), "velocity")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.to_x0(torch.zeros_like(x_t), x_t, t))

    x_T = torch.randn(2, 3, generator=generator())
    x = sampler.sample(denoise, x_T, diffusion, generator=generator(1))
    assert x.isfinite().all()
    if isinstance(sampler, DDIM) and sampler.eta == 0:  # nothing moves
        torch.testing.assert_close(x, x_T)


def test_ddim_on_a_straight_path_is_eulers_step() -> None:
    """Liu et al. (2023): x_s = x_t + (s - t) u."""
    diffusion = GaussianDiffusion(StraightPath(), "velocity")
    x = x_T = torch.randn(4, 6, dtype=torch.float64, generator=generator())

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x_t + 3 * per_sample(t, x_t))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(diffusion.to_x0(velocity(x_t, t), x_t, t))

    for t, s in pairwise(time_grid(9, "uniform")):
        x = x + (s - t) * velocity(x, time_of(t, x))
    torch.testing.assert_close(DDIM(9, grid="uniform").sample(denoise, x_T, diffusion), x)


def flow(x_T: Tensor, times: list[float], schedule: Schedule) -> Tensor:
    """Where the exact flow of the Gaussian carries x_T, from the first time to the last."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([times[0], times[-1]], dtype=torch.float64))
    std = (alpha.square() * VAR + sigma.square()).sqrt()
    return alpha[1] * MEAN + std[1] / std[0] * (x_T - alpha[0] * MEAN)


def start(x_T: Tensor, times: list[float], schedule: Schedule) -> Tensor:
    """Noise at the first time: of variance 1 where the variance is preserved, of alpha^2 + sigma^2 elsewhere."""
    return x_T * schedule.power(torch.tensor(times[0], dtype=torch.float64)).sqrt()


SCHEDULES = [CosineSchedule(), LinearSchedule(), StraightPath()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize(
    ("solver", "order"), [(partial(DDIM, grid="karras"), 1), (partial(DPMSolver, grid="karras"), 2), (Heun, 2)]
)
def test_order_of_convergence(solver: Callable[[int], Sampler], order: int, schedule: Schedule) -> None:
    """The error against the exact flow falls as steps^-order; the last estimate, the same for all, left aside."""
    diffusion, denoise = of(schedule), partial(gaussian_denoise, schedule=schedule)
    x_T = torch.randn(64, 1, dtype=torch.float64, generator=generator())

    def error(steps: int) -> float:
        sampler = solver(steps)
        times = sampler.times(diffusion)[:-1]
        end = denoise(flow(start(x_T, times, schedule), times, schedule), time_of(times[-1], x_T)).x0
        return (sampler.sample(denoise, x_T, diffusion) - end).abs().max().item()

    steps = torch.tensor([64, 96, 128, 192])
    errors = torch.tensor([error(int(n)) for n in steps])
    inputs = torch.stack([steps.float().log(), torch.ones(4)], dim=1)
    slope = torch.linalg.lstsq(inputs, errors.log()[:, None]).solution[0].item()
    assert slope == pytest.approx(-order, abs=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("sampler", [DPMSolver(300, grid="karras"), Heun(300)])
def test_the_flow_ends_at_the_noises_own_quantile(sampler: Sampler, schedule: Schedule) -> None:
    """A sample has the rank among the data that its noise has at the first level: MEAN + sqrt(VAR) quantile."""
    x_T = torch.randn(64, 1, dtype=torch.float64, generator=generator())
    times = sampler.times(of(schedule))
    alpha, sigma = schedule.alpha_sigma(torch.tensor(times[0], dtype=torch.float64))
    quantile = (start(x_T, times, schedule) - alpha * MEAN) / (alpha.square() * VAR + sigma.square()).sqrt()
    x = sampler.sample(partial(gaussian_denoise, schedule=schedule), x_T, of(schedule))
    torch.testing.assert_close(x, MEAN + math.sqrt(VAR) * quantile, rtol=0, atol=5e-4)
    torch.testing.assert_close(quantile, x_T, rtol=0, atol=0.03)  # 1/80 of the mean is hidden in the noise


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs
@pytest.mark.parametrize("steps", [5, 8, 20])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_equals_diffusers(eta: float, steps: int) -> None:
    """Their scheduler gets our times, the strided grid's indices, and the levels of its table unrounded."""
    diffusers = pytest.importorskip("diffusers")
    kind = {0.0: "dpmsolver++", 1.0: "sde-dpmsolver++"}[eta]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        trained_betas=cosine_betas().numpy(), algorithm_type=kind, prediction_type="sample", final_sigmas_type="zero"
    )
    ours = DPMSolver(steps, eta)
    indices = [round(t * T) - 1 for t in ours.times(GaussianDiffusion())[:-1]]
    scheduler.set_timesteps(timesteps=indices)
    scheduler.sigmas = torch.tensor([*((1 / (1 - cosine_betas()).cumprod(0) - 1).sqrt()[indices]), 0.0]).double()

    def network(x_t: Tensor, index: int) -> Tensor:
        return torch.sin(x_t + index / 300)

    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator())
    x, g = x_T, generator(1)
    for index in indices:
        noise = torch.randn(x.shape, dtype=x.dtype, generator=g)
        x = scheduler.step(network(x, index), index, x, variance_noise=noise).prev_sample

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return Denoised(network(x_t, round(t[0].item() * T) - 1))

    drawn = ours.sample(denoise, x_T, GaussianDiffusion(), generator=generator(1))
    torch.testing.assert_close(drawn, x, rtol=0, atol=1e-5)


def test_heun_is_the_papers_algorithm() -> None:
    """Karras et al. (2022), algorithm 1, line by line: sigma(t) = t, on x / alpha."""
    diffusion, sampler = GaussianDiffusion(LinearSchedule()), Heun(9)
    x_T = torch.randn(5, 3, dtype=torch.float64, generator=generator())
    times = sampler.times(diffusion)[:-1]
    alpha, sigma = diffusion.schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64))
    level = [*(sigma / alpha).tolist(), 0.0]

    def D(x: Tensor, i: int) -> Tensor:
        return random_denoise(alpha[i] * x, time_of(times[i], x)).x0

    x = x_T / alpha[0]
    for i in range(9):
        slope = (x - D(x, i)) / level[i]
        ahead = x + (level[i + 1] - level[i]) * slope
        if level[i + 1] != 0:
            slope_ahead = (ahead - D(ahead, i + 1)) / level[i + 1]
            ahead = x + (level[i + 1] - level[i]) * (slope + slope_ahead) / 2
        x = ahead
    torch.testing.assert_close(sampler.sample(random_denoise, x_T, diffusion), x)


def test_a_second_look_is_counted_and_the_last_step_may_be_anothers() -> None:
    asked: list[str] = []

    def asks(name: str) -> Denoise:
        def denoise(x_t: Tensor, t: Tensor) -> Denoised:
            asked.append(name)
            return random_denoise(x_t, t)

        return denoise

    seen: list[tuple[int, int]] = []

    def progress(done: int, steps: int, x0: Tensor) -> None:
        seen.append((done, steps))

    for sampler in (Heun(4), DPMSolver(4)):
        seen.clear()
        asked.clear()
        x_T = torch.randn(2, 3, generator=generator())
        sampler.sample(asks("first"), x_T, GaussianDiffusion(), last=asks("last"), progress=progress)
        assert asked == ["first"] * (len(sampler.looks(GaussianDiffusion())) - 1) + ["last"]
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_first_steps_of_dpm_solver_are_ddims() -> None:
    """Two times know one estimate each: the step between them and the last estimate."""
    x_T = torch.randn(3, 5, generator=generator())
    for eta in (0.0, 0.7):
        ours, ddim = (
            solver(2, eta).sample(random_denoise, x_T, GaussianDiffusion(), generator=generator(1))
            for solver in (DPMSolver, DDIM)
        )
        assert torch.equal(ours, ddim)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_karras_levels(schedule: Schedule) -> None:
    times = torch.tensor(time_grid(18, "karras", T, schedule)[:-1], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(times)
    levels = sigma / alpha
    lowest = torch.divide(*reversed(schedule.alpha_sigma(torch.tensor(1 / T, dtype=torch.float64))))
    torch.testing.assert_close(levels[[0, -1]], torch.stack([torch.tensor(80.0).double(), lowest]))
    roots = levels ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(17) / 17)


def test_another_number_of_steps() -> None:
    sampler = DDIM(15, 0.5, "uniform")
    fewer = sampler.with_steps(6)
    assert (fewer.steps, fewer.eta, fewer.grid, sampler.steps) == (6, 0.5, "uniform", 15)
    with pytest.raises(ValueError, match="Got 0"):
        sampler.with_steps(0)


class TestErrors:
    def test_grids(self) -> None:
        for grid in ("strided", "uniform"):
            with pytest.raises(ValueError, match=r"from 1 to 1000 steps.* Got 0"):
                DDIM(0, grid=grid)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"from 1 to 100 steps.* Got 101"):
                DDIM(101, grid=grid).check(GaussianDiffusion(steps=100))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leading"):
            DDIM(5, grid="leading")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"from 1 to 1000 steps.* Got 0"):
            Heun(0)
        with pytest.raises(ValueError, match="eta"):
            DPMSolver(5, eta=-0.1)
        with pytest.raises(ValueError, match="eta"):
            DDIM(5, eta=1.5)

    def test_variances(self) -> None:
        diffusion, x_T = GaussianDiffusion(), torch.zeros(1, 1)
        with pytest.raises(ValueError, match="fixed"):
            Ancestral(5, "fixed")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="predicts its variance"):
            Ancestral(5, "learned").sample(gaussian_denoise, x_T, diffusion)
        with pytest.raises(ValueError, match="Expected posterior_mse, the errors"):
            Ancestral(5, "analytic").sample(gaussian_denoise, x_T, diffusion)
        for wrong in (torch.zeros(10), torch.full((1000,), math.nan)):
            diffusion.posterior_mse = wrong
            with pytest.raises(ValueError, match=r"\(1000,\), all finite. Got"):
                Ancestral(5, "analytic").check(diffusion)

    def test_what_the_network_was_not_trained_for(self) -> None:
        Ancestral(5, "learned").check(GaussianDiffusion(), learns_variance=True)
        for sampler in (DDIM(5), Ancestral(5, "large"), Ancestral(5, "analytic")):
            sampler.check(gaussian_diffusion())
            sampler.check(gaussian_diffusion(), learns_variance=True)
        with pytest.raises(ValueError, match="learned its variance"):
            Ancestral(5, "learned").check(GaussianDiffusion())
        with pytest.raises(ValueError, match="posterior_mse"):
            Ancestral(5, "analytic").check(GaussianDiffusion(), learns_variance=True)

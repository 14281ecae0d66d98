import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from unclip_pl.diffusion.loss import hybrid_loss, simple_loss, variational_bound
from unclip_pl.diffusion.process import GaussianDiffusion, Prediction

T = 1000


def cosine_betas() -> torch.Tensor:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


def example(index: int, dtype: torch.dtype = torch.float64, batch: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(index)
    x0 = torch.rand(batch, 2, 4, 4, generator=g, dtype=torch.float64).mul(2).sub(1).mul(127.5).round().div(127.5)
    eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    t = torch.full((batch,), (index + 1) / T, dtype=torch.float64)
    x_t = GaussianDiffusion().add_noise(x0, t, eps)
    F = eps + 0.1 * torch.randn(x0.shape, generator=g, dtype=torch.float64)
    frac_raw = 0.5 * torch.randn(x0.shape, generator=g, dtype=torch.float64)
    tensors = {"F": F, "frac_raw": frac_raw, "x0": x0, "x_t": x_t, "eps": eps, "t": t}
    return {name: x.to(dtype) for name, x in tensors.items()}


def bound(diffusion: GaussianDiffusion, e: dict[str, torch.Tensor]) -> torch.Tensor:
    return variational_bound(diffusion, e["F"], e["frac_raw"], e["x0"], e["x_t"], e["t"])


def model_and_truth(e: dict[str, torch.Tensor], index: int) -> tuple[Normal, Normal]:
    """p(x_s | x_t) and q(x_s | x_t, x0) of an eps-predicting network, from the table of betas."""
    betas = cosine_betas()
    abar = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar])[index]
    tilde = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    log_tilde = tilde[max(index, 1) - 1].log()  # the first entry is the second's
    frac = (e["frac_raw"] + 1) / 2
    std = (0.5 * (frac * betas[index].log() + (1 - frac) * log_tilde)).exp()
    x0_hat = (e["x_t"] - (1 - abar[index]).sqrt() * e["F"]) / abar[index].sqrt()
    a = previous.sqrt() * betas[index] / (1 - abar[index])
    b = (1 - betas[index]).sqrt() * (1 - previous) / (1 - abar[index])
    return Normal(a * x0_hat + b * e["x_t"], std), Normal(a * e["x0"] + b * e["x_t"], (0.5 * log_tilde).exp())


@pytest.mark.parametrize("index", [1, 2, 100, 500, 998, 999])
def test_bound_is_the_divergence_in_bits(index: int) -> None:
    e = example(index)
    p, q = model_and_truth(e, index)
    expected = kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(bound(GaussianDiffusion(), e), expected, rtol=1e-6, atol=1e-12)


def test_first_bound_is_the_likelihood_of_pixels_in_bits() -> None:
    e = example(0)
    p, _ = model_and_truth(e, 0)
    upper = torch.where(e["x0"] > 0.999, 1.0, p.cdf(e["x0"] + 1 / 255))
    lower = torch.where(e["x0"] < -0.999, 0.0, p.cdf(e["x0"] - 1 / 255))
    expected = -(upper - lower).log2().mean((1, 2, 3))
    torch.testing.assert_close(bound(GaussianDiffusion(), e), expected, rtol=1e-6, atol=0)


def test_pixel_likelihoods_sum_to_one() -> None:
    """The 256 values share one prediction: as x0 runs over them, their probabilities sum to 1."""
    diffusion = GaussianDiffusion(prediction="x0")
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean in (-1.0, -0.3, 0.999):
        F, t = torch.full_like(x0, mean), torch.full((256,), 1 / T, dtype=torch.float64)
        bits = variational_bound(diffusion, F, torch.zeros_like(x0), x0, x0, t)
        # Far values are held at 1e-12.
        assert (-bits * math.log(2)).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("index", [0, 3, 500, 999])
def test_weight_of_the_bound_is_one_at_1000_steps(index: int) -> None:
    diffusion, e = GaussianDiffusion(), example(index)
    rest = hybrid_loss(diffusion, **e) - simple_loss(e["F"], e["eps"])
    torch.testing.assert_close(rest, 1e-3 * T * bound(diffusion, e))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_bound_trains_the_variance_only(prediction: Prediction) -> None:
    diffusion, e = GaussianDiffusion(prediction=prediction), example(400)
    F, frac_raw = e["F"].requires_grad_(), e["frac_raw"].requires_grad_()
    (grad,) = torch.autograd.grad(hybrid_loss(diffusion, **e).sum(), F, retain_graph=True)
    (simple,) = torch.autograd.grad(simple_loss(F, diffusion.target(e["x0"], e["eps"], e["t"])).sum(), F)
    assert torch.equal(grad, simple)
    assert torch.autograd.grad(hybrid_loss(diffusion, **e).sum(), frac_raw)[0].abs().min() > 0


def test_best_variance_is_the_analytic_one() -> None:
    """The bound's gradient in the variance is zero where it is beta_tilde + c_x0^2 (x0 - x0_hat)^2."""
    diffusion, e = GaussianDiffusion(prediction="x0"), example(300)
    t = e["t"]
    e["F"] = e["x0"] + 0.3
    q = diffusion.schedule.posterior(t, t - 1 / T)
    best = q.beta_tilde + q.c_x0.square() * 0.3**2
    frac = (best / q.beta_tilde).log() / (q.beta / q.beta_tilde).log()
    frac_raw = (2 * frac - 1).view(-1, 1, 1, 1).expand_as(e["x0"]).clone().requires_grad_()
    e["frac_raw"] = frac_raw
    (grad,) = torch.autograd.grad(bound(diffusion, e).sum(), frac_raw)
    assert grad.abs().max() < 1e-9


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_on_a_gaussian_mean_and_variance_converge_to_the_best(prediction: Prediction) -> None:
    """From zero, with the exact posterior mean and beta_tilde + c_x0^2 Var[x0 | x_t] (Bao et al. 2022) at the end.

    Data ~ N(0, 0.25), ten times; a line in x_t and a number for the variance at each of them.
    """
    steps, var, g = 10, 0.25, torch.Generator().manual_seed(0)
    diffusion = GaussianDiffusion(prediction=prediction, steps=steps)
    # The first has a likelihood of pixels; near the last, rounding of eps is all there is of x0.
    k = torch.arange(2, steps - 1)
    t = (k / steps).double()
    slope, frac_raw = (torch.zeros(len(k), 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([slope, frac_raw], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        x0 = math.sqrt(var) * torch.randn(len(k), 2048, generator=g, dtype=torch.float64)
        eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
        x_t = diffusion.add_noise(x0, t, eps)
        optimizer.zero_grad()
        hybrid_loss(diffusion, slope * x_t, frac_raw.expand_as(x_t), x0, x_t, eps, t).sum().backward()
        optimizer.step()
        scheduler.step()

    alpha, sigma = diffusion.schedule.alpha_sigma(t)
    spread = alpha**2 * var + sigma**2  # of x_t
    best = diffusion.target(alpha * var / spread, sigma / spread, t)  # E[x0 | x_t], E[eps | x_t] per unit of x_t
    torch.testing.assert_close(slope.detach()[:, 0], best, rtol=0, atol=0.01)
    q = diffusion.schedule.posterior(t, t - 1 / steps)
    frac = (frac_raw.detach()[:, 0] + 1) / 2
    learned = (frac * q.beta.log() + (1 - frac) * q.beta_tilde.log()).exp()
    torch.testing.assert_close(learned, q.beta_tilde + q.c_x0**2 * var * sigma**2 / spread, rtol=0.02, atol=0)


def test_simple_loss_is_per_sample() -> None:
    F, target = torch.zeros(2, 3, 4), torch.stack([torch.ones(3, 4), 2 * torch.ones(3, 4)])
    assert simple_loss(F, target).tolist() == [1.0, 4.0]


def test_batch_is_samples() -> None:
    mixed = {name: torch.cat([example(i, batch=1)[name] for i in (0, 1, 500, 999)]) for name in example(0)}
    alone = torch.cat([hybrid_loss(GaussianDiffusion(), **example(i, batch=1)) for i in (0, 1, 500, 999)])
    torch.testing.assert_close(hybrid_loss(GaussianDiffusion(), **mixed), alone)


@pytest.mark.parametrize("index", [0, 1, 500, 999])
def test_float32_agrees_with_float64(index: int) -> None:
    e = example(index)
    expected = hybrid_loss(GaussianDiffusion(), **e).float()
    actual = hybrid_loss(GaussianDiffusion(), **example(index, torch.float32))
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-5)


def test_untrained_outputs_in_bfloat16_give_finite_gradients() -> None:
    e = {name: torch.cat([example(i, torch.float32)[name] for i in (0, 1, 500, 999)]) for name in example(0)}
    F = (10 * torch.randn_like(e["F"])).bfloat16().requires_grad_()
    frac_raw = (10 * torch.randn_like(F)).requires_grad_()
    loss = hybrid_loss(GaussianDiffusion(), **{**e, "F": F, "frac_raw": frac_raw})
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert F.grad is not None
    assert frac_raw.grad is not None
    assert F.grad.isfinite().all()
    assert frac_raw.grad.isfinite().all()

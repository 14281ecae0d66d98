import math

import pytest
import torch

from unclip_pl.diffusion.schedule import CosineSchedule, LinearSchedule, Schedule, StraightPath, VariancePreserving

T = 1000
TIMES = torch.arange(1, T + 1, dtype=torch.float64) / T


def cosine_betas() -> torch.Tensor:
    """The table of OpenAI's improved-diffusion, `betas_for_alpha_bar`."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64)


def linear_betas() -> torch.Tensor:
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def test_cosine_is_the_table() -> None:
    alpha, sigma = CosineSchedule().alpha_sigma(TIMES)
    abar = (1 - cosine_betas()).cumprod(0)
    assert (alpha.square() - abar).abs().max() < 3e-13
    assert (sigma.square() - (1 - abar)).abs().max() < 3e-13
    assert alpha[-1].square().item() == pytest.approx(2.428767e-9, rel=1e-6)
    torch.testing.assert_close(alpha.square(), abar, rtol=1e-8, atol=0)


def test_cosine_constants() -> None:
    abar = CosineSchedule().alpha_sigma(TIMES)[0].square()
    expected = {0: 0.99995872, 99: 0.97209274, 499: 0.49384359, 899: 0.02409172, 998: 2.428767e-6}
    for index, value in expected.items():
        assert abar[index].item() == pytest.approx(value, rel=1e-6)


def test_linear_is_near_the_table() -> None:
    abar = LinearSchedule().alpha_sigma(TIMES)[0].square()
    assert (abar - (1 - linear_betas()).cumprod(0)).abs().max() < 8.2e-4


def test_posterior_is_the_table() -> None:
    betas = cosine_betas()
    abar = (1 - betas).cumprod(0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    q = CosineSchedule().posterior(TIMES, TIMES - 1 / T)
    torch.testing.assert_close(q.beta, betas, rtol=1e-8, atol=0)
    torch.testing.assert_close(q.beta_tilde[1:], (betas * (1 - previous) / (1 - abar))[1:], rtol=1e-8, atol=0)
    torch.testing.assert_close(q.c_x0, previous.sqrt() * betas / (1 - abar), rtol=1e-8, atol=0)


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()])
class TestEverySchedule:
    def test_clean_at_0(self, schedule: VariancePreserving) -> None:
        alpha, sigma = schedule.alpha_sigma(torch.zeros(1))
        assert alpha.item() == 1
        assert sigma.item() == 0

    def test_falls_and_preserves_variance(self, schedule: VariancePreserving) -> None:
        assert (schedule.log_snr(TIMES).diff() < 0).all()
        alpha, sigma = schedule.alpha_sigma(TIMES)
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(TIMES), rtol=1e-14, atol=0)

    def test_log_snr_is_the_ratio(self, schedule: VariancePreserving) -> None:
        alpha, sigma = schedule.alpha_sigma(TIMES)
        torch.testing.assert_close(2 * (alpha / sigma).log(), schedule.log_snr(TIMES))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_keeps_dtype_and_is_finite(self, schedule: VariancePreserving, dtype: torch.dtype) -> None:
        for value in schedule.alpha_sigma(torch.tensor([0.0, 1e-3, 0.5, 1.0], dtype=dtype)):
            assert value.dtype == dtype
            assert value.isfinite().all()
        assert (schedule.alpha_sigma(torch.ones(1, dtype=dtype))[0] > 0).all()

    @pytest.mark.parametrize("stride", [1, 37, 250])
    def test_posterior_composes_to_the_marginal(self, schedule: VariancePreserving, stride: int) -> None:
        """E and Var of x_s drawn from q(x_s | x_t, x0), x_t from q(x_t | x0), are those of q(x_s | x0)."""
        t, s = TIMES[stride:], TIMES[:-stride]
        q = schedule.posterior(t, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        torch.testing.assert_close(q.c_x0 + q.c_xt * alpha_t, alpha_s)
        torch.testing.assert_close((q.c_xt * sigma_t).square() + q.beta_tilde, sigma_s.square())
        assert (q.beta_tilde <= q.beta).all()

    def test_posterior_of_the_clean_end(self, schedule: VariancePreserving) -> None:
        q = schedule.posterior(TIMES, torch.zeros_like(TIMES))
        torch.testing.assert_close(q.c_x0, torch.ones_like(TIMES))
        assert (q.c_xt == 0).all()
        assert (q.beta_tilde == 0).all()

    @pytest.mark.parametrize("stride", [1, 37, 250])
    def test_any_path_has_such_a_posterior(self, schedule: VariancePreserving, stride: int) -> None:
        """The rule for every schedule, which cancels where alpha and sigma lie close, against that of log-SNRs."""
        t, s = TIMES[stride:], TIMES[:-stride]
        general, own = Schedule.posterior(schedule, t, s), schedule.posterior(t, s)
        torch.testing.assert_close(general, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_straight_path(shift: float) -> None:
    schedule = StraightPath(shift)
    alpha, sigma = schedule.alpha_sigma(TIMES)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(TIMES), rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma, shift * TIMES / (1 + (shift - 1) * TIMES))
    torch.testing.assert_close(schedule.level(TIMES[:-1]), shift * TIMES[:-1] / (1 - TIMES[:-1]))
    assert [c.item() for c in schedule.alpha_sigma(torch.zeros(1))] == [1, 0]
    assert [c.item() for c in schedule.alpha_sigma(torch.ones(1))] == [0, 1]
    assert all(c.dtype == torch.float32 for c in schedule.alpha_sigma(torch.ones(1)))
    if shift == 1:
        assert torch.equal(sigma, TIMES)


def test_posterior_of_a_straight_path_composes_to_the_marginal() -> None:
    schedule, t, s = StraightPath(), TIMES[37:], TIMES[:-37]
    q = schedule.posterior(t, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    torch.testing.assert_close(q.c_x0 + q.c_xt * alpha_t, alpha_s)
    torch.testing.assert_close((q.c_xt * sigma_t).square() + q.beta_tilde, sigma_s.square())

import pickle

import pytest
import torch

from unclip_pl.diffusion.process import (
    GaussianDiffusion,
    LogitNormalTime,
    PowerTime,
    Prediction,
    TimeDensity,
    UniformTime,
    noise_like,
    same_levels,
)
from unclip_pl.diffusion.schedule import CosineSchedule, LinearSchedule, StraightPath

PREDICTIONS = ["x0", "eps", "v", "velocity"]


def of(prediction: Prediction) -> GaussianDiffusion:
    return GaussianDiffusion(StraightPath() if prediction == "velocity" else CosineSchedule(), prediction)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 4, 4)])
def test_target_is_the_output_that_gives_x0(prediction: Prediction, shape: tuple[int, ...]) -> None:
    diffusion = of(prediction)
    x0, eps = torch.randn(2, *shape, dtype=torch.float64, generator=generator()).unbind()
    t = torch.tensor([0.001, 0.1, 0.4, 0.7, 0.95, 0.999], dtype=torch.float64)
    x_t = diffusion.add_noise(x0, t, eps)
    torch.testing.assert_close(diffusion.to_x0(diffusion.target(x0, eps, t), x_t, t), x0)


def test_parameterisations_are_one_estimate() -> None:
    """A wrong F means the same wrong x0 in every parameterisation: eps and v follow from an x0 by their definitions."""
    t = torch.tensor([0.02, 0.5, 0.9], dtype=torch.float64)
    x_t, x0 = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator()).unbind()
    alpha, sigma = (c[:, None] for c in GaussianDiffusion().schedule.alpha_sigma(t))
    eps = (x_t - alpha * x0) / sigma
    outputs: dict[Prediction, torch.Tensor] = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}
    for prediction, F in outputs.items():
        torch.testing.assert_close(GaussianDiffusion(prediction=prediction).to_x0(F, x_t, t), x0)


def test_add_noise_ends() -> None:
    diffusion = GaussianDiffusion()
    x0, eps = torch.randn(2, 2, 8, generator=generator()).unbind()
    assert torch.equal(diffusion.add_noise(x0, torch.zeros(2), eps), x0)
    torch.testing.assert_close(diffusion.add_noise(x0, torch.ones(2), eps), eps, rtol=0, atol=3e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_outputs_are_read_in_float32(prediction: Prediction) -> None:
    F, x_t = torch.randn(2, 4).bfloat16(), torch.randn(2, 4)
    x0 = of(prediction).to_x0(F, x_t, torch.tensor([0.1, 1.0]))
    assert x0.dtype == torch.float32
    assert x0.isfinite().all()


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("density", [UniformTime(), PowerTime(1.7), PowerTime(2.0)])
def test_times_lie_on_the_grid(density: TimeDensity, steps: int) -> None:
    diffusion = GaussianDiffusion(steps=steps, time_density=density)
    t = diffusion.draw_t(20_000, generator=generator())
    index = diffusion.index(t)
    assert t.dtype == torch.float32
    assert t.shape == (20_000,)
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-3 * steps / 1000)
    assert index.round().min() == 0
    assert index.round().max() == steps - 1
    assert torch.equal(t, diffusion.draw_t(20_000, generator=generator()))


@pytest.mark.parametrize("power", [1.0, 1.7, 2.0])
def test_power_time_has_its_distribution(power: float) -> None:
    """P(t > k / T) = P(u^power < 1 - k / T) = (1 - k / T)^(1 / power); power 1 is uniform."""
    t = PowerTime(power).draw(100_000, steps=10, generator=generator())
    for k in range(10):
        assert (t > (k + 0.5) / 10).float().mean().item() == pytest.approx((1 - k / 10) ** (1 / power), abs=6e-3)


def test_uniform_time_is_uniform() -> None:
    counts = (UniformTime().draw(100_000, steps=10, generator=generator()) * 10).round().long().bincount()[1:]
    assert (counts.float() / 1e5 - 0.1).abs().max() < 4e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_time_has_its_distribution(mean: float, std: float) -> None:
    t = LogitNormalTime(mean, std).draw(100_000, steps=1000, generator=generator())
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(mean, abs=0.02)
    assert logit.std().item() == pytest.approx(std, rel=0.02)
    assert ((logit - mean) / std < 1).float().mean().item() == pytest.approx(0.8413, abs=5e-3)
    t = LogitNormalTime(0.0, 50.0).draw(1000, steps=1000, generator=generator())
    assert t.min() > 0
    assert t.max() < 1


def test_times_of_a_straight_path_are_embedded_unrounded() -> None:
    diffusion = GaussianDiffusion(StraightPath(), "velocity")
    assert isinstance(diffusion.time_density, LogitNormalTime)
    t = diffusion.draw_t(100, generator=generator())
    assert torch.equal(diffusion.index(t), t * 1000 - 1)
    assert (diffusion.index(t) != diffusion.index(t).round()).any()


def test_velocity_is_the_slope_of_the_path() -> None:
    diffusion = GaussianDiffusion(StraightPath(), "velocity")
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator()).unbind()
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-3
    slope = (diffusion.add_noise(x0, t + h, eps) - diffusion.add_noise(x0, t - h, eps)) / (2 * h)
    torch.testing.assert_close(diffusion.target(x0, eps, t), slope)


def test_a_prediction_belongs_to_its_schedule() -> None:
    for prediction in ("v", "eps"):
        with pytest.raises(ValueError, match=f"'velocity' or 'x0' on a straight path. Got '{prediction}'"):
            GaussianDiffusion(StraightPath(), prediction)  # type: ignore[arg-type]
    for schedule in (CosineSchedule(), LinearSchedule()):
        with pytest.raises(ValueError, match=f"StraightPath for prediction 'velocity'. Got {type(schedule).__name__}"):
            GaussianDiffusion(schedule, "velocity")
    with pytest.raises(ValueError, match=r"shift > 0. Got 0"):
        StraightPath(0)
    with pytest.raises(ValueError, match=r"std > 0. Got 0"):
        LogitNormalTime(std=0)


def test_levels_are_compared_by_what_they_are() -> None:
    straight, cosine = (GaussianDiffusion(schedule, "x0") for schedule in (StraightPath(), CosineSchedule()))
    assert same_levels(straight, GaussianDiffusion(StraightPath(), "velocity"))
    assert same_levels(cosine, GaussianDiffusion())
    others = (straight, GaussianDiffusion(LinearSchedule()), GaussianDiffusion(steps=100))
    assert not any(same_levels(cosine, other) for other in others)
    assert not same_levels(straight, GaussianDiffusion(StraightPath(2.0), "x0"))


def test_noise_follows_the_generator() -> None:
    x = torch.empty(3, 5, dtype=torch.float64)
    noise = noise_like(x, generator=generator(1))
    assert noise.shape == x.shape
    assert noise.dtype == x.dtype
    assert torch.equal(noise, noise_like(x, generator=generator(1)))
    assert not torch.equal(noise, noise_like(x, generator=generator(2)))


def test_pickles() -> None:
    diffusion = GaussianDiffusion(LinearSchedule(), "v", 100, PowerTime(1.7))
    clone = pickle.loads(pickle.dumps(diffusion))
    t = torch.tensor([0.3])
    assert torch.equal(clone.target(t, t, t), diffusion.target(t, t, t))
    assert clone.steps == 100


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        GaussianDiffusion(prediction="epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        GaussianDiffusion(steps=0)
    with pytest.raises(ValueError, match="power"):
        PowerTime(0.0)

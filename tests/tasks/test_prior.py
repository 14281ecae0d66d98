"""The diffusion prior's own bookkeeping: errors of validation become the analytic variance of its sampler."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from unclip_pl.diffusion import Ancestral, GaussianDiffusion, TimeDensity, simple_loss
from unclip_pl.diffusion.process import Prediction
from unclip_pl.generation.priors import DiffusionPriorSpec
from unclip_pl.nn.prior import PriorTransformer
from unclip_pl.nn.space import Moments, write_statistics
from unclip_pl.tasks import DiffusionPriorTask
from unclip_pl.tasks.prior import Draws
from unclip_pl.types import PriorBatch, TextFeatures

D, W = 6, 5


def text(n: int) -> TextFeatures:
    return TextFeatures(torch.ones(n, 3).long(), torch.randn(n, 3, W), torch.ones(n, 3).bool(), torch.randn(n, D))


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_errors_of_x0_whatever_the_network_predicts(prediction: Prediction, tmp_path: Path) -> None:
    """A network that answers 0 knows nothing: x0_hat is 0, x_t / alpha or alpha x_t, and its error a closed form."""
    torch.manual_seed(0)
    z_i = torch.nn.functional.normalize(torch.randn(4000, D), dim=-1)
    write_statistics(tmp_path / "s.safetensors", moments=Moments.of(z_i), null_text=text(1), fingerprint="c")
    net = PriorTransformer(D, W, 8, width=8, layers=1, heads=2)
    torch.nn.init.zeros_(net.out_proj.weight)
    torch.nn.init.zeros_(net.out_proj.bias)
    diffusion = GaussianDiffusion(prediction=prediction)
    task = DiffusionPriorTask(net, str(tmp_path / "s.safetensors"), diffusion=diffusion, draws_per_caption=8)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    loader = DataLoader([PriorBatch(part, text(len(part))) for part in z_i.split(1000)], batch_size=None)
    trainer.validate(task, loader, verbose=False)

    c_t = task.diffusion.posterior_mse
    assert c_t is not None
    assert c_t.shape == (1000,)
    variance = task.space.unit_scale**2 / D
    middle = torch.arange(200, 800)
    alpha, sigma = diffusion.schedule.alpha_sigma((middle + 1) / 1000)
    error = {
        "x0": torch.full_like(alpha, variance),
        "eps": (sigma / alpha) ** 2,
        "v": sigma**4 * variance + (alpha * sigma) ** 2,
    }[prediction]
    torch.testing.assert_close(c_t[middle], error.clamp(max=variance), rtol=0.1, atol=0.02)


class Late(TimeDensity):
    """Draws what it was given, in order."""

    def __init__(self, times: list[list[float]]) -> None:
        self.times = iter(times)

    def draw(self, n: int, **_: Any) -> Tensor:
        return torch.tensor(next(self.times))


def test_the_loss_of_a_quarter_is_the_mean_over_its_own_draws(tmp_path: Path) -> None:
    """One draw in the first quarter in one batch, three in the other; none at all in the third."""
    torch.manual_seed(0)
    z_i = torch.nn.functional.normalize(torch.randn(8, D), dim=-1)
    write_statistics(tmp_path / "s.safetensors", moments=Moments.of(z_i), null_text=text(1), fingerprint="c")
    times = [[0.1, 0.3, 0.9, 1.0], [0.2, 0.25, 0.01, 0.8]]
    diffusion = GaussianDiffusion(prediction="x0", time_density=Late(times))
    net = PriorTransformer(D, W, 8, width=8, layers=1, heads=2)
    task = DiffusionPriorTask(net, str(tmp_path / "s.safetensors"), diffusion=diffusion)
    errors: list[Tensor] = []
    kept = task.denoise_batch

    def watched(*given: Any) -> Draws:
        draws = kept(*given)
        errors.append(simple_loss(draws.F, draws.target))
        return draws

    task.denoise_batch = watched  # type: ignore[method-assign]
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, num_sanity_val_steps=0
    )
    loader = DataLoader([PriorBatch(part, text(len(part))) for part in z_i.split(4)], batch_size=None)
    (logged,) = trainer.validate(task, loader, verbose=False)

    all_times, all_errors = torch.tensor(times).flatten(), torch.cat(errors)
    quarters = {name: value for name, value in logged.items() if name.startswith("val/loss_t")}
    assert set(quarters) == {"val/loss_t0.00-0.25", "val/loss_t0.25-0.50", "val/loss_t0.75-1.00"}
    for name, value in quarters.items():
        low, high = (float(end) for end in name.removeprefix("val/loss_t").split("-"))
        chosen = (all_times > low) & (all_times <= high)
        assert value == pytest.approx(all_errors[chosen].mean().item(), rel=1e-5)


def test_the_sampler_finds_it_in_the_checkpoint(mini_run: Path, tmp_path: Path) -> None:
    path = mini_run / "prior" / "checkpoints" / "last.ckpt"
    prior = DiffusionPriorSpec(path.name, Ancestral(4, "analytic")).load(path.parent)
    c_t = prior.part.diffusion.posterior_mse
    assert c_t is not None
    assert torch.equal(c_t, torch.load(path, weights_only=True)["posterior_mse"])

    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["posterior_mse"]
    torch.save(checkpoint, tmp_path / "early.ckpt")
    with pytest.raises(ValueError, match="Expected posterior_mse, the errors"):
        DiffusionPriorSpec("early.ckpt", Ancestral(4, "analytic")).load(tmp_path)
    DiffusionPriorSpec("early.ckpt").load(tmp_path)
    with pytest.raises(ValueError, match="learned its variance"):
        DiffusionPriorSpec("early.ckpt", Ancestral(4, "learned")).load(tmp_path)

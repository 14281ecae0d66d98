"""The upsamplers' Task: crops in training, whole images afterwards, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unclip_pl.diffusion import DDIM, GaussianDiffusion, LinearSchedule, StraightPath
from unclip_pl.diffusion.process import Prediction
from unclip_pl.nn.unet import UpsamplerUNet
from unclip_pl.tasks import UpsamplerTask
from unclip_pl.tasks.corruption import BSRDegradation, Corruption, GaussianBlur, Sometimes, shrink
from unclip_pl.types import UpsamplerBatch


def task(**arguments: object) -> UpsamplerTask:
    torch.manual_seed(0)
    net = UpsamplerUNet(8, [1, 2], 1, dropout=0.0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return UpsamplerTask(net, **arguments)  # type: ignore[arg-type]


def coordinates(n: int, side: int) -> Tensor:
    """Pixels that say where they are: row, column and image."""
    axis = torch.arange(side, dtype=torch.float32)
    place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    return torch.cat(
        [place.expand(n, -1, -1, -1), torch.arange(float(n)).view(n, 1, 1, 1).expand(-1, 1, side, side)], 1
    )


def test_crops_are_a_quarter_of_the_side_and_anywhere() -> None:
    torch.manual_seed(0)
    image = coordinates(500, 32)
    crop = task().random_crop(image)
    assert crop.shape == (500, 3, 8, 8)
    corner = crop[:, :2, 0, 0]
    assert torch.equal(crop[:, :2], corner[..., None, None] + coordinates(1, 8)[:, :2])  # one piece of the image
    assert torch.equal(crop[:, 2, 0, 0], torch.arange(500.0))  # of its own image
    assert corner.min() == 0
    assert corner.max() == 24
    assert corner[:, 0].unique().numel() == 25


def test_training_sees_crops_and_validation_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    model = task()
    monkeypatch.setattr(model, "loss", lambda batch, generator=None: seen.append(tuple(batch.image.shape)))
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    batch = UpsamplerBatch(torch.zeros(2, 3, 32, 32))
    model.training_step(batch, 0)
    model.validation_step(batch, 0)
    assert seen == [(2, 3, 8, 8), (2, 3, 32, 32)]


@pytest.mark.parametrize("corruption", [GaussianBlur(), Sometimes(GaussianBlur()), BSRDegradation()])
def test_images_are_corrupted_in_float32_under_autocast(
    corruption: Corruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    model = task(corruption=corruption)
    enlarge = model.enlarge
    monkeypatch.setattr(model, "enlarge", lambda low, size: (seen.append(low), enlarge(low, size))[1])
    batch = UpsamplerBatch(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert model.loss(batch, torch.Generator().manual_seed(1)).isfinite()
    assert seen[0].dtype == torch.float32
    assert torch.equal(*seen)


@pytest.mark.parametrize("corruption", [None, BSRDegradation()])
def test_loss_and_gradients_of_both_corruptions(corruption: BSRDegradation | None) -> None:
    model = task(corruption=corruption, diffusion=GaussianDiffusion(LinearSchedule()))
    batch = UpsamplerBatch(torch.rand(3, 3, 16, 16) * 2 - 1)
    loss, again = (model.loss(batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(loss, again)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.net.parameters())


def test_applied_at_full_size_it_does_what_it_does_on_crops() -> None:
    """Convolutions do not know where they are: far from the border a crop of the output is the output of the crop."""
    model = task().double().eval()
    g = torch.Generator().manual_seed(0)
    # GroupNorm pools over the whole image: with the same statistics everywhere (a periodic image) both see the same.
    tile = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float64)
    low = torch.rand(1, 3, 2, 2, generator=g, dtype=torch.float64)
    t = torch.full((1,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        small, large = (model.denoiser(low.repeat(1, 1, n, n), 8 * n)(tile.repeat(1, 1, n, n), t).x0 for n in (16, 24))
    torch.testing.assert_close(small[..., 56:64, 56:64], large[..., 80:88, 80:88], rtol=0, atol=2e-2)


def test_it_draws_at_four_times_the_side() -> None:
    model, low = task().eval(), torch.rand(2, 3, 4, 4)
    x_T = torch.randn(2, 3, 16, 16)
    image = DDIM(3).sample(model.denoiser(low, 16), x_T, model.diffusion)
    assert image.shape == (2, 3, 16, 16)
    assert image.abs().max() <= 1


def test_an_untrained_network_that_predicts_x0_draws_the_enlarged_image() -> None:
    net = UpsamplerUNet(8, [1, 2], 1, dropout=0.0)  # its last convolution is zero
    model, low = UpsamplerTask(net, diffusion=GaussianDiffusion(prediction="x0")), torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        image = DDIM(3).sample(model.denoiser(low, 16), torch.randn(2, 3, 16, 16), model.diffusion)
    torch.testing.assert_close(image, model.enlarge(low, 16))


def test_shrink_of_a_constant_and_of_a_ramp() -> None:
    assert torch.allclose(shrink(torch.full((1, 3, 8, 8), 0.3), 4), torch.tensor(0.3))
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    torch.testing.assert_close(
        shrink(ramp, 4)[0, 0, 4, 2:-2], ramp[0, 0, 0].view(8, 4).mean(1)[2:-2], rtol=0, atol=1e-5
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"0 < crop <= 1.*Got 1.5"):
        task(crop=1.5)
    with pytest.raises(ValueError, match=r"multiple of factor = 4 and of the network's stride = 2\. Got 9 px"):
        task(crop=0.3).random_crop(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_the_network_adds_what_the_enlarged_image_lacks(
    prediction: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows image and noise is asked for what is missing of the image, and for the noise as it is."""
    diffusion = GaussianDiffusion(StraightPath() if prediction == "velocity" else None, prediction)
    model = task(diffusion=diffusion)
    x0, eps, large = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.3, 0.9])
    missing = x0 - large
    monkeypatch.setattr(model.net, "forward", lambda *_: missing if prediction == "x0" else eps - missing)
    x_t = diffusion.add_noise(x0, t, eps)
    torch.testing.assert_close(diffusion.to_x0(model.estimate(x_t, t, large), x_t, t), x0)


def test_weights_of_one_path_are_not_taken_for_anothers() -> None:
    straight, cosine = (
        task(diffusion=diffusion) for diffusion in (GaussianDiffusion(StraightPath(), "velocity"), None)
    )
    saved: dict[str, Any] = {}
    straight.on_save_checkpoint(saved)
    task(diffusion=GaussianDiffusion(StraightPath(), "velocity")).on_load_checkpoint(saved)
    others = (cosine, task(diffusion=GaussianDiffusion(StraightPath(3.0), "velocity")))
    for other in others:
        with pytest.raises(
            ValueError, match=r"trained as StraightPath\(shift=1.0\), velocity, 1000 steps, but model.diffusion says"
        ):
            other.on_load_checkpoint(saved)
    cosine.on_load_checkpoint({})  # of before
    older = {"diffusion": saved["diffusion"].removesuffix(", 1000 steps")}
    task(diffusion=GaussianDiffusion(StraightPath(), "velocity")).on_load_checkpoint(older)
    with pytest.raises(ValueError, match="velocity, 250 steps: give the config"):  # networks embed other times
        task(diffusion=GaussianDiffusion(StraightPath(), "velocity", steps=250)).on_load_checkpoint(saved)

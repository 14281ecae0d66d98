"""``unclip sample``: pictures of captions."""

from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

from unclip_pl.pipeline import Unclip


def sample(
    captions: list[str],
    run: str = "runs/quickstart",
    out: str = "sample.png",
    *,
    num: int = 4,
    seed: int = 0,
    guidance: float | None = None,
    prior: str = "diffusion",
    device: str = "cpu",
) -> None:
    """Draw images of captions from a trained run: one row per caption.

    Args:
        captions: texts; an empty one is unconditional.
        run: folder with run.json.
        out: PNG file to write.
        num: images per caption.
        seed: the same seed gives the same bytes.
        guidance: of the decoder; without it the run's own. 1 is off.
        prior: one of the run's priors.
        device: where to compute.
    """
    if not captions:
        raise ValueError('Expected a caption, such as: unclip sample "a large red star on a navy background".')
    unclip = Unclip.load(run, device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        steps = bar.add_task("drawing", total=unclip.decoder.sampler.steps)

        def progress(done: int, total: int, x0: torch.Tensor) -> None:
            bar.update(steps, completed=done, total=total)

        images = unclip.generate(captions, num=num, prior=prior, guidance=guidance, seed=seed, progress=progress).images
    grid = make_grid(images.cpu().add(1).div(2), nrow=num, padding=2, pad_value=1.0)
    info = PngInfo()
    for key, value in {"captions": "\n".join(captions), "seed": seed, "prior": prior, "run": Path(run).name}.items():
        info.add_itxt(key, str(value))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(out, format="PNG", pnginfo=info)
    print(f"{len(captions)} × {num} images: {out}")

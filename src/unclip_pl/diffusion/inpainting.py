"""Inpainting: samples of which a part is known (RePaint, Lugmayr et al. 2022)."""

from typing import Self

import torch
from torch import Tensor

from unclip_pl.diffusion.process import Denoise, Denoised, GaussianDiffusion, noise_like
from unclip_pl.diffusion.solvers import OneLook, Progress, Sampler, first_of, time_of
from unclip_pl.errors import InputError
from unclip_pl.streams import Streams


class Inpaint(Sampler):
    """Draws by another solver what a mask leaves open, around what is known.

    Each estimate of x0 gets the known values in their places. So what the solver makes there of x_t is the known data
    with its own noise at every level, and at the end the data themselves.

    Args:
        solver: solver whose steps it takes.
        known: data, (B, ...); only values outside the mask count.
        mask: booleans that broadcast to the data's shape, True where data are drawn.
        jumps: number of times that each step is taken back, by fresh noise, and walked again (Lugmayr et al. 2022,
            algorithm 1 with U = jumps + 1). The drawn part then fits the known one better. A mask of everything takes
            none.

    Raises:
        InputError: jumps < 0, or jumps with a solver that looks twice a step.
    """

    def __init__(self, solver: Sampler, known: Tensor, mask: Tensor, jumps: int = 0) -> None:
        super().__init__(solver.steps, solver.grid)
        if jumps < 0:
            raise InputError(f"Expected jumps >= 0. Got {jumps}: give 0 for none.")
        if jumps and not isinstance(solver, OneLook):
            raise InputError(
                f"Expected a solver of one look a step, for jumps. Got {type(solver).__name__}: set jumps to 0, or "
                "draw by DDIM."
            )
        self.solver = solver
        self.known = known
        self.mask = mask
        self.jumps = 0 if mask.all() else jumps

    def with_steps(self, steps: int) -> Self:
        """Return the same inpainting by the solver with another number of steps."""
        other = super().with_steps(steps)
        other.solver = self.solver.with_steps(steps)
        return other

    def times(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times that the solver visits."""
        return self.solver.times(diffusion)

    def looks(self, diffusion: GaussianDiffusion) -> list[float]:
        """Return the times at which it asks the network, in order."""
        *looks, last = self.solver.looks(diffusion)
        return [t for t in looks for _ in range(self.jumps + 1)] + [last]

    def check(self, diffusion: GaussianDiffusion, *, learns_variance: bool = False) -> None:
        """Refuse what the solver refuses."""
        self.solver.check(diffusion, learns_variance=learns_variance)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        x_T: Tensor,
        diffusion: GaussianDiffusion,
        *,
        last: Denoise | None = None,
        generator: Streams | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw data as `Sampler.sample` describes."""
        denoise, last = self._placed(denoise), self._placed(denoise if last is None else last)
        if not self.jumps:
            return self.solver.sample(denoise, x_T, diffusion, last=last, generator=generator, progress=progress)
        assert isinstance(self.solver, OneLook)
        times, looks = self.times(diffusion), len(self.looks(diffusion))
        t = torch.tensor(times[:-1], dtype=torch.float64, device="cpu")
        (alpha, _), beta = diffusion.schedule.alpha_sigma(t), diffusion.schedule.posterior(t[:-1], t[1:]).beta
        back = list(zip((alpha[:-1] / alpha[1:]).tolist(), beta.sqrt().tolist(), strict=True))
        x, step, done = first_of(x_T, times[0], diffusion.schedule), self.solver.plan(times, diffusion), 0
        for i, time in enumerate(times[:-2]):
            for turn in range(self.jumps + 1):
                if turn:  # q(x_t | x_s); what a solver remembers is of another x
                    scale, std = back[i]
                    x, step = scale * x + std * noise_like(x, generator=generator), self.solver.plan(times, diffusion)
                denoised = denoise(x, time_of(time, x))
                x, done = step(i, x, denoised, generator), done + 1
                if progress is not None:
                    progress(done, looks, denoised.x0)
        x0 = last(x, time_of(times[-2], x)).x0
        if progress is not None:
            progress(looks, looks, x0)
        return x0

    def _placed(self, denoise: Denoise) -> Denoise:
        def placed(x_t: Tensor, t: Tensor) -> Denoised:
            x0, frac = denoise(x_t, t)
            return Denoised(torch.where(self.mask, x0, self.known.to(x0.dtype)), frac)

        return placed

"""Random numbers from one stream for a whole batch, or from one stream for each of its rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip_pl.errors import InputError

#: One generator, or one for each row: a row then draws the same in any batch and on any rank.
Streams = torch.Generator | Sequence[torch.Generator]


def fill_like(x: Tensor, fill: Callable[[Tensor, torch.Generator | None], object], streams: Streams | None) -> Tensor:
    """Return a tensor like ``x`` of random numbers, drawn on the generators' device and moved.

    Args:
        x: (n·B, …), B rows with n draws each, side by side.
        fill: function that writes random numbers into the tensor that it is given.
        streams: one generator, B of them, or None for torch's global one.

    Raises:
        InputError: the generators do not divide the rows.
    """
    each = [streams] if streams is None or isinstance(streams, torch.Generator) else streams
    if len(x) % len(each):
        raise InputError(f"Expected one generator, or one for each row. Got {len(each)} for {len(x)} rows: give B.")
    source = x.device if each[0] is None else each[0].device
    out = torch.empty(x.shape, dtype=x.dtype, device=source)
    for rows, generator in zip(out.unflatten(0, (len(each), -1)), each, strict=True):
        fill(rows, generator)
    return out.to(x.device)

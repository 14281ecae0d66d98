"""A network's weights under other names: every tensor accounted for, on both sides."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unclip_pl.errors import InputError

Weights = Mapping[str, Tensor]


class Layout(ABC):
    """Where somebody else's checkpoint keeps the tensors of one of our networks, and in what form."""

    #: Tensors that the other side's network owns and ours does not.
    extra: tuple[str, ...] = ()

    @abstractmethod
    def names(self, name: str) -> tuple[str, ...]:
        """The tensors there that make up our parameter ``name``."""

    @abstractmethod
    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Our parameter ``name`` made of them, in that order."""

    def has(self, weights: Weights, name: str) -> bool:
        """Whether a checkpoint holds what makes up our parameter ``name``."""
        return all(there in weights for there in self.names(name))

    def count(self, weights: Weights, pattern: str) -> int:
        """How many modules 0, 1, … a checkpoint has; ``pattern`` is one of our parameters, ``{}`` for the number."""
        n = 0
        while self.has(weights, pattern.format(n)):
            n += 1
        return n

    def shape(self, weights: Weights, name: str) -> tuple[int, ...]:
        """Shape of our parameter ``name`` in a checkpoint.

        Raises:
            ValueError: it is not there.
        """
        missing = [there for there in self.names(name) if there not in weights]
        if missing:
            raise InputError(
                f"Expected {', '.join(missing)}, which says the network's sizes. Got a checkpoint without."
            )
        return tuple(self.join([weights[there] for there in self.names(name)], name).shape)


@torch.no_grad()
def load_weights(net: nn.Module, weights: Weights, layout: Layout, what: str = "the checkpoint") -> None:
    """Copy a checkpoint into ``net``; nothing may be missing, left over or of another shape.

    Args:
        net: ours, of the checkpoint's sizes.
        weights: tensors by the other side's names.
        layout: which names those are.
        what: the checkpoint, for the error.

    Raises:
        ValueError: listing every key that is missing, unexpected or misshapen; ``net`` is left as it was.
    """
    parameters = dict(net.named_parameters())
    sources = {name: layout.names(name) for name in parameters}
    wanted = {there for names in sources.values() for there in names} | set(layout.extra)
    made, misshapen = {}, []
    for name, parameter in parameters.items():
        if not layout.has(weights, name):
            continue
        parts = [weights[there] for there in sources[name]]
        if (tensor := _joined(layout, parts, name)) is not None and tensor.shape == parameter.shape:
            made[name] = tensor
        else:
            have = " + ".join(str(tuple(part.shape)) for part in parts)
            misshapen.append(f"{' + '.join(sources[name])} of shape {have}, together not {tuple(parameter.shape)}")
    faults = [
        _fault("missing", wanted - weights.keys()),
        _fault("unexpected", weights.keys() - wanted),
        _fault("misshapen", misshapen),
    ]
    if any(faults):
        raise InputError(f"{what} does not fit {type(net).__name__}: {'; '.join(filter(None, faults))}.")
    for name, parameter in parameters.items():
        parameter.copy_(made[name])


def side_by_side(parts: list[Tensor], heads: int) -> Tensor:
    """Projections of equal height fused so that those of one head lie together: q, k, v, q, k, v, …"""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _joined(layout: Layout, parts: list[Tensor], name: str) -> Tensor | None:
    try:
        return layout.join(parts, name)
    except (RuntimeError, IndexError):  # parts of unequal sizes, or of too few axes
        return None


def _fault(kind: str, keys: Iterable[str]) -> str:
    listed = sorted(keys)
    return f"{len(listed)} {kind} ({', '.join(listed)})" if listed else ""

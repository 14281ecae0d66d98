"""Copy weights between names: every tensor is accounted for, on both sides."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unclip_pl.errors import InputError

Weights = Mapping[str, Tensor]


class Layout(ABC):
    """Names and forms of one network's tensors in somebody else's checkpoint."""

    #: Tensors of the other network that ours does not have.
    extra: tuple[str, ...] = ()

    @abstractmethod
    def names(self, name: str) -> tuple[str, ...]:
        """Return the other names of the tensors that make up our parameter ``name``."""

    @abstractmethod
    def join(self, parts: list[Tensor], name: str) -> Tensor:
        """Make our parameter ``name`` of those tensors, in the order of their names."""

    def has(self, weights: Weights, name: str) -> bool:
        """Say whether a checkpoint holds all tensors of our parameter ``name``."""
        return all(there in weights for there in self.names(name))

    def count(self, weights: Weights, pattern: str) -> int:
        """Count modules 0, 1, … in a checkpoint. ``pattern`` is a parameter of ours, with ``{}`` for the number."""
        n = 0
        while self.has(weights, pattern.format(n)):
            n += 1
        return n

    def shape(self, weights: Weights, name: str) -> tuple[int, ...]:
        """Return the shape of our parameter ``name`` in a checkpoint.

        Raises:
            InputError: the checkpoint lacks it.
        """
        missing = [there for there in self.names(name) if there not in weights]
        if missing:
            raise InputError(
                f"Expected {', '.join(missing)}, which says the network's sizes. Got a checkpoint without: download it "
                "again."
            )
        return tuple(self.join([weights[there] for there in self.names(name)], name).shape)


@torch.no_grad()
def load_weights(net: nn.Module, weights: Weights, layout: Layout, what: str = "the checkpoint") -> None:
    """Copy a checkpoint into ``net``. Nothing may be missing, left over or of another shape.

    Args:
        net: our network, with the checkpoint's sizes.
        weights: tensors by their other names.
        layout: map from our names to the others.
        what: name of the checkpoint, for the error.

    Raises:
        InputError: a key is missing, unexpected or misshapen; the error lists all. ``net`` is left as it was.
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
        said = "; ".join(filter(None, faults))
        raise InputError(f"{what} does not fit {type(net).__name__}: {said}. Import a checkpoint of Karlo as it is.")
    for name, parameter in parameters.items():
        parameter.copy_(made[name])


def side_by_side(parts: list[Tensor], heads: int) -> Tensor:
    """Fuse projections of equal height so that those of one head lie together: q, k, v, q, k, v, …"""
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

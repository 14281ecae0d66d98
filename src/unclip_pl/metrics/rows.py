"""Features of all batches and processes, kept for functions that need all of them at once."""

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class Rows(Metric):
    """Rows of features by name, in the same order for every name.

    Args:
        names: names of the features.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, **features: Tensor) -> None:
        """Keep rows (B, …) of each name."""
        for name in self.names:
            getattr(self, name).append(features[name])

    def compute(self) -> dict[str, Tensor]:
        """Return all rows (N, …) by name."""
        return {name: dim_zero_cat(getattr(self, name)) for name in self.names}

"""One complaint of a peer's users, with what the peer does and what Esper does, side by side."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two libraries do where the same is asked of them.

    Attributes:
        asked: What is asked.
        source: Where users ask for it; empty where it was only seen.
        peer: What the peer does, as measured.
        esper: What Esper does, as measured.
    """

    asked: str
    source: str
    peer: str
    esper: str


def told(comparisons: Iterable[Callable[[], Comparison]]) -> None:
    """Make comparisons and print each as a line of JSON; one that fails says how."""
    for compare in comparisons:
        torch.manual_seed(0)
        try:
            row = asdict(compare())
        except Exception as error:  # noqa: BLE001 - a peer of another version may fail anywhere
            row = {"failed": f"{compare.__name__}: {type(error).__name__}: {error}"}
        print(json.dumps(row), flush=True)


class Bottleneck(nn.Module):
    """A kernel that is the identity at birth: its last layer is zero."""

    def __init__(self, width: int = 16, hidden: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the host's output."""
        return self.up(torch.relu(self.down(x)))


def held_by(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> str:
    """Say how many of the parameters an optimizer holds: ``"0 of 8"``."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [id(p) in held for p in parameters]
    return f"{sum(found)} of {len(found)}"


def largest(one: torch.Tensor, other: torch.Tensor) -> str:
    """Say how far two tensors are apart: ``"equal"``, or ``"1.3e-07"``."""
    return "equal" if torch.equal(one, other) else f"{float((one - other).abs().max()):.1e} apart"

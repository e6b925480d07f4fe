"""Seeds of one layer that are run as one, since their kernels have the same form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Sized

    from torch import Tensor

    from esper.state.seed_slot import Seed


class RunTogether(Protocol):
    """Runs kernels as one."""

    def pays(self, given: Tensor) -> bool:
        """Say whether this takes less time on an input than one by one."""

    def __call__(
        self, given: Tensor, alphas: Tensor, h: Tensor, *, is_watched: bool
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the sum of the shares, and the marks of each, if asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeedGroup:
    """What was found when a plan was made, and what of it has to be as it was in each call.

    Attributes:
        seeds: At least two, in slot order, with one guard and one position; they add.
        run: Runs their kernels.
        hooks: Tables of hooks on the kernels' modules: empty.
        tables: Tables of the kernels' modules that had these ``sizes``.
        sizes: Of ``tables``, in their order.
        parameters: ``(table, key)`` of their parameters.
        places: ``(table, key)`` of what stands in the kernels' tables, children among it.
        values: What stood there.
    """

    seeds: tuple[Seed, ...]
    run: RunTogether
    hooks: tuple[Mapping[object, object], ...]
    tables: tuple[Sized, ...]
    sizes: list[int]
    parameters: tuple[tuple[dict[str, Tensor], str], ...]
    places: tuple[tuple[Mapping[str, object], str], ...]
    values: list[object]

    @property
    def stands(self) -> bool:
        """Whether nothing was hooked, added or exchanged in its kernels since."""
        if any(self.hooks) or list(map(len, self.tables)) != self.sizes:
            return False
        return [table.get(key) for table, key in self.places] == self.values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouping:
    """How the seeds of a plan are run.

    Attributes:
        groups: Those that are run as one.
        others: Those that run by themselves, in slot order.
    """

    groups: tuple[SeedGroup, ...] = ()
    others: tuple[Seed, ...] = ()

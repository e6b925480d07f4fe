"""One Grower for a layer and for an optimizer at a time, and what an earlier one left behind."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import GrowthError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from esper.execution.kasmina_layer import KasminaLayer

_CLAIMS: Final[weakref.WeakKeyDictionary[object, weakref.ref[object]]] = weakref.WeakKeyDictionary()
"""Which Grower has a layer or an optimizer; both are held weakly."""


def check_free(things: Iterable[object]) -> None:
    """Refuse what another Grower has that was not closed.

    Args:
        things: Layers and optimizers.

    Raises:
        GrowthError: One is taken.
    """
    for thing in things:
        claim = _CLAIMS.get(thing)
        if claim is not None and claim() is not None:
            msg = (
                f"another Grower grows this model or steps with this optimizer (it has a "
                f"{type(thing).__name__}), and two would undo each other's work; call close() on "
                "it first, or give one Grower all optimizers in a sequence"
            )
            raise GrowthError(msg)


def claim(owner: object, things: Iterable[object]) -> None:
    """Keep layers and optimizers for one owner until it releases them or is gone."""
    _CLAIMS.update(dict.fromkeys(things, weakref.ref(owner)))


def release(owner: object) -> None:
    """Let others have what an owner had."""
    mine = [thing for thing, claim in list(_CLAIMS.items()) if claim() is owner]
    for thing in mine:
        del _CLAIMS[thing]


def left_behind(layers: Mapping[str, KasminaLayer]) -> Iterator[str]:
    """Say of each graft in a model that has no verdict that nobody will speak one.

    So it is after a Grower that was dropped, or a model that was saved, in the middle of a graft.
    """
    for name, layer in layers.items():
        layout = record_of(layer).layout
        for seed_idx in range(layout.num_seeds):
            state = layout.state(seed_idx)
            if state in (SeedLifecycleState.ACTIVE, SeedLifecycleState.ERROR_RECOVERY):
                yield (
                    f"seed {seed_idx} of {name!r} is {state.name} at alpha "
                    f"{layout.alpha(seed_idx):.3g} and belongs to no Grower (grafted by hand, or "
                    "left by a run that was not closed): it stays as it is and is not judged; call "
                    f"layer.fossilize({seed_idx}) to keep it, or layer.unload_kernel({seed_idx})"
                )
            elif state == SeedLifecycleState.LOADING and seed_idx not in record_of(layer).waiting:
                yield (
                    f"seed {seed_idx} of {name!r} is LOADING and belongs to no Grower (a load is "
                    "under way, or an audition was left by a run that was not closed): nothing "
                    f"grows there until layer.unload_kernel({seed_idx}) frees it"
                )

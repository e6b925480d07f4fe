"""The kernels of a registry as a run's own: asked for in time, taken between two steps.

The first of several ranks asks, and what it takes is sent to the others. Nothing here waits for a
registry but :meth:`Offers.load_state_dict`, which is called before a run goes on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.errors import SiteDescriptionError
from esper.contracts.layer_kind import positions_at
from esper.contracts.run_records import DIGEST_SHOWN, LINEAR_SUFFIX
from esper.fetching.preloader import Question
from esper.growth.sent_kernel import kernels_of_first_rank
from esper.resilience.attempt import Done, attempt
from esper.state.site import describe_site

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.site import SiteSpec
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.fetching.hitch import Hitch
    from esper.fetching.preloader import AtHand, Preloader

LIKELY: Final = 0.5
"""Outlook of a policy from which kernels are fetched."""
LOAD_S: Final = 5.0
"""Seconds that a resumed run waits for the kernels that it had at hand."""

_NAME_ROOM: Final = 64 - len(f".{LINEAR_SUFFIX}") - DIGEST_SHOWN
"""What is left of the longest name beside the digest, and for a linear form beside both."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offer:
    """A kernel on offer at a site.

    Attributes:
        blueprint: Its blueprint; of a registry's kernel under the name that it has in the run.
        artifact: The kernel itself where it came from a registry; None: it is compiled.
    """

    blueprint: BlueprintIR
    artifact: CompiledKernelArtifact | None = None


class Offers:
    """What a registry offers a run.

    Args:
        preloader: Asks it; None where there is none, and on ranks behind the first.
        given: The model, as it was handed over.
        has_registry: Whether the run has a registry, on whichever rank it is asked.
    """

    def __init__(
        self, preloader: Preloader | None, given: nn.Module, *, has_registry: bool
    ) -> None:
        self._preloader = preloader
        self._given = given
        self.has_registry = has_registry
        self._taken: tuple[CompiledKernelArtifact, ...] = ()
        self._names: dict[str, tuple[str, ...]] = {}
        self._asked_at: int | None = None
        self._was_likely = False

    def look(
        self,
        layers: Mapping[str, KasminaLayer],
        *,
        outlook: float,
        num_decisions: int,
        max_parameters: float,
    ) -> None:
        """Ask what fits, where that is not known, and fetch where growth is likely.

        To be called where the policy has something new to go by; never waits.

        Args:
            layers: The sites, by name.
            outlook: How likely growth is soon, from 0 to 1.
            num_decisions: Decisions to grow so far; behind each of them is asked anew.
            max_parameters: Most that a kernel may have.
        """
        preloader = self._preloader
        if preloader is None:
            return
        is_likely = outlook >= LIKELY
        is_news = is_likely and not self._was_likely  # reports may have come since it was asked
        self._was_likely = is_likely
        preloader.expect(is_likely=is_likely)
        if is_news or self._asked_at != num_decisions or not preloader.has_answers:
            self._asked_at = num_decisions
            preloader.ask(_questions(layers.values(), max_parameters))

    def take(self) -> None:
        """Take what is at hand now: what the next ranking is made of. Of ranks the first one's."""
        if not self.has_registry:
            return
        found = [] if self._preloader is None else self._preloader.at_hand()
        self._names |= {e.artifact.artifact_id: e.entry.tags for e in found if e.entry is not None}
        mine = [each.artifact for each in found]
        self._taken = tuple(kernels_of_first_rank(self._given, mine))

    def at(self, site: SiteSpec, local: Sequence[BlueprintIR]) -> list[Offer]:
        """Return what was taken that has a site's widths, and that the catalog does not make.

        Args:
            site: The layer.
            local: What the catalog offers there.
        """
        made_here = {blueprint.digest for blueprint in local}
        return [
            Offer(blueprint=replace(a.blueprint, id=name_of(a)), artifact=a)
            for a in self._taken
            if _has_widths(a, site)
            and (a.metadata.adds_capacity or not site.host_is_trainable)
            and not (a.metadata.zeroed and a.metadata.blueprint_digest in made_here)
        ]

    def told(self, artifact: CompiledKernelArtifact) -> str:
        """Return what a kernel is called in its registry, for people."""
        names = self._names.get(artifact.artifact_id, ())
        also = f", there {', '.join(names)}" if names else ""
        return f"{artifact.blueprint.id}, digest {artifact.artifact_id}{also}"

    def hitches(self) -> list[Hitch]:
        """Return what went wrong since the last call."""
        return [] if self._preloader is None else self._preloader.hitches()

    def close(self) -> None:
        """Ask nothing more; waits for nothing."""
        if self._preloader is not None:
            self._preloader.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the digests of what is at hand, and of what was taken."""
        found: list[AtHand] = [] if self._preloader is None else self._preloader.at_hand()
        return {
            "at_hand": [each.artifact.artifact_id for each in found],
            "taken": [artifact.artifact_id for artifact in self._taken],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Have at hand, and taken, what a run had; waits for it for a while.

        Returns:
            Digests of what was taken there and is not to be had.
        """
        if not self.has_registry:
            return list(state["taken"])
        if self._preloader is not None:
            wanted = [*state["taken"], *state["at_hand"]]
            self._preloader.load(dict.fromkeys(wanted), timeout_s=LOAD_S)
        self.take()
        by_digest = {artifact.artifact_id: artifact for artifact in self._taken}
        self._taken = tuple(by_digest[d] for d in state["taken"] if d in by_digest)
        return [digest for digest in state["taken"] if digest not in by_digest]


def name_of(artifact: CompiledKernelArtifact) -> str:
    """Return what a registry's kernel is called in a run: blueprint, and how its digest begins."""
    return f"{artifact.blueprint.id[:_NAME_ROOM]}.{artifact.artifact_id[:DIGEST_SHOWN]}"


def _questions(layers: Iterable[KasminaLayer], max_parameters: float) -> Iterator[Question]:
    """Yield what is asked for each site at which something may grow."""
    most = None if math.isinf(max_parameters) else max(0, int(max_parameters))
    for layer in layers:
        described = attempt(functools.partial(_described, layer))
        spec = described.value if isinstance(described, Done) else None
        if spec is None or not (spec.in_features and spec.out_features):
            continue
        yield Question(
            kind=spec.kind,
            in_features=spec.in_features,
            out_features=spec.out_features,
            dtype=spec.dtype,
            num_axes=spec.axes,
            capacity_only=spec.host_is_trainable,
            max_parameters=most,
        )


def _described(layer: KasminaLayer) -> SiteSpec | None:
    try:
        return describe_site(layer)
    except SiteDescriptionError:
        return None


def _has_widths(artifact: CompiledKernelArtifact, site: SiteSpec) -> bool:
    """Say whether a kernel reads and gives what a search for the site asks for."""
    said = artifact.metadata
    if said.position not in positions_at(site.kind):
        return False
    reads = site.in_features if said.position == "parallel" else site.out_features
    widths = (said.in_features, said.out_features, said.dtype)
    return widths == (reads, site.out_features, site.dtype)

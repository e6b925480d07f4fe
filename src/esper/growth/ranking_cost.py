"""What a ranking takes, foretold, and how it is cut to what it may take.

Of ``n`` samples ``R`` rows are looked at. A candidate with ``F`` features for ``O`` outputs, at a
host with ``P`` features, takes its kernel's forward, second and cross moments of
``2 R (F^2 + 2 P F + F O)`` and solves of ``F^3 / 3 + 2 P^2 F + S F^2 O`` with ``S`` splits. A site
takes ``2 R P^2 + P^3 / 3`` once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import nn

from esper.contracts.layer_kind import kind_of
from esper.growth.ranking import (
    MAX_FEATURES,
    MAX_ROWS,
    NUM_SPLITS,
    Candidate,
    RefusedCandidate,
    most_rows,
    readout_of,
    works_by_position,
)
from esper.state.host_parts import host_parameters
from esper.state.site import feature_axis, widths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from esper.growth.recording import SiteObservation

CUT: Final = "a ranking was cut to what growing may take"
"""How the words about a cut begin."""
MAX_STRIDE: Final = 8
"""Of samples and rows every eighth is looked at where they are cut most; a power of two."""
LEAST_SAMPLES: Final = 8 * NUM_SPLITS
"""Samples of a site below which they are not thinned."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AffordableRanking:
    """What of a ranking may be made.

    Attributes:
        observations: Of every site, with some of the samples that were recorded.
        candidates: Those to be ranked.
        refused: Those that are not.
        flops: What ranking them is foretold to take.
        share: Part of samples and rows that is looked at, in (0, 1].
    """

    observations: dict[str, SiteObservation]
    candidates: list[Candidate]
    refused: list[RefusedCandidate]
    flops: float
    share: float

    @property
    def text(self) -> str | None:
        """What was cut, for people; None where nothing was."""
        num_kept = len(self.candidates)
        num = num_kept + len(self.refused)
        if self.share == 1.0 and num_kept == num:
            return None
        return (
            f"{CUT}, which has a fifth of the overhead for it: {self.share:.1%} of what was "
            f"recorded is looked at, and {num_kept} of {num} candidates"
        )


def affordable_ranking(
    observations: Mapping[str, SiteObservation],
    candidates: Sequence[Candidate],
    flops: float,
) -> AffordableRanking:
    """Cut a ranking to what it may take: samples and rows first, then candidates, dearest first.

    Args:
        observations: What was recorded, by site.
        candidates: Kernels at those sites.
        flops: What the ranking may take.
    """
    by_position = functools.cache(lambda c: works_by_position(c, observations[c.site]))
    stride = 1
    while True:
        told = _foretold(observations, candidates, by_position, stride)
        if told.flops <= flops or stride == MAX_STRIDE:
            break
        stride *= 2
    kept = _cheapest(candidates, told, flops)
    refused = [
        RefusedCandidate(
            site=c.site,
            blueprint=c.blueprint,
            reason="ranking it would take more FLOPs than a ranking may",
        )
        for c in candidates
        if id(c) not in kept
    ]
    return AffordableRanking(
        observations=told.observations,
        candidates=[c for c in candidates if id(c) in kept],
        refused=refused,
        flops=sum(kept.values()),
        share=1.0 / stride,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Foretold:
    """What ranking everything would take, on a part of what was recorded.

    Attributes:
        observations: That part.
        candidates: FLOPs of each candidate, its site's own left out.
        sites: FLOPs of each site that has candidates.
    """

    observations: dict[str, SiteObservation]
    candidates: list[float]
    sites: dict[str, float]

    @property
    def flops(self) -> float:
        return sum(self.candidates) + sum(self.sites.values())


def _foretold(
    observations: Mapping[str, SiteObservation],
    candidates: Sequence[Candidate],
    by_position: Callable[[Candidate], bool],
    stride: int,
) -> _Foretold:
    thinned = {name: _thinned(seen, stride) for name, seen in observations.items()}
    return _Foretold(
        observations=thinned,
        candidates=[_candidate_flops(c, thinned[c.site], by_position) for c in candidates],
        sites={name: _site_flops(thinned[name]) for name in {c.site for c in candidates}},
    )


def _cheapest(candidates: Sequence[Candidate], told: _Foretold, flops: float) -> dict[int, float]:
    """Return the cost of each candidate that fits, by its id, the cheapest first."""
    kept: dict[int, float] = {}
    seen: set[str] = set()
    pairs = zip(told.candidates, candidates, strict=True)
    for cost, candidate in sorted(pairs, key=lambda pair: pair[0]):
        whole = cost + (0.0 if candidate.site in seen else told.sites[candidate.site])
        if whole > flops:
            continue
        flops -= whole
        seen.add(candidate.site)
        kept[id(candidate)] = whole
    return kept


def _thinned(seen: SiteObservation, stride: int) -> SiteObservation:
    """Keep every so manieth sample and row; where samples are few they stay."""
    if stride == 1:
        return seen
    max_rows = MAX_ROWS // stride
    while stride > 1 and seen.num_samples < stride * LEAST_SAMPLES:
        stride //= 2
    return replace(
        seen,
        max_rows=max_rows,
        inputs=[x[::stride] for x in seen.inputs],
        outputs=[h[::stride] for h in seen.outputs],
        gradients=[g[::stride] for g in seen.gradients],
    )


def _candidate_flops(
    candidate: Candidate, seen: SiteObservation, by_position: Callable[[Candidate], bool]
) -> float:
    """Foretell what ranking one candidate takes, its site's own part left out."""
    readout = readout_of(candidate)
    if readout is None:
        return 0.0  # it gets no score
    positions, rows = _positions(seen), _rows(seen)
    groups, num_features, outputs = _affine(readout)
    samples: float = seen.num_samples
    if rows < samples * positions and by_position(candidate):
        samples = rows / positions
    forward = (candidate.flops or 0.0) * samples
    _, host, _ = _host(seen)
    moments = 2 * rows * (num_features**2 + 2 * host * num_features + num_features * outputs)
    solves = num_features**3 / 3 + 2 * host**2 * num_features
    solves += NUM_SPLITS * num_features**2 * outputs
    return forward + groups * (moments + solves)


def _site_flops(seen: SiteObservation) -> float:
    groups, host, _ = _host(seen)
    return groups * (2 * _rows(seen) * host**2 + host**3 / 3)


def _rows(seen: SiteObservation) -> int:
    return min(most_rows(seen), seen.num_samples * _positions(seen))


def _positions(seen: SiteObservation) -> int:
    """Positions of a sample."""
    gradient = seen.gradients[0]
    return max(1, gradient[0].numel() // gradient.shape[feature_axis(seen.layer, gradient)])


def _host(seen: SiteObservation) -> tuple[int, int, int]:
    """Return groups, features of a group (and a one), and outputs of a group, of a host."""
    layer = seen.layer
    if not any(p.requires_grad for p in host_parameters(layer)):
        return 1, 0, 0
    if kind_of(layer).site == "linear":
        num_inputs, outputs = widths(layer)
        return 1, min(num_inputs, MAX_FEATURES) + 1, outputs
    if isinstance(layer, _CONVOLUTIONS):
        groups, num_features, outputs = _affine(layer)
        return groups, num_features + 1, outputs
    outputs = seen.gradients[0].shape[feature_axis(layer, seen.gradients[0])]
    return 1, min(outputs, MAX_FEATURES) + 1, outputs


def _affine(layer: nn.Module) -> tuple[int, int, int]:
    """Return groups, features of a group, and outputs of a group, of an affine layer."""
    weight = layer.get_parameter("weight")
    groups = layer.groups if isinstance(layer, _CONVOLUTIONS) else 1
    return groups, min(math.prod(weight.shape[1:]), MAX_FEATURES), weight.shape[0] // groups

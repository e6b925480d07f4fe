"""The two state machines: the lifecycle of a seed and the stage of a graft.

A seed is a slot in a layer; its lifecycle belongs to the execution engine. A graft is one try to
grow; its stage belongs to the growth controller and sits on top. While a graft is GERMINATED, in
TRIAL or in AUDITION its seed is LOADING and holds nothing.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final


class SeedLifecycleState(IntEnum):
    """State of a seed. The values are stored as uint8 and never change.

    Attributes:
        DORMANT: Nothing is in it, and the host answers.
        LOADING: It is reserved: a kernel is on its way, or in an audition, or waits for a probe.
        ACTIVE: Its kernel contributes, by its alpha.
        ERROR_RECOVERY: Its kernel is isolated, and the host answers, until a probe succeeds.
        FOSSILIZED: What was in it is permanent, as a kernel or folded into the host's weights.
    """

    DORMANT = 0
    LOADING = 1
    ACTIVE = 2
    ERROR_RECOVERY = 3
    FOSSILIZED = 4


_S = SeedLifecycleState

ALLOWED_TRANSITIONS: Final[dict[SeedLifecycleState, frozenset[SeedLifecycleState]]] = {
    _S.DORMANT: frozenset({_S.LOADING}),
    _S.LOADING: frozenset({_S.ACTIVE, _S.DORMANT}),
    _S.ACTIVE: frozenset({_S.ACTIVE, _S.DORMANT, _S.ERROR_RECOVERY, _S.FOSSILIZED}),
    _S.ERROR_RECOVERY: frozenset({_S.LOADING, _S.ACTIVE, _S.DORMANT}),
    _S.FOSSILIZED: frozenset(),
}
"""From a state to the states that may follow it. A fossil leaves only by restoring a snapshot."""


class GraftStage(StrEnum):
    """Stage of a graft, from its germination to its verdict.

    Attributes:
        GERMINATED: A kernel and a seed have been chosen.
        TRIAL: Its package trains in a twin, and the model does not notice.
        AUDITION: The kernel learns in shadow passes, and the model does not notice.
        BLENDING: It was admitted after an audition, and its alpha rises from 0.
        HOLDING: It trains with the model under watch, until its verdict.
        FOSSILIZED: It stays.
        CULLED: It was refused, or removed after it had come into the model.
    """

    GERMINATED = "germinated"
    TRIAL = "trial"
    AUDITION = "audition"
    BLENDING = "blending"
    HOLDING = "holding"
    FOSSILIZED = "fossilized"
    CULLED = "culled"


_G = GraftStage

ALLOWED_STAGES: Final[dict[GraftStage, frozenset[GraftStage]]] = {
    _G.GERMINATED: frozenset({_G.TRIAL, _G.AUDITION, _G.CULLED}),
    _G.TRIAL: frozenset({_G.HOLDING, _G.CULLED}),
    _G.AUDITION: frozenset({_G.BLENDING, _G.CULLED}),
    _G.BLENDING: frozenset({_G.HOLDING, _G.CULLED}),
    _G.HOLDING: frozenset({_G.FOSSILIZED, _G.CULLED}),
    _G.FOSSILIZED: frozenset(),
    _G.CULLED: frozenset(),
}
"""From a stage to the stages that may follow it."""

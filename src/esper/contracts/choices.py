"""Every closed set of words that a caller may say or read, each told once.

A type checker sees the alternatives through the ``Literal``; where code must check a value at run
time, there is a tuple beside it, which is made from the same type.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

Mode = Literal["add", "replace"]
"""How a kernel's output k joins a host's output h: ``h + alpha k`` or ``(1 - alpha) h + alpha k``.
"""
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

Position = Literal["parallel", "serial"]
"""What a kernel reads: the layer's input, or the host's output."""
POSITIONS: Final[tuple[Position, ...]] = get_args(Position)

Guard = Literal["always", "step", "off"]
"""Where the faults of a seed's kernel are stopped: in each call, before each step, nowhere."""
GUARDS: Final[tuple[Guard, ...]] = get_args(Guard)

Goal = Literal["min", "max"]
"""Whether a lower or a higher measure is better."""

Gate = Literal["admission", "fossilization"]
"""Which arrow between the stages of a graft a gate stands at."""
GATES: Final[tuple[Gate, ...]] = get_args(Gate)

SeedState = Literal[
    "dormant",
    "loading",
    "active",
    "error_recovery",
    "fossilized",
]
"""The name of a ``SeedLifecycleState`` in files, in the order of its values."""
SEED_STATES: Final[tuple[SeedState, ...]] = get_args(SeedState)

GraftVerdict = Literal[
    "in progress",
    "culled in audition",
    "culled at admission",
    "culled after admission",
    "fossilized",
]
"""What became of a graft."""

DepthInit = Literal["fresh", "copy"]
"""What a waking block begins with: its own weights, or those of the nearest awake one before it."""
INITS: Final[tuple[DepthInit, ...]] = get_args(DepthInit)

DepthVerdict = Literal["waking", "awake", "put to sleep"]
"""What became of a planned stage of depth."""

Verification = Literal["snapshot", "fork"]
"""What an admitted graft is held against: the run at its admission, or twins in training."""

Verdict = Literal[
    "diminishing",
    "deadline",
    "overfitting",
    "too_early",
    "too_late",
    "improving",
    "scheduled",
    "waiting",
]
"""The rule by which a policy decided; ``"scheduled"`` and ``"waiting"`` are of those without rules.
"""
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)

Schedule = Literal["epoch", "update"]
"""After what a learning-rate scheduler steps."""
SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)

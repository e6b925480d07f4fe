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

RegistryOperation = Literal["put", "fetch", "search", "report"]
"""What a registry was asked that did not answer: to publish a kernel, for one, which ones there
are, or to take a field report."""
REGISTRY_OPERATIONS: Final[tuple[RegistryOperation, ...]] = get_args(RegistryOperation)

Preparation = Literal["fetch", "compile", "load", "probe"]
"""What is done to a kernel before it can be tried: it is fetched or compiled, built, and run."""
PREPARATIONS: Final[tuple[Preparation, ...]] = get_args(Preparation)

PassWork = Literal["evaluation", "ranking", "trial", "probe"]
"""What a pass is made for that Esper makes beside the training."""
PASS_WORK: Final[tuple[PassWork, ...]] = get_args(PassWork)

FitReason = Literal["memory", "time"]
"""What chose how many samples such a pass is made of."""
FIT_REASONS: Final[tuple[FitReason, ...]] = get_args(FitReason)

RetriedWork = Literal["probe", "load"]
"""What was tried again: the probe of an isolated seed, or the load of a kernel."""
RETRIED_WORK: Final[tuple[RetriedWork, ...]] = get_args(RetriedWork)

RetryOutcome = Literal["tried again", "recovered", "failed", "given up"]
"""What became of a retry; the first says nothing yet."""
RETRY_OUTCOMES: Final[tuple[RetryOutcome, ...]] = get_args(RetryOutcome)

BreakerWord = Literal["closed", "open", "half_open"]
"""The name of a ``BreakerState`` in files."""
BREAKER_WORDS: Final[tuple[BreakerWord, ...]] = get_args(BreakerWord)

AnomalousFigure = Literal["latency", "error rate"]
"""What of a seed may leave its own history."""
ANOMALOUS_FIGURES: Final[tuple[AnomalousFigure, ...]] = get_args(AnomalousFigure)

GraftVerdict = Literal[
    "in progress",
    "culled in audition",
    "culled at admission",
    "culled after admission",
    "refused in trial",
    "rolled back",
    "removed as a passenger",
    "fossilized",
]
"""What became of a graft. Those that are refused in trial, rolled back, or removed as a passenger
belonged to a package; those that are culled were auditioned one by one.
"""

TrialVerdict = Literal["in trial", "refused", "taken over", "rolled back", "kept"]
"""What became of a package; of those that are taken over the watch has not decided yet."""
TRIAL_VERDICTS: Final[tuple[TrialVerdict, ...]] = get_args(TrialVerdict)

Taken = Literal["", "candidate", "null"]
"""Whose state the live run took over: nobody's, the candidate twin's, or the null twin's."""
TAKEN: Final[tuple[Taken, ...]] = get_args(Taken)

Attribution = Literal["trial", "run", "none"]
"""How long a null twin trains beside a package: through the trial, to the end of the run, never."""
ATTRIBUTIONS: Final[tuple[Attribution, ...]] = get_args(Attribution)

DepthInit = Literal["fresh", "copy"]
"""What a waking block begins with: its own weights, or those of the nearest awake one before it."""
INITS: Final[tuple[DepthInit, ...]] = get_args(DepthInit)

DepthVerdict = Literal["waking", "awake", "put to sleep"]
"""What became of a planned stage of depth."""
DEPTH_VERDICTS: Final[tuple[DepthVerdict, ...]] = get_args(DepthVerdict)

WorkUnit = Literal["flops", "passes"]
"""What work is counted in: FLOPs, or forwards of one sample, as files of format 1 do."""
WORK_UNITS: Final[tuple[WorkUnit, ...]] = get_args(WorkUnit)

TrialKind = Literal["twin", "shadow"]
"""Where kernels are tried: in a copy of the run, or by passes beside it that train them alone."""
TRIAL_KINDS: Final[tuple[TrialKind, ...]] = get_args(TrialKind)

Pays = Literal["updates", "flops"]
"""What a package has to beat: the live run at as many updates, or at as much work as well."""

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

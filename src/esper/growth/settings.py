"""The numbers of a growth run: name, type, default, bounds and meaning of each are told here."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Literal,
    Self,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from esper.contracts.arguments import Bounds, checked_number, generator_seed
from esper.contracts.choices import Goal, Verification

if TYPE_CHECKING:
    from collections.abc import Mapping


_Updates = Annotated[int, Bounds(what="a number of updates", least=1)]
_UpdatesOrZero = Annotated[int, Bounds(what="a number of updates", least=0)]
_Count = Annotated[int, Bounds(what="a count", least=1)]
_Overhead = Annotated[float, Bounds(what="a ratio to the FLOPs of training", least=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthSettings:
    """The numbers of a growth run; each is an argument of the Grower.

    *The run.* ``horizon``, ``goal``, ``random_seed``. *What growing may take.* ``overhead``,
    ``evaluate_every``. *The course of a graft*, in its order. ``record_updates``, ``candidates``,
    ``audition_updates``, ``min_effect``, ``embargo``, ``ramp_updates``, ``warmup_updates``,
    ``lr_new``, ``hold_updates``, ``looks``, ``verify``.

    Attributes:
        horizon: Length of the run in updates, at least 1; None where unknown.
        goal: ``"min"`` where lower is better of what ``evaluate`` returns, ``"max"`` where higher.
        evaluate_every: Updates between two evaluations, at least 1. None: at every
            ``Grower.end_epoch``, or every 50 updates where it is never called. Less often where
            that would take more than a fifth of ``overhead``.
        overhead: What growing may take (evaluations, rankings, trials and shadow passes together),
            in FLOPs, as a ratio to those of training; at least 0. Without a ``horizon`` it is
            earned by the updates done. None: 0.10, or 1.0 for a host that the budget calls small.
        audition_updates: Shadow passes of an audition, at least 1.
        ramp_updates: Updates over which alpha rises from 0 to 1, at least 1.
        hold_updates: Updates at alpha 1 before the verdict, at least 0.
        looks: Readings of the gate split, spread over the hold, whose mean the verdict is on; at
            least 1.
        warmup_updates: Updates over which the factor on new parameters rises to 1, at least 0.
        lr_new: Share of the peak rate that new parameters start at where the rate is spent, in
            [0, 1]; 0 leaves the host's rate.
        record_updates: Updates that are recorded for a ranking, at least 1.
        candidates: Auditions side by side, at most; at least 1.
        min_effect: Smallest fall of the gate loss at admission, as a share of it; at least 0.
        embargo: Decisions to grow that a slot and a blueprint sit out after a refusal, at least 0.
        verify: ``"snapshot"``: a graft stays if the gate split is not worse than at its
            admission. ``"fork"``: if it also beats a twin that got the same treatment with a
            kernel that adds nothing; costs three more models in training while it lasts.
        random_seed: Starts every generator of the controller's own; any whole number.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of its range.
    """

    horizon: _Updates | None = None
    goal: Goal = "min"
    evaluate_every: _Updates | None = None
    overhead: _Overhead | None = None
    audition_updates: _Updates = 100
    ramp_updates: _Updates = 100
    hold_updates: _UpdatesOrZero = 100
    looks: _Count = 5
    warmup_updates: _UpdatesOrZero = 100
    lr_new: Annotated[float, Bounds(what="a share of the peak rate", least=0, most=1)] = 0.3
    record_updates: _Updates = 16
    candidates: _Count = 3
    min_effect: Annotated[float, Bounds(what="a share of the gate loss", least=0)] = 0.001
    embargo: Annotated[int, Bounds(what="a count", least=0)] = 3
    verify: Verification = "snapshot"
    random_seed: Annotated[int, Bounds(what="a whole number")] = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense, and keep plain numbers only."""
        for name, annotation in _annotations().items():
            object.__setattr__(self, name, _checked(name, annotation, getattr(self, name)))

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """Return the settings that are among options, the others at their defaults.

        Args:
            options: Values by name; a name that is no setting's is passed over.

        Raises:
            TypeError: A value is of the wrong type.
            ValueError: A value is out of its range.
        """
        own = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        return cls(**cast("SettingOptions", own))  # what they are is checked when it is made

    @property
    def graft_updates(self) -> int:
        """Updates from a decision to grow until the verdict."""
        return self.record_updates + self.audition_updates + self.joint_updates

    @property
    def joint_updates(self) -> int:
        """Updates from an admission until the verdict."""
        return self.ramp_updates + self.hold_updates

    def as_options(self) -> SettingOptions:
        """Return the settings as the keywords that the Grower takes."""
        return cast("SettingOptions", asdict(self))

    @property
    def generator_seed(self) -> int:
        """What generators are started from: ``random_seed``, folded to where each takes it."""
        return generator_seed(self.random_seed)


class SettingOptions(TypedDict, total=False):
    """The settings for a type checker, which cannot derive them; a test holds the two together.

    What each means, and what it may be, is told in :class:`GrowthSettings`.
    """

    horizon: int | None
    goal: Goal
    evaluate_every: int | None
    overhead: float | None
    audition_updates: int
    ramp_updates: int
    hold_updates: int
    looks: int
    warmup_updates: int
    lr_new: float
    record_updates: int
    candidates: int
    min_effect: float
    embargo: int
    verify: Verification
    random_seed: int


@functools.cache
def _annotations() -> dict[str, object]:
    return get_type_hints(GrowthSettings, include_extras=True)


def _checked(name: str, annotation: object, value: object) -> object:
    """Return the value as a plain one, or refuse it."""
    alternatives = (
        [annotation] if get_origin(annotation) in (Annotated, Literal) else [*get_args(annotation)]
    )
    optional = NoneType in alternatives
    (told,) = (a for a in alternatives if a is not NoneType)
    if value is None and optional:
        return None
    if get_origin(told) is Literal:
        return _chosen(name, get_args(told), value)
    kind, bounds = get_args(told)
    assert isinstance(bounds, Bounds)
    return checked_number(name, value, bounds, kind=kind, optional=optional)


def _chosen(name: str, choices: tuple[str, ...], value: object) -> object:
    expected = f"{name} is {' or '.join(map(repr, choices))}"
    if not isinstance(value, str):
        msg = f"{expected}; got {value!r} (a {type(value).__name__})"
        raise TypeError(msg)
    if value not in choices:
        msg = f"{expected}; got {value!r}"
        raise ValueError(msg)
    return value

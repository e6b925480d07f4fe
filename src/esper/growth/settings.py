"""The numbers of a growth run: name, type, default, bounds and meaning of each are told here."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Final,
    Literal,
    Self,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from esper.contracts.arguments import Bounds, checked_number, generator_seed
from esper.contracts.choices import Attribution, Goal, Pays, TrialKind

if TYPE_CHECKING:
    from collections.abc import Mapping


_Updates = Annotated[int, Bounds(what="a number of updates", least=1)]
_UpdatesOrZero = Annotated[int, Bounds(what="a number of updates", least=0)]
_Count = Annotated[int, Bounds(what="a count", least=1)]
_Seconds = Annotated[float, Bounds(what="a number of seconds", above=0)]
_Overhead = Annotated[float, Bounds(what="a ratio to the FLOPs of training", least=0)]

MIN_TRIAL: Final = 50
"""Fewest updates of a trial: what is shorter shows the first steps of kernels and nothing else."""
LEAST_RECORDED: Final = 4
"""Fewest updates recorded before a trial in twins: they tell how the run clips its gradients."""
MIN_NULLS: Final = 3
"""Fewest equal twins that a spread is measured on; one pair of runs is one degree of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthSettings:
    """The numbers of a growth run; each is an argument of the Grower.

    *The run.* ``horizon``, ``goal``, ``random_seed``. *What growing may take.* ``overhead``,
    ``evaluate_every``, ``pass_s``. *The trial of a package.* ``trial``, ``record_updates``,
    ``trial_updates``, ``tries``, ``spread``, ``nulls``, ``attribution``, ``pays``,
    ``min_effect``. *After it.* ``warmup_updates``, ``lr_new``, ``hold_updates``. *Of*
    ``trial="shadow"`` *alone.* ``audition_updates``, ``ramp_updates``.

    Attributes:
        horizon: Length of the run in updates, at least 1; None where unknown.
        goal: ``"min"`` where lower is better of what ``evaluate`` returns, ``"max"`` where higher.
        evaluate_every: Updates between two evaluations, at least 1. None: at every
            ``Grower.end_epoch``, or every 50 updates where it is never called; less often
            where that would take more than a fifth of ``overhead``.
        overhead: What growing may take, in FLOPs, as a share of the FLOPs of the training itself,
            at least 0; evaluation, ranking, trials and shadow passes together. None: 0.10, and 1.0
            for a host under 100,000 parameters. Whatever it is, these are done, since they tell
            what things take: one forward and backward of ``compute_loss`` at the first batch and
            after each change of the model, the first reading of ``evaluate`` (three times over,
            since its order has to repeat), and, where a trial could be paid, one update of a twin.
            At 0 nothing is tried.
        pass_s: Seconds that one pass beside the training may take, above 0: a forward, or a forward
            and backward, of evaluation, ranking or trial. One that takes longer is made in parts
            from then on, whose losses and gradients add up to the same; what was chosen is in the
            log. None: as long as it takes.
        trial: ``"twin"``: a package of kernels is tried in a copy of the run. ``"shadow"``: one
            kernel at a time learns in passes beside the run; for models of which no copy fits.
        record_updates: Updates that are recorded for a ranking, at least 1.
        trial_updates: Updates of a trial, at least 50; fewer where ``overhead`` does not buy them.
        tries: Packages that may be refused before growth of the model ends, at least 1; each is
            tested at the level 0.05 / ``tries``.
        spread: By what the standard error of a verdict is widened, since runs that are equal come
            out apart; at least 1. Not used where ``nulls`` measures it.
        nulls: Equal twins that train beside a trial to measure the spread; 0, or at least 3.
        attribution: How long the package made linear trains beside it, so that a gain can be
            told apart from its treatment: ``"trial"``, to the end of the ``"run"``, or ``"none"``.
            To the end of a run of known length no package is tried whose null ``overhead`` does
            not buy that long; without a horizon it trains for as long as that is earned.
        pays: ``"updates"``: a package stays where it beats the live run at equal updates.
            ``"flops"``: where it also beats what the same FLOPs of going on would have brought.
        min_effect: Smallest fall of the gate loss that a package has to bring, as a share of it;
            at least 0.
        warmup_updates: Updates over which the factor on new parameters rises to 1, at least 0.
        lr_new: Share of the peak rate that new parameters start at where the rate is spent, in
            [0, 1]; 0 leaves the host's rate.
        hold_updates: Updates under watch after the taking over, at least 0.
        audition_updates: Shadow passes of an audition, at least 1.
        ramp_updates: Updates over which alpha rises from 0 to 1 where it cannot begin at 1, at
            least 1.
        random_seed: Starts every generator of the controller's own; any whole number.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of its range.
    """

    horizon: _Updates | None = None
    goal: Goal = "min"
    evaluate_every: _Updates | None = None
    overhead: _Overhead | None = None
    pass_s: _Seconds | None = None
    trial: TrialKind = "twin"
    record_updates: _Updates = 16
    trial_updates: Annotated[int, Bounds(what="a number of updates", least=MIN_TRIAL)] = 200
    tries: _Count = 1
    spread: Annotated[float, Bounds(what="a factor", least=1)] = 1.6
    nulls: Annotated[int, Bounds(what="a count", least=0)] = 0
    attribution: Attribution = "trial"
    pays: Pays = "updates"
    min_effect: Annotated[float, Bounds(what="a share of the gate loss", least=0)] = 0.001
    warmup_updates: _UpdatesOrZero = 100
    lr_new: Annotated[float, Bounds(what="a share of the peak rate", least=0, most=1)] = 0.3
    hold_updates: _UpdatesOrZero = 100
    audition_updates: _Updates = 100
    ramp_updates: _Updates = 100
    random_seed: Annotated[int, Bounds(what="a whole number")] = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense, and keep plain numbers only."""
        for name, annotation in _annotations().items():
            object.__setattr__(self, name, _checked(name, annotation, getattr(self, name)))
        if 0 < self.nulls < MIN_NULLS:
            msg = f"nulls is 0 or at least {MIN_NULLS}, got {self.nulls}: fewer tell no spread"
            raise ValueError(msg)

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
    def package_updates(self) -> int:
        """Fewest updates from a decision to grow until kernels are permanent."""
        if self.trial == "twin":
            return max(self.record_updates, LEAST_RECORDED) + MIN_TRIAL + self.hold_updates
        return self.record_updates + self.audition_updates + self.joint_updates

    @property
    def joint_updates(self) -> int:
        """Updates from an admission until the verdict, after an audition."""
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
    pass_s: float | None
    trial: TrialKind
    record_updates: int
    trial_updates: int
    tries: int
    spread: float
    nulls: int
    attribution: Attribution
    pays: Pays
    min_effect: float
    warmup_updates: int
    lr_new: float
    hold_updates: int
    audition_updates: int
    ramp_updates: int
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

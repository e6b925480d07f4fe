"""Policies: when to grow, and, where the owner says so, what and where."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import replace
from types import NoneType
from typing import Any, Final, Protocol

from esper.contracts.arguments import check_type, whole_number
from esper.contracts.blueprint import BlueprintIR
from esper.growth.detector import Detector, out_of_time
from esper.growth.reading import Choice, Decision, PolicyState, Reading

_ASKED: Final = {
    "observe": ("reading",),
    "decide": ("reading",),
    "germinated": ("update", "choice"),
}
"""What every policy is called with, by method."""


class Policy(Protocol):
    """Says when to grow; the ranking says where, the gates whether.

    One's own is as short as this::

        class WhenRateIsSpent(Policy):
            def decide(self, reading: Reading) -> Decision:
                if max(reading.rates, default=1.0) > 1e-4:
                    return Decision(grow=False, verdict="waiting", reason="the rate is high")
                return Decision(grow=True, verdict="scheduled", reason="the rate is spent")

    The other six methods are for a policy that remembers something, or looks ahead. Since
    ``decide`` is asked after every update, a policy that goes by losses or metrics says yes only
    at an update that it has just observed: between two evaluations they are the last one's.
    """

    def observe(self, reading: Reading) -> None:  # noqa: ARG002 - for one that remembers
        """Take one evaluation; by default nothing is remembered."""
        return

    def decide(self, reading: Reading) -> Decision:
        """Say whether to grow now; asked only while nothing is under way. Changes nothing."""
        ...

    def germinated(self, update: int, choice: Choice | None) -> None:  # noqa: ARG002 - for one that remembers
        """Learn that a decision to grow was carried out, or refused for good.

        Args:
            update: Optimizer updates done.
            choice: The graft that the decision named; None where the ranking chose.
        """
        return

    def outlook(self, reading: Reading) -> float:  # noqa: ARG002 - for one that looks ahead
        """Say how near a yes is that leaves the choice to the ranking, in [0, 1]; 1 is due.

        From 0.5 kernels of a registry are fetched, so that they are at hand; by default always.
        """
        return 1.0

    def waits_until(self, reading: Reading) -> float:
        """Return the first update at which ``decide`` may say yes, should nothing be observed.

        It need not be asked before; by default it is asked after every update. Overridden beside
        ``decide``: what stands in a class above one with a ``decide`` of its own is not heard.

        Args:
            reading: The last one that it was asked with, and said no to.
        """
        return reading.update

    def state_dict(self) -> PolicyState:
        """Return the policy's memory as JSON-able values."""
        return {}

    def load_state_dict(self, state: PolicyState) -> None:  # noqa: ARG002 - for one that remembers
        """Take over the memory of a policy of the same class and settings."""
        return


class DiminishingReturns(Policy):
    """Grows at 10 % of a run of known length, and again where returns diminish; the default.

    But for the first package it says yes at evaluations only, where its losses are fresh.

    Args:
        detector: Holds the rules; the default one where None.

    Raises:
        TypeError: ``detector`` is no detector.
    """

    def __init__(self, detector: Detector | None = None) -> None:
        words = "a Detector, or None for the default one"
        check_type("detector", detector, (Detector, NoneType), words)
        self.detector = Detector() if detector is None else detector
        self._observed_at: int | None = None

    def observe(self, reading: Reading) -> None:
        """Pass an evaluation to the detector, which leaves out one that is not finite."""
        self._observed_at = reading.update
        self.detector.observe(reading)

    def decide(self, reading: Reading) -> Decision:
        """Return the detector's decision."""
        if reading.update != self._observed_at:
            first = self.detector.first(reading)
            if first is not None:
                return first
            return Decision(grow=False, verdict="waiting", reason="the next evaluation decides")
        return self.detector.decide(reading)

    def outlook(self, reading: Reading) -> float:
        """Return the detector's outlook."""
        return self.detector.outlook(reading)

    def waits_until(self, reading: Reading) -> float:
        """Return when the first package is due; evaluations decide about all others."""
        is_own = type(self.detector).first is not Detector.first
        return reading.update if is_own else self.detector.first_at(reading)

    def state_dict(self) -> PolicyState:
        """Return the detector's observations."""
        return {**self.detector.state_dict(), "observed_at": self._observed_at}

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over a detector's observations.

        Raises:
            ValueError: Something is missing, or the state is of another format.
        """
        observed_at = _remembered(self, state, "observed_at")
        self.detector.load_state_dict(state)
        self._observed_at = observed_at


class EveryN(Policy):
    """Grows every so many updates, whatever the losses, but not in the last 20 % of a run.

    Args:
        updates: Updates between two germinations, at least 1.

    Raises:
        TypeError: ``updates`` is no whole number.
        ValueError: ``updates`` is less than 1.
    """

    def __init__(self, updates: int) -> None:
        self.updates = whole_number("updates", updates, least=1)
        self._last = 0

    def decide(self, reading: Reading) -> Decision:
        """Say yes once ``updates`` have passed since the start or the last germination."""
        late = out_of_time(reading)
        if late:
            return late
        if reading.update < self._last:  # the policy was used in another run before
            self._last = 0
        due = self._last + self.updates
        if reading.update < due:
            return Decision(grow=False, verdict="waiting", reason=f"the next graft is due at {due}")
        return Decision(grow=True, verdict="scheduled", reason=f"a graft was due at {due}")

    def germinated(self, update: int, choice: Choice | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Count the next distance from here."""
        self._last = update

    def outlook(self, reading: Reading) -> float:
        """Return how much of the distance has passed."""
        if out_of_time(reading):
            return 0.0
        return max(0.0, min(1.0, (reading.update - self._last) / self.updates))

    def waits_until(self, reading: Reading) -> float:
        """Return when the next distance has passed."""
        return math.inf if out_of_time(reading) else self._last + self.updates

    def state_dict(self) -> PolicyState:
        """Return when the last graft germinated."""
        return {"last": self._last}

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over when the last graft germinated.

        Raises:
            ValueError: It is missing.
        """
        self._last = int(_remembered(self, state, "last"))


class ByHand(Policy):
    """Grows what the owner names, in the order named.

    It skips the ranking and the capacity filter; never the probe, the budget or the gates.

    Args:
        choices: Each a :class:`Choice`, ``(site, blueprint)`` or ``(site, blueprint, update)``.

    Raises:
        TypeError: ``choices`` is a single one, or a part of an entry is of the wrong type.
        ValueError: An entry is none of these, or its update is negative.
    """

    def __init__(
        self,
        choices: Iterable[
            Choice | tuple[str, BlueprintIR | str] | tuple[str, BlueprintIR | str, int]
        ],
    ) -> None:
        check_type("choices", choices, Iterable, "a list of choices, also of one: [choice]")
        self.choices = tuple(_as_choice(entry) for entry in choices)
        self._num_done = 0

    def decide(self, reading: Reading) -> Decision:
        """Say yes once the next choice is due."""
        choice = self._next()
        if choice is None:
            return Decision(grow=False, verdict="waiting", reason="nothing more was named")
        if reading.update < choice.update:
            reason = f"{choice.site!r} is due at update {choice.update}"
            return Decision(grow=False, verdict="waiting", reason=reason)
        reason = f"{choice.site!r} was named by hand"
        return Decision(grow=True, verdict="scheduled", reason=reason, choice=choice)

    def germinated(self, update: int, choice: Choice | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Go on to the next choice, where it was this policy's own that germinated."""
        if choice is not None and choice == self._next():
            self._num_done += 1

    def outlook(self, reading: Reading) -> float:  # noqa: ARG002 - the protocol's signature
        """Return 0: nothing is left to a ranking."""
        return 0.0

    def waits_until(self, reading: Reading) -> float:  # noqa: ARG002 - the protocol's signature
        """Return when the next choice is due."""
        choice = self._next()
        return math.inf if choice is None else choice.update

    def state_dict(self) -> PolicyState:
        """Return how many choices are done."""
        return {"num_done": self._num_done}

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over how many choices are done.

        Raises:
            ValueError: It is missing.
        """
        self._num_done = int(_remembered(self, state, "num_done"))

    def _next(self) -> Choice | None:
        return self.choices[self._num_done] if self._num_done < len(self.choices) else None


class Never(Policy):
    """Never grows: the run is only watched, and ranked where the owner asks for suggestions."""

    def decide(self, reading: Reading) -> Decision:  # noqa: ARG002 - the protocol's signature
        """Say no."""
        return Decision(grow=False, verdict="waiting", reason="the policy never grows")

    def outlook(self, reading: Reading) -> float:  # noqa: ARG002 - the protocol's signature
        """Return 0."""
        return 0.0

    def waits_until(self, reading: Reading) -> float:  # noqa: ARG002 - the protocol's signature
        """Return infinity."""
        return math.inf


class _Composed(Policy):
    """Several policies as one: each observes, and learns what germinated, for itself.

    Args:
        policies: At least one.

    Raises:
        TypeError: There is none, or one is no policy.
    """

    def __init__(self, *policies: Policy) -> None:
        if not policies:
            msg = f"{type(self).__name__} is made of one policy or more, got none"
            raise TypeError(msg)
        for policy in policies:
            if isinstance(policy, (list, tuple)):
                msg = (
                    f"{type(self).__name__} is made of policies, got a {type(policy).__name__}; "
                    f"pass them one by one: {type(self).__name__}(first, second)"
                )
                raise TypeError(msg)
            check_policy(f"each policy that {type(self).__name__} is made of", policy)
        self.policies = policies

    def observe(self, reading: Reading) -> None:
        """Let each take the evaluation."""
        for policy in self.policies:
            policy.observe(reading)

    def germinated(self, update: int, choice: Choice | None) -> None:
        """Let each learn it, whichever of them wanted it."""
        for policy in self.policies:
            policy.germinated(update, choice)

    def state_dict(self) -> PolicyState:
        """Return the memory of each, in their order."""
        return {"policies": [policy.state_dict() for policy in self.policies]}

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over the memory of as many policies, in the same order.

        Raises:
            ValueError: It is the memory of more policies, or of fewer, or of none at all.
        """
        states = _remembered(self, state, "policies")
        if len(states) != len(self.policies):
            msg = f"the state is of {len(states)} policies, this is made of {len(self.policies)}"
            raise ValueError(msg)
        for policy, own in zip(self.policies, states, strict=True):
            policy.load_state_dict(own)


class AnyOf(_Composed):
    """Grows where one of several policies would; the first that says yes names the graft.

    Args:
        policies: At least one.

    Raises:
        TypeError: There is none, or one is no policy.
    """

    def decide(self, reading: Reading) -> Decision:
        """Return the first yes, or every reason against."""
        decisions = []
        for policy in self.policies:
            decision = policy.decide(reading)
            if decision.grow:
                return decision
            decisions.append(decision)
        return replace(decisions[0], reason="; ".join(d.reason for d in decisions))

    def outlook(self, reading: Reading) -> float:
        """Return the nearest yes of any."""
        return max(outlook_of(policy, reading) for policy in self.policies)

    def waits_until(self, reading: Reading) -> float:
        """Return when the first of them may say yes."""
        return min(waits_until(policy, reading) for policy in self.policies)


class AllOf(_Composed):
    """Grows where each of several policies would; the first that names a graft is followed.

    Args:
        policies: At least one.

    Raises:
        TypeError: There is none, or one is no policy.
    """

    def decide(self, reading: Reading) -> Decision:
        """Return the first no, or every reason for."""
        decisions = []
        for policy in self.policies:
            decision = policy.decide(reading)
            if not decision.grow:
                return decision
            decisions.append(decision)
        choice = next((d.choice for d in decisions if d.choice is not None), None)
        return replace(decisions[0], reason="; ".join(d.reason for d in decisions), choice=choice)

    def outlook(self, reading: Reading) -> float:
        """Return the farthest yes of any."""
        return min(outlook_of(policy, reading) for policy in self.policies)

    def waits_until(self, reading: Reading) -> float:
        """Return when the last of them may say yes."""
        return max(waits_until(policy, reading) for policy in self.policies)


def outlook_of(policy: Policy, reading: Reading) -> float:
    """Return a policy's outlook; one that is not derived from :class:`Policy` may have none."""
    found = getattr(policy, "outlook", None)
    return 1.0 if found is None else float(found(reading))


def waits_until(policy: Policy, reading: Reading) -> float:
    """Return the update before which a policy need not be asked, should nothing be observed.

    One whose own ``decide`` stands without a ``waits_until`` beside it is asked after every update.
    """
    if "decide" not in getattr(policy, "__dict__", ()):
        for cls in type(policy).__mro__:
            if "waits_until" in vars(cls):
                return policy.waits_until(reading)
            if "decide" in vars(cls):
                break
    return reading.update


def check_policy(name: str, policy: object) -> None:
    """Refuse what cannot be asked as a policy, before anything is trained.

    Args:
        name: What it is, for messages.
        policy: What was given.

    Raises:
        TypeError: It is a class, lacks a method, or has one that cannot be called as it will be.
    """
    if isinstance(policy, type):
        msg = f"{name} is an object, got the class {policy.__name__}; make one of it"
        raise TypeError(msg)
    for method, arguments in _ASKED.items():
        if not callable(getattr(policy, method, None)):
            msg = (
                f"{name} has the method {method}(); {type(policy).__name__} has none; derive it "
                "from esper.Policy"
            )
            raise TypeError(msg)
        _check_call(name, policy, method, arguments)


def _check_call(name: str, policy: object, method: str, arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(getattr(policy, method))
    except ValueError:
        return  # a callable that is not written in Python does not always tell its own
    try:
        signature.bind(*arguments)
    except TypeError as error:
        msg = (
            f"{name} is called as {method}({', '.join(arguments)}); {type(policy).__name__} has "
            f"{method}{signature}: {error}"
        )
        raise TypeError(msg) from error


def choices_of(policy: Policy) -> tuple[Choice, ...]:
    """Return every graft that a policy, or one that it is made of, was told by hand."""
    if isinstance(policy, ByHand):
        return policy.choices
    if isinstance(policy, _Composed):
        return tuple(choice for part in policy.policies for choice in choices_of(part))
    return ()


def _as_choice(entry: object) -> Choice:
    if isinstance(entry, tuple) and len(entry) in (2, 3):
        entry = Choice(**dict(zip(("site", "blueprint", "update"), entry, strict=False)))
    if not isinstance(entry, Choice):
        msg = f"a choice by hand is (site, blueprint) or (site, blueprint, update), got {entry!r}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed entry, whatever its type
    return entry


def _remembered(policy: Policy, state: PolicyState, name: str) -> Any:
    """Return one thing that a policy remembered."""
    if name not in state:
        msg = (
            f"the state of a {type(policy).__name__} has {name!r}, found {sorted(state)}; give it "
            "what its state_dict() returned"
        )
        raise ValueError(msg)
    return state[name]

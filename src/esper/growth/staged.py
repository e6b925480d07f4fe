"""Planned stages of depth: blocks that sleep wake at shares of the run, whatever the losses say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

from esper.continuity.deepening import (
    Deepening,
    begin_deepening,
    check_is_trained,
    is_moving,
    sleeping_stack,
    sources_of,
)
from esper.continuity.replicas import any_rank, bare, replicas
from esper.continuity.snapshot import RunSnapshot, parameters_by_name
from esper.contracts.arguments import Bounds, checked_number, whole_number
from esper.contracts.choices import INITS, DepthInit, DepthVerdict
from esper.contracts.report import StageRecord
from esper.growth.losses import LOSS_CHECK_EVERY, SpikeLimit
from esper.growth.policies import AllOf, AnyOf, Never, Policy
from esper.growth.reading import Decision, PolicyState, Reading
from esper.growth.step_flops import StepFlops, is_compiled
from esper.seeds.shallow import depth_state, load_depth_state
from esper.seeds.sleep import kind_of_sleep, share_of
from esper.seeds.stack import stack_at

if TYPE_CHECKING:
    from torch import nn

    from esper.continuity.ensemble import AnyOptimizer
    from esper.growth.batch import Batch
    from esper.growth.run import GrowthRun
    from esper.seeds.stack import Stack

Shares = Mapping[float, int]
"""Shares of the run, in [0, 1), and how many blocks of a stack are awake from each on."""

_SHARE: Final = Bounds(what="a share of the horizon", least=0.0, below=1.0)
_RAMP: Final = Bounds(what="a share of the updates that remain", above=0.0, most=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """What is planned for one stack.

    Attributes:
        path: Dotted name of the stack; None for the only one with blocks that sleep.
        stages: Share of the horizon and blocks that are awake from it on, both rising.
    """

    path: str | None
    stages: tuple[tuple[float, int], ...]


class Staged(Policy):
    """Wakes blocks of a model after :func:`esper.shallow` at planned moments; it grafts nothing.

    It needs ``Grower(horizon=...)`` and ``grower.step(loss)``, and no wrapped model. Beside a
    policy that grafts it stands in ``AnyOf``. Each waking is the identity at birth, and no gate
    decides about it: the report has losses and FLOPs of each stage. Should the loss spike, or not
    be finite, while blocks wake, the run goes back to where they began to, and they sleep again.

    Args:
        stages: Blocks that are awake from a share of the horizon on: ``{0.8: 12}``. For several
            stacks such stages by the path of each: ``{"encoder": {0.8: 12}, "decoder": {0.8: 6}}``.
        path: Dotted name of the stack; None for the only one with blocks that sleep.
        ramp: Share of the updates that remain over which blocks come in, in (0, 1].
        init: What they begin with, as for :func:`esper.deepen`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no stage, a share is not in [0, 1), depths do not rise with shares,
            paths are given twice, or ``ramp`` or ``init`` is none.
    """

    def __init__(
        self,
        stages: Shares | Mapping[str, Shares],
        path: str | None = None,
        ramp: float = 0.2,
        init: DepthInit = "fresh",
    ) -> None:
        self.plans = tuple(_plans(stages, path))
        self.ramp = checked_number("ramp", ramp, _RAMP)
        if init not in INITS:
            msg = f"init is one of {', '.join(map(repr, INITS))}; got {init!r}"
            raise ValueError(msg)
        self.init: DepthInit = init
        self.num_begun = [0] * len(self.plans)

    def decide(self, reading: Reading) -> Decision:  # noqa: ARG002 - the protocol's signature
        """Say no: what is planned needs no decision."""
        reason = "stages of depth are planned, and no grafts"
        return Decision(grow=False, verdict="waiting", reason=reason)

    def waits_until(self, reading: Reading) -> float:  # noqa: ARG002 - the protocol's signature
        """Return infinity."""
        return math.inf

    def state_dict(self) -> PolicyState:
        """Return how many stages of each stack have begun."""
        return {"num_begun": list(self.num_begun)}

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over how many stages of each stack have begun.

        Raises:
            ValueError: It is missing, or of another number of stacks.
        """
        begun = state.get("num_begun")
        if not isinstance(begun, list) or len(begun) != len(self.plans):
            msg = (
                f"the state of a Staged has 'num_begun' for its {len(self.plans)} stacks, found "
                f"{state}; give it what state_dict() returned"
            )
            raise ValueError(msg)
        self.num_begun = [int(number) for number in begun]


def _plans(stages: object, path: str | None) -> Iterator[StackPlan]:
    if not isinstance(stages, Mapping) or not stages:
        msg = (
            "stages are blocks awake by shares of the horizon, {0.8: 12}, or such stages by the "
            f"paths of stacks; got {stages!r}"
        )
        raise TypeError(msg)
    by_path = {key: own for key, own in stages.items() if isinstance(key, str)}
    if not by_path:
        yield _plan(path, stages)
        return
    if path is not None or len(by_path) < len(stages):
        msg = f"each stack is named once, in stages or by path=; got {stages!r} and path={path!r}"
        raise ValueError(msg)
    for key, own in by_path.items():
        if not isinstance(own, Mapping) or not own:
            msg = f"the stages of {key!r} are like {{0.8: 12}}; got {own!r}"
            raise TypeError(msg)
        yield _plan(key, own)


def _plan(path: str | None, stages: Mapping[float, int]) -> StackPlan:
    ordered = tuple(
        sorted(
            (checked_number("a stage", share, _SHARE), whole_number("depth", depth, least=1))
            for share, depth in stages.items()
        )
    )
    if any(later[1] <= earlier[1] for earlier, later in itertools.pairwise(ordered)):
        msg = f"depth rises from stage to stage; got {dict(ordered)}"
        raise ValueError(msg)
    return StackPlan(path=path, stages=ordered)


def staged_in(policy: Policy) -> list[Staged]:
    """Return every :class:`Staged` that a policy is or is made of.

    Raises:
        ValueError: One is in an ``AllOf``, where it would keep the others from growing.
    """
    if isinstance(policy, Staged):
        return [policy]
    if isinstance(policy, AllOf) and any(staged_in(part) for part in policy.policies):
        msg = "Staged says no to every graft, so AllOf with it never grows; compose it by AnyOf"
        raise ValueError(msg)
    parts = policy.policies if isinstance(policy, AnyOf) else ()
    return [staged for part in parts for staged in staged_in(part)]


def grafts_nothing(policy: Policy) -> bool:
    """Say whether a policy wants no grafts, so that a model without seeds is enough for it."""
    if isinstance(policy, AnyOf):
        return all(map(grafts_nothing, policy.policies))
    return isinstance(policy, (Never, Staged))


def needs_no_seeds(policy: Policy) -> bool:
    """Say whether a policy has work to do in a model without seeds, and only there."""
    return grafts_nothing(policy) and bool(staged_in(policy))


def check_stages(
    policy: Policy, model: nn.Module, optimizer: AnyOptimizer, horizon: int | None
) -> None:
    """Refuse stages that cannot be carried out, before anything is trained.

    Args:
        policy: The run's.
        model: The model; it may be inside DistributedDataParallel or ``torch.compile``.
        optimizer: What trains it.
        horizon: Length of the run in updates; None where unknown.

    Raises:
        ValueError: There is no horizon, a stack is missing, too short or planned for twice, or
            blocks in it are not trained by the optimizer or have none to copy.
    """
    seen: set[str] = set()
    for staged in staged_in(policy):
        if horizon is None:
            msg = "Staged wakes blocks at shares of the run: give the Grower horizon= in updates"
            raise ValueError(msg)
        for plan in staged.plans:
            stack = _stack_of(plan, bare(model))
            if stack is None:
                continue
            if plan.stages[-1][1] > len(stack):
                msg = (
                    f"{stack.path!r} has {len(stack)} blocks, and {plan.stages[-1][1]} are planned "
                    f"to be awake at {plan.stages[-1][0]:.0%} of the run"
                )
                raise ValueError(msg)
            if stack.path in seen:
                msg = f"{stack.path!r} is planned for twice: give its stages in one Staged"
                raise ValueError(msg)
            seen.add(stack.path)
            check_is_trained(stack, stack.numbers("asleep"), optimizer)
            if staged.init == "copy":
                sources_of(stack, stack.numbers("asleep"))


def _stack_of(plan: StackPlan, model: nn.Module) -> Stack | None:
    """Return the stack of a plan; None where every block of it, or of the model, is awake."""
    if plan.path is not None:
        stack = stack_at(model, plan.path)
        return stack if len(stack.numbers(None)) < len(stack) else None
    is_awake = all(kind_of_sleep(module) is None for module in model.modules())
    return None if is_awake else sleeping_stack(model, None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Course:
    """One stack, and what is planned for it: ``number`` of the plans of ``staged``."""

    staged: Staged
    number: int
    stack: Stack

    @property
    def idle(self) -> list[tuple[float, int]]:
        """Stages that ask for no more blocks than are awake: they wake nothing."""
        num_awake = len(self.stack.numbers(None))
        return [
            (s, depth) for s, depth in self.staged.plans[self.number].stages if depth <= num_awake
        ]

    @property
    def is_idle(self) -> bool:
        """Whether every stage is such a one."""
        return len(self.idle) == len(self.staged.plans[self.number].stages)

    @property
    def said_of_idle(self) -> str:
        """What the owner is told of these stages."""
        asked = ", ".join(f"{depth} at {share:.0%} of the run" for share, depth in self.idle)
        awake, whole = len(self.stack.numbers(None)), len(self.stack)
        what = "nothing will wake in" if self.is_idle else "a stage wakes nothing in"
        return (
            f"{what} {self.stack.path!r}: of its {whole} blocks {awake} are awake already, and "
            f"Staged asks for {asked}; a depth is how many are awake from then on, at most {whole}"
        )

    def due(self, update: int, horizon: int) -> int | None:
        """Return the depth that is due, the last where several are, and count it as begun."""
        stages = self.staged.plans[self.number].stages
        num_due = sum(math.ceil(share * horizon - 1e-9) <= update for share, _ in stages)
        if num_due <= self.staged.num_begun[self.number]:
            return None
        self.staged.num_begun[self.number] = num_due
        depth = stages[num_due - 1][1]
        return depth if depth > len(self.stack.numbers(None)) else None

    def ramp_left(self, update: int, horizon: int) -> int:
        """Return the updates until alpha is 1: all of a ramp, or what is left of one.

        A ramp of ``r (H - s)`` updates that began at update s is at
        ``alpha = (u - s) / (r (H - s))`` by update u, which gives s.
        """
        begun = [share_of(self.stack.blocks[i]) for i in self.stack.numbers("waking")]
        ramp, alpha = self.staged.ramp, min(begun, default=0.0)
        began = (update - alpha * ramp * horizon) / (1.0 - alpha * ramp)
        return max(1, round((1.0 - alpha) * ramp * (horizon - began)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waking:
    """Stages that began together: what moves their blocks, by record, and the way back."""

    movers: dict[int, Deepening]
    snapshot: RunSnapshot
    parameters: list[nn.Parameter]
    factors: list[dict[str, float] | None]
    usual: SpikeLimit

    def state_dict(self, run: GrowthRun) -> dict[str, Any]:
        """Return what moves, and the way back, by names."""
        named = {id(p): n for n, p in parameters_by_name(run.model, run.optimizer).items()}
        pairs = zip(self.parameters, self.factors, strict=True)
        return {
            "movers": {
                number: mover.state_dict(run.optimizer) for number, mover in self.movers.items()
            },
            "snapshot": self.snapshot.state_dict(run.model, run.optimizer),
            "factors": {named[id(p)]: factor for p, factor in pairs if id(p) in named},
            "usual": self.usual.limit,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], run: GrowthRun) -> _Waking:
        """Go on moving what moved in another run."""
        named = parameters_by_name(run.model, run.optimizer)
        return cls(
            movers={
                number: Deepening.from_state_dict(own, run.given, run.optimizer)
                for number, own in state["movers"].items()
            },
            snapshot=RunSnapshot.from_state_dict(state["snapshot"], run.model, run.optimizer),
            parameters=[cast("nn.Parameter", named[name]) for name in state["factors"]],
            factors=list(state["factors"].values()),
            usual=SpikeLimit(limit=state["usual"]),
        )


class PlannedDepth:
    """Carries out a run's stages of depth, behind each update.

    Args:
        run: The run.
    """

    def __init__(self, run: GrowthRun) -> None:
        self._run = run
        self._courses = [
            _Course(staged=staged, number=number, stack=stack)
            for staged in staged_in(run.policy)
            for number, plan in enumerate(staged.plans)
            if (stack := _stack_of(plan, run.model)) is not None
        ]
        self._records: list[StageRecord] = []
        self._waking: _Waking | None = None
        self._counted = range(0)
        self._flops = self._new_count() if self._courses else None

    def state_dict(self) -> dict[str, Any]:
        """Return what sleeps, what wakes and how far, and the way back, by names."""
        run, waking = self._run, self._waking
        numbers = {id(staged): i for i, staged in enumerate(staged_in(run.policy))}
        return {
            "shares": depth_state(run.model),
            "courses": [[numbers[id(c.staged)], c.number, c.stack.path] for c in self._courses],
            "counted": [self._counted.start, self._counted.stop],
            "flops": None if self._flops is None else self._flops.state_dict(),
            "waking": None if waking is None else waking.state_dict(run),
        }

    def load_state_dict(self, state: Mapping[str, Any], records: Sequence[StageRecord]) -> None:
        """Go on with what was planned and begun in another run of a model like this one.

        Args:
            state: What :meth:`state_dict` returned.
            records: Every stage that had begun, in order.

        Raises:
            ValueError: The model has no such blocks, or is replicated and its blocks do not sleep
                as they did.
        """
        run = self._run
        _let_sleep(run, state["shares"])
        policies = staged_in(run.policy)
        self._courses = [
            _Course(staged=policies[i], number=number, stack=stack_at(run.model, path))
            for i, number, path in state["courses"]
        ]
        self._records, self._counted = list(records), range(*state["counted"])
        if self._flops is not None:
            self._flops.close()
        self._flops = None
        if state["flops"] is not None:
            self._flops = self._new_count()
            self._flops.load_state_dict(state["flops"])
        waking = state["waking"]
        self._waking = None if waking is None else _Waking.from_state_dict(waking, run)

    def _new_count(self) -> StepFlops:
        run = self._run
        compiled = is_compiled(run.given)
        return StepFlops(run.model, is_compiled=compiled, compute_loss=run.compute_loss)

    def warn_if_idle(self) -> None:
        """Warn the owner where stages are planned and nothing sleeps, or nothing will wake."""
        if staged_in(self._run.policy) and not self._courses:
            self._run.journal.warn(
                "nothing can wake: no block of the model sleeps; call esper.shallow(model, path, "
                "depth=...) before the Grower"
            )
        for course in self._courses:
            if course.idle:
                tell = self._run.journal.warn if course.is_idle else self._run.journal.note
                tell(course.said_of_idle)

    @property
    def is_planned(self) -> bool:
        """Whether there are blocks that sleep or wake by plan."""
        return bool(self._courses) or self._waking is not None

    @property
    def is_waking(self) -> bool:
        """Whether blocks are on their way; nothing is grafted meanwhile."""
        return self._waking is not None

    @property
    def records(self) -> tuple[StageRecord, ...]:
        """Every stage that has begun, in order; the FLOPs of the last go on."""
        total = None if self._flops is None else self._flops.total
        return tuple(
            replace(record, flops=total) if i in self._counted else record
            for i, record in enumerate(self._records)
        )

    def advance(self, batches: list[Batch], *, is_free: bool) -> None:
        """Follow one update of the run.

        Args:
            batches: What the update was made of; empty where the owner passes none.
            is_free: Whether nothing else is under way that a change of depth would disturb.
        """
        if self._flops is not None:
            self._flops.after_update(batches)
        if self._waking is not None:
            self._follow(self._waking)
        elif is_free and self._courses:
            self._begin()

    def close(self, reason: str) -> None:
        """Move nothing any more; blocks that were on their way stay where they are."""
        if self._waking is not None:
            for number, mover in self._waking.movers.items():
                if not mover.is_done:
                    mover.close()
                    why = f"{reason} at alpha {mover.alpha:.3g}; esper.deepen goes on from there"
                    self._records[number] = replace(self._records[number], reason=why)
                    self._run.journal.note(f"{', '.join(mover.names)}: {why}")
            self._waking = None
        if self._flops is not None:
            self._flops.close()

    def _begin(self) -> None:
        """Wake what is due, and go on with what another Grower had begun."""
        update, horizon = self._run.updates, self._run.settings.horizon
        assert horizon is not None
        due: list[tuple[_Course, int]] = []
        for course in self._courses:
            stack = course.stack
            if is_moving(stack):  # by hand: what is planned waits for it
                continue
            depth = course.due(update, horizon)
            if depth is None and stack.numbers("waking"):
                depth = len(stack.numbers(None)) + len(stack.numbers("waking"))
            if depth is not None:
                due.append((course, depth))
        if due:
            self._wake(due, horizon)

    def _wake(self, due: Sequence[tuple[_Course, int]], horizon: int) -> None:
        run = self._run
        parameters = list(run.model.parameters())
        waking = _Waking(
            movers={},
            snapshot=RunSnapshot(run.model, run.optimizer, update=run.updates),
            parameters=parameters,
            factors=run.factor.state_dict(parameters),
            usual=SpikeLimit.after(run.losses),
        )
        loss = _finite(run.losses.mean())
        run.end_null_beside("blocks woke in the run alone")
        for course, depth in due:
            ramp_updates = course.ramp_left(run.updates, horizon)
            mover = begin_deepening(
                run.given,
                run.optimizer,
                depth=depth,
                path=course.stack.path,
                init=course.staged.init,
                ramp_updates=ramp_updates,
            )
            waking.movers[len(self._records)] = mover
            self._records.append(
                StageRecord(
                    path=course.stack.path,
                    depth=depth,
                    blocks=mover.names,
                    init=course.staged.init,
                    started_at=run.updates,
                    ramp_updates=ramp_updates,
                    loss_before=loss,
                    reason=f"planned for update {run.updates} of {horizon}",
                )
            )
            run.journal.stage_woken(self._records[-1])
        run.ledger.structure_changed()
        self._waking = waking

    def _follow(self, waking: _Waking) -> None:
        """Look after blocks on their way: count anew once they run, and end where it is time."""
        num_updates = self._run.updates - waking.snapshot.update
        if num_updates == 1:
            self._count_anew(range(min(waking.movers), len(self._records)))
        is_done = all(mover.is_done for mover in waking.movers.values())
        if is_done or num_updates % LOSS_CHECK_EVERY == 0:
            trouble = waking.usual.trouble(self._run.losses)
            if any_rank(self._run.given, here=trouble is not None):
                self._take_back(waking, trouble or "the training loss went wrong on another rank")
                return
        loss = _finite(self._run.losses.mean())
        for number, mover in waking.movers.items():
            if mover.is_done and self._records[number].ended_at is None:
                self._end(number, verdict="awake", reason="alpha reached 1", loss_after=loss)
        if is_done:
            self._waking = None
            self._run.ledger.structure_changed()
            self._run.journal.note(
                "depth is planned, not gated: the report has the loss and the FLOPs of each stage. "
                "Nothing was compared: train the shallow model for the same FLOPs to see what the "
                "stages brought"
            )

    def _end(
        self, number: int, *, verdict: DepthVerdict, reason: str, loss_after: float | None
    ) -> None:
        total = None if self._flops is None else self._flops.total
        self._records[number] = record = replace(
            self._records[number],
            ended_at=self._run.updates,
            verdict=verdict,
            reason=reason,
            loss_after=loss_after,
            flops=total,
        )
        self._run.journal.stage_woken(record)

    def _take_back(self, waking: _Waking, trouble: str) -> None:
        """Go back to where the blocks began to wake, and let them sleep."""
        run = self._run
        loss, lost = _finite(run.losses.mean(LOSS_CHECK_EVERY)), run.updates
        lost -= waking.snapshot.update
        for mover in waking.movers.values():
            mover.put_to_sleep()
        waking.snapshot.restore(run.optimizer)
        run.factor.load_state_dict(waking.factors, waking.parameters)
        run.losses.clear()
        reason = f"{trouble}; {lost} updates were undone"
        for number in waking.movers:
            self._end(number, verdict="put to sleep", reason=reason, loss_after=loss)
            run.journal.note(
                f"{', '.join(self._records[number].blocks)} sleep again: {reason}. Wake them by "
                "esper.deepen, over more updates or at a lower rate"
            )
        self._waking = None
        run.ledger.structure_changed()
        self._count_anew(range(0))

    def _count_anew(self, counted: range) -> None:
        """Let the FLOPs from here on be those of other stages."""
        assert self._flops is not None
        total, depths = self._flops.total, [c.stack for c in self._courses]
        for number in self._counted:
            self._records[number] = replace(self._records[number], flops=total)
        if not self._counted and total is not None:
            awake = ", ".join(f"{s.path}: {len(s.numbers(None))} of {len(s)}" for s in depths)
            self._run.journal.note(
                f"{total:.4g} FLOPs of training until update {self._run.updates}, with few blocks "
                f"awake ({awake})"
            )
        self._counted = counted
        self._flops.begin()


def _let_sleep(run: GrowthRun, shares: Mapping[str, float]) -> None:
    """Let blocks sleep and wake as those of another model did.

    Raises:
        ValueError: The model has no such blocks, or it is replicated and others sleep in it.
    """
    if depth_state(run.model) == shares:
        return
    if replicas(run.given) is not None:
        msg = (
            "other blocks sleep in this model than in the run that was saved, and it is in "
            "DistributedDataParallel already: let them sleep as they did before that, with "
            "esper.load_checkpoint or load_depth_state"
        )
        raise ValueError(msg)
    load_depth_state(run.model, shares)


def _finite(loss: float | None) -> float | None:
    """Return a loss for a report, which has no number that is not finite."""
    return None if loss is None or not math.isfinite(loss) else loss

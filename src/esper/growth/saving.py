"""The state of a growing run: what is saved of it, what it fits, and how a run goes on from it.

A state is plain values and CPU tensors, by names. What goes on is a watch, a ramp of a kernel or of
blocks, and all that was counted; what was only tried (a recording, a trial, an audition) begins
again.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from esper.continuity.replicas import any_rank, in_step, spread
from esper.continuity.snapshot import parameters_by_name
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.errors import GrowthError
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import run_report_from_json
from esper.contracts.value_json import is_newer, version_to_write
from esper.growth.budget import Cost
from esper.growth.holding import Holding
from esper.growth.measurement import Measurement
from esper.growth.null_beside import NullBeside
from esper.growth.policies import AllOf, AnyOf, Policy
from esper.growth.probation import Probation
from esper.growth.reading import Choice, Reading
from esper.growth.staged import staged_in
from esper.growth.stages import Recording
from esper.growth.tries import no_tries_left, set_tries_spent, spend_try, tries_spent
from esper.seeds.probe import load_probe_memory, probe_memory
from esper.seeds.seed_figures import health_state, load_health_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from esper.contracts.choices import GraftVerdict
    from esper.contracts.report import RunReport
    from esper.growth.run import GrowthRun
    from esper.growth.stage import Stage, StageState

STATE_FORMAT_VERSION: Final = "1.0"
"""Format of the state; one with a higher number is refused."""

_COUNTED: Final = (
    "activation_bytes",
    "num_packages",
    "num_decisions",
    "too_dear",
    "awaited_flops",
    "no_twins",
    "last_change_update",
)
"""Plain values of a run that are saved as they are."""

_PLAIN: Final = (str, int, float, bool, type(None))
_MOST_TOLD: Final = 3


def saved_run(run: GrowthRun, stage: Stage | None, report: RunReport) -> dict[str, Any]:
    """Return what is saved of a run and of what is under way.

    Args:
        run: The run.
        stage: What is under way; None where nothing is.
        report: The run's report as it is.
    """
    measured, evaluator = run.last_measurement, run.evaluator
    return {
        "format_version": STATE_FORMAT_VERSION,
        "run_id": run.journal.run_id,
        "origin_id": run.origin_id,
        "field_reports": run.field_reports.state_dict(),
        "identity": identity(run),
        "report": replace(report, settings={}).to_json(),
        "journal": run.journal.state_dict(),
        "counted": {name: getattr(run, name) for name in _COUNTED},
        "host_cost": [run.host_cost.parameters, run.host_cost.flops, run.host_cost.latency_s],
        "graft_costs": run.grafts.costs,
        "choice": _saved_choice(run.choice),
        "tries_spent": tries_spent(run.model),
        "last_measurement": None if measured is None else measured.state_dict(),
        "evaluator": None if evaluator is None else evaluator.state_dict(),
        "policy": run.policy.state_dict(),
        "ranking": _state_of(run.ranking),
        "watcher": run.watcher.state_dict(),
        "ledger": run.ledger.state_dict(),
        "losses": run.losses.state_dict(),
        "warmup": _saved_warmup(run),
        "probes": probe_memory(run.layers),
        "sizes": run.fits.state_dict(),
        "health": health_state(run.layers),
        "null_beside": None if run.null_beside is None else run.null_beside.state_dict(),
        "stage": None if stage is None else stage.state_dict(),
    }


def load_run(run: GrowthRun, state: Mapping[str, Any]) -> RunReport:
    """Let a run have everything of a state but what is under way; return its report.

    Raises:
        ValueError: The policy, or the report, refuses what it is given.
        KeyError: A part is missing.
    """
    report = run_report_from_json(state["report"])
    run.policy.load_state_dict(state["policy"])
    _load_state_of(run.ranking, state["ranking"])
    for name in _COUNTED:
        setattr(run, name, state["counted"][name])
    parameters, flops, latency_s = state["host_cost"]
    run.host_cost = Cost(parameters=parameters, flops=flops, latency_s=latency_s)
    run.choice = _loaded_choice(state["choice"])
    measured = state["last_measurement"]
    run.last_measurement = None if measured is None else Measurement.from_state_dict(measured)
    if run.evaluator is not None and state["evaluator"] is not None:
        run.evaluator.load_state_dict(state["evaluator"])
    run.watcher.load_state_dict(state["watcher"])
    run.ledger.load_state_dict(state["ledger"])
    run.losses.load_state_dict(state["losses"])
    _load_warmup(run, state["warmup"])
    load_probe_memory(run.layers, state["probes"])
    run.fits.take(state.get("sizes", {}))
    load_health_state(run.layers, state.get("health", {}))
    run.journal.goes_on(report, state["journal"])
    run.grafts.load(report.grafts, state["graft_costs"])
    set_tries_spent(run.model, state["tries_spent"])
    run.origin_id = state.get("origin_id", state["run_id"])
    run.field_reports.load_state_dict(state.get("field_reports", []))
    return report


def resumed_stage(run: GrowthRun, state: Mapping[str, Any]) -> Stage | None:
    """Return what is under way now: it goes on, or it begins again.

    Args:
        run: The run, which has all else of the state.
        state: The state.
    """
    _guard_kernels(run)
    _go_on_with_null(run, state["null_beside"])
    saved: StageState | None = state["stage"]
    if saved is None:
        return None
    if saved["kind"] == "holding":
        return Holding.from_state_dict(saved, run)
    if saved["kind"] == "probation":
        return Probation.from_state_dict(saved, run)
    if saved["kind"] == "recording":
        return Recording(run, run.choice, advise_only=saved["advise_only"])
    return _begun_again(run, saved)


def _go_on_with_null(run: GrowthRun, saved: int | Mapping[str, Any] | None) -> None:
    """Let the null train on beside the run; where it was not saved, say that it has ended."""
    if run.null_beside is not None:  # what was loaded did not fit, and the run goes back
        run.null_beside.close()
        run.null_beside, run.watcher.reads_scale, run.ledger.promised = None, False, 0.0
    if saved is None:
        return
    package = saved if isinstance(saved, int) else saved["package"]
    made, why = in_step(run.given, lambda: _resumed_null(run, saved))
    if any_rank(run.given, here=made is None):
        if made is not None:
            made.close()
        run.ledger.promised = 0.0
        run.tell_null_ended(package, why or "it could not go on on another rank")
        return
    run.null_beside, run.watcher.reads_scale = made, True


def _resumed_null(run: GrowthRun, saved: int | Mapping[str, Any]) -> tuple[NullBeside | None, str]:
    """Return the null that trains on; else None, and why."""
    why = "the process ended that trained it"
    if isinstance(saved, int):
        return None, why
    try:
        return NullBeside.from_state_dict(saved, run), ""
    except GrowthError as error:
        return None, f"{why}, and it cannot go on ({error})"


def _begun_again(run: GrowthRun, saved: StageState) -> Stage | None:
    """Count a trial, or an audition, that was cut off; begin again with what it began with.

    It was let in as one of the tries, and so is what begins in its place: a verdict on it is the
    only one. One that is cut off beyond the tries is the last.
    """
    had_tries = tries_spent(run.model) < run.settings.tries
    spend_try(run.model)
    is_trial = saved["kind"] == "trial"
    what = f"the trial of package {saved['package']}" if is_trial else "the audition of a kernel"
    cut = f"cut off at update {run.updates:,} by the end of the process that it ran in"
    verdict: GraftVerdict = "refused in trial" if is_trial else "culled in audition"
    for number in saved["grafts"]:
        run.grafts.numbered(number).cull(cut, update=run.updates, verdict=verdict)
    record = next((t for t in run.journal.trials if t.package == saved["package"]), None)
    if record is not None:
        run.journal.trial_changed(replace(record, verdict="refused", reason=cut))
    goes_on = "it begins again from there, with a recording" if had_tries else "no try is left"
    run.journal.note(f"{what} was {cut}; that counts as a try, and {goes_on}")
    if had_tries:
        return Recording(run, run.choice)
    run.last_change_update = run.updates
    run.journal.note(no_tries_left(run.model, run.settings.tries))
    return None


def _guard_kernels(run: GrowthRun) -> None:
    """Let kernels that are permanent, and those of ranks, be guarded at the step, as they were.

    A model that was loaded before an optimizer was handed over could not have such a guard.
    """
    at_the_step = {GraftStage.FOSSILIZED}
    if spread(run.given) is not None:  # or one rank could isolate a kernel alone
        at_the_step |= {GraftStage.BLENDING, GraftStage.HOLDING}
    for record in run.grafts.records:
        if record.stage in at_the_step and not record.folded:
            layer = run.layers.get(record.site)
            if layer is not None and layer.seed_kernel(record.seed_idx) is not None:
                layer.set_guard(record.seed_idx, "step")


# ---- what a state fits


def identity(run: GrowthRun) -> dict[str, Any]:
    """Return what the run has to be that goes on from a state: its model, and what decides."""
    parameters = parameters_by_name(run.model, run.optimizer)
    named = {id(p): name for name, p in parameters.items()}
    return {
        "settings": {**asdict(run.settings), "budget": asdict(run.budget)},
        "policy": _named_policy(run.policy),
        "ranking": type(run.ranking).__qualname__,
        "layers": list(run.layers),
        "parameters": {name: list(p.shape) for name, p in parameters.items()},
        "groups": [
            sorted(named[id(p)] for p in group["params"]) for group in run.optimizer.param_groups
        ],
    }


def check_loadable(run: GrowthRun, state: Mapping[str, Any]) -> None:
    """Refuse a state that a run cannot go on from.

    Raises:
        ValueError: It is none, of a newer Esper, of another model or optimizer, or of other
            settings; the message names what differs.
    """
    with damage_told():
        version, theirs = state["format_version"], state["identity"]
    version_to_write("Grower state", version, STATE_FORMAT_VERSION)
    if is_newer(version, STATE_FORMAT_VERSION):
        msg = (
            f"Grower state format {version!r} is not known here (this Esper reads up to "
            f"{STATE_FORMAT_VERSION}); load it with a newer Esper"
        )
        raise ValueError(msg)
    ours = identity(run)
    with damage_told():
        _check_model(ours, theirs)
        _check_settings(ours, theirs)


def _check_model(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    mine, other = ours["parameters"], theirs["parameters"]
    odd = [name for name in {**other, **mine} if mine.get(name) != other.get(name)]
    odd += [name for name in {*ours["layers"]} ^ {*theirs["layers"]} if name not in odd]
    if odd:
        msg = (
            f"the state is of a model that differs from this one in {_some(sorted(odd))}; build "
            "and wrap the model as it was, load its state (which builds its kernels) and the "
            "optimizer's, and the Grower's then"
        )
        raise ValueError(msg)
    if ours["groups"] != theirs["groups"]:
        odd = sorted({_place_of(ours, name) for name in _moved(ours, theirs)})
        msg = (
            f"the optimizer has other parameters in its groups than when the state was saved "
            f"({_some(odd)}); build it with the groups that it had, and load its state before the "
            "Grower's"
        )
        raise ValueError(msg)


def _moved(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = [
        {name: i for i, names in enumerate(each["groups"]) for name in names}
        for each in (ours, theirs)
    ]
    return [name for name in {**found[0], **found[1]} if found[0].get(name) != found[1].get(name)]


def _place_of(ours: Mapping[str, Any], name: str) -> str:
    groups = [i for i, names in enumerate(ours["groups"]) if name in names]
    return f"{name}: in group {groups[0]} here" if groups else f"{name}: in none here"


def _check_settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    pairs = [(name, theirs[name], ours[name]) for name in ("policy", "ranking")]
    names = {**theirs["settings"], **ours["settings"]}
    pairs += [(n, theirs["settings"].get(n), ours["settings"].get(n)) for n in names]
    odd = [f"{name} (saved: {was!r}, here: {now!r})" for name, was, now in pairs if was != now]
    if odd:
        msg = (
            f"the state is of a run with other settings: {', '.join(odd)}; make the Grower with "
            "those of the run that was saved, and before the model's state is loaded where an "
            "overhead is left to it"
        )
        raise ValueError(msg)


def _named_policy(policy: Policy) -> str:
    """Return the class of a policy, of what it is made of, and what it has planned of depth."""
    name = type(policy).__qualname__
    if isinstance(policy, (AnyOf, AllOf)):
        return f"{name}({', '.join(map(_named_policy, policy.policies))})"
    plans = [(p.path, p.stages) for staged in staged_in(policy) for p in staged.plans]
    return f"{name}({plans})" if plans else name


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_TOLD
    return ", ".join(names[:_MOST_TOLD]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def damage_told() -> Iterator[None]:
    """Turn what a state that lacks a part, or has another in its place, leads to into words.

    Raises:
        ValueError: The state is damaged.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        msg = (
            f"this is no state of a Grower, or it is damaged ({type(error).__name__}: {error}); "
            "give it what state_dict() returned"
        )
        raise ValueError(msg) from error


def checked_plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state, which is plain values and CPU tensors throughout.

    Raises:
        GrowthError: A tensor of it is sharded, or of another subclass.
        TypeError: Something else is no plain value.
    """
    _check_plain(state, "state")
    return state


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.device.type != "cpu":
            msg = (
                f"{where} is a {type(value).__name__} on {value.device}, which a Grower cannot "
                "save; save the run when no package is under watch and no block is waking"
            )
            raise GrowthError(msg)
    elif type(value) is dict:
        for name, item in value.items():
            _check_plain(name, f"a key of {where}")
            _check_plain(item, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):  # type: ignore[arg-type] # a list or a tuple, by its type
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN:
        msg = (
            f"{where} is a {type(value).__name__}; a state has dicts, lists, tuples, numbers, "
            "text, booleans, None and tensors: let state_dict() of your policy or ranking return "
            "such values"
        )
        raise TypeError(msg)


# ---- parts


def saved_reading(reading: Reading) -> dict[str, Any]:
    """Return what the policy was told last, but for the horizon, as plain values."""
    return {
        "update": reading.update,
        "train_loss": reading.train_loss,
        "gate_loss": reading.gate_loss,
        "metrics": dict(reading.metrics),
        "rates": list(reading.rates),
        "last_change_update": reading.last_change_update,
        "num_packages": reading.num_packages,
    }


def loaded_reading(state: Mapping[str, Any], horizon: int | None) -> Reading:
    """Return what the policy was told last.

    Args:
        state: What :func:`saved_reading` returned.
        horizon: Length of the run in updates; None where unknown.
    """
    return Reading(**{**state, "rates": tuple(state["rates"])}, horizon=horizon)


def _saved_warmup(run: GrowthRun) -> dict[str, dict[str, float]]:
    """Return how far parameters on their first steps are, by name."""
    named = parameters_by_name(run.model, run.optimizer)
    found = zip(named, run.factor.state_dict(list(named.values())), strict=True)
    return {name: saved for name, saved in found if saved is not None}


def _load_warmup(run: GrowthRun, state: Mapping[str, dict[str, float]]) -> None:
    named = parameters_by_name(run.model, run.optimizer)
    run.factor.load_state_dict(list(state.values()), [named[name] for name in state])


def _saved_choice(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    blueprint, is_named = choice.blueprint, isinstance(choice.blueprint, str)
    text = blueprint if isinstance(blueprint, str) else blueprint.to_json().decode()
    return {
        "site": choice.site,
        "blueprint": text,
        "is_named": is_named,
        "update": choice.update,
    }


def _loaded_choice(state: Mapping[str, Any] | None) -> Choice | None:
    if state is None:
        return None
    text = state["blueprint"]
    blueprint = text if state["is_named"] else BlueprintIR.from_json(text.encode())
    return Choice(site=state["site"], blueprint=blueprint, update=state["update"])


def _state_of(ranking: object) -> Any:
    """Return what a ranking remembers; None of one that has no ``state_dict``."""
    saved = getattr(ranking, "state_dict", None)
    return None if saved is None else saved()


def _load_state_of(ranking: object, state: Any) -> None:
    load = getattr(ranking, "load_state_dict", None)
    if load is not None and state is not None:
        load(state)

"""All that a model is beyond its class: weights, the seeds they stand in, and how deep it is.

It is taken as plain values, checked against a model without changing it, and put into it in the
order in which that works: blocks that sleep, kernels, weights, counters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypedDict

from torch import Tensor, nn

from esper.continuity.replicas import bare, over_ranks, replicas
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.written_alphas import take_written_alphas
from esper.resilience.attempt import Done, attempt
from esper.seeds.rebuilding import Plan, carry_out, planned
from esper.seeds.shallow import depth_state, load_depth_state
from esper.seeds.structure import SeedStructure, structure
from esper.state.host_parts import SEEDS, is_in_a_seed
from esper.state.kernel import PreparedKernel, reference_tensor
from esper.state.layer_record import RECORD, record_of
from esper.state.shards import is_in_shards, spread_like
from esper.state.state_layout import KasminaStateLayout

if TYPE_CHECKING:
    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

_COUNTS: Final = (
    "native_count",
    "active_count",
    "kernel_execution_count",
    "num_faults",
    "num_skipped",
)
_SEEN: Final = ("num_retries", "readings_to_wait")
_NUM_SHOWN: Final = 3


class LayerState(TypedDict):
    """The seeds of one layer.

    Attributes:
        seeds: Structure of those that are not dormant.
        classes: Of kernels by hand: ``module:qualname`` of the class, by seed.
        frozen: Names of the kernel's parameters that are not trained, by seed.
        isolated: Tensors of the kernel, and what is known of its probes, by seed; of kernels that
            are out of use, which no ``state_dict`` has.
        layout: State of all seeds, counters included.
        counts: Calls and faults of the layer.
    """

    seeds: list[SeedStructure]
    classes: dict[int, str]
    frozen: dict[int, list[str]]
    isolated: dict[int, dict[str, Any]]
    layout: dict[str, Any]
    counts: dict[str, int]


class GrownState(TypedDict):
    """A model's state.

    Attributes:
        layers: Of wrapped layers whose seeds have ever been touched, by name.
        depth: The share of every block that is not awake, by name.
    """

    layers: dict[str, LayerState]
    depth: dict[str, float]


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Return the ``state_dict`` of a model, outside of DDP and ``torch.compile``."""
    return dict(bare(model).state_dict())


def grown_state(model: nn.Module) -> GrownState:
    """Return what a model is beyond its class, weights aside."""
    inner = bare(model)
    layers = {n: _layer_state(m) for n, m in layers_of(inner).items() if not _is_pristine(m)}
    return {"layers": layers, "depth": depth_state(inner)}


def check_can_be_saved(model: nn.Module, classes: Iterable[type[nn.Module]]) -> None:
    """Refuse kernels that a load could not build again.

    Raises:
        ValueError: A graft waits for a call of its layer, or a kernel was neither lowered from a
            blueprint nor is its class among ``classes`` and importable.
    """
    known = set(classes)
    for name, layer in layers_of(bare(model)).items():
        record = record_of(layer)
        if record.waiting:
            msg = (
                f"the graft at seed {min(record.waiting)} of layer {name!r} waits for a call of "
                "its layer, and is no part of the model yet: save behind the next forward, or pass "
                "example= to graft"
            )
            raise ValueError(msg)
        for i, seed in record.seeds.items():
            if seed.kernel.blueprint is None:
                _check_class(f"the kernel of seed {i} of layer {name!r}", seed, known)


def check_same_kernels(model: nn.Module) -> None:
    """Refuse shards of a model that is another one on another rank: nobody could make them whole.

    Raises:
        ValueError: The ranks hold other kernels.
    """
    if not is_in_shards(model):
        return
    names = over_ranks(model, [*weights_of(model)])
    if any(each != names[0] for each in names):
        msg = (
            "the ranks do not hold the same kernels, so that their shards are of no one model: "
            "unload on every rank what one of them has isolated or given up, then save"
        )
        raise ValueError(msg)


def _check_class(what: str, seed: Seed, known: set[type[nn.Module]]) -> None:
    kind = type(seed.kernel.module)
    if kind not in known:
        msg = (
            f"{what} is a {kind.__qualname__} written by hand, whose name alone builds nothing: "
            f"pass classes=[{kind.__name__}] here and on loading"
        )
        raise ValueError(msg)
    if _imported(_word_of(kind)) is not kind:
        msg = (
            f"{what} is of the class {kind.__module__}.{kind.__qualname__}, which cannot be "
            "imported by that name: define it at the top of a module"
        )
        raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """A state that fits a model, with its kernels built.

    Attributes:
        model: The model.
        weights: Its ``state_dict`` to be.
        grown: What it will be beyond its class.
        plans: Its seeds to be, by layer.
    """

    model: nn.Module
    weights: dict[str, Any]
    grown: GrownState
    plans: dict[str, Plan] = field(default_factory=dict)


def checked(
    what: str,
    model: nn.Module,
    weights: Mapping[str, Any],
    grown: GrownState,
    classes: Iterable[type[nn.Module]] = (),
) -> Loading:
    """Check that a state is that of a model; nothing is changed, but kernels are built.

    Args:
        what: What the model is called, for messages.
        model: The model.
        weights: What :func:`weights_of` returned.
        grown: What :func:`grown_state` returned.
        classes: Of kernels by hand.

    Raises:
        ValueError: It is not; the message names what differs.
    """
    inner, known = bare(model), {_word_of(kind): kind for kind in classes}
    _check_same(what, _hosts(weights_of(inner)), _hosts(weights))
    _check_depth(what, model, grown["depth"])
    layers = layers_of(inner)
    plans, in_seeds = {}, {k: v for k, v in weights.items() if is_in_a_seed(k)}
    for name, state in grown["layers"].items():
        if name in layers:
            plans[name] = _plan(layers[name], f"layer {name!r} of {what}", state, known)
            _check_tensors(plans[name], name, f"layer {name!r} of {what}", state, in_seeds)
        elif any("kernel" in entry for entry in state["seeds"]):
            msg = (
                f"the checkpoint has a kernel at layer {name!r} of {what}, which is not wrapped "
                "here: call esper.wrap on the model first, with the select= of the run that was "
                "saved; esper.unwrap makes it plain afterwards"
            )
            raise ValueError(msg)
    return Loading(model=model, weights=dict(weights), grown=grown, plans=plans)


def as_it_is(model: nn.Module) -> Loading:
    """Return the way back: a model's own state, with copies of its tensors and its own kernels."""
    grown = grown_state(model)
    layers = layers_of(bare(model))
    return Loading(
        model=model,
        weights={
            name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for name, value in weights_of(model).items()
        },
        grown=grown,
        plans={
            name: planned(layers[name], state["seeds"]) for name, state in grown["layers"].items()
        },
    )


def load_depth(loading: Loading) -> None:
    """Let blocks sleep and wake as the state says."""
    inner = bare(loading.model)
    if depth_state(inner) != loading.grown["depth"]:
        load_depth_state(inner, loading.grown["depth"])


def load_seeds(loading: Loading) -> None:
    """Put the kernels in that the state has, and take all others out."""
    for name, layer in layers_of(bare(loading.model)).items():
        if name in loading.plans:
            carry_out(layer, loading.plans[name])
            _settle(loading.plans[name], loading.grown["layers"][name])
        elif not _is_pristine(layer):
            carry_out(layer, {})


def load_weights(loading: Loading) -> None:
    """Load the weights, and then what counts the calls of their layers."""
    inner = bare(loading.model)
    _load_tensors(inner, loading.weights)
    for name, layer in layers_of(inner).items():
        if name in loading.plans:
            state = loading.grown["layers"][name]
            _load_counters(record_of(layer), state["layout"], state["counts"])
        elif not _is_pristine(layer):
            own = record_of(layer).layout
            at_birth = KasminaStateLayout(own.num_seeds, own.device).__getstate__()
            _load_counters(record_of(layer), at_birth, dict.fromkeys(_COUNTS, 0))


def tell_followers(model: nn.Module) -> None:
    """Let averages that follow a model look whether they are in step with it."""
    for layer in layers_of(bare(model)).values():
        record_of(layer).changed()


# ---- one layer


def _layer_state(layer: nn.Module) -> LayerState:
    take_written_alphas(layer)
    record = record_of(layer)
    seeds = record.seeds
    by_hand = {i: seed for i, seed in seeds.items() if seed.kernel.blueprint is None}
    return {
        "seeds": structure(layer),
        "classes": {i: _word_of(type(seed.kernel.module)) for i, seed in by_hand.items()},
        "frozen": {i: names for i, seed in seeds.items() if (names := _frozen(seed))},
        "isolated": {i: _isolated(seed) for i, seed in seeds.items() if _is_out(layer, i)},
        "layout": copy.deepcopy(record.layout.__getstate__()),
        "counts": {name: getattr(record, name) for name in _COUNTS},
    }


def _is_pristine(layer: nn.Module) -> bool:
    """Say whether nothing was ever done with a layer's seeds, nor counted."""
    record = record_of(layer)
    counted = record.layout.num_transitions, *(getattr(record, name) for name in _COUNTS)
    return not any(counted) and not record.waiting


def _frozen(seed: Seed) -> list[str]:
    return [name for name, p in seed.slot.kernel.named_parameters() if not p.requires_grad]


def _isolated(seed: Seed) -> dict[str, Any]:
    tensors = {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
        for name, value in seed.slot.kernel.state_dict().items()
    }
    return {"tensors": tensors, **{name: getattr(seed, name) for name in _SEEN}}


def _is_out(layer: nn.Module, seed_idx: int) -> bool:
    return record_of(layer).layout.state(seed_idx) == SeedLifecycleState.ERROR_RECOVERY


def _plan(
    layer: nn.Module,
    what: str,
    state: LayerState,
    classes: Mapping[str, type[nn.Module]],
) -> Plan:
    """Return the seeds of a layer."""
    _check_layout(what, record_of(layer), state)
    by_hand = {
        int(entry["seed"]): _by_hand(layer, what, entry, state, classes)
        for entry in state["seeds"]
        if "kernel" in entry and entry["blueprint"] is None
    }
    made = {i: kernel for i, kernel in by_hand.items() if kernel is not None}
    try:
        return planned(layer, state["seeds"], made)
    except (KernelLoadError, ValueError) as error:
        msg = f"{what}: {error}"
        raise ValueError(msg) from error


def _check_tensors(
    plan: Plan, name: str, what: str, state: LayerState, in_seeds: Mapping[str, Any]
) -> None:
    """Refuse weights that are not those of a layer's seeds."""
    prefix = f"{name}.{SEEDS}." if name else f"{SEEDS}."
    saved = {k.removeprefix(prefix): v for k, v in in_seeds.items() if k.startswith(prefix)}
    saved |= {
        f"{i}.kernel.{key}": value
        for i, isolated in state["isolated"].items()
        for key, value in isolated["tensors"].items()
    }
    _check_same(f"the kernels of {what}", _tensors_of(plan, saved), saved)


def _tensors_of(plan: Plan, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the seeds of a plan have; of descriptions, whose length is free, the saved."""
    found: dict[str, Any] = {}
    for i, (entry, seed) in plan.items():
        if seed is None:
            continue
        is_out = entry["state"] == SeedLifecycleState.ERROR_RECOVERY
        own = seed.slot.kernel.state_dict(prefix="kernel.") if is_out else seed.slot.state_dict()
        found |= {f"{i}.{key}": value for key, value in own.items()}
        if not is_out:
            found[f"{i}.structure"] = saved.get(f"{i}.structure")
    return found


def _by_hand(
    layer: nn.Module,
    what: str,
    entry: SeedStructure,
    state: LayerState,
    classes: Mapping[str, type[nn.Module]],
) -> PreparedKernel | None:
    """Return a kernel of a class by hand; None where the owner has grafted one of it there."""
    seed_idx = int(entry["seed"])
    word = state["classes"][seed_idx]
    there = record_of(layer).seeds.get(seed_idx)
    if there is not None and _word_of(type(there.kernel.module)) == word:
        return None
    begin = f"the kernel of seed {seed_idx} of {what} is a {word} written by hand"
    if word not in classes:
        msg = f"{begin}: pass classes= with that class, or graft such a kernel there, then load"
        raise ValueError(msg)
    built = attempt(classes[word])
    if isinstance(built, Done):
        return PreparedKernel(
            module=built.value.to(reference_tensor(layer).device),
            mode=entry["mode"],
            position=entry["position"],
            artifact_id=entry["artifact_id"],
            draws_random=entry["draws_random"],
            adds_capacity=entry["adds_capacity"],
        )
    msg = f"{begin}, and cannot be built without arguments ({built}): graft one there, then load"
    raise ValueError(msg)


def _settle(plan: Plan, state: LayerState) -> None:
    """Let what is frozen be so, and what is out of use have its weights."""
    for i, (_, seed) in plan.items():
        if seed is None:
            continue
        frozen = state["frozen"].get(i, [])
        for name, p in seed.slot.kernel.named_parameters():
            p.requires_grad_(name not in frozen)
        if i in state["isolated"]:
            _load_tensors(seed.slot.kernel, state["isolated"][i]["tensors"])
            for name in _SEEN:
                setattr(seed, name, state["isolated"][i][name])


def _load_tensors(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Load tensors that are whole, also where the module has shards of them."""
    like = module.state_dict()
    module.load_state_dict(
        {name: spread_like(value, like.get(name)) for name, value in tensors.items()}
    )


def _check_layout(what: str, record: LayerRecord, state: LayerState) -> None:
    ours: dict[str, Any] = record.layout.__getstate__()
    theirs, counts = state["layout"], state["counts"]
    if theirs["num_seeds"] != ours["num_seeds"]:
        msg = (
            f"{what} had {theirs['num_seeds']} seeds and has {ours['num_seeds']} here: wrap the "
            f"model with num_seeds={theirs['num_seeds']}"
        )
        raise ValueError(msg)
    sizes = [{k: len(v) for k, v in each["arrays"].items()} for each in (ours, theirs)]
    kinds = [{k: type(v) for k, v in each.items()} for each in (ours, theirs)]
    if sizes[0] != sizes[1] or kinds[0] != kinds[1] or list(counts) != list(_COUNTS):
        msg = f"{what}: the state of its seeds is not one that Esper writes"
        raise ValueError(msg)


def _load_counters(record: LayerRecord, state: dict[str, Any], counts: dict[str, int]) -> None:
    layout = record.layout
    layout.__setstate__({**state, "device": layout.device})
    for i in range(layout.num_seeds):
        if layout.state(i) == SeedLifecycleState.LOADING:  # what it waited for is not saved
            layout.transition_seed_state(i, SeedLifecycleState.DORMANT)
    for name in _COUNTS:
        setattr(record, name, counts[name])


# ---- what has to be the same


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return wrapped layers outside of seeds by their names."""
    named = model.named_modules()
    return {n: m for n, m in named if RECORD in m.__dict__ and not is_in_a_seed(n)}


def _hosts(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if not is_in_a_seed(name)}


def _check_same(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse tensors of other names, shapes or dtypes."""
    lacking, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if lacking or extra:
        sides = {"the checkpoint has not": lacking, "only the checkpoint has": extra}
        said = "; ".join(f"{side} {some(names)}" for side, names in sides.items() if names)
        msg = f"the checkpoint is of another model than {what}: {said}; build the model as it was"
        raise ValueError(msg)
    for name, mine in ours.items():
        forms = [_form(mine), _form(theirs[name])]
        if forms[0] != forms[1]:
            msg = (
                f"the checkpoint is of another model than {what}: {name} was {forms[1]} and is "
                f"{forms[0]} here; build the model as it was, in the same dtype"
            )
            raise ValueError(msg)


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return "a value"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _check_depth(what: str, model: nn.Module, depth: Mapping[str, float]) -> None:
    mine = depth_state(bare(model))
    if mine != depth and replicas(model) is not None:
        msg = (
            f"other blocks of {what} sleep or wake than in the checkpoint, and the model is in "
            "DistributedDataParallel already: load it before, and give load_checkpoint the module "
            "inside"
        )
        raise ValueError(msg)
    names = dict(bare(model).named_modules())
    unknown = [name for name in depth if name not in names]
    if unknown:
        msg = f"no blocks of {what}: {some(unknown)}, which sleep in the checkpoint"
        raise ValueError(msg)


def some(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{', '.join(names[:_NUM_SHOWN])}{more}"


def _word_of(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _imported(word: str) -> object:
    """Return what has such a name in a module that is imported already, or None."""
    module, _, qualname = word.partition(":")
    found: object = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found

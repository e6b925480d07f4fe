"""``esper.save_checkpoint`` and ``load_checkpoint``: a run in one file, as it grew, bit for bit."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypedDict, cast, runtime_checkable

import torch
from torch import nn

from esper.continuity.deepening import ramps_of, resume_ramps
from esper.continuity.ensemble import AnyOptimizer, joined, members_of
from esper.continuity.following import averages_of, follow
from esper.continuity.grown_state import (
    GrownState,
    Loading,
    as_it_is,
    check_can_be_saved,
    check_same_kernels,
    checked,
    grown_state,
    layers_of,
    load_depth,
    load_seeds,
    load_weights,
    some,
    tell_followers,
    weights_of,
)
from esper.continuity.named_state import NAMES, is_named_by_model, names_in, saved_names
from esper.continuity.optimizer import (
    kernels_in,
    sync_again,
    sync_to_groups,
    with_kernels_out_of_use,
)
from esper.continuity.rank_contents import of_all_ranks, of_rank, shared_bytes
from esper.continuity.replicas import bare, go_on, in_step, ranks_of
from esper.continuity.snapshot import RandomState, random_state, set_random_state
from esper.continuity.stored_values import Reader, Writer
from esper.contracts import checkpoint_format
from esper.contracts.arguments import check_type
from esper.registry.disk import Disk
from esper.resilience.durable_file import WritesFiles, write_durably
from esper.seeds.seed_figures import health_state, load_health_state
from esper.state.host_parts import check_module, is_in_a_seed
from esper.state.shards import is_in_shards, whole_in

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from esper.continuity.agreement import Ranks
    from esper.continuity.ensemble import ParamGroup

_logger = logging.getLogger(__name__)


@runtime_checkable
class Resumable(Protocol):
    """What can say how far it is, and go on from there: a scheduler, a scaler, a Grower."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: numbers, text, tensors, arrays, and nestings of them."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take what :meth:`state_dict` returned."""


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    scheduler: Resumable | Sequence[Resumable] | None = None,
    scaler: Resumable | None = None,
    ema: nn.Module | None = None,
    grower: Resumable | None = None,
    extra: object = None,
    classes: Iterable[type[nn.Module]] = (),
) -> None:
    """Write a run to one file, from which :func:`load_checkpoint` goes on bit for bit.

    Call it between two updates: gradients are not part of it. It holds the model's ``state_dict``,
    which kernels stand in it and how far blocks are that sleep or wake, the optimizer's state by
    names, what else is given, and where random numbers go on from (torch on the CPU and the model's
    devices, numpy, Python). Put into ``extra`` what only you know: the epoch, the state of a
    ``torch.Generator`` of your own. Buffers that are not persistent, modes and hooks are not in it.

    The file has its name once it is whole and survives a power failure; until then what was there
    before is there. It is data: a safetensors file whose tensors of names that begin with
    ``model.`` are the ``state_dict`` (``esper.wrap(model).load_state_dict`` takes them without the
    prefix), with canonical JSON and a digest beside.

    Of a model in DistributedDataParallel every rank calls it, and the first writes the file. It has
    what each rank has for itself: where its random numbers go on from, its running statistics, its
    ``grower``. What the ranks have alike is in it once; ``extra`` is each rank's own. So it is of a
    model that FSDP2 has sharded: its tensors are made whole, in the memory of every rank meanwhile,
    and the file fits a model that is not sharded, too.

    Args:
        path: The file; its folder exists. What has the name is replaced. Of several ranks the
            first one's counts.
        model: The model; it may be inside DistributedDataParallel or ``torch.compile``.
        optimizer: What trains it, or all that train it together; :func:`esper.sync_optimizer` is
            called for it first.
        scheduler: The scheduler of the rate, or several.
        scaler: A ``torch.amp.GradScaler``.
        ema: An average of the model, ``AveragedModel`` or a copy; it may follow (:func:`follow`).
        grower: The Grower of the run.
        extra: Any nesting of dicts, lists, tuples, text, bytes, numbers, None, tensors and numpy
            arrays; all types come back, keys' too.
        classes: Classes of kernels that were grafted as modules written by hand, each to be had
            from its module by its name. Of such a kernel the file has the class's name and the
            ``state_dict``.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Something cannot be written (an object, a function, a kernel by hand whose class
            is not in ``classes``); it is named, and nothing was written.
        OSError: The file cannot be written; what was there before is there still.
        RankFailedError: One of these was raised on another rank; nothing was written.
    """
    run = _Run.of(model, optimizer, scheduler, scaler, ema, grower)
    known = _classes(classes)

    def save() -> None:
        file = _file(path)
        check_can_be_saved(run.model, known)
        if run.ema is not None:
            check_can_be_saved(run.ema, known)
        if run.optimizer is not None:
            sync_again(model, run.optimizer)
        check_same_kernels(run.model)
        content = {**_collected(run), "extra": extra}
        if is_in_shards(run.model):
            content = whole_in(content)
        write_checkpoint(Disk(), file, content, ranks_of(model))

    in_step(model, save)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    scheduler: Resumable | Sequence[Resumable] | None = None,
    scaler: Resumable | None = None,
    ema: nn.Module | None = None,
    grower: Resumable | None = None,
    classes: Iterable[type[nn.Module]] = (),
) -> Any:
    """Let a run go on from a checkpoint: all of it is loaded, or nothing is changed.

    Build everything as at the start of the run that was saved (wrap, shallow, optimizer, scheduler,
    average, Grower; MLPs that were widened as wide as they were), then call this. Kernels and
    blocks that sleep are put in first, then weights, the optimizer's state with the kernels in the
    groups that they had, ramps of waking blocks, scheduler, scaler, Grower, and random state last.
    Kernels that the model has beyond the checkpoint are taken out.

    A kernel by hand is loaded into the one of its class that stands in its seed, if you have
    grafted one there; else it is built, by calling its class without arguments.

    Of a model in DistributedDataParallel every rank calls it. One rank reads the file, of those
    that have it the one whose was written last, and the others are sent it: machines need not share
    a folder. Where there are more or fewer ranks than it was saved by, the run goes on, but not bit
    for bit, and a warning says so.

    Args:
        path: The file. It may be missing on some ranks.
        model: A model of the same class and sizes, wrapped where kernels stand.
        optimizer: As for :func:`save_checkpoint`, like all that follow; each is given if it was
            when the checkpoint was saved, and only then.
        scheduler: The scheduler, or several.
        scaler: The scaler.
        ema: The average; it follows the model from then on, if it did.
        grower: The Grower.
        classes: Classes of kernels by hand.

    Returns:
        ``extra`` as it was given to :func:`save_checkpoint`; its tensors are on the CPU.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The file is torn or was changed, or it is of another model, optimizer, scheduler
            and so on than are given; the message says what differs.
        OSError: The file cannot be read; ``FileNotFoundError`` where no rank has it.
        RankFailedError: It could not be loaded on another rank; nothing was changed on any.
    """
    run = _Run.of(model, optimizer, scheduler, scaler, ema, grower)
    known = _classes(classes)
    return in_step(model, lambda: _loaded(run, _file(path), known))


def _file(path: object) -> Path:
    """Return the file that a caller named, or refuse what names none."""
    words = "the name of a file, a str or a Path"
    check_type("path", path, (str, os.PathLike), words)
    if not (file := Path(cast("str | os.PathLike[str]", path))).name:
        msg = f"path is {words}; got {path!r}"
        raise ValueError(msg)
    return file


def _classes(classes: object) -> tuple[type[nn.Module], ...]:
    """Return the classes of kernels by hand, or refuse what is none."""
    words = "a list of classes of modules, for example [MyKernel]"
    check_type("classes", classes, Iterable, words)
    known = tuple(cast("Iterable[object]", classes))
    for each in known:
        if not (isinstance(each, type) and issubclass(each, nn.Module)):
            msg = f"classes is {words}; got {classes!r}"
            raise TypeError(msg)
    return cast("tuple[type[nn.Module], ...]", known)


def _loaded(run: _Run, path: Path, classes: tuple[type[nn.Module], ...]) -> Any:
    """Load a file into a run; return its ``extra``."""
    model = run.model
    content = read_checkpoint(path, ranks_of(model))
    before = random_state(model)
    try:
        loading = _checked(run, content, classes)
    except ValueError as error:
        msg = f"cannot load {path}: {error}. Nothing was changed"
        raise ValueError(msg) from error
    except (AttributeError, LookupError, TypeError) as error:
        msg = f"cannot load {path}: its content is not what Esper writes ({error!r})"
        raise ValueError(msg) from error
    finally:
        set_random_state(before)  # kernels were built, which draws
    _load(run, loading)
    return content["extra"]


def write_checkpoint(
    disk: WritesFiles, path: Path, content: dict[str, Any], ranks: Ranks | None = None
) -> None:
    """Write plain values durably to a file, or nothing.

    Args:
        disk: Who makes the calls to the machine.
        path: The file.
        content: Values by the name that those within them are called by in messages.
        ranks: Who write together; None where one process does by itself.

    Raises:
        ValueError: A value cannot be written.
        OSError: The file cannot be written.
    """
    writer = Writer()
    tensors: Mapping[str, checkpoint_format.StoredTensor] = writer.tensors
    made = ["dict", *(each for k, v in content.items() for each in (k, writer.json(v, k)))]
    if ranks is not None:
        made, tensors = of_all_ranks(ranks, made, tensors)
    if ranks is None or ranks.is_first:
        write_durably(disk, path, checkpoint_format.encode(made, tensors))


def read_checkpoint(path: Path, ranks: Ranks | None = None) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, of several ranks this one's part.

    Args:
        path: The file.
        ranks: Who read together; None where one process does by itself.

    Raises:
        ValueError: The file is torn, was changed, or is no checkpoint.
        OSError: The file cannot be read.
    """
    data = path.read_bytes() if ranks is None else shared_bytes(ranks, path)
    rank, size = (0, 1) if ranks is None else (ranks.group.rank(), ranks.group.size())
    try:
        made, tensors, num_saved = of_rank(checkpoint_format.parse(data), rank)
        content = _parts(Reader(tensors).value(made))
    except ValueError as error:
        msg = f"cannot load {path}: {error}. Nothing was changed; take an earlier checkpoint"
        raise ValueError(msg) from error
    if num_saved != size:
        _logger.warning(
            "%s is of %d ranks, and there are %d here: the run goes on, but not bit for bit",
            path,
            num_saved,
            size,
        )
    if rank >= num_saved:
        content["random"] = _drawn_anew(content["random"], rank)
    return content


def _drawn_anew(random: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return another state of torch's generators, for a rank that the checkpoint has none of."""
    devices = {}
    for name, state in random["devices"].items():
        if not _is_here(name):
            continue
        generator = torch.Generator(name)
        generator.set_state(state)
        drawn = torch.randint(2**31, (), generator=generator, device=name)
        devices[name] = generator.manual_seed(int(drawn) + rank).get_state()
    return {**random, "devices": devices}


def _parts(content: object) -> dict[str, Any]:
    if isinstance(content, dict) and content.keys() | _SINCE_THEN == _CONTENT | _SINCE_THEN:
        return content
    msg = "its content is not what Esper writes"
    raise ValueError(msg)


# ---- what is in it


class _Objects(TypedDict):
    """States of objects, and the names of their classes."""

    classes: list[str]
    states: list[dict[str, Any]]


class _Average(TypedDict):
    """An average: whether it follows, and what a model has."""

    follows: bool
    weights: dict[str, Any]
    grown: GrownState


_OBJECTS: Final = ("scheduler", "scaler", "grower")
_CONTENT: Final = {"model", "grown", "optimizer", "ramps", "ema", "random", "extra", *_OBJECTS}
_SINCE_THEN: Final = {"health"}
"""What files of before have not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The parts of a run; ``objects`` are schedulers, scaler and Grower by their argument."""

    model: nn.Module
    optimizer: AnyOptimizer | None
    ema: nn.Module | None
    objects: dict[str, tuple[Resumable, ...]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        scheduler: Resumable | Sequence[Resumable] | None,
        scaler: Resumable | None,
        ema: nn.Module | None,
        grower: Resumable | None,
    ) -> _Run:
        check_module("a checkpoint", model)
        check_type("ema", ema, (nn.Module, type(None)), "a module (keep any other in extra=)")
        given = {"scheduler": scheduler, "scaler": scaler, "grower": grower}
        return cls(
            model=model,
            optimizer=None if optimizer is None else joined(optimizer),
            ema=ema,
            objects={name: _several(name, value) for name, value in given.items()},
        )


def _several(name: str, given: object) -> tuple[Resumable, ...]:
    several = given if isinstance(given, (list, tuple)) and name == "scheduler" else (given,)
    for each in several:
        if each is not None:
            words = "an object with state_dict() and load_state_dict(state)"
            check_type(name, each, Resumable, words)
    return tuple(each for each in several if each is not None)


def _collected(run: _Run) -> dict[str, Any]:
    return {
        "model": weights_of(run.model),
        "grown": grown_state(run.model),
        "health": health_state(layers_of(bare(run.model))),
        "optimizer": None if run.optimizer is None else _optimizers(run.optimizer),
        "ramps": [] if run.optimizer is None else ramps_of(run.model, run.optimizer),
        "ema": _average(run),
        **{name: _objects(several) if several else None for name, several in run.objects.items()},
        "random": _random(run.model),
    }


def _objects(objects: Sequence[Any]) -> _Objects:
    return {
        "classes": [type(each).__qualname__ for each in objects],
        "states": [each.state_dict() for each in objects],
    }


def _optimizers(optimizer: AnyOptimizer) -> _Objects:
    with with_kernels_out_of_use():
        return _objects(members_of(optimizer))


def _average(run: _Run) -> _Average | None:
    if run.ema is None:
        return None
    return {
        "follows": _follows(run),
        "weights": weights_of(run.ema),
        "grown": grown_state(run.ema),
    }


def _follows(run: _Run) -> bool:
    return any(each is run.ema for each in averages_of(bare(run.model)))


def _random(model: nn.Module) -> dict[str, Any]:
    state = random_state(model)
    return {"devices": state.devices, "python": state.python, "numpy": state.numpy}


# ---- whether it fits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """A checkpoint that fits a run."""

    model: Loading
    ema: Loading | None
    follows: bool
    optimizer: list[dict[str, Any]]
    group_of: dict[str, int]
    ramps: list[dict[str, Any]]
    health: dict[str, Any]
    objects: dict[str, list[dict[str, Any]]]
    random: dict[str, Any]


def _checked(run: _Run, content: dict[str, Any], classes: tuple[type[nn.Module], ...]) -> _Loading:
    """Check all that can be looked at beforehand; kernels are built, and nothing is changed."""
    members: tuple[Any, ...] = () if run.optimizer is None else members_of(run.optimizer)
    optimizer = _states("optimizer", members, content["optimizer"])
    objects = {name: _states(name, run.objects[name], content[name]) for name in _OBJECTS}
    _check_scaler(run.objects["scaler"], objects["scaler"])
    average: _Average | None = content["ema"]
    _check_given("ema", is_given=run.ema is not None, is_saved=average is not None)
    model = checked("the model", run.model, content["model"], content["grown"], classes)
    ema = None
    if run.ema is not None and average is not None:
        ema = checked("ema", run.ema, average["weights"], average["grown"], classes)
    for number, (member, state) in enumerate(zip(members, optimizer, strict=True)):
        _check_groups(
            run.model, f"optimizer {number}" if number else "the optimizer", member, state
        )
    return _Loading(
        model=model,
        ema=ema,
        follows=average is not None and average["follows"],
        optimizer=optimizer,
        group_of=_groups_by_name(optimizer),
        ramps=content["ramps"],
        health=content.get("health", {}),
        objects=objects,
        random=content["random"],
    )


def _check_given(name: str, *, is_given: bool, is_saved: bool) -> None:
    if is_saved and not is_given:
        msg = f"the checkpoint has the state of {name}, which is not given: pass it, as on saving"
        raise ValueError(msg)
    if is_given and not is_saved:
        msg = (
            f"{name} is given, and the checkpoint has nothing of it: leave it out here to begin "
            f"with it anew, or pass {name} to save_checkpoint"
        )
        raise ValueError(msg)


def _states(name: str, given: Sequence[object], saved: _Objects | None) -> list[dict[str, Any]]:
    """Return the states of objects of the same classes."""
    _check_given(name, is_given=bool(given), is_saved=saved is not None)
    if saved is None:
        return []
    found = [type(each).__qualname__ for each in given]
    if found != saved["classes"]:
        msg = (
            f"{name} was {', '.join(saved['classes'])} when the checkpoint was saved, and is "
            f"{', '.join(found)} here; build it as it was"
        )
        raise ValueError(msg)
    return saved["states"]


def _check_scaler(given: Sequence[Resumable], states: Sequence[dict[str, Any]]) -> None:
    for scaler, state in zip(given, states, strict=True):
        if bool(scaler.state_dict()) != bool(state):  # torch's is empty where it is disabled
            was, now = ("enabled", "disabled") if state else ("disabled", "enabled")
            msg = f"scaler was {was} when the checkpoint was saved, and is {now} here"
            raise ValueError(msg)


def _check_groups(model: nn.Module, what: str, member: Any, state: dict[str, Any]) -> None:
    """Refuse an optimizer whose groups train other parameters of the host."""
    live: list[ParamGroup] = member.param_groups
    saved: list[ParamGroup] = state["param_groups"]
    if len(live) != len(saved):
        msg = f"{what} had {len(saved)} param groups and has {len(live)} here; build it as it was"
        raise ValueError(msg)
    kernels = kernels_in(member)
    names = names_in(bare(model), member, kernels, by_model=is_named_by_model(saved))
    named = saved_names(saved)
    for number, (mine, theirs) in enumerate(zip(live, saved, strict=True)):
        if NAMES not in theirs:  # it trains what is no part of the model: torch goes by position
            continue
        hosts = [id(p) for p in mine["params"] if id(p) not in kernels]
        ours = {names[key] for key in hosts}
        then = set(named[number])
        odd = sorted(name for name in ours ^ then if not is_in_a_seed(name))
        if odd:
            msg = (
                f"group {number} of {what} trained other parameters when the checkpoint was saved: "
                f"it differs in {some(odd)}; build it as it was"
            )
            raise ValueError(msg)


def _groups_by_name(states: Sequence[dict[str, Any]]) -> dict[str, int]:
    named = [names for state in states for names in saved_names(state["param_groups"])]
    return {name: i for i, names in enumerate(named) for name in names}


# ---- putting it in


def _load(run: _Run, loading: _Loading) -> None:
    with ExitStack() as undo:
        undo.callback(_way_back(run))
        _load_model(run, loading)
        if run.optimizer is not None:
            sync_to_groups(run.model, run.optimizer, loading.group_of)
            for member, state in zip(members_of(run.optimizer), loading.optimizer, strict=True):
                member.load_state_dict(state)
            resume_ramps(run.model, run.optimizer, loading.ramps)
        load_health_state(layers_of(bare(run.model)), loading.health)
        for name in _OBJECTS:
            for each, state in zip(run.objects[name], loading.objects[name], strict=True):
                each.load_state_dict(state)
        _load_random(loading.random)
        go_on(run.model)
        undo.pop_all()


def _load_model(run: _Run, loading: _Loading) -> None:
    """Load model and average, in step; what follows follows from the first kernel on."""
    if run.optimizer is not None:
        sync_again(run.model, run.optimizer)  # its layers know of guard="step" from now on
    both = [each for each in (loading.model, loading.ema) if each is not None]
    for each in both:
        load_depth(each)
    if loading.follows and run.ema is not None and not _follows(run):
        follow(run.model, run.ema)
    for each in both:
        load_seeds(each)
    for each in both:
        load_weights(each)
    tell_followers(run.model)  # of guards and counters, which no weights have


def _load_random(state: dict[str, Any]) -> None:
    there = {name: value for name, value in state["devices"].items() if _is_here(name)}
    absent = sorted(state["devices"].keys() - there.keys())
    if absent:
        _logger.warning(
            "%s: random numbers were drawn there when the checkpoint was saved, and there is no "
            "such device here; those of this run will be others",
            ", ".join(absent),
        )
    set_random_state(RandomState(devices=there, python=state["python"], numpy=state["numpy"]))


def _is_here(name: str) -> bool:
    device = torch.device(name)
    if device.type == "cpu":
        return True
    module = getattr(torch, device.type, None)
    return module is not None and (device.index or 0) < module.device_count()


def _way_back(run: _Run) -> Callable[[], None]:
    """Return what puts a run back to where it is now."""
    both = [as_it_is(each) for each in (run.model, run.ema) if each is not None]
    objects = [
        (each, copy.deepcopy(each.state_dict()))
        for name in ("scheduler", "scaler")
        for each in run.objects[name]
    ]
    random = random_state(run.model)
    ramps = [] if run.optimizer is None else ramps_of(run.model, run.optimizer)
    groups = None if run.optimizer is None else _Groups(run.optimizer)

    def go_back() -> None:
        for step in (load_depth, load_seeds, load_weights):
            for each in both:
                step(each)
        tell_followers(run.model)
        if groups is not None and run.optimizer is not None:
            sync_again(run.model, run.optimizer)
            groups.put_back()
            resume_ramps(run.model, run.optimizer, ramps)
        for part, state in objects:
            part.load_state_dict(state)
        set_random_state(random)

    return go_back


class _Groups:
    """The groups and the state of an optimizer as they are now."""

    def __init__(self, optimizer: AnyOptimizer) -> None:
        self._members = [
            (
                member,
                [(dict(group), list(group["params"])) for group in member.param_groups],
                {p: copy.deepcopy(state) for p, state in member.state.items()},
            )
            for member in members_of(optimizer)
        ]

    def put_back(self) -> None:
        """Put them back."""
        for member, groups, state in self._members:
            for group, (settings, params) in zip(member.param_groups, groups, strict=True):
                group.clear()
                group.update({**settings, "params": params})
            member.state.clear()
            member.state.update(state)

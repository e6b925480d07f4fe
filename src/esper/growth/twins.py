"""Twins: copies of the run, trained in lockstep with it on the same batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from esper.continuity.ensemble import Ensemble, rebuilt
from esper.continuity.following import stands_apart
from esper.continuity.grown_state import Loading, grown_state, load_seeds, load_weights, weights_of
from esper.continuity.named_state import parameters_of
from esper.continuity.snapshot import (
    RandomState,
    random_state,
    seed_random_state,
    set_random_state,
)
from esper.continuity.step_hooks import StepHooks
from esper.continuity.warmup import UpdateFactor
from esper.contracts.errors import GrowthError
from esper.forward.recompilation import uncompiled
from esper.seeds.batch_rows import cuts, num_rows, rows_of
from esper.seeds.fitting import Pass, device_of, fits_in_use
from esper.seeds.micro_batches import measure_loss, parts_of
from esper.seeds.rebuilding import planned
from esper.state.plain_values import as_plain, from_plain
from esper.state.seed_slot import SeedSlot
from esper.state.set_aside import Apart
from esper.state.shards import is_in_shards, whole, whole_in
from esper.wrapping.wrap import layers, wrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.grown_state import GrownState
    from esper.growth.batch import Batch, LossFunction, OwnUpdate, TwinBuilder, TwinUpdate
    from esper.growth.live_step import LiveStep
    from esper.growth.run import GrowthRun
    from esper.seeds.fitting import Cuts, Rule

PERTURBATION: Final = 1e-3
"""Relative size of the noise by which twins differ that are to be equal but for luck."""

_GENERATORS: Final = ("devices", "python", "numpy")

_OWNERS_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_LIBRARIES: Final = ("torch.", "esper.")
"""Whose hooks belong to what a module computes; those of others watch it."""


class Twin:
    """A copy of a run that takes the live run's batches, rates and other settings.

    It runs eagerly, has a random state of its own, which starts as the run's, and none of the
    owner's hooks. What the owner's functions keep is its own likewise, and the run's comes back
    after each of its updates.

    Args:
        run: The run; its model, optimizer and warm-up are copied as far as they are.

    Raises:
        GrowthError: The optimizer holds a parameter that is not the model's, or the model cannot
            be copied.
    """

    def __init__(self, run: GrowthRun) -> None:
        memo: dict[int, object] = {}
        self.model = copied_model(run, memo)
        self._memo = memo
        self.optimizer = _copied_optimizer(run.optimizer, memo)
        self.factor = _copied_factor(run.factor, self.optimizer, run.model, memo)
        self._update = run.twin_update
        self._fits = run.fits
        self._apart = Apart(self.model, run.functions)
        self._random_state = random_state(run.model)

    def update(self, batches: list[Batch], step: LiveStep) -> None:
        """Do the update that the live run has just done: same batches, same settings."""
        # a group that the owner added to the live run later is not the twin's
        for group, settings in zip(self.optimizer.param_groups, step.settings, strict=False):
            group.update(settings)
        outer = random_state(self.model)
        set_random_state(self._random_state)
        try:
            with self._apart.inside(batches) as back:

                def undo() -> None:
                    set_random_state(self._random_state)
                    back()

                in_use = self._fits.in_use(undo=undo)
                with uncompiled(self.model), torch.enable_grad(), in_use:
                    self._update(self.model, self.optimizer, batches, step)
        finally:
            self._random_state = random_state(self.model)
            set_random_state(outer)

    def state_dict(self) -> dict[str, Any]:
        """Return the twin by names, as plain values and tensors on the CPU.

        Raises:
            TypeError: The state of its optimizer, or what the owner's functions keep of it, is not
                plain.
        """
        named = parameters_of(self.model)
        names = {id(p): name for name, p in named.items()}
        factors = self.factor.state_dict(list(named.values()))
        moments = self.optimizer.state
        return {
            "grown": as_plain(grown_state(self.model)),
            "values": as_plain(named),
            "frozen": [name for name, p in named.items() if not p.requires_grad],
            "resting": [name for name, m in self.model.named_modules() if not m.training],
            "buffers": as_plain(_buffers(self.model)),
            "groups": [[names[id(p)] for p in g["params"]] for g in self.optimizer.param_groups],
            "moments": as_plain({n: dict(moments[p]) for n, p in named.items() if p in moments}),
            "factors": dict(zip(named, factors, strict=True)),
            "random": as_plain({n: getattr(self._random_state, n) for n in _GENERATORS}),
            "apart": self._apart.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], run: GrowthRun) -> Twin:
        """Return the twin that :meth:`state_dict` was taken of, beside a run that goes on.

        Args:
            state: What it returned.
            run: The run; its model is of the same class, whatever stands in its seeds.

        Raises:
            GrowthError: The model cannot be copied, or the owner's functions are others.
            KeyError: The state names what the copy does not have.
        """
        twin = cls(run)
        twin.factor.close()
        device = device_of(run.model)
        _grow(twin.model, from_plain(state["grown"], device))
        named = parameters_of(twin.model)
        _write(twin.model, state, device)
        groups = [[named[name] for name in names] for names in state["groups"]]
        groups += [[] for _ in run.optimizer.param_groups[len(groups) :]]
        twin.optimizer = rebuilt(run.optimizer, groups)
        for name, moments in from_plain(state["moments"], device).items():
            twin.optimizer.state[named[name]] = moments
        live = run.factor
        twin.factor = UpdateFactor(
            twin.optimizer, warmup_updates=live.warmup_updates, lr_new=live.lr_new
        )
        twin.factor.load_state_dict(
            list(state["factors"].values()), [named[name] for name in state["factors"]]
        )
        twin._memo = {}  # nothing in the live model became what the twin has now
        twin._random_state = RandomState(**from_plain(state["random"], torch.device("cpu")))
        twin._apart.load_state_dict(state["apart"])
        return twin

    def copy_of(self, p: Tensor) -> Tensor:
        """Return the twin's copy of a parameter that the live model had when it was made."""
        return _copy_of(p, self._memo)

    def perturb(self, random_seed: int) -> None:
        """Multiply every trainable weight by ``1 + 1e-3 N(0, 1)``, and draw other random numbers.

        Without it equal twins are equal bit for bit, and tell nothing of how far apart runs come
        out that differ by luck alone.
        """
        generator = torch.Generator().manual_seed(random_seed)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                    p.mul_((1 + PERTURBATION * noise).to(p))
        outer = random_state(self.model)
        seed_random_state(self.model, random_seed)
        self._random_state = random_state(self.model)
        set_random_state(outer)

    def close(self) -> None:
        """Let go of the optimizer's hooks; the twin is trained no more."""
        self.factor.close()


def twin_update(own: OwnUpdate | None, compute_loss: LossFunction | None) -> TwinUpdate:
    """Return how a twin is updated.

    Args:
        own: The owner's update; None where the owner gave none.
        compute_loss: The owner's loss; None where the owner gave none.
    """
    if own is not None:
        return owner_update(own)
    if compute_loss is not None:
        return lockstep_update(compute_loss)
    return lambda *_: None  # nothing ever grows, so there is never a twin


def lockstep_update(compute_loss: LossFunction) -> TwinUpdate:
    """Return the update a twin does where the owner gave none: loss, backward, step.

    Several micro-batches of one update are averaged. Gradients are scaled and clipped as those of
    the live run were seen to be. Where an update does not fit into memory, or takes too long in one
    piece, its gradients are those of parts of its batches, added up.
    """
    rules: WeakKeyDictionary[nn.Module, dict[str, Rule]] = WeakKeyDictionary()

    def update(
        model: nn.Module, optimizer: AnyOptimizer, batches: list[Batch], step: LiveStep
    ) -> None:
        optimizer.zero_grad()
        fits_in_use().run(
            functools.partial(_backward, model, compute_loss, batches, step.loss_scale),
            lambda: Pass(
                work="trial",
                batch=batches[0],  # parts of the others are as large
                device=device_of(model),
                parted=functools.partial(
                    _backward_of_parts, model, compute_loss, batches, step.loss_scale
                ),
                measure=functools.partial(measure_loss, model, compute_loss, batches[0]),
                rules=rules.setdefault(model, {}),
                undo=optimizer.zero_grad,
            ),
        )
        if step.average is not None:
            step.average(optimizer)
        if step.loss_scale != 1.0 and not _unscaled(optimizer, step.loss_scale):
            return
        step.clipping.apply(model.parameters())
        optimizer.step()

    return update


def _backward(
    model: nn.Module, compute_loss: LossFunction, batches: list[Batch], loss_scale: float
) -> None:
    """Add the gradients of the batches of one update."""
    for batch in batches:
        share = compute_loss(model, batch) / len(batches)
        (share * loss_scale).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped


def _backward_of_parts(
    model: nn.Module,
    compute_loss: LossFunction,
    batches: list[Batch],
    loss_scale: float,
    parts: Cuts,
    rule: Rule,
) -> None:
    """Add the gradients of the batches of one update, part by part."""
    most = max(stop - start for start, stop in parts)
    for batch in batches:
        for part in parts_of(model, compute_loss, cuts(num_rows(batch), most), rule):
            with part.within:
                share = compute_loss(model, rows_of(batch, *part.rows)) / len(batches)
                (share * (part.share * loss_scale)).backward()  # type: ignore[no-untyped-call] # as above


def _unscaled(optimizer: AnyOptimizer, scale: float) -> bool:
    """Take a loss's scale off the gradients as GradScaler does; say whether they are finite."""
    held = (p.grad for group in optimizer.param_groups for p in group["params"])
    gradients = [gradient for gradient in held if gradient is not None]
    torch._foreach_mul_(gradients, float(torch.tensor(1.0 / scale)))
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def owner_update(update: OwnUpdate) -> TwinUpdate:
    """Adapt the owner's ``update(model, optimizer, batch)``.

    The returned function raises GrowthError where an update took several micro-batches: only the
    owner knows how to weigh them.
    """

    def call(
        model: nn.Module,
        optimizer: AnyOptimizer,
        batches: list[Batch],
        step: LiveStep,
    ) -> None:
        if len(batches) != 1:
            msg = (
                f"update= takes one batch, but {len(batches)} micro-batches were given to "
                "grower.step for one optimizer update; pass them to step as one batch (a list), "
                "or leave update= out"
            )
            raise GrowthError(msg)
        given = optimizer.members if isinstance(optimizer, Ensemble) else optimizer
        average = step.average
        if average is None:
            update(model, given, batches[0])
            return
        hooks = StepHooks(optimizer, before=lambda member, *_: average(member))
        try:
            update(model, given, batches[0])
        finally:
            hooks.close()

    return call


def copied_model(
    run: GrowthRun, memo: dict[int, object] | None = None, *, of: nn.Module | None = None
) -> nn.Module:
    """Return a copy of the live model, or of a twin's, without the owner's hooks.

    Args:
        run: The run.
        memo: Learns what became what, as for ``copy.deepcopy``.
        of: What is copied; the live model where None.

    Raises:
        GrowthError: The model cannot be copied.
    """
    memo = {} if memo is None else memo
    model = run.model if of is None else of
    if run.build_twin is not None:
        return _built(run.build_twin, model, memo)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        other = "" if is_in_shards(model) else ", or trial='shadow'"
        msg = (
            f"the model cannot be copied for a twin ({type(error).__name__}: {error}); give the "
            f"Grower twin=, a function that builds such a module anew{other}"
        )
        raise GrowthError(msg) from error
    stands_apart(model, copied)
    for module in copied.modules():
        _drop_hooks(module)
    return copied


def _built(build: TwinBuilder, model: nn.Module, memo: dict[int, object]) -> nn.Module:
    """Let the owner build a module; its first values are drawn beside the run's random state."""
    outer = random_state(model)
    try:
        return build(model, memo)
    finally:
        set_random_state(outer)


def builder(make: Callable[[], nn.Module] | None) -> TwinBuilder | None:
    """Return how a twin's module is made by the owner's ``twin=``; None where there is none.

    Args:
        make: Builds a module of the model's class and shapes, not wrapped, on its device.
    """
    if make is None:
        return None

    def build(model: nn.Module, memo: dict[int, object]) -> nn.Module:
        made: object = make()
        if not isinstance(made, nn.Module):
            msg = f"twin= returns a torch.nn.Module like the model, got {type(made).__name__}"
            raise GrowthError(msg)
        try:
            _become_alike(made, model)
            ours, copies = parameters_of(model), parameters_of(made)
            pairs = list(zip(ours.values(), map(copies.__getitem__, ours), strict=True))
        except (LookupError, RuntimeError, ValueError) as error:
            msg = f"what twin= returned is not like the model: {error}"
            raise GrowthError(msg) from error
        for p, theirs in pairs:
            if theirs is p:
                msg = "what twin= returned shares parameters with the model; build a module anew"
                raise GrowthError(msg)
            memo[id(p)] = theirs.requires_grad_(p.requires_grad)
        return made

    return build


def _become_alike(made: nn.Module, model: nn.Module) -> None:
    """Give a module the seeds, the state and the modes of a model of the same class."""
    found = layers(model)
    if made is not model and not layers(made):
        wrap(made, select=list(found), num_seeds=max(f.num_seeds for f in found.values()))
    made.load_state_dict(whole_in(dict(model.state_dict())))
    if len(parameters_of(model)) != len(parameters_of(made)):
        _grow(made, whole_in(grown_state(model)))  # kernels out of use, which no state_dict has
    for module, copied in zip(model.modules(), made.modules(), strict=True):
        copied.training = module.training


def _drop_hooks(module: nn.Module) -> None:
    """Take the owner's hooks off a copy; those of libraries compute, as weight_norm's does."""
    for name in _OWNERS_HOOKS:
        hooks: dict[int, Callable[..., object]] = getattr(module, name)
        for key, hook in list(hooks.items()):
            if not _is_librarys(hook):
                del hooks[key]
                for flags in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
                    getattr(module, flags).pop(key, None)
                module._forward_hooks_always_called.pop(key, None)  # noqa: SLF001 - torch has no public way


def _is_librarys(hook: object) -> bool:
    named = hook if hasattr(hook, "__module__") else type(hook)
    return str(getattr(named, "__module__", "")).startswith(_LIBRARIES)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return what a forward may write: every buffer but those of the seeds' slots."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if not isinstance(module, SeedSlot)
        for name, buffer in module._buffers.items()  # noqa: SLF001 - past properties
        if buffer is not None
    }


def _grow(model: nn.Module, grown: GrownState) -> None:
    """Let a copy have the kernels of a state, and none of those that it came with."""
    found = layers(model)
    plans = {name: planned(found[name], own["seeds"]) for name, own in grown["layers"].items()}
    loading = Loading(model=model, weights={}, grown=grown, plans=plans)
    load_seeds(loading)
    load_weights(replace(loading, weights=weights_of(model)))  # for its counters


@torch.no_grad()
def _write(model: nn.Module, state: Mapping[str, Any], device: torch.device) -> None:
    frozen, resting = set(state["frozen"]), set(state["resting"])
    named, held = parameters_of(model), _buffers(model)
    for name, value in from_plain(state["values"], device).items():
        named[name].copy_(value)
        named[name].requires_grad_(name not in frozen)
        named[name].grad = None
    for name, value in from_plain(state["buffers"], device).items():
        held[name].copy_(value)
    for name, module in model.named_modules():
        module.training = name not in resting


def _copied_optimizer(optimizer: AnyOptimizer, memo: dict[int, object]) -> AnyOptimizer:
    shares = []
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if id(p) not in memo]
        if missing:
            msg = (
                f"the optimizer holds {len(missing)} parameters that the model does not have (the "
                f"first has the shape {tuple(missing[0].shape)}); a twin cannot be made of them. "
                "Give the Grower the module that owns them all, or trial='shadow'"
            )
            raise GrowthError(msg)
        shares.append([_copy_of(p, memo) for p in group["params"]])
    twin = rebuilt(optimizer, shares)
    for p, state in optimizer.state.items():
        twin.state[_copy_of(p, memo)] = {
            k: whole(v).clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
        }
    return twin


def _copy_of(p: Tensor, memo: dict[int, object]) -> Tensor:
    """Return the copy of a parameter that ``deepcopy`` left in its memo."""
    copied = memo[id(p)]
    assert isinstance(copied, torch.Tensor)
    return copied


def _copied_factor(
    factor: UpdateFactor,
    optimizer: AnyOptimizer,
    model: nn.Module,
    memo: dict[int, object],
) -> UpdateFactor:
    parameters = list(parameters_of(model).values())
    twin = UpdateFactor(optimizer, warmup_updates=factor.warmup_updates, lr_new=factor.lr_new)
    twin.load_state_dict(factor.state_dict(parameters), [_copy_of(p, memo) for p in parameters])
    return twin

"""``esper.widen``: an MLP gets more hidden units, in place, and computes what it did."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.continuity.ensemble import joined
from esper.continuity.replicas import bare, replicas
from esper.contracts.arguments import check_type, whole_number
from esper.resilience.attempt import Done, attempt
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import check_module
from esper.state.layer_record import RECORD, record_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

    from esper.continuity.ensemble import AnyOptimizer

TOLERANCE: Final = 1e-6
"""Relative difference of an MLP's outputs that the order of a longer sum may make, in float32."""


def widen(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    path: str | Sequence[str],
    *,
    intermediate: int,
    config: str | None = None,
) -> tuple[str, ...]:
    """Give MLPs more hidden units, in place; outputs stay, to rounding. All of it, or nothing.

    Plain MLPs (``Linear``, activation, ``Linear``) and gated ones, with ``nn.Linear`` or
    transformers' ``Conv1D``. A unit that comes reads a mixture of two that are there, scaled as
    these are, so that activations keep their size; its output weights are zero, and its moments
    too. The classes stay the owner's, and the ``state_dict`` is that of a model built wider.

    Outputs are not equal bit by bit: the sum over hidden units is longer, and is added up in
    another order.

    Parameters are new objects: they take the places of the old ones in the optimizer's groups.
    What else holds the old ones (an average, an optimizer that is not given) does not follow.

    Args:
        model: The model; it may be inside ``torch.compile``.
        optimizer: What trains it, or all that train it together.
        path: Dotted name of the MLP, or of a block with one MLP in it; a pattern for several
            (``"model.layers.*.mlp"``), or several of these.
        intermediate: Hidden units then, more than there are.
        config: Name of the attribute of ``model.config`` that says the width, and is rewritten
            (``"intermediate_size"``, ``"n_inner"``, ``"text_config.intermediate_size"``); None
            rewrites none. An attribute of that name on an MLP is rewritten with it.

    Returns:
        The names of the MLPs that were widened.

    Raises:
        TypeError: An argument is of the wrong type, or the optimizer is not supported.
        ValueError: The model is in DistributedDataParallel or sharded by FSDP2, nothing is at the
            path or no MLP, it is as wide already, its weights are shared, or its hidden units are
            more than multiplied elementwise (a norm over them, a softmax).
    """
    check_module("widen", model)
    _refuse_ranks(model)
    inner, every = bare(model), joined(optimizer)
    check_type("path", path, (str, Sequence), "the name of an MLP, a pattern, or several of these")
    whole_number("intermediate", intermediate, least=1)
    owner, name = _config(inner, config)
    mlps = [_mlp(name, module, intermediate) for name, module in _at(inner, path)]
    changes = [change for mlp in mlps for change in _changes(mlp, intermediate)]
    _check_changes(inner, every, changes)
    outputs = [_output(mlp) for mlp in mlps]
    for change in changes:
        change.put(change.after)
    try:
        for mlp, output in zip(mlps, outputs, strict=True):
            _check_output(mlp, output)
    except ValueError:
        for change in changes:
            change.put(change.before)
        raise
    _exchange(every, changes)
    for part in (part for mlp in mlps for part in mlp.module.modules()):
        if name and name in vars(part):
            setattr(part, name, intermediate)
    if owner is not None:
        setattr(owner, name, intermediate)
    return tuple(mlp.name for mlp in mlps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Linear:
    """A linear layer, by its sizes, and the axes of its weight that they are along."""

    name: str
    layer: nn.Module
    num_in: int
    num_out: int
    axis_out: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Mlp:
    """A module with hidden units: the layers into them, and the one out of them."""

    name: str
    module: nn.Module
    ups: tuple[_Linear, ...]
    down: _Linear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Change:
    """A parameter that takes the place of another, with more units along an axis."""

    owner: nn.Module
    name: str
    before: nn.Parameter
    after: nn.Parameter
    axis: int
    size: str

    def put(self, parameter: nn.Parameter) -> None:
        """Let the layer have one of the two, and say its size."""
        self.owner._parameters[self.name] = parameter  # noqa: SLF001 - past hooks and properties
        setattr(self.owner, self.size, parameter.shape[self.axis])

    def padded(self, values: Tensor) -> Tensor:
        """Return values of the parameter before with zeros for the units that came."""
        shape = list(values.shape)
        shape[self.axis] = self.after.shape[self.axis] - values.shape[self.axis]
        return torch.cat([values, values.new_zeros(shape)], dim=self.axis)


def _refuse_ranks(model: nn.Module) -> None:
    is_replicated = replicas(model) is not None or any(
        isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()
    )
    is_sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
    if is_replicated or is_sharded:
        holder = "DistributedDataParallel" if is_replicated else "FSDP2"
        msg = (
            f"the model is in {holder}, which holds the parameters that would be exchanged: widen "
            "the model before it, or load what was saved into the wider class"
        )
        raise ValueError(msg)


def _config(model: nn.Module, config: str | None) -> tuple[Any, str]:
    """Return the object that holds the attribute that says the width, and the attribute's name."""
    if config is None:
        return None, ""
    check_type("config", config, str, "the name of an attribute of model.config, or None")
    *path, name = f"config.{config}".split(".")
    owner: Any = model
    for part in path:
        owner = getattr(owner, part, None)
    if not hasattr(owner, name):
        msg = f"config={config!r} names an attribute of model.config; this model has none"
        raise ValueError(msg)
    return owner, name


def _at(model: nn.Module, path: str | Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    patterns = [path] if isinstance(path, str) else list(path)
    named = dict(model.named_modules())
    found = {
        name: module
        for pattern in patterns
        for name, module in named.items()
        if name == pattern or fnmatch.fnmatchcase(name, pattern)
    }
    if not found:
        msg = f"no module of this model is at {path!r}; model.named_modules() has the names"
        raise ValueError(msg)
    yield from found.items()


def _linears(module: nn.Module) -> Iterator[_Linear]:
    """Yield the linear layers of a module: torch's, and transformers' ``Conv1D``."""
    for name, part in module.named_modules():
        weight = part._parameters.get("weight")  # noqa: SLF001 - past parametrizations
        if weight is None or weight.ndim != 2:
            continue
        if isinstance(part, nn.Linear):
            yield _Linear(
                name=name, layer=part, num_in=weight.shape[1], num_out=weight.shape[0], axis_out=0
            )
        elif hasattr(part, "nf") and hasattr(part, "nx"):
            yield _Linear(
                name=name, layer=part, num_in=weight.shape[0], num_out=weight.shape[1], axis_out=1
            )


def _mlp(name: str, module: nn.Module, intermediate: int) -> _Mlp:
    """Find the hidden units of a module.

    Raises:
        ValueError: It has none that can be told from others, or they are as many already.
    """
    linears = list(_linears(module))
    found = [
        _Mlp(name=name, module=module, ups=ups, down=down)
        for i, down in enumerate(linears)
        if (ups := tuple(u for u in linears[:i] if _feeds(u, down)))
        and not any(_reads_as(other, down) for other in linears if other is not down)
    ]
    wider = [mlp for mlp in found if mlp.down.num_in != mlp.down.num_out]
    found = wider or found
    if len(found) != 1:
        pairs = "; ".join(f"{', '.join(u.name for u in m.ups)} -> {m.down.name}" for m in found)
        msg = (
            f"{name!r} is no MLP: expected linear layers into hidden units and one out of them; "
            f"found {pairs or 'none'} in a {type(module).__name__}. Name the MLP itself"
        )
        raise ValueError(msg)
    width = found[0].down.num_in
    if width >= intermediate:
        msg = f"{name!r} has {width} hidden units; intermediate= is more, got {intermediate}"
        raise ValueError(msg)
    _check_units_are_apart(found[0])
    return found[0]


def _feeds(up: _Linear, down: _Linear) -> bool:
    return (up.num_in, up.num_out) == (down.num_out, down.num_in)


def _reads_as(other: _Linear, down: _Linear) -> bool:
    """Say whether another layer may read the same hidden units."""
    return other.num_in == down.num_in != down.num_out


def _check_units_are_apart(mlp: _Mlp) -> None:
    """Refuse what has a size of the hidden units and is none of the MLP's layers."""
    own = {id(p) for each in (*mlp.ups, mlp.down) for p in each.layer.parameters()}
    if mlp.down.num_in == mlp.down.num_out:
        return  # sizes tell nothing; outputs are compared
    for name, tensor in (*mlp.module.named_parameters(), *mlp.module.named_buffers()):
        if id(tensor) not in own and mlp.down.num_in in tensor.shape:
            msg = (
                f"{mlp.name}.{name} is of shape {tuple(tensor.shape)}: it goes over the hidden "
                "units, so that more of them would change what the others give"
            )
            raise ValueError(msg)


@torch.no_grad()
def _changes(mlp: _Mlp, intermediate: int) -> Iterator[_Change]:
    """Yield the parameters that take the places of an MLP's."""
    width = mlp.down.num_in
    mixture = _Mixture(width, intermediate - width)
    for up in mlp.ups:
        size = "out_features" if up.axis_out == 0 else "nf"
        weight, bias = (up.layer._parameters.get(name) for name in ("weight", "bias"))  # noqa: SLF001 - as above
        assert weight is not None
        rows = mixture.rows(weight.movedim(up.axis_out, 0)).movedim(0, up.axis_out)
        yield _change(up.layer, "weight", rows, up.axis_out, size)
        if bias is not None:
            yield _change(up.layer, "bias", mixture.biases(bias), 0, size)
    axis = 1 - mlp.down.axis_out
    weight = mlp.down.layer._parameters["weight"]  # noqa: SLF001 - as above
    assert weight is not None
    shape = list(weight.shape)
    shape[axis] = intermediate - width
    size = "in_features" if axis == 1 else "nx"
    yield _change(mlp.down.layer, "weight", weight.new_zeros(shape), axis, size)


def _change(owner: nn.Module, name: str, came: Tensor, axis: int, size: str) -> _Change:
    before = owner._parameters[name]  # noqa: SLF001 - as above
    assert before is not None
    values = torch.cat([before.detach(), came.to(before.dtype)], dim=axis)
    after = nn.Parameter(values.contiguous(), requires_grad=before.requires_grad)
    after.__dict__.update(vars(before))
    return _Change(owner=owner, name=name, before=before, after=after, axis=axis, size=size)


class _Mixture:
    """Units made of two that are there each, in shares of their own, so that no two are alike.

    Unit j is ``cos(t) a + sin(t) b`` for an angle t of its own, scaled to the size that a and b
    have by these shares, so that its activations are as large as theirs.

    Args:
        num_units: Units that are there.
        num_more: Units that come.
    """

    def __init__(self, num_units: int, num_more: int) -> None:
        number = torch.arange(num_more)
        self._first = number % num_units
        self._other = (self._first + 1 + number // num_units) % num_units
        angle = torch.pi * (0.125 + 0.25 * ((0.6180339887 * (number + 1)) % 1.0))
        self._cos, self._sin = angle.cos(), angle.sin()

    def rows(self, weight: Tensor) -> Tensor:
        """Return weights of units that come, shape (more, in), for weights (units, in)."""
        cos, sin = (v.to(weight.device)[:, None] for v in (self._cos, self._sin))
        known = weight.float()
        a, b = (known[v.to(weight.device)] for v in (self._first, self._other))
        mixed = cos * a + sin * b
        wanted = (cos.square() * a.square() + sin.square() * b.square()).sum(1, keepdim=True)
        size = mixed.square().sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return mixed * (wanted / size).sqrt()

    def biases(self, bias: Tensor) -> Tensor:
        """Return biases of units that come, shape (more,), for biases (units,)."""
        share = self._cos.square().to(bias.device)
        a, b = (bias.float()[v.to(bias.device)] for v in (self._first, self._other))
        return share * a + (1.0 - share) * b


def _check_changes(model: nn.Module, optimizer: AnyOptimizer, changes: Sequence[_Change]) -> None:
    """Refuse parameters that are not a layer's own, or that another optimizer trains."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = list(model.named_parameters(remove_duplicate=False))
    for change in changes:
        names = [name for name, p in named if p is change.before]
        reason = None
        if len(names) > 1:
            reason = "it is shared"
        elif parametrize.is_parametrized(change.owner):
            reason = "its layer is parametrized"
        elif RECORD in change.owner.__dict__ and record_of(change.owner).seeds:
            reason = "its layer holds kernels of this size"
        elif not change.before.is_floating_point():
            reason = "it is quantised"
        elif change.before.requires_grad and id(change.before) not in held:
            reason = "it is trainable, and in no param group of the optimizer"
        if reason is not None:
            msg = f"{' and '.join(names)} cannot be made wider: {reason}; nothing was changed"
            raise ValueError(msg)


def _output(mlp: _Mlp) -> Tensor | None:
    """Return what an MLP makes of an input made here; None where it takes more than one."""

    def run() -> Tensor:
        weight = mlp.down.layer._parameters["weight"]  # noqa: SLF001 - as above
        assert weight is not None
        x = torch.linspace(-2.0, 2.0, 6 * mlp.down.num_out).cos().view(2, 3, mlp.down.num_out)
        y: object = mlp.module.eval()(x.to(weight.device, weight.dtype))
        assert isinstance(y, Tensor)
        return y

    with shadow_pass(mlp.module), torch.no_grad():
        found = attempt(run)
    return found.value if isinstance(found, Done) else None


def _check_output(mlp: _Mlp, before: Tensor | None) -> None:
    after = None if before is None else _output(mlp)
    if before is None or after is None:
        return
    tolerance = max(TOLERANCE, 4 * torch.finfo(before.dtype).eps)
    scale = max(1.0, float(before.abs().max()))
    if before.shape != after.shape or float((after - before).abs().max()) > 10 * tolerance * scale:
        msg = (
            f"{mlp.name!r} gives something else once it is wider: its hidden units are not each by "
            "itself (a softmax, a norm or halves of one layer); nothing was changed"
        )
        raise ValueError(msg)


def _exchange(optimizer: AnyOptimizer, changes: Sequence[_Change]) -> None:
    """Let the optimizer train what came in the place of what was there, moments padded."""
    by_id = {id(change.before): change for change in changes}
    for group in optimizer.param_groups:
        params = group["params"]
        params[:] = [by_id[id(p)].after if id(p) in by_id else p for p in params]
    state = optimizer.state
    for change in changes:
        before, after = change.before, change.after
        known: Mapping[str, Any] = state.get(before) or {}
        if known:
            state[after] = {
                name: change.padded(value) if _is_like(value, before) else value
                for name, value in known.items()
            }
        state.pop(before, None)
        after.grad = None if before.grad is None else change.padded(before.grad)


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape

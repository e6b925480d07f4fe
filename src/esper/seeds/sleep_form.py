"""The form in which a block gives its output, so that a sleeping one can give its input in it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_flatten

from esper.contracts.owner_warning import warn_owner
from esper.resilience.attempt import Done, attempt
from esper.seeds.replica_names import check_ignored
from esper.seeds.shadow import shadow_pass
from esper.state.layer_call import LayerCall

HostForward = Callable[..., Any]
"""The forward of a block's own class: the block comes first, then what it takes."""

_PLAIN: Final = (bool, int, float, str)


class Form(NamedTuple):
    """How one part of an output comes about while the block sleeps.

    Attributes:
        kind: ``first``: the block's first input. ``given``: another argument, found by ``of``.
            ``constant``: ``of`` itself. ``zero``: a scalar zero, for a loss that a block adds.
            ``sequence``: a tuple, a named one or a list of class ``of``. ``fields``: a mapping or
            dataclass of class ``of``.
        of: As told there.
        parts: Of a sequence or of fields: name and form of each, in order.
    """

    kind: Literal["first", "given", "constant", "zero", "sequence", "fields"]
    of: Any = None
    parts: tuple[tuple[str, Form], ...] = ()


FIRST: Final = Form("first")


def in_form(form: Form, first: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a sleeping block gives for a call.

    Args:
        form: The block's form.
        first: Its first input.
        args: Positional arguments of the call.
        kwargs: Its keywords.
    """
    if form.kind == "first":
        return first
    if form.kind == "given":
        value: Any = kwargs if isinstance(form.of[0], str) else args
        for step in form.of:
            value = value[step]
        return value
    if form.kind == "zero":
        return first.new_zeros(())
    if form.kind == "constant":
        return form.of
    parts = [(name, in_form(part, first, args, kwargs)) for name, part in form.parts]
    if form.kind == "fields":
        return form.of(**dict(parts))
    values = [value for _, value in parts]
    return form.of(*values) if hasattr(form.of, "_fields") else form.of(values)


def exchanged(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with its first tensor changed, in the form that it has.

    Raises:
        TypeError: It has no first tensor.
    """
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)) and output:
        values = [exchanged(output[0], change), *output[1:]]
        cls: Any = type(output)
        return cls(*values) if hasattr(cls, "_fields") else cls(values)
    named = _fields_of(output)
    if named:
        name = next(name for name, value in named.items() if value is not None)
        cls = type(output)
        return cls(**{**named, name: exchanged(named[name], change)})
    msg = (
        f"a block gives a tensor, or a tuple, dataclass or mapping that begins with one; this one "
        f"gives {type(output).__name__}"
    )
    raise TypeError(msg)


def leading_tensor(value: Any) -> Tensor:
    """Return the tensor that an input or output begins with; :func:`exchanged` would change it.

    Raises:
        TypeError: There is none.
    """
    if isinstance(value, Tensor):
        return value
    parts = value if isinstance(value, (tuple, list)) else _fields_of(value).values()
    for part in parts:
        if part is not None:
            return leading_tensor(part)
    msg = f"what a waking block is given begins with a tensor; got {type(value).__name__}"
    raise TypeError(msg)


def _fields_of(output: object) -> dict[str, Any]:
    """Return what a mapping or a dataclass holds by name; nothing of anything else."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return {}


CallKind = tuple[bool, tuple[tuple[int | str, object], ...]]
"""Whether a block trains, and its arguments by position or name: flags, words, None, or others."""


class Forms:
    """What is known of the forms of a stack's blocks that share a class; they share one object.

    Args:
        name: Name of the stack, for messages.
        assumed: The form that a call takes until it was seen; None where none can be told.

    Attributes:
        name: As given, like the next.
        assumed: As given.
        learned: Forms that were seen, by the kind of call.
        returned: Arguments that a ``return`` of the blocks' forward names, by position and name;
            None where that cannot be read.
    """

    def __init__(self, name: str, assumed: Form | None) -> None:
        self.name = name
        self.assumed = assumed
        self.learned: dict[CallKind, Form] = {}
        self.returned: frozenset[int | str] | None = None

    def like(self, kind: CallKind) -> Form | None:
        """Return what was seen of a call that differs in what is None and no output alone.

        Libraries leave a mask out where it hides nothing, which a compiled graph cannot look at.
        """
        for seen, form in self.learned.items():
            if _are_alike(seen, kind, self.returned):
                return form
        return None


def form_of_call(
    block: nn.Module,
    forms: Forms,
    host_forward: HostForward,
    first: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Form:
    """Return the form of a call, which the block is run for once, apart, where it is not known.

    Args:
        block: The sleeping block.
        forms: What is known.
        host_forward: The forward of its own class.
        first: Its first input.
        args: Positional arguments of the call.
        kwargs: Its keywords.

    Raises:
        RuntimeError: It is not known, and cannot be learned where this runs.
        ValueError: The block changes the shape of its input, or DistributedDataParallel waits for
            its gradients.
    """
    marks: list[tuple[int | str, object]] = [(i, _mark(value)) for i, value in enumerate(args)]
    marks += [(name, _mark(value)) for name, value in kwargs.items()]
    key = (block.training, tuple(marks))
    is_traced = _is_traced(args)
    assumed = forms.assumed if is_traced or _is_sharded(block) else None
    if assumed is not None and assumed.kind == "first":
        return assumed
    if key in forms.learned:
        return forms.learned[key]
    if assumed is not None and _is_bare(marks):
        return assumed
    if is_traced:
        seen = forms.like(key)
        if seen is not None:
            return seen
        msg = (
            f"a block of {forms.name!r} sleeps, and in which form it gives its output is not known "
            "yet: run one forward in this way before the model is compiled or traced"
        )
        raise RuntimeError(msg)
    check_ignored(block)
    forms.learned[key] = found = _learn(block, forms.name, host_forward, first, args, kwargs)
    if forms.returned is None:
        forms.returned = _named_in_returns(host_forward)
    return found


def _are_alike(seen: CallKind, kind: CallKind, returned: frozenset[int | str] | None) -> bool:
    keys = [(each[0], *[key for key, _ in each[1]]) for each in (seen, kind)]
    if returned is None or keys[0] != keys[1]:
        return False
    pairs = [(key, a, b) for (key, a), (_, b) in zip(seen[1], kind[1], strict=True) if a != b]
    return not [
        key
        for key, a, b in pairs
        if key in returned or a not in (None, "...") or b not in (None, "...")
    ]


def _named_in_returns(host_forward: HostForward) -> frozenset[int | str] | None:
    """Return which arguments the returns of a forward name, as far as its source can be read."""
    written = attempt(
        lambda: ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(host_forward))))
    )
    if not isinstance(written, Done):
        return None
    returns = [node.value for node in ast.walk(written.value) if isinstance(node, ast.Return)]
    names = {
        part.id
        for value in returns
        if value is not None
        for part in ast.walk(value)
        if isinstance(part, ast.Name)
    }
    own = list(inspect.signature(host_forward).parameters)[1:]
    return frozenset(names | {i for i, name in enumerate(own) if name in names})


def _mark(value: object) -> object:
    """Return what of an argument may decide about the form: flags and words, not numbers."""
    return value if value is None or isinstance(value, (bool, str)) else "..."


def _is_bare(marks: list[tuple[int | str, object]]) -> bool:
    """Say whether a call gives nothing but the first input, as the one that was tried."""
    return all([mark is None or mark is False for _, mark in marks[1:]])  # noqa: C419 - dynamo traces no generator


def _is_traced(args: tuple[Any, ...]) -> bool:
    """Say whether the call is looked at and not run."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - torch.func says it nowhere
        return True
    return torch._C._get_tracing_state() is not None or any(  # noqa: SLF001 - torch.jit's is banned
        isinstance(value, fx.Proxy) for value in args
    )


def _is_sharded(block: nn.Module) -> bool:
    """Say whether FSDP2 keeps the block's parameters apart, so that it cannot just be run."""
    return hasattr(block, "unshard")


def _learn(
    block: nn.Module,
    name: str,
    host_forward: HostForward,
    first: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Form:
    """Run a block on a copy of a call, without a trace, and see what it gives."""
    named = {key: value for key, value in kwargs.items() if not _is_object(value)}
    copied = LayerCall(tuple(None if _is_object(v) else v for v in args), named).detached()
    own_args = tuple(
        value if _is_object(value) else copy for value, copy in zip(args, copied.args, strict=True)
    )
    own_kwargs = {key: copied.kwargs.get(key, value) for key, value in kwargs.items()}
    objects = [value for value in (*args, *kwargs.values()) if _is_object(value)]
    with shadow_pass(block, values=objects), _alone(block), torch.no_grad():
        output = host_forward(block, *own_args, **own_kwargs)
    given = (*args, *kwargs.values())
    copies = (*own_args, *own_kwargs.values())
    copied_first = next(c for value, c in zip(given, copies, strict=True) if value is first)
    form = form_of(output, copied_first, dict(_sources(own_args, own_kwargs)))
    if isinstance(form, str):
        raise refused(name, form)
    lost = _lost_in(form, output)
    if lost:
        warn_owner(
            f"a block of {name!r} gives more than its input can stand for: a sleeping one gives "
            f"None for part {', '.join(map(repr, lost))} of its output"
        )
    return form


def _lost_in(form: Form, output: Any) -> list[str]:
    """Return which tensors of an output a sleeping block has nothing for."""
    named = _fields_of(output) or dict(zip(map(str, range(len(form.parts))), output, strict=False))
    return [
        part
        for part, how in form.parts
        if how == Form("constant") and isinstance(named[part], Tensor)
    ]


def refused(name: str, reason: str) -> ValueError:
    """Return the error for a block of a stack that cannot sleep."""
    return ValueError(
        f"a block of {name!r} cannot sleep: {reason}; let it stay awake, by keep= of "
        "esper.shallow, or choose a stack whose blocks keep what they are given in shape"
    )


def _is_object(value: object) -> bool:
    """Say whether an argument is an object such as a cache, which is set aside and not copied."""
    return not (
        value is None or isinstance(value, (Tensor, bool, int, float, str, tuple, list, dict))
    )


@contextmanager
def _alone(block: nn.Module) -> Iterator[None]:
    """Let nobody hear of a run: hooks behind the forwards inside, and autocast's cache of casts."""
    is_sharded = _is_sharded(block)
    parts = [] if is_sharded else [part for part in block.modules() if part is not block]
    kept = [(part, part._forward_hooks) for part in parts]  # noqa: SLF001 - torch has no other way
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    for part in parts:
        part._forward_hooks = type(part._forward_hooks)()  # noqa: SLF001 - as above
    if is_sharded:
        block.unshard()  # type: ignore[operator] # FSDP2's method
    try:
        yield
    finally:
        if is_sharded:
            block.reshard()  # type: ignore[operator] # as above
        for part, hooks in kept:
            part._forward_hooks = hooks  # noqa: SLF001 - as above
        torch.set_autocast_cache_enabled(caches)


def _sources(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """Yield what an output may have been taken from, with the way to it."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, _PLAIN) or value is None:
            continue
        yield (key,), value
        if isinstance(value, (tuple, list)):
            yield from (((key, i), part) for i, part in enumerate(value) if part is not None)


def form_of(output: Any, first: Any, sources: Mapping[tuple[int | str, ...], Any]) -> Form | str:
    """Read the form off an output.

    Args:
        output: What the block gave.
        first: The first input that it was given.
        sources: What else it was given, by the way to it.

    Returns:
        The form, or why there is none.
    """
    if not isinstance(first, Tensor):
        return FIRST if _shapes(output) == _shapes(first) else "its first input is no tensor"
    if isinstance(output, Tensor):
        if _is_like(output, first):
            return FIRST
        return f"it makes {_shape(output)} of its first input of {_shape(first)}"
    named = _fields_of(output)
    if isinstance(output, (tuple, list)):
        named = {str(i): value for i, value in enumerate(output)}
    leading = next((name for name, value in named.items() if value is not None), None)
    if leading is None:
        return f"it gives {type(output).__name__}, which begins with no tensor"
    begin = form_of(named[leading], first, sources)
    if isinstance(begin, str):
        return begin
    parts = tuple(
        (name, begin if name == leading else _part(value, sources)) for name, value in named.items()
    )
    kind: Literal["sequence", "fields"] = (
        "sequence" if isinstance(output, (tuple, list)) else "fields"
    )
    return Form(kind, type(output), parts)


def _part(value: Any, sources: Mapping[tuple[int | str, ...], Any]) -> Form:
    """Return the form of what an output has behind its first tensor."""
    if value is None or isinstance(value, _PLAIN):
        return Form("constant", value)
    for way, source in sources.items():
        if source is value:
            return Form("given", way)
    if not isinstance(value, Tensor):
        return Form("constant")
    for way, source in sources.items():
        if isinstance(source, Tensor) and _is_equal(source, value):
            return Form("given", way)
    return Form("zero" if value.ndim == 0 and value.is_floating_point() else "constant")


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one.is_nested or other.is_nested or one.dtype != other.dtype or one.shape != other.shape:
        return False
    found = attempt(lambda: torch.equal(one, other))  # some tensors have no values
    return isinstance(found, Done) and found.value


def _is_like(output: Tensor, first: Tensor) -> bool:
    """Say whether an output can stand for the input: nested ones are not measured."""
    if output.is_nested or first.is_nested:
        return output.is_nested == first.is_nested
    return output.shape == first.shape and (output.is_floating_point() == first.is_floating_point())


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} and {tensor.dtype}"


def _shapes(value: Any) -> object:
    leaves, structure = tree_flatten(value)
    return structure, [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def assumed_form(block: nn.Module, container: nn.Module) -> Form | str | None:
    """Return the form that a block has by all that can be told without a call.

    It is tried on made inputs without memory or arithmetic. What its class declares, and what a
    ``Sequential`` needs, stand where that says nothing.

    Args:
        block: The block.
        container: What it stands in.

    Returns:
        The form; None where nothing is known, and the reason where it changes its input's shape.
    """
    tried = _tried(block)
    if tried is not None:
        return tried
    hint = inspect.signature(type(block).forward).return_annotation
    is_declared = hint is Tensor or str(hint) in ("Tensor", "torch.Tensor")
    return FIRST if is_declared or isinstance(container, nn.Sequential) else None


def _tried(block: nn.Module) -> Form | str | None:
    """Run a block on made inputs: the first that it takes and keeps in shape decides."""
    reason = None
    with shadow_pass(block), torch.no_grad():
        tensors = dict(_unmade(block))
        for shape in _likely_shapes(block):
            outcome = attempt(functools.partial(_run_on, block, tensors, shape))
            if isinstance(outcome, Done) and not isinstance(outcome.value, str):
                return outcome.value
            reason = outcome.value if isinstance(outcome, Done) else reason
    return reason


def _run_on(
    block: nn.Module, tensors: dict[str, Tensor], shape: tuple[int, ...]
) -> Form | str | None:
    """Return the form that an input of a shape gives; None where other arguments decide."""
    like = next((p for p in tensors.values() if p.is_floating_point()), torch.empty(()))
    first = torch.empty(shape, dtype=like.dtype, device="meta")
    leading, *rest = list(inspect.signature(type(block).forward).parameters.values())[1:]
    kwargs: dict[str, Any] = dict.fromkeys(_required(rest))
    args: tuple[Any, ...] = (first,)
    if leading.kind is inspect.Parameter.KEYWORD_ONLY:
        args, kwargs = (), {leading.name: first, **kwargs}
    with _reparametrize_module(block, tensors):
        output = type(block).forward(block, *args, **kwargs)
    form = form_of(output, first, {})
    return None if isinstance(form, Form) and _lost_in(form, output) else form


def _required(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """Return the names of those parameters of a forward that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def _unmade(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors without memory in the shapes of a block's parameters and buffers."""
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        yield name, torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def _likely_shapes(block: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes that a block may take, by the layers in it, in their order."""
    seen: set[tuple[int, ...]] = set()
    for part in block.modules():
        for shape in _shapes_for(part):
            if shape not in seen:
                seen.add(shape)
                yield shape


def _shapes_for(part: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes that a layer of torch's, or one with the same attributes, would take."""
    channels = getattr(part, "in_channels", None)
    if isinstance(part, nn.modules.conv._ConvNd) and isinstance(channels, int):  # noqa: SLF001 - all kinds at once
        return [(2, channels, *[8] * len(part.kernel_size))]
    shape = getattr(part, "normalized_shape", None)
    sizes = [shape[-1]] if isinstance(shape, tuple) and shape else []
    sizes += [getattr(part, name, None) for name in ("in_features", "embed_dim", "nx")]
    return [shape for size in sizes if isinstance(size, int) for shape in ((2, 3, size), (2, size))]

"""Choose which modules of a model become sites, and say why the others do not."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from esper.contracts.layer_kind import host_class_name, kind_of
from esper.execution.host_class import refusal
from esper.execution.kasmina_layer import KasminaLayer
from esper.state.host_parts import SEEDS

Pattern = str | type[nn.Module]
Predicate = Callable[[str, nn.Module], bool]
Select = Pattern | Predicate | Iterable[Pattern]

_NOTHING: Final = nn.ModuleDict()

QUANTISED_PACKAGES: Final = (
    "torch.ao",
    "torchao",
    "bitsandbytes",
    "optimum.quanto",
    "auto_gptq",
    "gptqmodel",
    "awq",
    "hqq",
)
"""Packages whose modules or parameters hold integers behind a float interface."""

PEFT_WRAPPERS: Final = frozenset(
    {"BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"}
)
"""Classes of PEFT that stand in a layer's place and own what is below them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedModule:
    """A module that is no site.

    Attributes:
        name: Its qualified name in the model; empty for the model itself.
        type: Its class, by name.
        reason: Why it was left, in words for a person.
    """

    name: str
    type: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a model offers.

    Attributes:
        taken: Sites by qualified name, in the model's order. A module that is there under two
            names has the first.
        skipped: Modules that hold parameters of their own and are no site.
    """

    taken: dict[str, nn.Module]
    skipped: tuple[SkippedModule, ...]


def choose(model: nn.Module, select: Select | None = None) -> Selection:
    """Choose the sites of a model. Changes nothing.

    Args:
        model: The model.
        select: What to take. ``None`` takes every module of a kind that ``LAYER_KINDS`` takes by
            default and that is not tied, quantised or owned by another wrapper. A name takes that
            module. A glob takes the matching modules that have parameters; ``*`` and ``?`` stay
            within one part of a dotted name and ``**`` stands for any number of parts. A type
            takes its instances. A predicate ``(name, module) -> bool`` takes what it is true for.
            An iterable of names, globs and types takes what any of them takes. Whatever is asked
            for by ``select`` is taken if a seed could work there at all.

    Returns:
        The sites, and the modules that were left with the reasons.

    Raises:
        TypeError: ``select`` is something else.
        ValueError: A pattern matches nothing, or names a module that cannot be a site.
    """
    context = _Context(model)
    wanted = None if select is None else _wanted(model, select)
    taken: dict[str, nn.Module] = {}
    skipped: list[SkippedModule] = []
    for name, module in named_host_modules(model).items():
        reason = context.reason_left(name, module, wanted)
        if reason is None:
            taken[name] = module
        elif wanted is not None and name in wanted.by_name:
            raise ValueError(f"{name!r} ({type(module).__name__}) cannot be a site: {reason}")
        elif _is_reported(name, module, wanted):
            skipped.append(SkippedModule(name=name, type=type(module).__name__, reason=reason))
    return Selection(taken=taken, skipped=tuple(skipped))


def named_host_modules(model: nn.Module, *, every_name: bool = False) -> dict[str, nn.Module]:
    """Return the modules of a model by qualified name, without those of kernels in its seeds.

    Args:
        model: The model.
        every_name: Whether a module that is there under several names has all of them, not only
            the first.
    """
    kernels = {
        id(part)
        for module in model.modules()
        if isinstance(module, KasminaLayer)
        for part in getattr(module, SEEDS, _NOTHING).modules()
    }
    named = model.named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in named if id(module) not in kernels}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What ``select`` matched: first names of modules, and which were spelled out."""

    names: frozenset[str]
    by_name: frozenset[str]


class _Context:
    """What has to be known about the whole model to judge one of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._owners = _parameter_owners(model)
        self._hard = dict(_uncalled(model))
        self._soft = dict(_owned_by_wrappers(model))

    def reason_left(self, name: str, module: nn.Module, wanted: _Wanted | None) -> str | None:
        """Return why a module is no site, or None if it is one."""
        if wanted is not None and name in wanted.names:
            return None if isinstance(module, KasminaLayer) else self._why_impossible(module)
        reason = self._why_not_by_default(name, module)
        return reason if wanted is None else reason or "left out by select="

    def _why_not_by_default(self, name: str, module: nn.Module) -> str | None:
        if isinstance(module, KasminaLayer):
            return None
        if not kind_of(module).is_default:
            return "not of a kind that is taken by default; name it in select= to take it"
        return self._why_impossible(module) or self._why_unwise(name, module)

    def _why_impossible(self, module: nn.Module) -> str | None:
        return self._hard.get(id(module)) or refusal(module) or _why_without_forward(module)

    def _why_unwise(self, name: str, module: nn.Module) -> str | None:
        return self._soft.get(id(module)) or _why_quantised(module) or self._why_tied(name, module)

    def _why_tied(self, name: str, module: nn.Module) -> str | None:
        for parameter_name, parameter in module.named_parameters(recurse=False):
            others = [owner for owner in self._owners[id(parameter)] if owner != name]
            if others:
                return f"its {parameter_name} is tied to that of {others[0]!r}"
        return None


def _why_without_forward(module: nn.Module) -> str | None:
    if type(module).forward is nn.Module.forward:
        return "its class has no forward, so nobody calls it (name the modules inside it)"
    return None


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, for each parameter's id, the names of the distinct modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {id(p): p for p in module.parameters(recurse=False)}.values():
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _uncalled(model: nn.Module) -> Iterator[tuple[int, str]]:
    for parent in model.modules():
        for child in kind_of(parent).uncalled_children:
            name = host_class_name(type(parent)).rpartition(".")[2]
            yield id(parent.get_submodule(child)), f"its parent, a {name}, never calls its forward"


def _owned_by_wrappers(model: nn.Module) -> Iterator[tuple[int, str]]:
    for module in model.modules():
        owner = _wrapper_name(module)
        if owner is not None:
            yield from ((id(part), f"owned by {owner}") for part in module.modules())
        parametrizations = getattr(module, "parametrizations", None)
        if isinstance(parametrizations, nn.ModuleDict):
            reason = f"it computes a parameter of a {type(module).__name__}"
            yield from ((id(part), reason) for part in parametrizations.modules())


def _wrapper_name(module: nn.Module) -> str | None:
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "peft" and cls.__name__ in PEFT_WRAPPERS:
            return f"PEFT's {type(module).__name__}"
    return None


def _why_quantised(module: nn.Module) -> str | None:
    tensors: list[Tensor] = list(module.parameters(recurse=False))
    for cls in (type(module), *(type(tensor) for tensor in tensors)):
        if f"{cls.__module__}.".startswith(tuple(f"{name}." for name in QUANTISED_PACKAGES)):
            return f"quantised ({cls.__module__}.{cls.__qualname__})"
    if any(not (t.is_floating_point() or t.is_complex()) for t in tensors):
        return "quantised (a parameter holds integers)"
    return None


def _is_reported(name: str, module: nn.Module, wanted: _Wanted | None) -> bool:
    """Say whether leaving a module is worth a line: it has tensors, or somebody asked for it."""
    asked = kind_of(module).is_default if wanted is None else name in wanted.names
    return asked or next(module.parameters(recurse=False), None) is not None


def _wanted(model: nn.Module, select: Select) -> _Wanted:
    first_name = {id(module): name for name, module in named_host_modules(model).items()}
    every = named_host_modules(model, every_name=True)
    names: set[str] = set()
    by_name: set[str] = set()
    for pattern in _as_patterns(select):
        matches = [name for name, module in every.items() if _matches(pattern, name, module)]
        if not matches:
            raise ValueError(_nothing_matches(pattern, list(every)))
        firsts = {first_name[id(every[name])] for name in matches}
        names |= firsts
        if isinstance(pattern, str) and not _is_glob(pattern):
            by_name |= firsts
    return _Wanted(names=frozenset(names), by_name=frozenset(by_name))


def _as_patterns(select: Any) -> list[Pattern | Predicate]:
    if isinstance(select, str | type) or callable(select):
        patterns: list[Any] = [select]
    elif isinstance(select, Iterable):
        patterns = list(select)
    else:
        patterns = []
    wrong = [p for p in patterns if not (isinstance(p, str | type) or callable(p))]
    if wrong or not patterns:
        found = f"{wrong[0]!r}" if wrong else f"{select!r}"
        raise TypeError(
            f"select= takes names, globs, module types or a predicate (name, module) -> bool; "
            f"found {found}"
        )
    return patterns


def _matches(pattern: Pattern | Predicate, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if not isinstance(pattern, str):
        return pattern(name, module)
    if not _is_glob(pattern):
        return pattern == name
    has_parameters = next(module.parameters(), None) is not None
    return bool(name) and has_parameters and _parts_match(pattern.split("."), name.split("."))


def _is_glob(pattern: str) -> bool:
    return any(sign in pattern for sign in "*?[")


def _parts_match(pattern: list[str], name: list[str]) -> bool:
    """Match a dotted name part by part; ``**`` takes any number of parts, none included."""
    if not pattern:
        return not name
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(_parts_match(rest, name[start:]) for start in range(len(name) + 1))
    return bool(name) and fnmatch.fnmatchcase(name[0], head) and _parts_match(rest, name[1:])


def _nothing_matches(pattern: Pattern | Predicate, names: list[str]) -> str:
    if not isinstance(pattern, str):
        label = pattern.__name__ if isinstance(pattern, type) else "the predicate"
        return f"select= matches nothing: no module of the model satisfies {label}"
    close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[1:6]
    cure = "; '*' stays within one part of a dotted name, '**' crosses dots"
    return (
        f"select= matches nothing: no module is named {pattern!r}; close names are "
        f"{', '.join(map(repr, close)) or 'none, the model has no submodules'}"
        f"{cure if _is_glob(pattern) else ''}"
    )

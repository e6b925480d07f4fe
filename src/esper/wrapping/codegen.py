"""Write plain modules as the Python source that a person would have written.

Only what can be written and read back exactly is written: every constructor is called once, and
what it makes must print the same and hold tensors of the same names and shapes.
"""

from __future__ import annotations

import builtins
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx, nn

from esper.wrapping.plain import SPREAD, class_name_of

_IMPORTS: Final = {
    "torch": "import torch",
    "device": "from torch import device",
    "inf": "from math import inf",
    "nan": "from math import nan",
}
_RESERVED: Final = (
    *("nn", "torch", "build", "GRAFTS"),
    *("StandIn", "revive", "standing_for", "like", "on_host"),
)
_CLEAN_UP: Final = re.compile(r";  (?:\w+ = )+None$")
_RENAMING: Final = re.compile(r"^    ((\w+)_1) = \2$", re.MULTILINE)
_ARITHMETIC: Final = re.compile(r"^    (\w+) = ([\w.]+(?: [*+] [\w.]+)+)$", re.MULTILINE)
_LAST: Final = re.compile(r"^    (\w+) = (.*)\n    return \1$", re.MULTILINE)
_WHOLE: Final = r"slice\(None, None, None\)"
_CHOICE: Final = re.compile(
    rf"^    (\w+) = \w+\[slice\(None, 0, None\)\]\n    (\w+) = \1 \+ \(({_WHOLE}|\w+), (.+)\)\n"
    r"    (\w+) = \2\[(\w+)\]$",
    re.MULTILINE,
)
_INDEXED: Final = re.compile(
    rf"^    (\w+) = (.+) if (\w+) else {_WHOLE}\n    (\w+) = (\w+)\[\1\]$", re.MULTILINE
)
_BUILTIN: Final = re.compile(r"\btorch\._C\._nn\.(\w+)")
_HOST_CALL: Final = re.compile(r"^(    \w+ = self\.host\()(.*)\)$", re.MULTILINE)
_INDENT: Final = "    "
_LINE_WIDTH: Final = 84


class SourceWriter:
    """Collects classes, each distinct one once, and the imports they need."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._sources: list[str] = []
        self._imports = {"from torch import nn"}

    @property
    def imports(self) -> list[str]:
        """The import statements that the classes need, sorted."""
        uses_torch = any(re.search(r"\btorch\.", source) for source in self._sources)
        statements = self._imports | ({"import torch"} if uses_torch else set())
        return sorted(statements, key=lambda line: (line.startswith("from"), line))

    @property
    def classes(self) -> list[str]:
        """The source of each class, those that others use before them."""
        return list(self._sources)

    def add_graph(
        self, graph_module: fx.GraphModule, *, name: str, doc: str, given: str | None = None
    ) -> str:
        """Write the class of a graph module.

        Args:
            graph_module: The module.
            name: A name for the class; a number is appended where it is taken.
            doc: Its docstring, one line.
            given: A child that the constructor takes as its argument instead of making it.

        Returns:
            The name of the class; a class with the same source is written once.

        Raises:
            ValueError: Something in the module cannot be written.
        """
        making = [*self._making(graph_module, given)]
        if given in dict(graph_module.named_children()):
            making.insert(0, f"self.{given} = {given}")
        signature = "self" if given is None else f"self, {given}: nn.Module"
        body = [
            f'{_INDENT}"""{doc}"""',
            "",
            f"{_INDENT}def __init__({signature}) -> None:",
            *(f"{_INDENT * 2}{line}" for line in ["super().__init__()", *making]),
            "",
            *(
                f"{_INDENT}{line}"
                for line in self._forward(graph_module, is_site=given is not None)
            ),
        ]
        return self._named(name, "\n".join(body))

    def expression(self, module: nn.Module, *, name: str) -> str:
        """Return an expression that makes a module of this one's structure.

        Args:
            module: A layer of ``torch.nn``, an ``nn.Sequential`` or a graph module of such.
            name: What the module is called, for errors.

        Returns:
            The expression. Classes that it needs have been written.

        Raises:
            ValueError: It cannot be written.
        """
        if isinstance(module, fx.GraphModule):
            made = self.add_graph(module, name=class_name_of(module), doc="A grown kernel.")
            return f"{made}()"
        if is_numbered(module):
            items = [self.expression(m, name=f"{name}.{n}") for n, m in module.named_children()]
            return _call(f"nn.{type(module).__name__}", items)
        if is_torch_layer(module):
            return constructor(module)
        raise ValueError(f"{name!r} is of {type(module).__qualname__}, which is not torch's")

    def _making(self, graph_module: fx.GraphModule, given: str | None) -> Iterator[str]:
        targets = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
        for target in dict.fromkeys(targets):
            if target != given:
                child = graph_module.get_submodule(target)
                made = f"self.{target} = {self.expression(child, name=target)}"
                yield from made.splitlines()
                yield from _freezing(child, target)
        for name, parameter in graph_module.named_parameters(recurse=False):
            yield f"self.{name} = nn.Parameter({_empty(parameter)}{_frozen(parameter)})"
        for name, buffer in graph_module.named_buffers(recurse=False):
            yield f'self.register_buffer("{name}", {_empty(buffer)})'

    def _forward(self, graph_module: fx.GraphModule, *, is_site: bool) -> Iterator[str]:
        code = graph_module.graph.python_code("self")
        lines = [_CLEAN_UP.sub("", line) for line in code.src.splitlines() if line.strip()]
        head, *body = lines[next(i for i, line in enumerate(lines) if line.startswith("def ")) :]
        text = "\n".join([re.sub(r"\).*:$", "):", head), *body])
        for renamed, name in _RENAMING.findall(text):
            text = re.sub(rf"\b{renamed}\b", name, text)
            text = text.replace(f"{_INDENT}{name} = {name}\n", "")
        for name, value in code.globals.items():
            if re.search(rf"\b{name}\b", text):
                if getattr(builtins, name, None) is value:
                    continue
                if name not in _IMPORTS:
                    raise ValueError(
                        f"{type(graph_module).__name__} calls {value!r}: generated code may "
                        f"import torch only; give the kernel as a BlueprintIR"
                    )
                self._imports.add(_IMPORTS[name])
        text = _CHOICE.sub(r"    \5 = \4 if \6 else \3", text)
        text = _INDEXED.sub(r"    \4 = \5[\2] if \3 else \5", text)
        text = text.replace("[slice(1, None, None)]", "[1:]")
        text = text.replace("[(slice(None, 1, None), None)]", "[:1, None]")
        text = _BUILTIN.sub(_public_name, _inlined(text) if is_site else text)
        for star, names in graph_module.meta.get(SPREAD, {}).items():
            text = _spread(text, star, names)
        yield from _LAST.sub(r"    return \2", text).splitlines()

    def _named(self, name: str, body: str) -> str:
        if body not in self._names:
            taken = {*self._names.values(), *_RESERVED}
            numbered = (f"{name}{n}" for n in range(2, len(taken) + 3))
            self._names[body] = next(n for n in (name, *numbered) if n not in taken)
            self._sources.append(f"class {self._names[body]}(nn.Module):\n{body}\n")
        return self._names[body]


def is_torch_layer(module: nn.Module) -> bool:
    """Say whether a module's class is one that ``torch.nn`` exports."""
    return getattr(nn, type(module).__name__, None) is type(module)


def constructor(module: nn.Module) -> str:
    """Return the call that makes a layer of ``torch.nn`` like this one.

    Args:
        module: A layer whose class ``torch.nn`` exports.

    Returns:
        For example ``"nn.Conv2d(8, 16, 3, padding=1)"``: arguments that are their defaults are
        left out.

    Raises:
        ValueError: The layer that the call makes is not like this one.
    """
    for collapse in (True, False):
        args, kwargs = _arguments(module, collapse=collapse)
        if _makes_the_like(module, args, kwargs):
            for name in list(kwargs):
                fewer = {key: value for key, value in kwargs.items() if key != name}
                kwargs = fewer if _makes_the_like(module, args, fewer) else kwargs
            shown = [repr(value) for value in args]
            shown += [f"{name}={value!r}" for name, value in kwargs.items()]
            return f"nn.{type(module).__name__}({', '.join(shown)})"
    raise ValueError(f"no call of nn.{type(module).__name__} makes a module like {module}")


def is_numbered(module: nn.Module) -> bool:
    """Say whether a module is an ``nn.Sequential`` whose children are named by their places."""
    return type(module) is nn.Sequential and repr(nn.Sequential(*module)) == repr(module)


def _arguments(module: nn.Module, *, collapse: bool) -> tuple[list[Any], dict[str, Any]]:
    """Read the constructor's arguments off a layer's attributes of the same names."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        value = _argument(module, name)
        if collapse and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            args.append(value)
        elif name != "device" and value != parameter.default:
            kwargs[name] = value
    return args, kwargs


def _argument(module: nn.Module, name: str) -> Any:
    tensors = dict(module.named_parameters(recurse=False))
    if name == "dtype":
        return next((tensor.dtype for tensor in tensors.values()), None)
    if name == "bias" and tensors:
        return "bias" in tensors or "in_proj_bias" in tensors
    if name == "add_bias_kv":
        return "bias_k" in tensors
    return getattr(module, name, None)


def _makes_the_like(module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> bool:
    try:
        made = type(module)(*args, **{**kwargs, **_on_meta(module)})
    except (TypeError, ValueError, RuntimeError):
        return False
    return _likeness(made) == _likeness(module)


def _on_meta(module: nn.Module) -> dict[str, str]:
    return {"device": "meta"} if "device" in inspect.signature(type(module)).parameters else {}


def _likeness(module: nn.Module) -> tuple[str, list[str], list[tuple[Any, ...]]]:
    """Return what two modules of one structure have in common: text, settings and tensors."""
    settings = [
        f"{name}={value!r}"
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training"
    ]
    named = [*module.named_parameters(), *module.named_buffers()]
    return repr(module), settings, [(n, tensor.shape, tensor.dtype) for n, tensor in named]


def _spread(text: str, star: str, names: list[str]) -> str:
    """Write ``*args`` or ``**kwargs`` where a graph has the names of what was seen in them.

    Where a kernel reads one of them they stay: code names what it reads.
    """
    call = _HOST_CALL.search(text)
    if call is None or (star.count("*") == 1 and not names):
        return text
    passed = call[2].split(", ")
    spread = [f"{name} = {name}" if star.startswith("**") else name for name in names]
    head, _, body = text.partition("\n")
    if any(re.search(rf"\b{name}\b", body.replace(call[0], "")) for name in names):
        return text
    place = passed.index(spread[0]) if spread else len(passed)
    passed = [*passed[:place], star, *(p for p in passed[place:] if p not in spread)]
    for name in names[1:]:
        head = re.sub(rf", {name}(?: = None)?(?=[,)])", "", head)
    first = rf"{names[0]}(?: = None)?(?=[,)])" if names else r"(?=\):$)"
    head = re.sub(first, star if names else f", {star}", head, count=1)
    return f"{head}\n{body}".replace(call[0], f"{call[1]}{', '.join(passed)})")


def _inlined(text: str) -> str:
    """Write products and sums into the one sum that uses them: ``y = 0.5 * h + k_0``.

    The order of the additions stays: a product may stand anywhere in a sum, a sum at its left.
    For sites only: no kernel of one writes into what it reads, so a product may wait.
    """
    for match in _ARITHMETIC.finditer(text):
        name, expression = match.groups()
        place = rf"(?<== ){name}(?= \+)"
        if "+" not in expression:
            place += rf"|(?<=\+ ){name}$"
        is_used_once = len(re.findall(rf"\b{name}\b", text)) == 2  # where it is made, and there
        if is_used_once and re.search(place, text, re.MULTILINE):
            made = re.search(rf"^    {name} = (.*)\n", text, re.MULTILINE)
            assert made is not None, "earlier replacements keep the line"
            text = re.sub(place, made[1], text.replace(made[0], ""), flags=re.MULTILINE)
    return text


def _call(function: str, arguments: list[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= _LINE_WIDTH and "\n" not in line:
        return line
    inside = textwrap.indent(",\n".join(arguments), _INDENT)
    return f"{function}(\n{inside},\n)"


def _public_name(builtin: re.Match[str]) -> str:
    public = getattr(nn.functional, builtin[1], None)
    is_same = getattr(public, "__module__", None) == "torch._C._nn"
    return f"nn.functional.{builtin[1]}" if is_same else builtin[0]


def _freezing(module: nn.Module, name: str) -> Iterator[str]:
    if isinstance(module, fx.GraphModule):
        return  # its own class freezes what is frozen
    frozen = [key for key, p in module.named_parameters() if not p.requires_grad]
    if frozen and len(frozen) == len(list(module.named_parameters())):
        yield f"self.{name}.requires_grad_(False)"
    else:
        yield from (f'self.{name}.get_parameter("{k}").requires_grad_(False)' for k in frozen)


def _empty(tensor: torch.Tensor) -> str:
    dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.empty({tuple(tensor.shape)!r}{dtype})"


def _frozen(parameter: torch.Tensor) -> str:
    return "" if parameter.requires_grad else ", requires_grad=False"

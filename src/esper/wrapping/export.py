"""Write a grown model as readable code and one file of weights, for use without Esper."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors.torch import save
from torch import Tensor, fx, nn

from esper.contracts.arguments import check_type
from esper.resilience.whole_file import write_whole
from esper.seeds.shallow import depth_state
from esper.state.host_parts import check_module
from esper.state.layer_call import LayerCall
from esper.wrapping import stand_in
from esper.wrapping.codegen import SourceWriter, is_numbered, is_torch_layer
from esper.wrapping.host_text import construction_text, host_parts, input_text, source_text
from esper.wrapping.plain import fused_paths, is_grafted, trace
from esper.wrapping.unwrap import unwrap

if TYPE_CHECKING:
    from esper.state.layer_call import Example

GRAFTS_FILE: Final = "grafts.py"
WEIGHTS_FILE: Final = "model.safetensors"


def export(
    model: nn.Module, folder: str | os.PathLike[str], *, example: Example | None = None
) -> Path:
    """Write a grown model to a folder. The model itself is not changed.

    ``grafts.py`` is readable code that imports torch only; its ``build(host)`` turns a fresh model
    of the user's own class into the grown one. ``model.safetensors`` has the weights, under the
    names of the unwrapped model's ``state_dict``. The same model gives the same bytes.

    The code says which host ``build`` wants: the class, its arguments as far as attributes of the
    same names tell them, and each module with its parameters' shapes, which ``build`` checks.

    Args:
        model: A wrapped model, or one that ``unwrap`` returned.
        folder: Where to write; made if it is not there.
        example: An input of the model, whose shapes the code then tells; data is not needed, so
            that tensors may be on the device ``meta``.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is no module, or ``folder`` no name of a folder.
        ValueError: A kernel given as a module of the user's own cannot be written as code, the
            model's ``state_dict`` holds something that is no tensor, or blocks of it sleep, which
            would be awake in a fresh model. Nothing is written.
        OSError: A file cannot be written, and is named; one that was there before is unchanged.
    """
    check_module("export", model)
    check_type("folder", folder, (str, os.PathLike), "the name of a folder, a str or a Path")
    sleepers = list(depth_state(model))
    if sleepers:
        msg = (
            f"{', '.join(sleepers)}: not awake, and would be in a fresh model of the class; wake "
            "them by esper.deepen, or keep the whole model with torch.save"
        )
        raise ValueError(msg)
    grown = unwrap(copy.deepcopy(model))
    _make_writable_(grown)
    source = _source(grown, None if example is None else LayerCall.of(example)).encode()
    weights = save(_tensors(grown))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / WEIGHTS_FILE, weights)
    write_whole(path / GRAFTS_FILE, source)
    return path


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state on the CPU; tensors that share memory are written out each."""
    state = model.state_dict()
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"state_dict()[{wrong[0]!r}] is a {type(state[wrong[0]]).__name__}; a safetensors file "
            f"holds tensors only: keep the unwrapped model with torch.save"
        )
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _make_writable_(model: nn.Module) -> None:
    """Trace the kernels that are modules of the user's own down to layers of torch."""
    for name, module in list(model.named_modules()):
        if is_grafted(module):
            for child_name, child in list(module.named_children()):
                if child_name != "host":
                    setattr(module, child_name, _writable(child, f"{name}.{child_name}"))


def _writable(module: nn.Module, name: str) -> nn.Module:
    if not is_numbered(module) and not isinstance(module, fx.GraphModule):
        return module if is_torch_layer(module) else _trace_both_modes(module, name)
    for child_name, child in list(module.named_children()):
        setattr(module, child_name, _writable(child, f"{name}.{child_name}"))
    return module


def _trace_both_modes(module: nn.Module, name: str) -> fx.GraphModule:
    """Trace a kernel of the user's own: the same graph in both modes, or not at all."""
    cure = "graft it as a BlueprintIR, or keep the unwrapped model with torch.save"
    modes = [(part, part.training) for part in module.modules()]
    graphs = []
    try:
        for training in (False, True):
            module.train(training)
            graphs.append(trace(module, is_leaf=is_torch_layer, class_name=type(module).__name__))
    except (TypeError, ValueError, RuntimeError, NameError, AttributeError) as error:
        raise ValueError(
            f"the forward of {name!r} ({type(module).__name__}) cannot be written as code: "
            f"{error}; {cure}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    if graphs[0].code != graphs[1].code:
        raise ValueError(
            f"{name!r} ({type(module).__name__}) does other things in training than in "
            f"evaluation, which generated code does not tell apart; {cure}"
        )
    graphs[0].training = module.training
    return graphs[0]


def _source(model: nn.Module, example: LayerCall | None) -> str:
    writer = SourceWriter()
    sites = {}
    for name, module in model.named_modules():
        if is_grafted(module):
            assert isinstance(module, fx.GraphModule)
            sites[_host_name(model, name)] = _add_site(writer, module)
    table = "".join(f"    {json.dumps(name)}: {made},\n" for name, made in sites.items())
    fused = "".join(
        f"    modules[{json.dumps(_host_name(model, name))}].{attribute} = {value!r}\n"
        for name, attribute, value in fused_paths(model)
    )
    if fused:
        fused = f"    # The fused path of evaluation would bypass the grafts.\n{fused}"
    host = _host_of(model)
    parts = host_parts(model, lambda name: _host_name(model, name))
    given = input_text(example)
    return _TEMPLATE.format(
        model="Host" if host is None else type(host).__name__,
        made=construction_text(host),
        source=source_text(host),
        given=f"It is called with {given}.\n" if given else "",
        parts="".join(
            f"    {json.dumps(name)}: {json.dumps(is_)},\n" for name, is_ in parts.items()
        ),
        weights=WEIGHTS_FILE,
        imports="\n".join(writer.imports),
        standing="\n\n".join(_REMARK.sub("", inspect.getsource(part)) for part in _STANDING),
        classes="".join(f"\n\n{source}" for source in writer.classes),
        table=f"{{\n{table}}}" if table else "{}",
        fused=fused,
    )


def _host_of(model: nn.Module) -> nn.Module | None:
    """Return the module whose class ``build`` takes; None where a root's host is gone."""
    return dict(model.named_children()).get("host") if is_grafted(model) else model


def _host_name(model: nn.Module, name: str) -> str:
    """Return the name that a module has in a fresh host: without the hosts of grafts around it."""
    parts: list[str] = []
    module = model
    for part in filter(None, name.split(".")):
        if not (is_grafted(module) and part == "host"):
            parts.append(part)
        module = module.get_submodule(part)
    return ".".join(parts)


def _add_site(writer: SourceWriter, module: fx.GraphModule) -> str:
    kind = type(module.host).__name__
    doc = f"A {kind} and what was grown beside it."
    return writer.add_graph(module, name=f"Grafted{kind}", doc=doc, given="host")


_STANDING: Final = (
    stand_in.StandIn,
    stand_in.revive,
    stand_in.standing_for,
    stand_in.like,
    stand_in.on_host,
)
"""What makes a graft answer as its host, in ``grafts.py`` as in an unwrapped model."""

_REMARK: Final = re.compile(r"  # (?:type|noqa).*$", re.MULTILINE)

_TEMPLATE: Final = '''\
"""What was grown into `{model}`, as plain PyTorch.

    model = build({made})
    model.load_state_dict(safetensors.torch.load_file("{weights}"))

`build` takes a fresh `{model}`{source}.
Its modules are those of HOST, which `build` checks.
{given}"""

{imports}
{classes}

GRAFTS = {table}

HOST = {{
{parts}}}


def build(host: nn.Module) -> nn.Module:
    """Turn a fresh `{model}` into the grown one, in place; its weights are loaded afterwards.

    Raises:
        ValueError: The host is not of the class and size that this was grown in.
    """
    modules = dict(host.named_modules(remove_duplicate=False))
    check(host, modules)
    for name, graft in GRAFTS.items():
        site = modules[name]
        device = next((tensor.device for tensor in site.parameters()), None)
        grafted = standing_for(graft, site)(site).to(device).train(site.training)
        for alias, module in modules.items():
            if module is site and alias:
                parent, _, child = alias.rpartition(".")
                setattr(modules[parent], child, grafted)
            elif module is site:
                host = grafted
{fused}    return host


def check(host: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Refuse a host that is not made of the modules in HOST, before anything is changed."""
    missing = [name for name in {{**GRAFTS, **HOST}} if name not in modules]
    if missing:
        raise ValueError(f"{{type(host).__name__}} has no module {{', '.join(map(repr, missing))}}")
    gone = [name for name in GRAFTS if name not in HOST]
    for name, module in host.named_modules():
        if any(name == site or name.startswith(f"{{site}}.") or not site for site in gone):
            continue
        shapes = [f"{{key}} {{list(p.shape)}}" for key, p in module.named_parameters(recurse=False)]
        found = ", ".join([type(module).__name__, *shapes])
        wanted = HOST.get(name, "no module")
        if found != wanted:
            where = f"module {{name!r}} of the host" if name else "the host"
            raise ValueError(f"{{where}} is expected to be {{wanted}}, found {{found}}")


{standing}'''

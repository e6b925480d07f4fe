"""Write a grown model as readable code and one file of weights, for use without Esper."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors.torch import save
from torch import Tensor, fx, nn

from esper.state.host_parts import check_module
from esper.wrapping.codegen import SourceWriter, is_numbered, is_torch_layer
from esper.wrapping.plain import fused_paths, is_grafted, trace
from esper.wrapping.unwrap import unwrap

if TYPE_CHECKING:
    import os

GRAFTS_FILE: Final = "grafts.py"
WEIGHTS_FILE: Final = "model.safetensors"


def export(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a grown model to a folder. The model itself is not changed.

    ``grafts.py`` is readable code that imports torch only; its ``build(host)`` turns a fresh model
    of the user's own class into the grown one. ``model.safetensors`` has the weights, under the
    names of the unwrapped model's ``state_dict``. The same model gives the same bytes.

    Args:
        model: A wrapped model, or one that ``unwrap`` returned.
        folder: Where to write; made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: A kernel given as a module of the user's own cannot be written as code, or
            the model's ``state_dict`` holds something that is no tensor. Nothing is written.
        OSError: The folder cannot be written.
    """
    check_module("export", model)
    grown = unwrap(copy.deepcopy(model))
    _make_writable_(grown)
    source = _source(grown).encode()
    weights = save(_tensors(grown))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    _write(path / WEIGHTS_FILE, weights)
    _write(path / GRAFTS_FILE, source)
    return path


def _write(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


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


def _source(model: nn.Module) -> str:
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
    return _TEMPLATE.format(
        model=_host_class_name(model),
        weights=WEIGHTS_FILE,
        imports="\n".join(writer.imports),
        classes="".join(f"\n\n{source}" for source in writer.classes),
        table=f"{{\n{table}}}" if table else "{}",
        fused=fused,
    )


def _host_class_name(model: nn.Module) -> str:
    """Return the name of the class that ``build`` takes; "Host" where a root's host is gone."""
    if not is_grafted(model):
        return type(model).__name__
    host = dict(model.named_children()).get("host")
    return "Host" if host is None else type(host).__name__


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
    host = dict(module.named_children()).get("host")
    if host is None:
        doc = "What was grown in the place of a layer, which is left out."
        return writer.add_graph(module, name="Replacement", doc=doc, given="host")
    kind = type(host).__name__
    doc = f"A {kind} and what was grown beside it."
    return writer.add_graph(module, name=f"Grafted{kind}", doc=doc, given="host")


_TEMPLATE: Final = '''\
"""What was grown into `{model}`, as plain PyTorch.

    model = build({model}(...))
    model.load_state_dict(safetensors.torch.load_file("{weights}"))
"""

{imports}
{classes}

GRAFTS = {table}


def build(host: nn.Module) -> nn.Module:
    """Turn a fresh `{model}` into the grown one, in place; its weights are loaded afterwards.

    Raises:
        ValueError: The host lacks a module that something was grown at.
    """
    modules = dict(host.named_modules(remove_duplicate=False))
    missing = [name for name in GRAFTS if name not in modules]
    if missing:
        raise ValueError(f"{{type(host).__name__}} has no module {{', '.join(map(repr, missing))}}")
    for name, graft in GRAFTS.items():
        site = modules[name]
        device = next((tensor.device for tensor in site.parameters()), None)
        grafted = graft(site).to(device).train(site.training)
        for alias, module in modules.items():
            if module is site and alias:
                parent, _, child = alias.rpartition(".")
                setattr(modules[parent], child, grafted)
            elif module is site:
                host = grafted
{fused}    return host
'''

"""Putting kernels back while ``from_pretrained`` loads a model that has grown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from esper.contracts.errors import KernelLoadError
from esper.integrations.module_form import built_module
from esper.integrations.pretrained_marks import CANNOT, METHOD, REFUSED
from esper.seeds.rebuilding import build
from esper.seeds.slots import make_seed
from esper.seeds.structure import read_structure
from esper.state.host_parts import SEEDS
from esper.state.kernel import PreparedKernel, reference_tensor
from esper.state.layer_record import record_of
from esper.wrapping.unwrap import unwrap
from esper.wrapping.wrap import layers, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FORMAT_VERSION: Final = 1


class GrownConfig(QuantizationConfigMixin):
    """What a config says of a grown model.

    Args:
        quant_method: ``"esper"``.
        format_version: Of this form.
        grown: The rest, as ``pretrained`` wrote it.
    """

    def __init__(self, *, quant_method: str, format_version: int = 1, **grown: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment] # the methods that transformers knows are an enum
        self.format_version = format_version
        self.grown = grown


class KernelLoader(HfQuantizer):
    """Loads the host as transformers does, then builds the kernels and loads their tensors.

    Raises:
        KernelLoadError: The config is of a newer format, a kernel was written by hand of more than
            torch's plain layers, or the model has no file of safetensors.
    """

    _files: Sequence[str] = ()

    def update_attn_implementation(self, config: Any) -> Any:
        """Take out what stops the loading where Esper is not there: it is."""
        fusions = dict(getattr(config, "fusion_config", None) or {})
        for name in (REFUSED, CANNOT):
            fusions.pop(name, None)
        if fusions:
            config.fusion_config = fusions
        elif hasattr(config, "fusion_config"):
            del config.fusion_config
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        grown, files = self._grown(), kwargs.get("checkpoint_files")
        _check_can_be_built(grown)
        if not files or not all(str(file).endswith(".safetensors") for file in files):
            msg = f"a grown model is loaded from files of safetensors, found {files!r}"
            raise KernelLoadError(msg)
        self._files = files
        ignored = [rf"(^|\.){re.escape(SEEDS)}\."]
        ignored += [rf"{re.escape(name)}\.(host|seed_\d+)\." for name in grown.get("plain", ())]
        missing = [rf"{re.escape(name)}\." for name in grown.get("plain", ())]
        for attribute, added in (("unexpected", ignored), ("missing", missing)):
            name = f"_keys_to_ignore_on_load_{attribute}"
            setattr(model, name, {*(getattr(model, name) or ()), *added})
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Build the kernels; the model is no quantised one, and is called none."""
        del kwargs
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call] # transformers leaves it untyped
        for attribute in ("unexpected", "missing"):
            model.__dict__.pop(f"_keys_to_ignore_on_load_{attribute}", None)
        grown = self._grown()
        with _Tensors(self._files, model.base_model_prefix) as tensors:
            if "plain" in grown:
                _build_plain(model, grown["plain"], tensors)
            else:
                _build_wrapped(model, grown, tensors)
        return model

    def _grown(self) -> dict[str, Any]:
        config: Any = self.quantization_config
        if config.format_version > FORMAT_VERSION:
            msg = (
                f"the config is of format {config.format_version}, known here up to "
                f"{FORMAT_VERSION}; load it with a newer Esper"
            )
            raise KernelLoadError(msg)
        found: dict[str, Any] = config.grown
        return found

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def register() -> None:
    """Let ``from_pretrained`` know the method; doing it twice changes nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(GrownConfig)
        register_quantizer(METHOD)(KernelLoader)


class _Tensors:
    """Tensors of a checkpoint's files, read when they are asked for.

    Args:
        files: Files of safetensors.
        prefix: What a model of the base class leaves out of its names.
    """

    def __init__(self, files: Sequence[str], prefix: str) -> None:
        self._opened: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._prefix = f"{prefix}."

    def __enter__(self) -> _Tensors:
        for opened in self._opened:
            opened.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for opened in self._opened:
            opened.__exit__(*error)

    def below(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a module of the saved model, by their names in it."""
        head = f"{name}." if name else ""
        return {
            key.removeprefix(head): opened.get_tensor(key)
            for opened in self._opened
            for key in opened.keys()  # noqa: SIM118 - it is no mapping
            if key.startswith(head)
        }

    def name_in(self, model: nn.Module, name: str) -> str:
        """Return a module's name in the model that is loaded: base and head differ by a prefix."""
        names = dict(model.named_modules())
        for found in (name, name.removeprefix(self._prefix), self._prefix + name):
            if found in names:
                return found
        msg = f"the saved model has grown at {name!r}, which {type(model).__name__} does not have"
        raise KernelLoadError(msg)


def _check_can_be_built(grown: Mapping[str, Any]) -> None:
    """Refuse, before anything is loaded, what nothing here can build."""
    lost = [name for name, entries in grown.get("plain", {}).items() if entries is None]
    lost += [name for name, forms in grown.get("by_hand", {}).items() if None in forms.values()]
    if lost:
        msg = (
            f"{', '.join(lost)}: the kernel is a module written by hand, or its site a whole "
            "block, which a config cannot describe; wrap a model of this class, graft such a "
            "kernel there and call load_state_dict, or save by torch.save or esper.export"
        )
        raise KernelLoadError(msg)


def _build_wrapped(model: nn.Module, grown: Mapping[str, Any], tensors: _Tensors) -> None:
    names = {name: tensors.name_in(model, name) for name in grown["wrapped"]}
    wrap(model, select=list(names.values()), num_seeds=grown["num_seeds"])
    sites = layers(model)
    for name, here in names.items():
        layer, head = sites[here], f"{SEEDS}."
        found = {k: v for k, v in tensors.below(name).items() if k.startswith(head)}
        for i, form in grown["by_hand"].get(name, {}).items():
            structure = found.get(f"{head}{i}.structure")
            if structure is not None:
                _put_by_hand(layer, int(i), form, read_structure(structure.numpy().tobytes()))
        if found:
            layer.load_state_dict(found, strict=False)


def _build_plain(model: nn.Module, plain: Mapping[str, Any], tensors: _Tensors) -> None:
    names = {name: tensors.name_in(model, name) for name in plain}
    most = max(int(entry["seed"]) for entries in plain.values() for entry in entries)
    wrap(model, select=list(names.values()), num_seeds=most + 1)
    sites = layers(model)
    for name, entries in plain.items():
        for entry in entries:
            if "module" in entry:
                _put_by_hand(sites[names[name]], int(entry["seed"]), entry["module"], entry)
        build(sites[names[name]], list(_bare(entries)))
    unwrap(model)
    for name, here in names.items():
        model.get_submodule(here).load_state_dict(tensors.below(name))


def _bare(entries: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    return ({k: v for k, v in entry.items() if k != "module"} for entry in entries)


def _put_by_hand(
    layer: nn.Module, seed_idx: int, form: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """Let a layer have a kernel by hand, which what is built next finds there."""
    like = reference_tensor(layer)
    kernel = PreparedKernel(
        module=built_module(form).to(like),
        mode=entry["mode"],
        position=entry["position"],
        draws_random=True,
    )
    record_of(layer).seeds[seed_idx] = make_seed(layer, seed_idx, kernel, guard="always")

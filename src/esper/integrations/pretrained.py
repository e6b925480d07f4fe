"""What has grown travels in the config of a model of transformers, so that it can be loaded.

``from_pretrained`` builds a model from its config, and drops what a file has beyond that. A grown
model's config therefore says so in two places that transformers reads:

- ``quantization_config``, of the method ``esper``: where Esper has registered it (by transformers'
  own ``register_quantizer``), it puts the kernels back when the host is loaded;
- ``fusion_config``, with a name that transformers does not know: where Esper has not been imported,
  loading stops at it, and the name says what to do.

Both go from the config when the last kernel goes, and from the loaded model's too. Nothing of
transformers is replaced, and nothing of it is imported before a model of it has grown.
"""

from __future__ import annotations

import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from esper.contracts.layer_kind import kind_of
from esper.integrations.module_form import described_module
from esper.integrations.pretrained_marks import CANNOT, METHOD, REFUSED
from esper.resilience.attempt import Failed, attempt
from esper.state.layer_record import record_of
from esper.state.roster import at_change, at_unwrapping
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.state.roster import Plain
    from esper.state.seed_slot import Seed

_logger = logging.getLogger(__name__)

_known: Final[weakref.WeakKeyDictionary[nn.Module, tuple[object, ...]]] = (
    weakref.WeakKeyDictionary()
)
"""What seeds a layer had when it was last looked at."""


def _note_change(layer: nn.Module) -> None:
    """Bring the config of a layer's model in line with the kernels that stand in it."""
    if "transformers" not in sys.modules:
        return
    record = record_of(layer)
    model = record.find_model()
    if model is None or "_modules" not in model.__dict__:  # a copy that is being made
        return
    now = tuple((i, id(seed.slot.kernel)) for i, seed in record.seeds.items())
    before = _known.get(layer)
    if before == now:
        return
    _known[layer] = now
    for part in pretrained_in(model):
        if now or before or _is_marked(part):  # a copy has the mark, and was never looked at
            _mark(part, _grown(part))


def _note_unwrapping(model: nn.Module, plain: Plain) -> None:
    """Say in a config which layers became graphs."""
    if "transformers" not in sys.modules or not plain:
        return
    for part in pretrained_in(model):
        names = {id(module): name for name, module in part.named_modules()}
        inside = {
            names[id(site)]: _entries(*plain[name], site=site.get_submodule("host"))
            for name in plain
            if id(site := model.get_submodule(name)) in names
        }
        _mark(part, {"plain": inside} if inside else None)


def pretrained_in(model: nn.Module) -> list[Any]:
    """Return the models of transformers in a model; those in others are left out."""
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None:
        return []
    if isinstance(model, kind):
        return [model]
    found: list[nn.Module] = []
    for module in model.modules():  # a model comes before those in it
        if isinstance(module, kind) and not any(module in set(f.modules()) for f in found):
            found.append(module)
    return found


def _grown(model: nn.Module) -> dict[str, Any] | None:
    """Return what a wrapped model's config says; None while no kernel stands in it."""
    sites = layers(model)
    holding = {name: record_of(layer).seeds for name, layer in sites.items()}
    if not any(holding.values()):
        return None
    by_hand = {
        name: {str(i): described_module(s.slot.kernel) for i, s in seeds.items() if _is_by_hand(s)}
        for name, seeds in holding.items()
    }
    return {
        "wrapped": list(sites),
        "num_seeds": max(record_of(layer).layout.num_seeds for layer in sites.values()),
        "by_hand": {name: forms for name, forms in by_hand.items() if forms},
    }


def _is_by_hand(seed: Seed) -> bool:
    return seed.kernel.blueprint is None


def _entries(
    described: Sequence[Any], kernels: Mapping[int, nn.Module], *, site: nn.Module
) -> list[dict[str, Any]] | None:
    """Return the seeds of a layer that became a graph; None where they cannot be built again."""
    if kind_of(site).name == "block":  # what it returns is known by a call alone
        return None
    found = [
        {**entry, "module": described_module(kernels[entry["seed"]])}
        if entry.get("blueprint") is None and "kernel" in entry
        else dict(entry)
        for entry in described
    ]
    return None if any(entry.get("module", entry) is None for entry in found) else found


def _mark(model: Any, grown: dict[str, Any] | None) -> None:
    """Write into a config what has grown, or take it out; a graft does not fail by it."""
    outcome = attempt(lambda: _write(model, grown))
    if isinstance(outcome, Failed):
        _logger.warning(
            "the config of %s does not take what it has to say of kernels, which from_pretrained "
            "would lose without a word: %s",
            type(model).__name__,
            outcome,
        )


def _write(model: Any, grown: dict[str, Any] | None) -> None:
    config = model.config
    fusions = {
        k: v
        for k, v in (getattr(config, "fusion_config", None) or {}).items()
        if k not in (REFUSED, CANNOT)
    }
    present, is_ours = getattr(config, "quantization_config", None), _is_marked(model)
    if grown is not None:
        is_free = present is None or is_ours
        fusions[REFUSED if is_free else CANNOT] = True
        if is_free:
            config.quantization_config = {"quant_method": METHOD, "format_version": 1, **grown}
            _let_it_load()
    elif is_ours:
        del config.quantization_config
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config


def _is_marked(model: Any) -> bool:
    present = getattr(model.config, "quantization_config", None)
    return isinstance(present, dict) and present.get("quant_method") == METHOD


def _let_it_load() -> None:
    from esper.integrations.pretrained_loading import register  # it imports transformers

    register()


at_change(_note_change)
at_unwrapping(_note_unwrapping)

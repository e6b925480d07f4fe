"""From the name of a kernel, as ``suggest`` and reports print it, to the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.compiler.catalog import default_catalog
from esper.forward.host_output import blendable
from esper.forward.host_view import host_view
from esper.resilience.attempt import Failed, attempt
from esper.seeds.shadow import shadow_pass
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall
from esper.state.layer_record import record_of
from esper.state.shards import gathered
from esper.state.site import describe_site

if TYPE_CHECKING:
    from torch import nn

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.site import SiteSpec
    from esper.state.layer_call import Example


def kernel_named(layer: nn.Module, name: str, example: Example | None) -> BlueprintIR:
    """Return the kernel of the default catalog that has a name, at a layer.

    A name that says nothing about looking at later inputs is taken at its word.

    Args:
        layer: Where it will be grafted.
        name: Id of the blueprint, for example ``"mlp-16x10-w32"``.
        example: An input of the layer, from which what it gives is known; None without one.

    Raises:
        ValueError: The catalog has no such kernel for this layer; those that it has are named.
    """
    site = _described(layer, example)
    variants = [site, replace(site, is_causal=False)] if site.is_sequence else [site]
    where = f"layer {record_of(layer).name!r}"
    if example is None and site.out_features == 0:
        where += ", of which nobody knows without example=, an input of it, what it gives"
    return default_catalog().named(name, *variants, where=where)


def _described(layer: nn.Module, example: Example | None) -> SiteSpec:
    if example is None:
        return describe_site(layer)
    call = LayerCall.of(example).detached().to(reference_tensor(layer).device)
    host = host_view(layer)
    with shadow_pass(layer), gathered(layer), torch.no_grad():
        given = attempt(lambda: blendable(type(host).forward(host, *call.args, **call.kwargs)))
    if isinstance(given, Failed) or not isinstance(given.value, Tensor):
        return describe_site(layer)
    return describe_site(layer, call.x, given.value)

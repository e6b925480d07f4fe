"""A layer's host by itself: its own forward, without hooks and seeds."""

from __future__ import annotations

from torch import nn

from esper.forward.generated_class import host_class_of, key_of, native_forward
from esper.state.layer_call import LayerCall, as_declared, declared_names
from esper.state.shards import gathered


def has_foreign_forward(module: nn.Module) -> bool:
    """Return whether an object has a forward of its own, which its class's would not replace.

    The bound method of its class, which accelerate leaves behind, is none: it is what a call would
    find anyway, until the class changes.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    bound_to = getattr(own, "__self__", None)
    of_class = getattr(own, "__func__", None) in [
        vars(c).get("forward") for c in type(module).__mro__
    ]
    return not (bound_to is module and of_class)


def host_view(layer: nn.Module) -> nn.Module:
    """Return an object of the host's class over the layer's own ``__dict__``."""
    view: nn.Module = object.__new__(host_class_of(layer))
    object.__setattr__(view, "__dict__", layer.__dict__)
    return view


def host_forward(layer: nn.Module, *args: object, **kwargs: object) -> object:
    """Run the host's own forward, without the layer's hooks and seeds.

    Of a layer that FSDP2 has sharded, every rank has to do so at the same moment.
    """
    key = key_of(layer)
    with gathered(layer):
        return native_forward(key.family, key.host_class)(layer, *args, **kwargs)


def completed(layer: nn.Module, call: LayerCall) -> LayerCall:
    """Return a call with the arguments that the layer's family lets a caller leave out."""
    complete = key_of(layer).family.complete_call
    if complete is not None:
        call = LayerCall(*complete(call.args, dict(call.kwargs)))
    return declared(layer, call)


def declared(layer: nn.Module, call: LayerCall) -> LayerCall:
    """Return a call with its keywords in the order in which the layer, or any module, has them."""
    return as_declared(declared_names(type(layer).forward), call.args, call.kwargs)

"""Row 15: what only a GPU can show."""

import copy
from collections.abc import Iterator

import torch
from measure import Figure, take_turns
from subjects import BATCH, FEATURES, bottleneck, grafted, sharing
from torch import nn

from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.execution.kasmina_layer import KasminaLayer

_NO_GPU = "no CUDA device on this machine"
_CHANNELS, _NUM_KERNELS = 64, 4


def gpu(rounds: int) -> Iterator[Figure]:
    """Measure all three, or say that there is no GPU."""
    if not torch.cuda.is_available():
        for key in ("gpu syncs", "gpu graph", "gpu async"):
            yield Figure(key=key, value=None, note=_NO_GPU)
        return
    yield _syncs()
    yield _graph()
    yield _async_over_sync(rounds)


def _active_layer() -> tuple[KasminaLayer, torch.Tensor]:
    host, kernel = nn.Linear(FEATURES, FEATURES), bottleneck()
    layer = grafted(host, kernel, "always").to("cuda")
    return layer, torch.randn(BATCH, FEATURES, device="cuda")


def _syncs() -> Figure:
    """Count forwards that raised, because something in them waited for the device."""
    layer, x = _active_layer()
    layer(x)
    waited = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            try:
                layer(x)
            except RuntimeError:
                waited += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Figure(key="gpu syncs", value=waited)


def _graph() -> Figure:
    """Capture an active layer, replay it on another input, and compare with the eager call."""
    layer, x = _active_layer()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        same = torch.allclose(y, layer(x))
    return Figure(key="gpu graph", value=float(same))


def _async_over_sync(rounds: int) -> Figure:
    """Time a convolution with kernels side by side on streams, and one after the other."""
    from esper.execution.async_kasmina_conv2d_layer import AsyncKasminaConv2dLayer

    host = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, device="cuda")
    kernels = [copy.deepcopy(host) for _ in range(_NUM_KERNELS)]
    x = torch.randn(1, _CHANNELS, 28, 28, device="cuda")
    layers = {
        "sync": KasminaConv2dLayer.adopt_as(sharing(host), name="sync"),
        "async": AsyncKasminaConv2dLayer.adopt_as(sharing(host), name="async"),
    }
    for layer in layers.values():
        for i, kernel in enumerate(kernels):
            layer.graft(i, copy.deepcopy(kernel), alpha=0.1, guard="off", example=x)

    def forward(layer: KasminaLayer) -> None:
        layer(x)
        torch.cuda.synchronize()

    calls = {name: (lambda layer=layer: forward(layer)) for name, layer in layers.items()}
    took = take_turns(calls, rounds=2 * rounds, number=20)
    return took["sync"].ratio(took["async"], "gpu async")

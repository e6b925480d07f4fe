"""Where a model goes its seeds go: the same promises on a processor and on an accelerator."""

import copy

import pytest
import torch
from execution_hosts import run, run_kernel

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt
from esper.seeds.maintenance import maintain
from esper.state.layer_call import LayerCall

pytestmark = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


def moved(kind, device):
    """Return a host, a wrapped copy of it that was moved after wrapping, and an input."""
    host = kind.make_host().eval()
    layer = adopt(copy.deepcopy(host), name="site").to(device)
    return host.to(device), layer, LayerCall.of(kind.make_input()).to(torch.device(device))


def test_a_grown_layer_is_its_formula_where_it_is(kind, device):
    """Dormant it gives the host's numbers, grown h + alpha k, and gradients reach the kernel."""
    host, layer, call = moved(kind, device)
    assert torch.equal(run(layer, call), run(host, call))
    kernel = kind.make_kernel().to(device)
    layer.graft(0, copy.deepcopy(kernel), alpha=0.5, example=call)
    layer.eval()
    y, h = run(layer, call), run(host, call)

    expected = h + 0.5 * run_kernel(kind, kernel.eval(), call, h)
    assert torch.allclose(y, expected, atol=1e-4)
    layer.train()  # a recurrent host that cuDNN runs has no backward in evaluation
    run(layer, call).square().sum().backward()
    assert all(p.grad.device.type == device for p in layer.seed_kernel(0).parameters())


def test_a_fault_is_stopped_and_counted_where_it_happens(kind, device):
    """A kernel that is not finite costs its share, is read by maintain and isolated."""
    host, layer, call = moved(kind, device)
    layer.graft(0, kind.make_kernel().to(device), alpha=0.5, example=call)
    with torch.no_grad():
        for p in layer.seed_kernel(0).parameters():
            p.fill_(torch.nan)
    for _ in range(3):
        assert torch.equal(run(layer, call), run(host, call))
    maintain(layer)
    assert layer.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY


def test_a_grown_layer_moves_with_its_seeds(kind, device):
    """Moved there and back, a grown layer computes what it did, with every tensor beside it."""
    _, layer, _ = moved(kind, "cpu")
    call = LayerCall.of(kind.make_input())
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=call)
    layer.eval()
    y = run(layer, call)

    layer.to(device)
    there = run(layer, call.to(torch.device(device)))
    assert {t.device.type for t in layer.state_dict().values()} == {device}
    assert torch.allclose(there.cpu(), y, atol=1e-2)  # a GPU may convolve in TF32
    assert torch.equal(run(layer.cpu(), call), y)


def test_mixed_precision_scales_and_steps(kind, device):
    """Autocast and GradScaler train a grown layer; no fault is counted."""
    _, layer, call = moved(kind, device)
    layer.graft(0, kind.make_kernel().to(device), alpha=0.5, example=call)
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=16.0)
    before = [p.detach().clone() for p in layer.seed_kernel(0).parameters()]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = run(layer, call).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = layer.seed_kernel(0).parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0

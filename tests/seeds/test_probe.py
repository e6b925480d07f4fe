"""The probe: what a kernel must show before it is let in, and that trying leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from esper.compiler.catalog import default_catalog
from esper.contracts.errors import KernelRefusedError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt
from esper.resilience.clock import ManualClock
from esper.seeds.probe import probe
from esper.state.kernel import prepare_kernel
from esper.state.site import describe_site


class Kernel(nn.Module):
    """A linear layer and something that is done around it."""

    def __init__(self, act, n_out=6):
        super().__init__()
        self.body = nn.Linear(6, n_out)
        self.act = act

    def forward(self, x):
        return self.act(self.body, x)


def _in_place(body, x):
    x.mul_(2.0)
    return body(x)


def _turn_gradients_off(body, x):
    y = body(x)
    torch.set_grad_enabled(False)
    return y


def _raise(body, x):
    raise RuntimeError("no")


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class Unreached(nn.Module):
    """A kernel of which one trainable layer is never used."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, x):
        return self.body(x)


class TwoZeroed(nn.Module):
    """Two zeroed layers in a row: neither can ever learn from the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        return self.last(self.first(x))


REFUSED = {
    "raises": Kernel(_raise),
    "type": Kernel(lambda body, x: [body(x)]),
    "shape": Kernel(lambda body, x: body(x)[:, :1]),
    "dtype": Kernel(lambda body, x: body(x).double()),
    "device": Kernel(lambda body, x: body(x).to("meta")),
    "view": Kernel(lambda body, x: x.view(-1, 6)),
    "in_place": Kernel(_in_place),
    "finite": Kernel(lambda body, x: body(x) / 0.0),
    "grad_mode": Kernel(_turn_gradients_off),
    "gradient": Kernel(lambda body, x: body(x).detach()),
}
ALSO_REFUSED = {
    "finite": Kernel(lambda body, x: _NanGradient.apply(body(x))),
    "gradient": Unreached(),
}


def site():
    return adopt(nn.Linear(6, 6), name="site")


@pytest.mark.parametrize(
    ("check", "kernel"), [*REFUSED.items(), *ALSO_REFUSED.items(), ("gradient", TwoZeroed())]
)
def test_a_bad_kernel_is_refused_and_nothing_is_inserted(check, kernel):
    """The refusal names the check; the seed is dormant and the layer as it was."""
    layer, x = site(), torch.randn(5, 6)
    before = layer(x)
    given = x.clone()
    with pytest.raises(KernelRefusedError) as refusal:
        layer.graft(0, copy.deepcopy(kernel), alpha=1.0, example=x)
    assert refusal.value.check == check
    assert layer.state_layout.state(0) == SeedLifecycleState.DORMANT
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), before)
    assert torch.equal(x, given)
    assert torch.is_grad_enabled()


def test_a_good_kernel_is_accepted():
    """The control: a kernel that does nothing wrong passes every check."""
    layer, x = site(), torch.randn(5, 6)
    layer.graft(0, Kernel(lambda body, x: body(x)), alpha=1.0, example=x)
    assert layer.state_layout.state(0) == SeedLifecycleState.ACTIVE


def test_undeclared_random_numbers_are_refused():
    """A kernel that says it draws nothing and does is refused; one by hand may draw."""
    layer, x = site(), torch.randn(5, 6)
    noisy = Kernel(lambda body, x: body(x) + torch.randn_like(x))
    prepared = prepare_kernel(layer, noisy)
    assert not probe(layer, prepared, x).is_identity
    honest = type(prepared)(module=noisy, draws_random=False)
    with pytest.raises(KernelRefusedError) as refusal:
        probe(layer, honest, x)
    assert refusal.value.check == "random"


def test_a_kernel_without_trainable_parameters_passes():
    """Nothing has to reach parameters that do not train."""
    layer, x = site(), torch.randn(5, 6)
    frozen = Kernel(lambda body, x: body(x)).requires_grad_(False)
    result = probe(layer, prepare_kernel(layer, frozen), x)
    assert not result.is_trainable


def test_a_zeroed_last_layer_passes_and_is_the_identity():
    """One zeroed layer is the way to be born: the others get gradients after one update."""
    layer, x = site(), torch.randn(5, 6)
    kernel = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6))
    nn.init.zeros_(kernel[2].weight)
    nn.init.zeros_(kernel[2].bias)
    result = probe(layer, prepare_kernel(layer, kernel), x)
    assert result.is_identity
    assert result.is_trainable


def test_probing_leaves_no_trace():
    """Random state, parameters, gradients and statistics are as they were, refused or not."""
    host = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    layer, x = adopt(host, name="site"), torch.randn(5, 6)
    kernel = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    tensors = [*layer.state_dict().values(), *kernel.state_dict().values()]
    before, state = [t.clone() for t in tensors], torch.get_rng_state()
    probe(layer, prepare_kernel(layer, kernel), x)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in [*layer.parameters(), *kernel.parameters()])


def test_it_works_under_no_grad_and_inference_mode():
    """The probe takes its own gradients, whatever mode it is called in."""
    layer, x = site(), torch.randn(5, 6)
    with torch.no_grad():
        layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=torch.randn(5, 6))
    assert layer.state_layout.get_active_seeds().tolist() == [True, True, False, False]


def test_what_one_layer_has_passed_is_not_believed_of_another():
    """A host of the same name and parameters may give another shape: its probe is its own."""
    same, smaller = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    for host in (same, smaller):
        adopt(host, name="conv")
    blueprint = default_catalog().blueprints_for(describe_site(same))[0]
    x = torch.randn(2, 4, 8, 8)
    for _ in range(3):  # a later probe asks less and less
        same.graft(0, blueprint, example=x)
        same.unload_kernel(0)
    with pytest.raises(KernelRefusedError, match="shape"):
        smaller.graft(0, blueprint, example=x)


class SlowKernel(nn.Linear):
    """A kernel during whose forward a clock moves on."""

    def __init__(self, clock, seconds):
        super().__init__(6, 6)
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.advance(self.seconds)
        return super().forward(x)

    def __deepcopy__(self, memo):
        return SlowKernel(self.clock, self.seconds)


@pytest.mark.parametrize("seconds", [0.9, 1.1])
def test_a_kernel_that_takes_too_long_is_refused(seconds):
    """More than a second is too long where the host takes none; less is the owner's business."""
    layer, clock = site(), ManualClock()
    kernel = prepare_kernel(layer, SlowKernel(clock, seconds))
    if seconds < 1.0:
        assert probe(layer, kernel, torch.randn(5, 6), clock=clock).is_trainable
        return
    with pytest.raises(KernelRefusedError) as refusal:
        probe(layer, kernel, torch.randn(5, 6), clock=clock)
    assert refusal.value.check == "time"


def test_a_machine_that_halts_once_costs_no_kernel_its_place():
    """A forward that took too long once, and not again, is none of the kernel's."""
    layer, clock = site(), ManualClock()

    class Halted(SlowKernel):
        def forward(self, x):
            self.seconds = 0.0 if self.clock.now() else 5.0
            return super().forward(x)

        def __deepcopy__(self, memo):
            return Halted(self.clock, self.seconds)

    kernel = prepare_kernel(layer, Halted(clock, 0.0))
    assert probe(layer, kernel, torch.randn(5, 6), clock=clock).is_trainable
    assert clock.now() == 5.0, "the first forward took too long, and no other"


def test_a_probe_sees_at_once_that_a_kernel_adds_nothing():
    """A zeroed last layer answers for later probes from the first one on."""
    layer, x = site(), torch.randn(5, 6)
    blueprint = default_catalog().blueprints_for(describe_site(layer))[0]
    kernel = prepare_kernel(layer, blueprint)
    assert probe(layer, kernel, x, is_pristine=True).is_null
    assert probe(layer, kernel, x, is_pristine=True).remembered

"""What every wrapped layer promises, on every kind of host."""

import asyncio
import copy
import io
import pickle

import pytest
import torch
from execution_hosts import in_dtype, run, run_kernel, zero_last_
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.contracts.errors import KernelRefusedError, SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt, release
from esper.execution.kasmina_layer import KasminaLayer
from esper.state.layer_call import LayerCall
from esper.state.layer_record import RECORD


def bare_and_wrapped(kind, **options):
    """Return a host, and a wrapped copy of it."""
    host = kind.make_host()
    return host, adopt(copy.deepcopy(host), name="site", **options)


def gradients(module, x):
    """Return the output, and gradients of its squared sum to host parameters and input."""
    x = LayerCall.of(x).with_tensors(lambda t: t.clone().requires_grad_(t.is_floating_point()))
    y = run(module, x)
    host = [p for n, p in module.named_parameters() if not n.startswith("_seeds.")]
    inputs = [t for t in x.tensors() if t.requires_grad]
    return y, torch.autograd.grad(y.square().sum(), [*host, *inputs])


def assert_same(left, right):
    """Compare two results of `gradients` bit for bit."""
    assert torch.equal(left[0], right[0])
    assert all(torch.equal(a, b) for a, b in zip(left[1], right[1], strict=True))


def test_a_dormant_layer_runs_the_host_class_function(kind):
    """The forward of a dormant layer is the host class's own function object."""
    host, layer = bare_and_wrapped(kind)
    assert (type(layer).forward is type(host).forward) == kind.is_native


def test_wrapping_keeps_the_object(kind):
    """The layer is the host object, an instance of both classes."""
    host = kind.make_host()
    layer = adopt(host, name="site")
    assert layer is host
    assert isinstance(layer, KasminaLayer)


def test_dormant_outputs_and_gradients_are_the_hosts(kind):
    """A dormant layer's outputs and gradients are the bare host's, bit for bit."""
    host, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    assert_same(gradients(layer, x), gradients(host, x))


def test_telemetry_counts_and_changes_nothing(kind):
    """With telemetry the calls are counted and the numbers are the host's."""
    host, layer = bare_and_wrapped(kind, telemetry_enabled=True)
    x = kind.make_input()
    assert_same(gradients(layer, x), gradients(host, x))
    assert layer.forward_count == 1


def test_keys_of_a_dormant_layer_are_the_hosts(kind):
    """Wrapping adds no key to the state dict and no parameter."""
    host, layer = bare_and_wrapped(kind)
    assert list(layer.state_dict()) == list(host.state_dict())
    assert [n for n, _ in layer.named_modules()] == [n for n, _ in host.named_modules()]


def test_release_gives_the_class_back(kind):
    """A released layer has the host's class and nothing of ours."""
    host, layer = bare_and_wrapped(kind)
    released = release(layer)
    assert type(released) is type(host)
    assert RECORD not in released.__dict__


def test_a_layer_in_use_is_not_released(kind):
    """Releasing a layer with a kernel is refused, and it goes on working."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    before = run(layer, x)
    with pytest.raises(SeedLifecycleError, match="seeds \\[0\\] are in use"):
        release(layer)
    assert torch.equal(run(layer, x), before)


@pytest.mark.parametrize("guard", ["always", "step", "off"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_an_adding_seed_follows_the_formula(kind, guard, alpha):
    """With one adding seed the output is h + alpha k, and gradients follow, bit for bit."""
    host, layer = bare_and_wrapped(kind)
    kernel, x = kind.make_kernel(), kind.make_input()
    layer.enable_step_guard()
    layer.graft(0, copy.deepcopy(kernel), alpha=alpha, guard=guard, example=x)

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = host
            self._seeds = kernel

        def forward(self, *args, **kwargs):
            call = LayerCall(args, kwargs)
            h = run(self.host, call)
            return h + torch.tensor(alpha) * run_kernel(kind, self._seeds, call, h)

    assert_same(gradients(layer, x), gradients(ByHand(), x))


@pytest.mark.parametrize("guard", ["always", "off"])
def test_a_replacing_seed_at_alpha_one_is_the_kernel(kind, guard):
    """A replacing seed alone at alpha 1 gives exactly the kernel's output."""
    host, layer = bare_and_wrapped(kind)
    kernel, x = kind.make_kernel(), kind.make_input()
    layer.graft(0, kernel, alpha=1.0, mode="replace", guard=guard, example=x)
    assert torch.equal(run(layer, x), run_kernel(kind, kernel, x, run(host, x)))


def test_several_seeds_add_up_in_slot_order(kind):
    """Serial, parallel, adding and replacing seeds together give w h + sum of alpha k."""
    host, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    one, two, three = kind.make_kernel(), kind.make_serial(), kind.make_kernel()
    layer.graft(2, three, alpha=0.5, example=x)
    layer.graft(1, two, alpha=0.25, position="serial", example=x)
    layer.graft(0, one, alpha=0.125, mode="replace", example=x)
    h = run(host, x)
    weight = 1.0 - torch.tensor(0.125)
    first, last = (run_kernel(kind, kernel, x, h) for kernel in (one, three))
    terms = (0.125 * first, 0.25 * two(h), 0.5 * last)
    assert torch.equal(run(layer, x), weight * h + terms[0] + terms[1] + terms[2])


def test_a_graft_is_the_identity_at_birth(kind):
    """Without an alpha nothing changes: a zeroed kernel enters at 1, another one at 0."""
    host, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, zero_last_(kind.make_kernel()), example=x)
    layer.graft(1, kind.make_kernel(), example=x)
    assert (layer.alpha(0), layer.alpha(1)) == (1.0, 0.0)
    assert torch.equal(run(layer, x), run(host, x))


def test_unloading_leaves_the_host_as_it_was(kind):
    """After unloading, outputs, class and keys are those of a layer that was never grafted."""
    host, layer = bare_and_wrapped(kind)
    x, dormant = kind.make_input(), type(layer)
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    assert layer.unload_kernel(0) is True
    assert type(layer) is dormant
    assert list(layer.state_dict()) == list(host.state_dict())
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict(host.state_dict())
    assert_same(gradients(fresh, x), gradients(copy.deepcopy(host), x))


def test_unloading_a_dormant_seed_says_so(kind):
    """Unloading where nothing is returns False."""
    _, layer = bare_and_wrapped(kind)
    assert layer.unload_kernel(0) is False


def test_alpha_zero_takes_the_seed_out_of_the_plan(kind):
    """At alpha 0 the output is the host's again, bit for bit, whatever the kernel holds."""
    host, layer = bare_and_wrapped(kind)
    kernel, x = kind.make_kernel(), kind.make_input()
    layer.graft(0, kernel, alpha=0.5, guard="off", example=x)
    with torch.no_grad():
        next(kernel.parameters()).fill_(torch.nan)
    layer.set_alpha(0, 0.0)
    assert torch.equal(run(layer, x), run(host, x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_guarded(kind, duplicate):
    """A copy computes the same, shares nothing, and zeroes bad kernel gradients like its origin."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert torch.equal(run(duplicate(layer), x), run(copy.deepcopy(layer), x))
    assert all(p._backward_hooks for p in twin.seed_kernel(0).parameters())
    twin.unload_kernel(0)
    assert layer.alpha(0) == 0.5


def test_state_survives_torch_save(kind):
    """A state dict with a hand-made kernel loads into a layer that holds such a kernel."""
    _, layer = bare_and_wrapped(kind)
    other = copy.deepcopy(layer)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    other.graft(0, kind.make_kernel(), alpha=0.25, example=x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    other.eval()
    assert other.alpha(0) == 0.5
    assert torch.equal(run(other, x), run(layer.eval(), x))


def test_mode_device_and_dtype_follow_the_host(kind):
    """A kernel follows train, eval and double; alpha stays float32."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.eval()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    assert not layer.seed_kernel(0).training
    layer.double()
    assert run(layer, in_dtype(x, torch.float64)).dtype == torch.float64
    assert layer.state_dict()["_seeds.0.alpha"].dtype == torch.float32


def test_half_precision_runs_in_half(kind):
    """In bfloat16 the output is bfloat16: alpha does not promote it."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    layer.bfloat16()
    assert run(layer, in_dtype(x, torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_casts_the_kernel_as_it_does_the_host(kind):
    """Under autocast a seed contributes and no fault is counted."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grafted = run(layer, x)
        layer.set_alpha(0, 0.0)
        assert not torch.equal(grafted, run(layer, x))
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_a_swap_keeps_the_working_kernel_until_the_new_one_passes(kind):
    """A refused exchange leaves the kernel that was there; an accepted one takes its place."""
    _, layer = bare_and_wrapped(kind)
    kernel, x = kind.make_kernel(), kind.make_input()
    layer.graft(0, kernel, alpha=0.5, example=x)
    with pytest.raises(KernelRefusedError):
        layer.graft(0, nn.Flatten(0), alpha=0.5, example=x)
    assert layer.seed_kernel(0) is kernel
    better = kind.make_kernel()
    layer.graft(0, better, alpha=0.5, example=x)
    assert layer.seed_kernel(0) is better


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_fossil_goes_on_contributing_and_cannot_be_changed(kind, mode):
    """A kernel that is not affine stays in the plan with its alpha; copies and files keep it."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.eval()
    layer.graft(0, kind.make_kernel(), alpha=0.5, mode=mode, example=x)
    y, twin = run(layer, x), copy.deepcopy(layer)

    assert not layer.fossilize(0).folded
    assert layer.state_layout.state(0) == SeedLifecycleState.FOSSILIZED
    assert not layer.state_layout.get_active_seeds().any()
    assert layer.state_layout.has_active_seeds()
    twin.load_state_dict(layer.state_dict())
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), twin):
        assert torch.equal(run(each, x), y)
    for change in (lambda: layer.unload_kernel(0), lambda: layer.set_alpha(0, 0.25)):
        with pytest.raises(SeedLifecycleError):
            change()
    assert torch.equal(run(layer, x), y)


def test_a_grown_layer_is_called_inside_a_running_event_loop(kind):
    """In a notebook or an asynchronous trainer the seed contributes as anywhere."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.eval()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)

    async def call():
        return run(layer, x)

    assert torch.equal(asyncio.run(call()), run(layer, x))
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_an_interrupt_in_a_kernel_reaches_the_caller(kind):
    """The fence holds errors of a kernel; control-C is no error of it, and nothing is counted."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    layer.seed_kernel(0).register_forward_pre_hook(_raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(layer, x)
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_a_kernel_without_memory_costs_its_contribution(kind):
    """Where the device has no memory left for a kernel, the host answers and the fault is known."""
    host, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.eval()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    layer.seed_kernel(0).register_forward_pre_hook(_raising(torch.OutOfMemoryError()))
    assert torch.equal(run(layer, x), run(host.eval(), x))
    assert layer.get_stats()["execution_stats"]["fault_count"] == 1


def _raising(error):
    def hook(*_):
        raise error

    return hook


def test_functional_call_replaces_kernel_parameters(kind):
    """functional_call reaches the parameters of a kernel by name."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    layer.eval()
    zeros = {n: torch.zeros_like(p) for n, p in layer.named_parameters() if n.startswith("_seeds.")}
    call = LayerCall.of(x)
    changed = torch.func.functional_call(layer, zeros, call.args, call.kwargs)
    changed = changed[0] if isinstance(changed, tuple) else changed
    assert torch.equal(changed, run(layer.default_layer, x))


def test_hooks_of_the_host_still_run(kind):
    """A forward hook that was there before wrapping sees the grafted output."""
    host = kind.make_host()
    seen = []
    host.register_forward_hook(lambda module, args, output: seen.append(output))
    layer = adopt(host, name="site")
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    seen.clear()
    y = run(layer, x)
    assert len(seen) == 1
    assert (seen[0][0] if isinstance(seen[0], tuple) else seen[0]) is y


def test_the_host_is_a_view_of_the_layer(kind):
    """default_layer is of the host's class, shares its parameters and has no seeds in it."""
    host, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    view = layer.eval().default_layer
    assert type(view) is type(host)
    assert torch.equal(run(view, x), run(host.eval(), x))


@pytest.mark.parametrize("seed_idx", [-1, 4])
def test_an_index_out_of_range_is_refused(kind, seed_idx):
    """Neither -1 nor num_seeds names a seed."""
    _, layer = bare_and_wrapped(kind)
    with pytest.raises(ValueError, match="not in \\[0, 4\\)"):
        layer.graft(seed_idx, kind.make_kernel(), example=kind.make_input())


@pytest.mark.parametrize(
    ("alpha", "error"),
    [(1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("x", TypeError)],
)
def test_an_alpha_is_a_number_from_zero_to_one(kind, alpha, error):
    """Refused by name, at the graft and later, and nothing has changed."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), example=x, alpha=0.5)
    for change in (
        lambda: layer.graft(1, kind.make_kernel(), example=x, alpha=alpha),
        lambda: layer.set_alpha(0, alpha),
    ):
        with pytest.raises(error, match=r"alpha is a number in \[0, 1\]; got"):
            change()
    assert [layer.alpha(i) for i in (0, 1)] == [0.5, 0.0]


def test_replacing_alphas_sum_to_one_at_most(kind):
    """An alpha that would let replacing seeds weigh more than 1 is refused, and changes nothing."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.75, mode="replace", example=x)
    layer.graft(1, kind.make_kernel(), alpha=0.25, mode="replace", example=x)
    with pytest.raises(ValueError, match="at most 1"):
        layer.set_alpha(1, 0.5)
    assert layer.alpha(1) == 0.25


def test_replacing_alphas_that_sum_to_one_in_decimals_are_accepted(kind):
    """0.6 and 0.4 are 1, though not as float32; a visible excess is not."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.6, mode="replace", example=x)
    layer.graft(1, kind.make_kernel(), alpha=0.4, mode="replace", example=x)
    assert layer.alpha(1) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="at most 1"):
        layer.set_alpha(1, 0.400001)


def test_a_step_guard_needs_a_reader(kind):
    """guard='step' without an optimizer that reads the flags is refused."""
    _, layer = bare_and_wrapped(kind)
    with pytest.raises(ValueError, match="sync_optimizer"):
        layer.graft(0, kind.make_kernel(), guard="step", example=kind.make_input())


@pytest.mark.parametrize("guard", ["always", "off"])
def test_gradients_are_those_of_the_output(kind, guard):
    """In float64, finite differences agree for kernel, host and input, guarded or not."""
    _, layer = bare_and_wrapped(kind)
    x = kind.make_input()
    layer.graft(0, kind.make_kernel(), alpha=0.5, guard=guard, example=x)
    layer.double()
    names = [name for name, _ in layer.named_parameters()]
    call = LayerCall.of(in_dtype(x, torch.float64))

    def output(first, *parameters):
        given = LayerCall((first, *call.args[1:]), call.kwargs)
        changed = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(layer, changed, given.args, given.kwargs)
        return y[0] if isinstance(y, tuple) else y

    first = call.x.requires_grad_(call.x.is_floating_point())
    assert torch.autograd.gradcheck(output, (first, *layer.parameters()), fast_mode=True)


def test_a_checkpointed_layer_gives_the_same_gradients(kind):
    """Recomputed in the backward, a grafted layer's gradients are those of one that is not."""
    _, layer = bare_and_wrapped(kind)
    x = LayerCall.of(kind.make_input())
    layer.graft(0, kind.make_kernel(), alpha=0.5, example=x)
    layer.eval()  # a norm that is recomputed would count its statistics twice

    x = x.with_tensors(lambda t: t.requires_grad_(t.is_floating_point()))
    parameters = list(layer.parameters())

    def checkpointed(*args, **kwargs):
        return checkpoint(layer, *args, use_reentrant=False, **kwargs)

    plain, again = (
        torch.autograd.grad(run(forward, x).square().sum(), parameters)
        for forward in (layer, checkpointed)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

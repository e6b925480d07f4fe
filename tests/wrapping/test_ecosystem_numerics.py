"""However a model is run, a layer is its host while it is dormant and its formula once it grew."""

import copy

import pytest
import torch
from ecosystem_hosts import DIFFERENTIABLE, HOSTS, ByHand, graft, result, wrapped
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import esper

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",  # torch's own, in torch.func
    "ignore:There is a performance drop:UserWarning",  # vmap over batch norm
)


def loss_of(module, call):
    return result(module(*call)).float().square().mean()


def gradients(module, call):
    """Outputs, and the gradients that a backward leaves in parameters and input."""
    x = call[0].clone().requires_grad_()
    y = result(module(x * 1, *call[1:]))  # autocast remembers the casts of leaves, so no leaf
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def in_evaluation(module, call):
    return gradients(module.eval(), call)


def in_float64(module, call):
    return gradients(module.double(), [x.double() for x in call])


def in_bfloat16(module, call):
    return gradients(module.bfloat16(), [x.bfloat16() for x in call])


def under_autocast(module, call):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gradients(module, call)


def under_no_grad(module, call):
    with torch.no_grad():
        return [result(module(*call))]


def under_inference_mode(module, call):
    with torch.inference_mode():
        return [result(module(*call))]


def twice_a_step(module, call):
    (loss_of(module, call) + loss_of(module, [2 * call[0], *call[1:]])).backward()
    return [p.grad for p in module.parameters()]


def accumulated(module, call):
    for scale in (1, 2, 3):
        loss_of(module, [scale * call[0], *call[1:]]).backward()
    return [p.grad for p in module.parameters()]


def with_double_backward(module, call):
    x = call[0].clone().requires_grad_()
    loss = loss_of(module, [x, *call[1:]])
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    g.square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def checkpointed(module, call, *, use_reentrant):
    x = call[0].clone().requires_grad_()
    y = result(checkpoint(module, x, *call[1:], use_reentrant=use_reentrant))
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def checkpointed_with_reentry(module, call):
    return checkpointed(module, call, use_reentrant=True)


def checkpointed_without_reentry(module, call):
    return checkpointed(module, call, use_reentrant=False)


def train(module, optimizer, step):
    for _ in range(3):
        step(optimizer)
    return list(module.parameters())


def with_lbfgs(module, call):
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(module, call)
        loss.backward()
        return loss

    return train(module, optimizer, lambda o: o.step(closure))


def with_grad_scaler(module, call):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def step(optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(module, call)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    return train(module, torch.optim.AdamW(module.parameters()), step)


def by_name(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def with_functional_call(module, call):
    halves = {name: p / 2 for name, p in by_name(module).items()}
    return [result(functional_call(module, halves, tuple(call)))]


def with_func_grad(module, call):
    module.eval()
    found = grad(lambda p: result(functional_call(module, p, tuple(call))).square().sum())(
        by_name(module)
    )
    return list(found.values())


def with_per_sample_gradients(module, call):
    module.eval()

    def loss(parameters, x):
        y = functional_call(module, parameters, (x[None], *call[1:]))
        return result(y).square().sum()

    return list(vmap(grad(loss), (None, 0))(by_name(module), call[0]).values())


def with_vmap(module, call):
    module.eval()
    return [vmap(lambda x: result(module(x[None], *call[1:])))(call[0])]


def with_jvp(module, call):
    module.eval()

    def run(x):
        return result(module(x, *call[1:]))

    return list(jvp(run, (call[0],), (torch.ones_like(call[0]),)))


def with_jacrev(module, call):
    module.eval()
    return [jacrev(lambda x: result(module(x, *call[1:])))(call[0])]


def with_hessian(module, call):
    module.eval()
    return [hessian(lambda x: result(module(x, *call[1:])).square().sum())(call[0][:1])]


def channels_last(module, call):
    layout = torch.channels_last if call[0].dim() == 4 else torch.contiguous_format
    module.to(memory_format=layout)
    found = gradients(module, [x.to(memory_format=layout) for x in call])
    assert found[0].is_contiguous(memory_format=layout)
    return found


def saved_on_cpu(module, call):
    with torch.autograd.graph.save_on_cpu():
        return gradients(module, call)


def anomaly_mode(module, call):
    with torch.autograd.set_detect_anomaly(True):
        return gradients(module, call)


MAPPED = (with_per_sample_gradients, with_vmap)
SCENARIOS = [
    gradients,
    in_evaluation,
    in_float64,
    in_bfloat16,
    under_autocast,
    under_no_grad,
    under_inference_mode,
    twice_a_step,
    accumulated,
    with_double_backward,
    checkpointed_with_reentry,
    checkpointed_without_reentry,
    with_lbfgs,
    with_grad_scaler,
    with_functional_call,
    with_func_grad,
    with_per_sample_gradients,
    with_vmap,
    with_jvp,
    with_jacrev,
    with_hessian,
    channels_last,
    saved_on_cpu,
    pytest.param(anomaly_mode, marks=pytest.mark.filterwarnings("ignore:Anomaly Detection")),
]


@pytest.fixture
def host(name, scenario):
    """A host, where torch can do with it what is asked for."""
    if scenario in MAPPED and not HOSTS[name].can_be_mapped:
        pytest.skip("torch cannot map over such a host")
    return HOSTS[name]


def own_class(layer):
    """Return a layer with its own class again."""
    return esper.restore(layer).model


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_dormant_layer_is_its_host(host, scenario):
    """Whatever is done to a dormant layer gives what it gives on the host, bit for bit."""
    layer = wrapped(host)
    bare = own_class(copy.deepcopy(layer))
    call = host.make_call()

    assert_equal(scenario(layer, call), scenario(bare, call))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_contributing_layer_is_its_formula(host, scenario):
    """Whatever is done to a grown layer gives what it gives on h + alpha k, bit for bit.

    Afterwards the seed has no fault to its name.
    """
    layer = graft(wrapped(host), host)
    kernel = copy.deepcopy(layer.seed_kernel(0))
    by_hand = ByHand(own_class(copy.deepcopy(layer)), kernel, 0.5, host.position)
    call = host.make_call()

    assert_equal(scenario(layer, call), scenario(by_hand, call))
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


@pytest.mark.parametrize("name", HOSTS)
def test_what_is_changed_in_inference_mode_still_trains(name):
    """Grafts, alphas and observed calls of an evaluation leave no inference tensor behind."""
    host = HOSTS[name]
    layer = wrapped(host)
    layer.graft(0, host.make_kernel(), alpha=0.5, position=host.position)
    other = host.make_kernel()
    with torch.inference_mode():
        layer(*host.make_call())
        layer.graft(1, other, alpha=0.5, position=host.position, example=host.make_call())
        layer.set_alpha(0, 0.25)
        layer.get_stats()

    result(layer(*host.make_call())).square().sum().backward()

    assert all(p.grad is not None for p in other.parameters())
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


class GivesNoGradient(torch.autograd.Function):
    """Addition whose first input gets no gradient: None, not zeros."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        return x + y

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


@pytest.mark.parametrize("name", HOSTS)
def test_a_backward_that_brings_no_gradient_passes(name):
    """Where what follows gives a layer no gradient, its parameters get none or zeros."""
    layer = graft(wrapped(HOSTS[name]), HOSTS[name])
    y = result(layer(*HOSTS[name].make_call()))
    beside = torch.zeros_like(y).requires_grad_()

    GivesNoGradient.apply(y, beside).sum().backward()

    assert torch.equal(beside.grad, torch.ones_like(y))
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


@pytest.mark.parametrize("name", ["linear", "layer_norm", "block", "attention"])
def test_first_and_second_derivatives_are_those_of_the_formula(name):
    """Gradcheck and gradgradcheck pass in float64, with and without undefined gradients."""
    layer = graft(wrapped(HOSTS[name]), HOSTS[name]).double()
    call = [x.double().requires_grad_() for x in HOSTS[name].make_call()]

    def run(*call):
        return result(layer(*call))

    assert torch.autograd.gradcheck(run, call)
    assert torch.autograd.gradgradcheck(run, call)

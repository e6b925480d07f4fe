"""Which tensor is a layer's input is the host's to say, and kernels read it as it was given."""

import copy
import itertools

import pytest
import torch
from torch import nn

import esper
from esper.forward.host_view import declared
from esper.state.layer_call import LayerCall


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x, mask, scale=None):
        return self.body(x) * mask * (1.0 if scale is None else scale)


class KeywordsOnly(Block):
    def forward(self, *, x, mask, scale=None):
        return Block.forward(self, x, mask, scale)


class EmbedsInstead(Block):
    """Takes tokens, or what was embedded already."""

    def forward(self, tokens=None, mask=None, embeds=None):
        h = self.body(embeds if tokens is None else tokens)
        return h if mask is None else h * mask


class OtherNames(nn.Module):
    """A kernel that calls what it takes by names of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, hidden, mask=None):
        return self.body(hidden) * (1.0 if mask is None else 2.0 * mask)


def wrapped(host):
    torch.manual_seed(0)
    net = esper.wrap(nn.ModuleDict({"b": host}), select=["b"])
    return net, net["b"]


def given():
    return {"x": torch.randn(3, 4), "mask": torch.rand(3, 4), "scale": torch.tensor(3.0)}


ORDERS = list(itertools.permutations(["x", "mask", "scale"]))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("host", [Block, KeywordsOnly])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), OtherNames], ids=["one", "several"])
def test_the_order_of_keywords_does_not_matter(make, host, order):
    """A call by keywords in any order gives what the formula says, unwrapped too."""
    net, layer = wrapped(host())
    kernel, values = make(), given()
    layer.graft(0, kernel, alpha=1.0, example=LayerCall((), values))
    with torch.no_grad():
        read = [values["x"]] if isinstance(kernel, nn.Linear) else [values["x"], values["mask"]]
        k = kernel(*read)
        want = layer.default_layer(**values) + k
        call = {name: values[name] for name in order}
        torch.testing.assert_close(layer(**call), want)
        layer(**call)
        plain = esper.unwrap(net)["b"]
        torch.testing.assert_close(plain(**call), want)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_an_example_by_keywords_is_read_by_the_signature(order):
    """A probe reads the host's input of an example in any order."""
    _, layer = wrapped(Block())
    values = given() | {"mask": torch.ones(1), "scale": None}
    kernel = nn.Linear(4, 4)
    layer.graft(0, kernel, alpha=1.0, example=LayerCall((), {n: values[n] for n in order}))
    with torch.no_grad():
        assert torch.equal(layer(**values), layer.default_layer(**values) + kernel(values["x"]))


def test_an_input_that_is_left_out_is_the_next_one():
    """Where the first argument is None, kernels read the first that is not."""
    net, layer = wrapped(EmbedsInstead())
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=1.0, example=LayerCall((None,), {"embeds": x}))
    with torch.no_grad():
        want = layer.body(x) + kernel(x)
        torch.testing.assert_close(layer(None, embeds=x), want)
        torch.testing.assert_close(layer(embeds=x, tokens=None), want)
        torch.testing.assert_close(esper.unwrap(net)["b"](embeds=x), want)


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_a_call_is_read_by_the_signature_wherever_it_is_seen(is_wrapped):
    """A wrapped layer, dormant or active, and a plain module say alike what their input is."""
    layer = wrapped(Block())[1] if is_wrapped else Block()
    values = given()
    for _ in range(2):
        call = declared(layer, LayerCall((), {n: values[n] for n in ("scale", "mask", "x")}))
        assert call.x is values["x"]
        if is_wrapped:
            layer.graft(0, nn.Linear(4, 4), alpha=1.0, example=call)


class Overwrites(nn.Module):
    """Changes its input before it reads it."""

    def __init__(self, change):
        super().__init__()
        self.body, self.change = nn.Linear(4, 4), change

    def forward(self, x):
        self.change(x)
        return self.body(x)


class OverwritesInTraining(Overwrites):
    def forward(self, x):
        return self.body(self.change(x) if self.training else x)


CHANGES = {
    "relu": nn.ReLU(inplace=True),
    "mul": lambda x: x.mul_(3.0),
    "row": lambda x: x[0].zero_(),
}


@pytest.mark.parametrize("guard", ["always", "step", "off"])
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_kernel_reads_what_the_host_overwrites(change, mode, guard):
    """Forward and unwrapped graph give the formula over the input as it was given."""
    net, layer = wrapped(Overwrites(change))
    layer.enable_step_guard()
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=0.5, mode=mode, guard=guard, example=x.clone())
    with torch.no_grad():
        h, k = layer.default_layer(x.clone()), kernel(x)
        want = h + 0.5 * k if mode == "add" else 0.5 * h + 0.5 * k
        torch.testing.assert_close(layer(x.clone()), want)
        torch.testing.assert_close(esper.unwrap(net)["b"](x.clone()), want)


def test_gradients_pass_through_both_readings():
    """The input's gradient is that of the host on the changed and of the kernel on the given."""
    _, layer = wrapped(Overwrites(CHANGES["mul"]))
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=1.0, example=x.clone())
    leaf = x.clone().requires_grad_()
    layer(leaf * 1.0).sum().backward()
    want = (3.0 * layer.body.weight + kernel.weight).sum(0).expand(3, 4)
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.parametrize("graft_in_training", [True, False])
def test_a_host_may_overwrite_in_one_mode_only(graft_in_training):
    """Each mode is looked at where it first runs."""
    _, layer = wrapped(OverwritesInTraining(CHANGES["relu"]))
    layer.train(graft_in_training)
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=1.0, example=x.clone())
    for training in (True, False, True):
        layer.train(training)
        with torch.no_grad():
            want = layer.body(x.relu() if training else x) + kernel(x)
            torch.testing.assert_close(layer(x.clone()), want)


def test_a_loaded_kernel_reads_what_the_host_overwrites():
    """Without a probe the first call is looked at."""
    _, layer = wrapped(Overwrites(CHANGES["relu"]))
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=1.0, example=x.clone())
    layer._kasmina.writes_input = [None, None]
    other = copy.deepcopy(layer)
    with torch.no_grad():
        want = layer.body(x.relu()) + kernel(x)
        torch.testing.assert_close(other(x.clone()), want)
        torch.testing.assert_close(other(x.clone()), want)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x.clone()), want)


def test_compiled_code_reads_what_the_host_overwrites():
    """A graph follows the same rule."""
    _, layer = wrapped(Overwrites(CHANGES["relu"]))
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    layer.graft(0, kernel, alpha=1.0, example=x.clone())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want = layer.body(x.relu()) + kernel(x)
        torch.testing.assert_close(compiled(x.clone()), want)


def test_a_shadow_kernel_reads_what_the_host_overwrites():
    """An audition feeds its candidate what the site is given."""
    _, layer = wrapped(Overwrites(CHANGES["relu"]))
    kernel, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.no_grad(), layer.shadow(0, kernel):
        torch.testing.assert_close(layer(x.clone()), layer.body(x.relu()) + kernel(x))

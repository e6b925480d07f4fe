"""What people hang on modules: hooks, parametrizations, pruning, tied weights."""

import copy
import warnings

import pytest
import torch
from ecosystem_hosts import DIFFERENTIABLE, HOSTS, ByHand, graft, result, wrapped
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import esper


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


@pytest.mark.parametrize("host", [HOSTS[name] for name in DIFFERENTIABLE], ids=DIFFERENTIABLE)
@pytest.mark.parametrize("is_grown", [False, True])
def test_hooks_can_be_put_on_and_taken_off(host, is_grown):
    """Forward and backward hooks, and their pre-hooks, see each call of a layer until removed."""
    layer = wrapped(host)
    if is_grown:
        graft(layer, host)
    call, seen = host.make_call(), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
        layer.register_forward_hook(lambda module, args, output: seen.append(result(output))),
        layer.register_full_backward_pre_hook(lambda module, grads: seen.append("backward")),
        layer.register_full_backward_hook(lambda module, into, out: seen.append(into[0])),
    ]
    x = call[0].clone().requires_grad_()

    y = result(layer(x, *call[1:]))
    y.sum().backward()
    for handle in handles:
        handle.remove()
    result(layer(*call)).sum().backward()

    assert [seen[0], seen[2]] == ["before", "backward"]
    assert torch.equal(seen[1], y)
    assert torch.equal(seen[3], x.grad)
    assert len(seen) == 4


def test_a_hook_that_changes_the_output_has_the_last_word(host):
    """A forward hook's answer replaces the blended output, as it would the host's."""
    layer = graft(wrapped(host), host)
    layer.register_forward_hook(lambda module, args, output: 7.0)

    assert layer(*host.make_call()) == 7.0


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: use the new one
        nn.utils.weight_norm(layer)


def remove_parametrization(layer):
    parametrize.remove_parametrizations(layer, "weight")


RULES = {
    "weight_norm": (parametrizations.weight_norm, remove_parametrization),
    "old_weight_norm": (old_weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (parametrizations.spectral_norm, remove_parametrization),
    "orthogonal": (parametrizations.orthogonal, remove_parametrization),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
}
"""How a weight is made from others, and how that is ended."""

AFTER = [(rule, state) for rule in RULES for state in ("dormant", "grown")]


@pytest.fixture(params=["linear", "conv2d"])
def weighted(request):
    return HOSTS[request.param]


def assert_trains_by_hand(layer, host, kernel):
    """Compare a step's gradients with those of the formula over a bare host like the layer."""
    by_hand = ByHand(host, kernel, 0.5, "parallel")
    x = torch.randn(3, 6) if isinstance(host, nn.Linear) else torch.randn(2, 4, 5, 5)
    expected, found = by_hand(x), layer(x)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    found = {name: p.grad for name, p in layer.named_parameters()}
    for name, p in by_hand.named_parameters():
        mine = name.replace("kernel.", "_seeds.0.kernel.", 1).removeprefix("host.")
        assert torch.equal(found.pop(mine), p.grad), name
    assert not found


@pytest.mark.parametrize(("rule", "state"), AFTER)
def test_a_rule_put_on_a_wrapped_layer(weighted, rule, state):
    """A weight that is made from others in a layer is made so in training, and can be ended."""
    start, end = RULES[rule]
    bare = weighted.make()
    layer = esper.wrap(copy.deepcopy(bare))
    if state == "grown":
        graft(layer, weighted)
    torch.manual_seed(0)
    start(layer)
    torch.manual_seed(0)
    start(bare)
    if state == "dormant":
        graft(layer, weighted)

    assert_trains_by_hand(layer, bare, copy.deepcopy(layer.seed_kernel(0)))
    end(layer)
    end(bare)

    call = weighted.make_call()
    assert torch.equal(layer.default_layer(*call), bare(*call))
    assert not torch.equal(layer(*call), bare(*call))
    layer.unload_kernel(0)
    assert type(esper.unwrap(layer)) is type(bare)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_was_there_before_wrapping(weighted, rule):
    """A layer whose weight is made from others grows, and gives its own class back."""
    start, _ = RULES[rule]
    bare = weighted.make()
    start(bare)
    own_class = type(bare)
    layer = esper.wrap(bare)
    twin = weighted.make()
    start(twin)
    twin.load_state_dict(layer.state_dict())

    graft(layer, weighted)

    assert_trains_by_hand(layer, twin, copy.deepcopy(layer.seed_kernel(0)))
    assert type(esper.restore(layer).model) is own_class
    call = weighted.make_call()
    assert torch.equal(layer.eval()(*call), twin.eval()(*call))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_ended_while_wrapped(weighted, rule):
    """A rule of before wrapping can be ended on the wrapped layer, dormant or grown."""
    start, end = RULES[rule]
    call = weighted.make_call()
    bare = weighted.make()
    own_class = type(bare)
    start(bare)
    layer = graft(esper.wrap(bare), weighted).eval()
    expected = layer(*call)

    end(layer)

    assert torch.allclose(layer(*call), expected, atol=1e-6)
    assert isinstance(layer, esper.KasminaLayer)
    layer.unload_kernel(0)
    assert type(esper.unwrap(layer)) is own_class


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_on_a_kernel(rule):
    """The weights of a kernel can be made from others too, and are trained so."""
    start, end = RULES[rule]
    host = HOSTS["linear"]
    layer = graft(wrapped(host), host)
    bare = esper.restore(copy.deepcopy(layer)).model
    torch.manual_seed(0)
    start(layer.seed_kernel(0).down)

    assert_trains_by_hand(layer, bare, copy_of_kernel(layer, start))
    layer.eval()
    expected = layer(*(call := host.make_call()))
    end(layer.seed_kernel(0).down)
    assert torch.allclose(layer(*call), expected, atol=1e-6)


def copy_of_kernel(layer, start):
    """Return a kernel with the same rule and the same numbers; some rules forbid deepcopy."""
    other = HOSTS["linear"].make_kernel()
    start(other.down)
    other.load_state_dict(layer.seed_kernel(0).state_dict())
    return other


class Tied(nn.Module):
    """An embedding whose weight is the head's; (N, L) integers to (N, L, 9)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def test_tied_weights_train_as_one():
    """Wrapped by request, a tied head takes part in training bit for bit, and stays tied."""
    torch.manual_seed(0)
    bare = Tied()
    model = esper.wrap(copy.deepcopy(bare), select=["body", "head"])
    tokens = torch.randint(9, (4, 3))

    for each in (bare, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            each(tokens).square().mean().backward()
            optimizer.step()

    assert model.head.weight is model.embedding.weight
    assert all(
        torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True)
    )
    assert copy.deepcopy(model).head.weight.data_ptr() != model.head.weight.data_ptr()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embedding.weight


def test_a_graft_at_a_tied_head_never_reaches_the_embedding():
    """An affine kernel at a tied head is not folded: the embedding would move with it."""
    torch.manual_seed(0)
    model = esper.wrap(Tied(), select="head")
    before = model.embedding.weight.detach().clone()
    tokens = torch.randint(9, (4, 3))
    model.head.graft(0, nn.Linear(6, 9, bias=False), alpha=0.5, example=torch.randn(2, 6))
    expected = model(tokens)

    certificate = model.head.fossilize(0)

    assert not certificate.folded
    assert torch.equal(model.embedding.weight, before)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(esper.unwrap(model)(tokens), expected)

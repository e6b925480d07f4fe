"""Whose parameter, whose optimizer: a kernel is trained by what trains its host, kind by kind."""

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon

from esper.continuity.ensemble import joined, rebuilt, register_optimizer
from esper.continuity.optimizer import sync_optimizer
from esper.state.host_parts import is_in_a_seed
from esper.wrapping.wrap import wrap


def kernel(width=4):
    """Two weights, two biases, a norm's two."""
    return nn.Sequential(nn.Linear(width, 8), nn.LayerNorm(8), nn.Linear(8, width))


def grafted(model, *layers, of=kernel):
    for layer in layers:
        layer.graft(0, of(), alpha=1.0, example=torch.randn(8, 4))
    return model


def host(**settings):
    return wrap(nn.Sequential(nn.Linear(4, 4, **settings), nn.LayerNorm(4), nn.Linear(4, 4)))


def split(model):
    """What people decay, and what they do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return matrices, [p for p in model.parameters() if p.ndim <= 1]


def kernels_in(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return sorted(names[id(p)] for p in group["params"] if is_in_a_seed(names[id(p)]))


def dims_in(model, group):
    by_name = dict(model.named_parameters())
    return sorted({by_name[name].ndim for name in kernels_in(model, group)})


def decayed(model, *, plain_first):
    matrices, vectors = split(model)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups[::-1] if plain_first else groups, lr=1e-2)


@pytest.mark.parametrize("plain_first", [False, True])
@pytest.mark.parametrize("bias", [False, True], ids=["host-without-bias", "host-with-bias"])
@pytest.mark.parametrize("site", [0, 1], ids=["linear", "norm"])
def test_weights_are_decayed_and_biases_and_norms_are_not(plain_first, bias, site):
    """Also where the host has no bias, or, being a norm, no weights that are decayed."""
    model = host(bias=bias)
    optimizer = decayed(model, plain_first=plain_first)
    grafted(model, model[site])
    sync_optimizer(model, optimizer)
    of_decay = {group["weight_decay"]: dims_in(model, group) for group in optimizer.param_groups}
    assert of_decay == {0.1: [2], 0.0: [1]}


def test_one_group_takes_everything():
    """An owner who tells nothing apart is followed in that."""
    model = host(bias=False)
    optimizer = AdamW(model.parameters())
    grafted(model, model[0], model[1])
    sync_optimizer(model, optimizer)
    assert dims_in(model, optimizer.param_groups[0]) == [1, 2]


def test_a_rate_per_layer_is_kept():
    """With a decayed and a plain group for each layer, a norm's kernel stays near its norm."""
    model = wrap(nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)))
    groups = [
        {"params": part, "lr": 10.0**-depth}
        for depth, block in enumerate(model)
        for part in split(block)
    ]
    optimizer = AdamW(groups)
    grafted(model, model[2][1])
    sync_optimizer(model, optimizer)
    joined_by = [i for i, g in enumerate(optimizer.param_groups) if kernels_in(model, g)]
    assert joined_by == [4, 5]


def test_norms_of_several_dimensions_are_norms():
    """Weight decay is kept from a norm's weights by what it is, not by their shape."""
    model = wrap(nn.Sequential(nn.Linear(4, 4)))
    optimizer = decayed(model, plain_first=False)
    grafted(
        model,
        model[0],
        of=lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LayerNorm((2, 2)), nn.Flatten()),
    )
    sync_optimizer(model, optimizer)
    assert kernels_in(model, optimizer.param_groups[0]) == []


@pytest.mark.parametrize("by_number", [False, True])
def test_the_owner_may_choose_the_group(by_number):
    """group_for= comes before the rule, and is told full names; None leaves it to the rule."""
    model, told = host(), []
    optimizer = decayed(model, plain_first=False)

    def group_for(name, p):
        told.append(name)
        if not name.endswith("0.weight"):
            return None
        return 1 if by_number else optimizer.param_groups[1]

    grafted(model, model[0])
    sync_optimizer(model, optimizer, group_for=group_for)
    assert "0._seeds.0.kernel.0.weight" in kernels_in(model, optimizer.param_groups[1])
    assert kernels_in(model, optimizer.param_groups[0]) == ["0._seeds.0.kernel.2.weight"]
    assert set(told) == {name for name, _ in model.named_parameters() if is_in_a_seed(name)}


@pytest.mark.parametrize("choice", [7, -1, "decayed", {"params": []}])
def test_a_group_that_there_is_not_is_refused(choice):
    """The error names the parameter, and says what may be returned."""
    model = host()
    optimizer = AdamW(model.parameters())
    grafted(model, model[0])
    with pytest.raises(ValueError, match=r"group_for\('0\._seeds.*number from 0 to 0"):
        sync_optimizer(model, optimizer, group_for=lambda name, p: choice)


def gan():
    return wrap(
        nn.ModuleDict(
            {
                "g": nn.Linear(4, 4),
                "d": nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4, affine=False)),
            }
        )
    )


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("site", [0, 1], ids=["without-bias", "without-parameters"])
def test_a_kernel_goes_to_the_optimizer_of_its_host(together, site):
    """Of two that train a part of the model each, whichever is synced first."""
    model = gan()
    of_g, of_d = Adam(model["g"].parameters()), Adam(model["d"].parameters())
    grafted(model, model["d"][site])
    for optimizer in [(of_g, of_d)] if together else (of_g, of_d):
        sync_optimizer(model, optimizer)
    assert kernels_in(model, of_g.param_groups[0]) == []
    assert len(kernels_in(model, of_d.param_groups[0])) == 6


def test_a_host_that_no_known_optimizer_trains_is_named(caplog):
    """Its kernel joins nothing, and the log says what to do, until that is known."""
    model = gan()
    of_g, of_d = Adam(model["g"].parameters()), Adam(model["d"].parameters())
    grafted(model, model["d"][0])
    sync_optimizer(model, of_g)
    assert kernels_in(model, of_g.param_groups[0]) == []
    assert "d.0._seeds.0.kernel.0.weight" in caplog.text
    assert "sequence of all of them" in caplog.text
    sync_optimizer(model, of_d)
    caplog.clear()
    sync_optimizer(model, of_g)
    assert not caplog.records


def test_frozen_hosts_may_have_kernels():
    """The kernel of a frozen backbone is trained by what trains the head."""
    model = host()
    for p in model[0].parameters():
        p.requires_grad_(requires_grad=False)
    optimizer = decayed(nn.Sequential(model[1], model[2]), plain_first=False)
    grafted(model, model[0])
    sync_optimizer(model, optimizer)
    assert [dims_in(model, group) for group in optimizer.param_groups] == [[2], [1]]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("together", "bias"), [(True, True), (True, False), (False, True)])
def test_muon_takes_matrices_and_adamw_the_rest(bias, order, together):
    """As the owner's split has it, in one call, or in two where the host has of both kinds."""
    model = host(bias=bias)
    matrices, vectors = split(model)
    muon, adamw = Muon(matrices, lr=1e-2), AdamW(vectors)
    grafted(model, model[0])
    for optimizer in [[muon, adamw][::order]] if together else [muon, adamw][::order]:
        sync_optimizer(model, optimizer)
    assert dims_in(model, muon.param_groups[0]) == [2]
    assert dims_in(model, adamw.param_groups[0]) == [1]
    model(torch.randn(8, 4)).square().mean().backward()
    for optimizer in (muon, adamw):
        optimizer.step()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return x + self.linear(self.norm(x))


@pytest.mark.parametrize("site", ["norm", "linear"])
def test_muon_trains_the_matrices_of_a_block_and_adamw_the_embedding(site):
    """A norm's kernel gets its matrices trained as its block's are, not as the embedding's."""
    model = wrap(nn.Sequential(nn.Embedding(5, 4), nn.Sequential(Block(), Block())))
    hidden = [p for p in model[1].parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if not any(p is q for q in hidden)]
    muon, adamw = Muon(hidden), AdamW(rest)
    grafted(model, model[1][0].get_submodule(site))
    sync_optimizer(model, [muon, adamw])
    assert dims_in(model, muon.param_groups[0]) == [2]
    assert dims_in(model, adamw.param_groups[0]) == [1]


def test_muon_is_given_no_convolution():
    """A kernel's weight that is no matrix goes where there is an optimizer that can train it."""
    model = host()
    matrices, vectors = split(model)
    muon, adamw = Muon(matrices), AdamW(vectors)
    deep = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten())
    grafted(model, model[0], of=lambda: deep)
    sync_optimizer(model, [muon, adamw])
    assert kernels_in(model, muon.param_groups[0]) == []
    assert len(kernels_in(model, adamw.param_groups[0])) == 2


@pytest.mark.parametrize("hand_over", [lambda o: o, lambda o: [o]], ids=["itself", "in-a-list"])
def test_an_optimizer_of_another_model_is_refused(hand_over):
    """It would train nothing of this one; the error says what it holds."""
    with pytest.raises(ValueError, match=r"\(SGD\) holds 2 parameters, and none of them is"):
        sync_optimizer(host(), hand_over(SGD(nn.Linear(2, 2).parameters(), lr=0.1)))


def test_one_foreign_optimizer_among_others_is_refused():
    """The one that is none of the model's is named."""
    model = host()
    with pytest.raises(ValueError, match=r"\(Adam\) holds 2 parameters"):
        sync_optimizer(model, [SGD(model.parameters(), lr=0.1), Adam(nn.Linear(2, 2).parameters())])


def test_a_parameter_in_two_optimizers_is_refused():
    """It would be stepped twice."""
    model = host()
    optimizers = [SGD(model.parameters(), lr=0.1), Adam(model[0].parameters())]
    with pytest.raises(ValueError, match="2 parameters are in two of them"):
        sync_optimizer(model, optimizers)


def test_no_optimizer_at_all_is_refused():
    """An empty list is a mistake."""
    with pytest.raises(ValueError, match="empty sequence"):
        sync_optimizer(host(), [])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_are_the_models(prefix):
    """An optimizer that was built from names has the model's, spelt as its owner's are."""
    model = host()
    optimizer = AdamW([(prefix + name, p) for name, p in model.named_parameters()])
    grafted(model, model[0], model[2])
    sync_optimizer(model, optimizer)
    group, names = optimizer.param_groups[0], {id(p): n for n, p in model.named_parameters()}
    assert group["param_names"] == [prefix + names[id(p)] for p in group["params"]]
    assert len(set(group["param_names"])) == 6 + 2 * 6


@pytest.mark.parametrize("whose", [0, 2], ids=["its-own-layer", "another-layer"])
def test_a_weight_tied_into_a_kernel_stays_the_hosts(whose):
    """With its moments, when the kernel goes."""
    model = host()
    optimizer = AdamW(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    tied = nn.Linear(4, 4)
    tied.weight = model[whose].weight
    grafted(model, model[0], of=lambda: tied)
    sync_optimizer(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 7
    model[0].unload_kernel(0)
    sync_optimizer(model, optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in model.parameters()
    }
    assert model[whose].weight in optimizer.state


def test_a_weight_that_two_kernels_share_stays_while_one_does():
    """And goes with the last of them."""
    model, shared = host(), nn.Linear(4, 4, bias=False)
    optimizer = AdamW(model.parameters())
    grafted(model, model[0], model[2], of=lambda: shared)
    sync_optimizer(model, optimizer)
    for layer, left in ((model[0], 7), (model[2], 6)):
        layer.unload_kernel(0)
        sync_optimizer(model, optimizer)
        assert len(optimizer.param_groups[0]["params"]) == left


class Wrapper:
    """What frameworks put around an optimizer, here one that is no torch optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Homemade(SGD):
    """A class of an owner's, whose constructor takes what it likes."""

    def __init__(self, model, /):
        super().__init__(model.parameters(), lr=0.1, momentum=0.9)
        self.num_steps = 0

    def step(self, closure=None):
        self.num_steps += 1
        return super().step(closure)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_wrappers_and_subclasses_are_taken(depth):
    """However deep the optimizer is wrapped."""
    model = host()
    optimizer = handed = Homemade(model)
    for _ in range(depth):
        handed = Wrapper(handed)
    grafted(model, model[0])
    sync_optimizer(model, handed)
    assert len(optimizer.param_groups[0]["params"]) == 12


def test_a_wrapper_of_what_is_not_supported_is_refused():
    """The one inside is named."""
    model = host()
    with pytest.raises(TypeError, match=r"under torch\.optim\.lbfgs\.LBFGS: it keeps one"):
        sync_optimizer(model, Wrapper(torch.optim.LBFGS(model.parameters())))


def test_a_wrapper_of_itself_is_refused():
    """No endless search."""
    wrapper = Wrapper(None)
    wrapper.optimizer = wrapper
    with pytest.raises(TypeError, match=r"Wrapper: expected a torch\.optim\.Optimizer"):
        joined(wrapper)


class Elsewhere:
    """Has its optimizer under a name of its own."""

    def __init__(self, inner):
        self.base = inner


def test_an_optimizer_that_is_elsewhere_is_registered():
    """Refused with the cure, and taken once it is said where to look."""
    model = host()
    optimizer = AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"esper\.register_optimizer"):
        sync_optimizer(model, Elsewhere(optimizer))
    register_optimizer(Elsewhere, lambda found: found.base)
    grafted(model, model[0])
    sync_optimizer(model, Elsewhere(optimizer))
    assert len(optimizer.param_groups[0]["params"]) > len(list(host().parameters()))


class Borrowed(torch.optim.Optimizer):
    """An optimizer by its class, which shares another's groups and is not built as torch's are."""

    def __init__(self, base):
        self.base, self.defaults = base, base.defaults
        self.param_groups, self.state = base.param_groups, base.state


def test_a_wrapper_that_is_an_optimizer_by_its_class_alone_is_registered():
    """Refused with the cure, as torch's own hooks cannot be put on it."""
    model = host()
    optimizer = AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"Borrowed: .*esper\.register_optimizer"):
        sync_optimizer(model, Borrowed(optimizer))
    register_optimizer(Borrowed, lambda found: found.base)
    grafted(model, model[0])
    sync_optimizer(model, Borrowed(optimizer))
    assert len(optimizer.param_groups[0]["params"]) > len(list(host().parameters()))


def test_a_copy_calls_no_constructor_and_steps_alike():
    """A subclass with a scheduler on it is rebuilt for other parameters, with its own settings."""
    model = host()
    optimizer = Homemade(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    hooked = []
    optimizer.register_step_pre_hook(lambda *_: hooked.append(1))
    (p,) = params = [nn.Parameter(torch.ones(3))]
    twin = rebuilt(optimizer, [params])
    p.grad = torch.ones(3)
    twin.step()
    assert torch.allclose(p, torch.full((3,), 0.9))
    assert (twin.num_steps, optimizer.num_steps, hooked) == (1, 0, [])


def test_every_optimizer_drops_a_step_that_a_kernel_spoilt():
    """Under guard="step", the second of two optimizers makes no step that the first has dropped."""
    model = host()
    matrices, vectors = split(model)
    pair = [SGD(matrices, lr=0.1), SGD(vectors, lr=0.1)]
    sync_optimizer(model, pair)
    grafted(model, model[0])
    sync_optimizer(model, pair)
    model[0].set_guard(0, "step")
    model[0].seed_kernel(0).register_forward_hook(lambda *call: call[2] * torch.inf)
    before = [p.detach().clone() for p in (*matrices, *vectors)]
    model(torch.randn(8, 4)).sum().backward()
    for optimizer in pair:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (*matrices, *vectors), strict=True))


def test_an_isolated_kernel_keeps_its_moments(caplog):
    """It may come back, and nobody syncs again for that."""
    caplog.set_level(logging.CRITICAL)
    model = host()
    optimizer = AdamW(model.parameters())
    sync_optimizer(model, optimizer)
    grafted(model, model[0])
    sync_optimizer(model, optimizer)
    model[0].set_guard(0, "step")
    spoil = model[0].seed_kernel(0).register_forward_hook(lambda *call: call[2] * torch.inf)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    spoil.remove()
    assert not model[0].state_layout.contributes(0)
    sync_optimizer(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 12

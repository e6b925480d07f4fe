"""Kernels outlive what others do to their layer, or somebody says that they did not."""

import copy
import functools
import logging
import subprocess
import sys
import types

import pytest
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

import esper
from esper.continuity.optimizer import busy_layers
from esper.execution.host_class import adopt
from esper.state.roster import where_kernels_stand

SGD = torch.optim.SGD


def net():
    """Return a wrapped model with a block in it, an input, and a kernel at the block's layer."""
    torch.manual_seed(0)
    block = nn.ModuleDict({"fc": nn.Linear(6, 6)})
    model = nn.ModuleList([nn.Linear(6, 6), block])
    esper.wrap(model)
    x = torch.randn(4, 6)
    model[1]["fc"].graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    return model, x


def told(model):
    """Return layer, seed and reason of what maintain finds."""
    return [(f.layer, f.seed_idx, f.reason) for f in esper.maintain(model).faults]


def same_kind():
    torch.manual_seed(1)
    return nn.Linear(6, 6)


PLACES = {
    "item": lambda model, module: model[1].__setitem__("fc", module),
    "add_module": lambda model, module: model[1].add_module("fc", module),
    "register_module": lambda model, module: model[1].register_module("fc", module),
    "setattr": lambda model, module: setattr(model[1], "fc", module),
    "set_submodule": lambda model, module: model.set_submodule("1.fc", module),
}


@pytest.mark.parametrize("put", PLACES)
def test_kernels_move_into_a_layer_of_the_same_kind(put):
    """However it is put there, the kernels stand in it, and can be found, trained and unwrapped."""
    model, x = net()
    layer, module = model[1]["fc"], same_kind()
    kernel = layer.seed_kernel(0)
    expected = module(x) + 0.5 * kernel(x)

    PLACES[put](model, module)

    assert torch.allclose(module(x), expected, atol=1e-6)
    assert esper.layers(model)["1.fc"] is module
    assert module.seed_kernel(0) is kernel
    assert type(layer) is nn.Linear
    assert not list(layer.children())
    assert not told(model)
    module.set_alpha(0, 0.25)
    optimizer = SGD(model.parameters(), lr=0.1)
    esper.sync_optimizer(model, optimizer)
    assert type(esper.unwrap(copy.deepcopy(model))[1]["fc"]).__module__.partition(".")[0] != "esper"


def test_a_layer_that_is_put_back_has_its_kernels_again():
    """The kernels are where the place is."""
    model, x = net()
    layer, y = model[1]["fc"], model[1]["fc"](x)
    model[1]["fc"] = same_kind()
    model[1]["fc"] = layer

    assert torch.equal(layer(x), y)
    assert not told(model)


def test_a_kernel_that_does_not_fit_is_isolated_and_told(caplog):
    """A layer of another size is the same place with another host."""
    model, x = net()
    with caplog.at_level(logging.WARNING):
        model[1]["fc"] = nn.Linear(6, 9)

    assert model[1]["fc"](x).shape == (4, 9)
    assert [(layer, seed) for layer, seed, _ in told(model)] == [("1.fc", 0)]
    assert "does not fit" in caplog.text
    assert esper.unwrap(model)[1]["fc"](x).shape == (4, 9)


LOSSES = {
    "another_kind": lambda model: model[1].__setitem__("fc", nn.Sequential(nn.Linear(6, 6))),
    "nothing": lambda model: setattr(model[1], "fc", None),
    "identity": lambda model: model[1].__setitem__("fc", nn.Identity()),
    "the_block": lambda model: model.__setitem__(1, nn.ModuleDict({"fc": nn.Linear(6, 6)})),
}


@pytest.mark.parametrize("how", LOSSES)
def test_what_is_lost_is_named(how, caplog):
    """Layer, seed and cure; at once, by maintain, and where the optimizer lets the kernel go."""
    model, _ = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper.sync_optimizer(model, optimizer)
    with caplog.at_level(logging.WARNING):
        LOSSES[how](model)
    assert "seed 0 of layer '1.fc'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        esper.sync_optimizer(model, optimizer)
    assert "seed 0 of layer '1.fc'" in caplog.text

    ((layer, seed_idx, reason),) = told(model)

    assert (layer, seed_idx) == ("1.fc", 0)
    assert "unload the kernel first" in reason
    assert not told(model)


def test_an_isolated_kernel_moves_too():
    """It stands in no layer, and comes back into the one that has the place."""
    model, x = net()
    layer, module = model[1]["fc"], same_kind()
    for _ in range(3):
        layer.state_layout.increment_error_count(0)
    model[1]["fc"] = module

    assert module.state_layout.state(0).name == "ERROR_RECOVERY"
    assert module(x).shape == (4, 6)


HARMLESS = {
    "dormant": lambda model: model.__setitem__(0, nn.Linear(6, 6)),
    "itself": lambda model: model[1].__setitem__("fc", model[1]["fc"]),
    "a_copy": lambda model: model[1].__setitem__("fc", copy.deepcopy(model[1]["fc"])),
    "around_it": lambda model: model[1].__setitem__("fc", nn.Sequential(model[1]["fc"])),
    "unloaded": lambda model: (
        model[1]["fc"].unload_kernel(0),
        model[1].__setitem__("fc", nn.Identity()),
    ),
    "unwrapped": esper.unwrap,
}


@pytest.mark.parametrize("how", HARMLESS)
def test_nothing_is_told_where_nothing_is_lost(how, caplog):
    """A layer without kernels, the layer itself, a copy of it, or something that holds it."""
    model, _ = net()
    with caplog.at_level(logging.WARNING):
        HARMLESS[how](model)

    assert not told(model)
    assert not caplog.text


NORMS = {
    "2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    "1d": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "bare": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 5, 5)),
}


@pytest.mark.parametrize("at_root", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_kernels_move_into_a_synchronised_norm(norm, at_root):
    """convert_sync_batchnorm makes another norm of the same tensors, which has the kernels."""
    make, shape = NORMS[norm]
    host, x = make(), torch.randn(shape)
    model = esper.wrap(host if at_root else nn.Sequential(nn.Sequential(host))).eval()
    host.graft(
        0, nn.Conv2d(4, 4, 1) if len(shape) == 4 else nn.Conv1d(4, 4, 1), alpha=0.5, example=x
    )
    y, names = model(x), list(model.state_dict())

    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    assert torch.equal(converted(x), y)
    assert list(converted.state_dict()) == names
    assert not told(converted)
    assert torch.equal(copy.deepcopy(converted)(x), y)
    assert torch.equal(esper.unwrap(converted)(x), y)


def twice(own, x):
    return 2 * own(x)


def nothing_of_ours(layer):
    return types.MethodType(nn.Linear.forward, layer)


FORWARDS = {
    "method": (nothing_of_ours, True),
    "function": (lambda layer: lambda x: torch.zeros(len(x), 6), True),
    "calls_it": (lambda layer: functools.partial(twice, layer.forward), False),
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_that_bypasses_kernels_is_found(forward, caplog):
    """Also by unwrap; one that runs the layer's own is none, and taking it off is the cure."""
    model, x = net()
    make, is_bypass = FORWARDS[forward]
    y = model[1]["fc"](x)
    model[1]["fc"].forward = make(model[1]["fc"])

    assert bool(told(model)) == is_bypass
    assert bool(told(model)) == is_bypass
    assert ("bypassed" in caplog.text) == is_bypass
    del model[1]["fc"].forward
    assert not told(model)
    assert torch.equal(model[1]["fc"](x), y)


def test_unwrap_names_what_is_bypassed(caplog):
    """The graph runs the kernels, which the layer did not: that is said."""
    model, _ = net()
    model[1]["fc"].forward = nothing_of_ours(model[1]["fc"])
    with caplog.at_level(logging.WARNING):
        esper.unwrap(model)

    assert "bypassed" in caplog.text


def test_looking_for_a_bypass_leaves_no_trace():
    """The forward is tried as a shadow pass: nothing is counted, nothing is drawn."""
    model, _ = net()
    layer = model[1]["fc"]
    layer.forward = lambda x: torch.rand(len(x), 6)
    random = torch.random.get_rng_state()
    told(model)

    assert torch.equal(torch.random.get_rng_state(), random)
    assert not layer.seed_kernel(0)._forward_pre_hooks


def test_a_shallow_copy_has_seeds_of_its_own():
    """Grafts, alphas and the end of a kernel in a copy are not those of the layer."""
    x = torch.randn(4, 6)
    layer = adopt(nn.Linear(6, 6), name="fc")
    layer.graft(0, mlp_blueprint(6), alpha=0.5, example=x)
    keys = list(layer.state_dict())
    y, copied = layer(x), copy.copy(layer)
    assert copied.weight is layer.weight
    assert copied.seed_kernel(0) is layer.seed_kernel(0)
    assert torch.equal(copied(x), y)

    copied.set_alpha(0, 0.25)
    copied.graft(1, nn.Linear(6, 6), alpha=0.5, example=x)
    copied.unload_kernel(0)

    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) == keys
    assert layer.state_layout.state(1).name == "DORMANT"
    assert copied.state_layout.state(0).name == "DORMANT"
    assert type(esper.restore(copied).model) is nn.Linear
    assert torch.equal(layer(x), y)


def test_a_shallow_copy_of_a_dormant_layer_does_not_mark_it():
    """A graft in the copy is not one in the layer."""
    x = torch.randn(4, 6)
    layer = adopt(nn.Linear(6, 6), name="fc")
    kind, copied = type(layer), copy.copy(layer)
    copied.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)

    assert type(layer) is kind
    assert layer.state_layout.state(0).name == "DORMANT"
    assert not list(layer.children())


def test_a_host_that_was_resized_in_place_is_unwrapped_without_what_no_longer_fits(caplog):
    """As weights are that somebody else resizes, with the attributes of the layer."""
    model, x = net()
    layer = model[1]["fc"]
    layer.weight.data = torch.randn(9, 6)
    layer.bias.data = torch.randn(9)
    layer.out_features = 9
    y = layer(x)
    assert told(model)
    with caplog.at_level(logging.WARNING):
        plain = esper.unwrap(model)

    assert torch.equal(plain[1]["fc"](x), y)
    assert "left out" in caplog.text


def test_who_looks_after_a_model_follows_the_kernels():
    """An optimizer that was synced before an exchange sees the kernels where they are."""
    model, _ = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    esper.sync_optimizer(model, optimizer)
    layer, module = model[1]["fc"], same_kind()
    model[1]["fc"] = module

    assert busy_layers(optimizer) == [module]
    assert where_kernels_stand(layer) is module
    model[1]["fc"] = layer
    assert busy_layers(optimizer) == [layer]
    assert where_kernels_stand(module) is layer


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_adapters_leave_the_kernels_as_they_leave_the_layer(end):
    """PEFT adapts kernels where it adapts all linear layers, and its end is the end of that."""
    peft = pytest.importorskip("peft")
    model, x = nn.Sequential(), torch.randn(4, 6)
    model.add_module("first", nn.Linear(6, 6))
    esper.wrap(model)
    kernel = nn.Sequential()
    kernel.add_module("down", nn.Linear(6, 3))
    kernel.add_module("up", nn.Linear(3, 6))
    model.first.graft(0, kernel, alpha=0.5, example=x)
    y = model(x)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    y = adapted(x) if end == "merge_and_unload" else y

    ended = getattr(adapted, end)()

    assert torch.allclose(ended(x), y, atol=1e-5)
    assert not [m for m in ended.modules() if type(m).__module__.startswith("peft")]
    assert type(ended.first.seed_kernel(0).up) is nn.Linear


@pytest.mark.slow
def test_nobody_looks_at_registrations_before_the_first_kernel():
    """Importing Esper and wrapping a model adds nothing to building other models."""
    code = """
import torch
from torch import nn
from torch.nn.modules import module
import esper
hooks = module._global_module_registration_hooks, module._global_parameter_registration_hooks
model = esper.wrap(nn.Sequential(nn.Linear(4, 4)))
assert not any(hooks), "before"
model[0].graft(0, nn.Linear(4, 4), example=torch.ones(2, 4))
assert all(len(each) == 1 for each in hooks), "after"
model[0].graft(1, nn.Linear(4, 4), example=torch.ones(2, 4))
assert all(len(each) == 1 for each in hooks), "once"
"""
    subprocess.run([sys.executable, "-c", code], check=True)

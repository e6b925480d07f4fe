"""Structure travels with the state dict: loading builds the seeds, then their tensors."""

import copy
import json

import pytest
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

from esper.compiler.compile import compile_blueprint
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt


def net():
    """Return a net with one wrapped layer."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    adopt(model[0], name="0")
    return model


def grown():
    """Return a net with two seeds from blueprints, one of them an unfolded fossil."""
    model, x = net(), torch.randn(5, 6)
    model[0].graft(0, mlp_blueprint(init_seed=1), alpha=0.5, example=x)
    artifact = compile_blueprint(mlp_blueprint(init_seed=2, mode="replace"))
    model[0].graft(2, artifact, alpha=0.25, example=x)
    assert not model[0].fossilize(2).folded
    return model


def test_loading_into_a_wrapped_model_builds_the_seeds():
    """A strict load of a grown dict into a fresh wrapped model computes the same."""
    source, target, x = grown(), net(), torch.randn(5, 6)
    target.load_state_dict(source.state_dict())
    layer = target[0]
    assert torch.equal(target(x), source(x))
    assert layer.structure() == source[0].structure()
    assert layer.state_layout.state(2) == SeedLifecycleState.FOSSILIZED
    assert layer.state_layout.kernel_id(2) == source[0].state_layout.kernel_id(2)


def test_loading_again_keeps_the_parameter_objects():
    """Where the kernel is there already only its tensors are loaded: optimizers stay right."""
    source, target = grown(), net()
    target.load_state_dict(source.state_dict())
    before = [id(p) for p in target.parameters()]
    target.load_state_dict(source.state_dict())
    assert [id(p) for p in target.parameters()] == before


def test_another_kernel_is_exchanged():
    """A seed that holds another kernel than the dict gets the dict's."""
    source, target, x = grown(), net(), torch.randn(5, 6)
    target[0].graft(0, mlp_blueprint(mode="replace"), alpha=0.5, example=x)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_a_plain_model_refuses_a_grown_dict():
    """Without seeds to hold them the keys are unexpected, unless strict=False."""
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(RuntimeError, match="_seeds"):
        plain.load_state_dict(grown().state_dict())
    plain.load_state_dict(grown().state_dict(), strict=False)


def test_a_dict_without_seeds_does_not_silently_drop_them():
    """Loading a host's dict into a grown model misses keys, and says which."""
    with pytest.raises(RuntimeError, match=r"_seeds\.0\.kernel"):
        grown().load_state_dict(net().state_dict())


def test_a_kernel_by_hand_cannot_be_built_from_its_name():
    """Loading one where it is not held is an error that says what to do."""
    source, x = net(), torch.randn(5, 6)
    source[0].graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    with pytest.raises(RuntimeError, match="written by hand"):
        net().load_state_dict(source.state_dict())


def test_loading_replaces_alpha_and_never_writes_it():
    """The alpha that a running backward holds is not the tensor that loading fills."""
    source, target = grown(), grown()
    held = target[0].get_buffer("_seeds.0.alpha")
    source[0].set_alpha(0, 0.125)
    target.load_state_dict(source.state_dict())
    assert float(held) == 0.5
    assert target[0].alpha(0) == 0.125


def test_damaged_structures_are_refused():
    """Bytes that are no structure are an error of the load, not of a later forward."""
    state = grown().state_dict()
    state["0._seeds.0.structure"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="structure of a seed"):
        net().load_state_dict(state)


@pytest.mark.parametrize("alpha", [2.0, float("nan"), None])
def test_a_load_that_fails_changes_no_seed(alpha):
    """The second seed of the dict is damaged: the first one is not touched either."""
    state, target, x = grown().state_dict(), grown(), torch.randn(5, 6)
    state["0._seeds.0.alpha"] = torch.tensor(0.125)
    state.pop("0._seeds.2.alpha")
    if alpha is not None:
        state["0._seeds.2.alpha"] = torch.tensor(alpha)
    structure = target[0].structure()
    with pytest.raises(RuntimeError, match="seed 2 is damaged"):
        target.load_state_dict(state, strict=False)
    assert target[0].structure() == structure
    assert [float(target[0].get_buffer(f"_seeds.{i}.alpha")) for i in (0, 2)] == [0.5, 0.25]
    assert torch.isfinite(target(x)).all()


def test_building_is_all_or_nothing_and_takes_the_guard():
    """A bad entry leaves every seed; a good structure brings its guard and artifact back."""
    layer = grown()[0]
    structure = layer.structure()
    with pytest.raises(KernelLoadError, match="damaged"):
        layer.build([{**structure[0], "alpha": 0.125}, {**structure[1], "alpha": 2.0}])
    assert layer.structure() == structure
    layer.set_guard(0, "off")
    layer.build([{**structure[0], "artifact_id": "f" * 64}, structure[1]])
    assert layer.structure()[0]["guard"] == "always"
    assert layer.state_layout.kernel_id(0) == "f" * 64


def test_structures_of_a_later_format_are_refused():
    """A newer format is named, and nothing is guessed."""
    layer = net()[0]
    later = [{**entry, "format_version": 99} for entry in grown()[0].structure()]
    with pytest.raises(KernelLoadError, match="newer Esper"):
        layer.build(later)
    assert layer.structure() == []


def test_a_structure_is_json_and_builds_the_layer():
    """structure() survives JSON; build() makes seeds of it, and empties those not in it."""
    source, target = grown(), net()
    target[0].graft(3, mlp_blueprint(), alpha=0.5, example=torch.randn(5, 6))
    target[0].build(json.loads(json.dumps(source[0].structure())))
    assert target[0].structure() == source[0].structure()
    assert target[0].state_layout.state(3) == SeedLifecycleState.DORMANT


def test_a_snapshot_of_before_a_fossil_can_be_restored():
    """build() may take a fossil back, which no transition may."""
    model = grown()
    before = copy.deepcopy(net()[0].structure())
    model[0].build(before)
    assert model[0].state_layout.get_dormant_seeds().all()
    assert list(model[0].state_dict()) == ["weight", "bias"]

"""Accelerate: its hooks set a forward on the instance, its Accelerator moves and casts models."""

import copy

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from wrapping_models import Bottleneck, Mlp

import esper

pytestmark = pytest.mark.slow


class Counting(ModelHook):
    """Counts the calls of its module."""

    def __init__(self):
        self.num_calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.num_calls += 1
        return args, kwargs


def grown():
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, Bottleneck(6, 8), alpha=0.5, example=torch.randn(3, 6))
    return model


def test_a_hook_on_a_dormant_layer_changes_nothing():
    """The layer computes what it did, and its hook is called."""
    model, hook, x = esper.wrap(Mlp()).eval(), Counting(), torch.randn(3, 6)
    expected = model(x)

    add_hook_to_module(model.fc1, hook)

    assert torch.equal(model(x), expected)
    assert hook.num_calls == 1


def test_a_graft_is_refused_where_a_hook_would_bypass_it():
    """The error says what is in the way and what to do."""
    model = esper.wrap(Mlp())
    add_hook_to_module(model.fc1, Counting())

    with pytest.raises(ValueError, match=r"forward of its own.*bypass.*graft before"):
        model.fc1.graft(0, Bottleneck(6, 8), example=torch.randn(3, 6))


def test_a_layer_with_a_hook_is_left_by_wrap():
    """A forward in the instance's dict cannot be replaced by a class; the reason is listed."""
    model = Mlp()
    add_hook_to_module(model.fc1, Counting())

    esper.wrap(model)

    assert list(esper.layers(model)) == ["fc2"]
    (left,) = esper.skipped(model)
    assert left.name == "fc1"
    assert "forward of its own" in left.reason


def test_a_hook_on_a_grown_layer_follows_its_seeds():
    """Grafted before, a layer with a hook blends, changes its alpha, and becomes its host."""
    model, hook, x = grown(), Counting(), torch.randn(3, 6)
    expected = model(x)
    quarter = copy.deepcopy(model)
    quarter.fc1.set_alpha(0, 0.25)

    add_hook_to_module(model.fc1, hook)

    assert torch.equal(model(x), expected)
    model.fc1.set_alpha(0, 0.25)
    assert torch.equal(model(x), quarter(x))
    model.fc1.unload_kernel(0)
    assert torch.equal(model(x), esper.restore(quarter).model(x))
    assert hook.num_calls == 3


def test_a_removed_hook_leaves_a_working_layer():
    """After remove_hook_from_module the grown layer computes what it did."""
    model, x = grown(), torch.randn(3, 6)
    expected = model(x)
    add_hook_to_module(model.fc1, Counting())
    remove_hook_from_module(model.fc1)

    assert torch.equal(model(x), expected)


def test_what_a_removed_hook_leaves_behind_is_in_nobodys_way():
    """The bound forward that accelerate leaves on an instance bypasses no seed."""
    model, x = Mlp().eval(), torch.randn(3, 6)
    for layer in (model.fc1, esper.wrap(model, select="fc2").fc2):
        add_hook_to_module(layer, Counting())
        remove_hook_from_module(layer)

    esper.wrap(model, select="fc1")
    expected = model(x)
    model.fc1.graft(0, Bottleneck(6, 8), alpha=0.5, example=x)
    grown = model(x)
    model.fc2.graft(0, Bottleneck(8, 3), alpha=0.5, example=torch.randn(3, 8))

    assert not torch.allclose(grown, expected)
    assert not torch.allclose(model(x), grown)


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_prepared_model_trains_and_grows(accelerator):
    """Accelerator.prepare takes a wrapped model; its layers still take grafts, and train them."""
    model = esper.wrap(Mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(3, 6)
    accelerator.backward(model(x).square().mean())
    optimizer.step()

    layer = accelerator.unwrap_model(model, keep_fp32_wrapper=True).fc1
    layer.graft(0, Bottleneck(6, 8), alpha=0.5)
    model(x)
    esper.sync_optimizer(model, optimizer.optimizer)
    before = copy.deepcopy(layer.seed_kernel(0).state_dict())
    accelerator.backward(model(x).square().mean())
    optimizer.step()

    after = layer.seed_kernel(0).state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_a_prepared_model_saves_what_a_wrapped_one_loads(accelerator, tmp_path):
    """save_model writes seeds and all."""
    model = accelerator.prepare(grown())
    accelerator.save_model(model, tmp_path)
    other = grown()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))

    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    x = torch.randn(3, 6)
    assert torch.equal(other(x), plain(x))


def test_an_offloaded_grown_model_computes_the_same():
    """cpu_offload keeps the weights elsewhere between calls, also those of kernels."""
    model, x = grown(), torch.randn(3, 6)
    expected = model(x)

    cpu_offload(model, execution_device=torch.device("cpu"))

    assert model.fc1.weight.device.type == "meta"
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:nothing can grow")  # it is too short for that
@pytest.mark.parametrize("hand_over", [lambda o: o, lambda o: [o]], ids=["itself", "list"])
def test_a_prepared_optimizer_is_taken(hand_over):
    """It is the optimizer inside that is followed, and that steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = esper.wrap(Mlp())
    inner = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, inner)
    with esper.Grower(model, hand_over(optimizer), horizon=300) as grower:
        loss = model(torch.randn(3, 6)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        grower.step(loss)
        assert grower.updates == 1
    model.fc1.graft(0, Bottleneck(6, 8), alpha=0.5, example=torch.randn(3, 6))
    esper.sync_optimizer(model, hand_over(optimizer))
    assert {id(p) for g in inner.param_groups for p in g["params"]} == set(
        map(id, model.parameters())
    )

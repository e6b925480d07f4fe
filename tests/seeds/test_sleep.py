"""Asleep, a model is its class with fewer blocks; awake, it is its class and has no Esper in it."""

import copy
import io
import pickle

import pytest
import torch
from sleepers import HOSTS, Listed, Residual, TupleBlock, made, renamed, smaller, step, update
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.seeds.shallow import depth_state, load_depth_state
from esper.seeds.sleep import PATIENCE

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


def shallow(name, depth=3, num=6):
    """Return a shallow host, an input, and the host that is built with as many blocks."""
    host, model = HOSTS[name], made(name, num)
    kept = [i * num // depth for i in range(depth)]
    built = smaller(model, name, kept)
    esper.shallow(model, host.path, depth=depth)
    return model, host.make_input(), built, kept


def assert_as_built(name, found, expected, kept):
    """Everything that the smaller host has is equal, and there is no gradient of a sleeper."""
    path = HOSTS[name].path
    for key, value in expected.items():
        assert torch.equal(found[renamed(key, path, kept)], value), key
    known = {renamed(key, path, kept) for key in expected}
    assert not [key for key in found.keys() - known if "running" not in key and "num_b" not in key]


def test_asleep_is_the_class_with_fewer_blocks(name):
    """Outputs, gradients and buffers of training steps are equal, bit for bit, from the first."""
    model, x, built, kept = shallow(name)
    for _ in range(2):
        assert_as_built(name, step(model, x), step(built, x), kept)


def test_asleep_in_evaluation_is_the_class_with_fewer_blocks(name):
    """Without gradients too, where torch's encoder goes its fast way of nested tensors."""
    model, x, built, _ = shallow(name)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), built.eval()(x))
        assert torch.equal(model(x), built(x))


def test_names_keys_and_parameters_are_the_whole_model_s(name):
    """From the first step: a state dict goes both ways, whatever sleeps."""
    model, _, _, _ = shallow(name)
    whole = made(name)
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    whole.load_state_dict(model.state_dict())
    model.load_state_dict(whole.state_dict())
    assert len(esper.asleep(model)) == 3


def woken(name, updates, ramp_updates=4):
    """Return a host some updates after it was told to wake, its optimizer and an input."""
    model, x, _, _ = shallow(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    esper.deepen(model, optimizer, depth=6, ramp_updates=ramp_updates)
    for _ in range(updates):
        update(model, optimizer, x)
    return model, optimizer, x


def test_awake_is_the_plain_class_without_esper(name):
    """Types are the host's own, no attribute of ours is left, and the numbers are plain ones."""
    model, _, x = woken(name, updates=4)
    plain = made(name)
    plain.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not [key for m in model.modules() for key in vars(m) if "esper" in key]
    found, expected = step(model, x), step(plain, x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_waking_block_is_between_its_input_and_its_output():
    """``y = (1 - alpha) x + alpha B(x)``, alpha a float32 scalar."""
    model, _, _ = woken("list", updates=1)
    block, x = model.blocks[1].eval(), torch.randn(5, 8)
    alpha = block.__dict__["_esper_alpha"]
    assert alpha.dtype == torch.float32
    assert float(alpha) == 0.25
    plain = Residual().eval()
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block(x), (1 - alpha) * x + alpha * plain(x))


def test_a_waking_block_keeps_the_form_of_its_output(name):
    """Every form goes on through the host's own loop, and the block's gradients are there."""
    model, _, x = woken(name, updates=2)
    assert all(p.grad is not None for p in model.parameters())
    assert not esper.asleep(model)
    model.state_dict()
    with torch.no_grad():
        model.eval()(x)


def test_a_block_that_writes_to_its_input_is_given_its_own():
    """What a block does to its input does not reach the share of the input."""

    class Writing(nn.Module):
        def forward(self, x):
            return x.mul_(0.0) + 1.0

    model = nn.Sequential(nn.Sequential(Writing(), Writing()), nn.Linear(2, 2))
    esper.shallow(model, "0", depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    esper.deepen(model, optimizer, depth=2, ramp_updates=2)
    update(model, optimizer, torch.ones(1, 2))
    assert torch.equal(model[0][1](torch.full((1, 2), 3.0)), torch.full((1, 2), 2.0))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("updates", [0, 2])
def test_a_copy_sleeps_and_wakes_as_its_original(copied, updates):
    """A copy has the same shares, shares nothing, and can be woken by itself."""
    model, _, x = woken("sequential", updates=updates, ramp_updates=4)
    other = copied(model)
    assert depth_state(other) == depth_state(model)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    esper.deepen(other, optimizer, depth=6, ramp_updates=1)
    update(other, optimizer, x)
    assert not depth_state(other)
    assert len(depth_state(model)) == 3


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_whose_waking_blocks_nothing_moves_is_told_of(copied):
    """After some calls in training, with the path, the alpha and the cure; then no more."""
    model, _, x = woken("sequential", updates=2)
    other = copied(model).train()
    other.eval()(x)
    for _ in range(PATIENCE - 1):
        other.train()(x)
    with pytest.warns(UserWarning, match=r"stay at alpha 0\.5: .* esper\.deepen\(copy, optimizer"):
        other(x)
    for _ in range(PATIENCE):
        other(x)


def test_a_copy_that_is_woken_is_told_nothing():
    """Its alpha moves: warnings are errors here."""
    model, _, x = woken("sequential", updates=2)
    other = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    esper.deepen(other, optimizer, depth=6, ramp_updates=2 * PATIENCE)
    for _ in range(PATIENCE + 1):
        update(other, optimizer, x)
    assert len(depth_state(other)) == 3


def test_a_saved_module_is_loaded_as_it_was():
    """``torch.save`` of the module goes by pickle, and knows the sleeping classes."""
    model, _, _, _ = shallow("list")
    model.call = None
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert esper.asleep(torch.load(stream, weights_only=False)) == esper.asleep(model)


def test_the_depth_of_a_model_is_saved_and_put_back():
    """Alpha is no key of the state dict: it travels with what saves the run."""
    model, _, x = woken("list", updates=1)
    esper_state, other = depth_state(model), made("list")
    other.load_state_dict(model.state_dict())
    load_depth_state(other, esper_state)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert depth_state(other) == {f"blocks.{i}": 0.25 for i in (1, 3, 5)}
    load_depth_state(other, {})
    assert not depth_state(other)
    with pytest.raises(ValueError, match=r"blocks\.9"):
        load_depth_state(other, {"blocks.9": 0.0})


def test_moves_keep_alpha_in_float32():
    """``.half()``, ``.double()`` and ``meta`` leave a share as it is."""
    model, _, x = woken("list", updates=1)
    model.double()
    assert model(x.double()).dtype == torch.float64
    model.to("meta").to_empty(device="cpu")
    assert float(model.blocks[1].__dict__["_esper_alpha"]) == 0.25
    assert model.blocks[1].__dict__["_esper_alpha"].dtype == torch.float32


def test_under_autocast_a_sleeping_model_is_the_smaller_one():
    """Mixed precision hands on what the block before gave; waking blocks learn in it."""
    model, x, built, kept = shallow("list")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = step(model, x), step(built, x)
    assert_as_built("list", found, expected, kept)
    model, optimizer, x = woken("list", updates=1)
    with torch.autocast("cpu", torch.bfloat16):
        update(model, optimizer, x)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing_a_sleeping_model_is_the_smaller_one(reentrant):
    """Blocks that the host checkpoints sleep and wake like any others."""

    def call(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    model, x, built, kept = shallow("list")
    model.call = built.call = call
    assert_as_built("list", step(model, x), step(built, x), kept)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    for _ in range(2):
        update(model, optimizer, x)
    assert not depth_state(model)


def test_a_form_is_learned_for_each_kind_of_call():
    """A flag that asks for more makes another form; what no input stands for is told."""
    block = TupleBlock()
    model = nn.Sequential(nn.Identity(), block)
    esper.shallow(model, "", depth=1)
    x, mask = torch.randn(5, 8), torch.ones(2)
    y, seen, loss, nothing = block(x, mask)
    assert y is x
    assert seen is mask
    assert (float(loss), nothing) == (0.0, None)
    assert block(x)[1] is None
    assert float(block(x, wants_norm=True)[3]) == 0.0


def test_what_a_block_computes_beside_its_output_is_named():
    """A sleeping block gives None for it, and says so once."""

    class Attending(Residual):
        def forward(self, x, wants=False):
            y = self.change(x)
            return (y, y.softmax(-1)) if wants else (y,)

    model = nn.ModuleList([Attending(), Attending()])
    esper.shallow(model, "", depth=1)
    x = torch.randn(5, 8)
    assert model[1](x) == (x,)
    with pytest.warns(UserWarning, match="None for part '1'"):
        assert model[1](x, wants=True) == (x, None)
    assert model[1](x, wants=True) == (x, None)


def test_learning_a_form_leaves_no_trace():
    """The one run aside changes no generator, buffer, attribute or cache, and hooks do not hear."""

    class Counting(Residual):
        def __init__(self):
            super().__init__()
            self.calls, self.generator = 0, torch.Generator().manual_seed(0)

        def forward(self, x, cache=None):
            self.calls += 1
            torch.rand(1, generator=self.generator)
            if cache is not None:
                cache.append(x)
            return self.change(x), cache

    model = nn.ModuleList([Counting(), Counting()])
    heard = []
    model[1].up.register_forward_hook(lambda *_: heard.append(1))
    esper.shallow(model, "", depth=1)
    before = copy.deepcopy(model[1].state_dict()), model[1].generator.get_state()
    cache, state = [], torch.get_rng_state()
    model[1](torch.randn(5, 8, generator=torch.Generator()), cache)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].generator.get_state(), before[1])
    assert (model[1].calls, cache, heard) == (0, [], [])
    after = model[1].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before[0].items())


def test_hooks_of_a_sleeping_block_hear_its_input():
    """Whoever asks for hidden states gets as many as the whole model has."""
    model, x, _, _ = shallow("list")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: seen.append(output is args[0]))
    model(x)
    assert seen == [False, True] * 3


def test_frozen_blocks_sleep_and_wake():
    """What is not trained is not asked for an optimizer."""
    model, x, _, _ = shallow("list")
    for block in model.blocks:
        block.requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    esper.deepen(model, optimizer, depth=6, ramp_updates=1)
    update(model, optimizer, x)
    assert not depth_state(model)
    assert isinstance(model, Listed)

"""``esper.shallow``: which blocks stay awake, what is said of them, and what is refused."""

import pytest
import torch
from sleepers import WIDTH, Listed, Residual, made
from torch import nn
from torch.nn.utils import parametrize

import esper

IGNORED = "_ddp_params_and_buffers_to_ignore"


def awake(model, path="blocks"):
    """Return the numbers of the blocks that are awake."""
    stack = list(model.get_submodule(path))
    asleep = esper.asleep(model)
    return [i for i in range(len(stack)) if f"{path}.{i}" not in asleep]


@pytest.mark.parametrize(
    ("num", "depth", "kept"),
    [
        (12, 4, [0, 3, 6, 9]),
        (12, 1, [0]),
        (6, 4, [0, 1, 3, 4]),
        (5, 2, [0, 2]),
        (4, 4, [0, 1, 2, 3]),
        (3, 0, []),
    ],
)
def test_the_awake_blocks_are_spread(num, depth, kept):
    """Number i of depth is block ``floor(i n / depth)``."""
    model = Listed(num)
    assert esper.shallow(model, "blocks", depth=depth) is model
    assert awake(model) == kept


def test_keep_names_others():
    """By numbers and by names, in any order."""
    model = Listed(6)
    esper.shallow(model, "blocks", depth=3, keep=[5, "0", 2])
    assert awake(model) == [0, 2, 5]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "block", "depth": 1}, r"'block' is no stack .* In this model: 'blocks'"),
        ({"path": "head", "depth": 1}, "it is a Linear"),
        ({"path": "blocks", "depth": 7}, "has 6 blocks"),
        ({"path": "blocks", "depth": -1}, "at least 0"),
        ({"path": "blocks", "depth": 2, "keep": [1]}, r"names depth=2 blocks"),
        ({"path": "blocks", "depth": 1, "keep": ["6"]}, "got \\['6'\\]"),
        ({"path": "blocks", "depth": 1, "keep": [True]}, "got \\[True\\]"),
        ({"path": "blocks", "depth": 1, "root": nn.Linear(1, 1)}, "holds the model"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(given, said):
    """A wrong argument says what was expected and found."""
    model = Listed(6)
    with pytest.raises(ValueError, match=said):
        esper.shallow(model, **given)
    assert not esper.asleep(model)


def test_a_wrong_type_is_a_type_error():
    """A depth is a whole number, and a model a module."""
    with pytest.raises(TypeError, match="depth is a whole number"):
        esper.shallow(Listed(6), "blocks", depth=2.5)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        esper.shallow([], "blocks", depth=2)


class Halving(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width // 2)

    def forward(self, x):
        return self.linear(x)


def test_a_block_that_changes_its_input_s_shape_is_refused():
    """At once, where its layers say what it takes."""
    model = nn.Sequential(*(Halving(2**i) for i in (4, 3, 2)))
    with pytest.raises(ValueError, match=r"makes shape .*, 8\) .* of its first input of .* 16\)"):
        esper.shallow(model, "", depth=0)
    assert not esper.asleep(model)


def test_a_block_that_is_seen_to_change_a_shape_is_refused_when_it_is_called():
    """Where nothing could be told before, the first call does."""

    class Cutting(nn.Module):
        def forward(self, x, length):
            return x[:, :length]

    model = nn.ModuleList([Cutting(), Cutting()])
    esper.shallow(model, "", depth=1)
    with pytest.raises(ValueError, match="cannot sleep"):
        model[1](torch.ones(2, 5), 3)


def _wrapped(model):
    esper.wrap(model, select="blocks.1")


def _parametrized(model):
    model.blocks[1].scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model.blocks[1], "scale", nn.Identity())


def _shared(model):
    model.blocks[1] = model.blocks[0]


def _hooked(model):
    model.blocks[1].forward = torch.relu


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_wrapped, "layer with seeds"),
        (_parametrized, "parametrized"),
        (_shared, "more than once"),
        (_hooked, "forward of its own"),
    ],
)
def test_a_block_that_cannot_change_its_class_is_refused(change, said):
    """What stands in the way is named, with nothing changed."""
    model = Listed(3)
    change(model)
    with pytest.raises(ValueError, match=said):
        esper.shallow(model, "blocks", depth=1)
    assert not esper.asleep(model)


def test_more_can_be_put_to_sleep_and_none_is_woken_by_it():
    """A second call deepens nothing."""
    model = Listed(6)
    esper.shallow(model, "blocks", depth=3)
    esper.shallow(model, "blocks", depth=1)
    assert awake(model) == [0]
    with pytest.raises(ValueError, match=r"blocks\.2, blocks\.4 would have to wake"):
        esper.shallow(model, "blocks", depth=3)


def test_a_replicated_model_is_refused():
    """DDP would wait for gradients that do not come."""
    with pytest.raises(ValueError, match=r"call esper\.shallow before it"):
        esper.shallow(object.__new__(nn.parallel.DistributedDataParallel), "blocks", depth=1)


class Typed(Residual):
    """A block that goes by what it was told of its place."""

    def __init__(self, **told):
        super().__init__()
        for name, value in told.items():
            setattr(self, name, value)


def of(blocks):
    model = Listed(1)
    model.blocks = nn.ModuleList(blocks)
    return model


def test_of_blocks_that_alternate_whole_periods_stay_awake():
    """Types that repeat stay in their order, and the warning says which blocks that are."""
    model = of([Typed(layer_type=("sliding", "full")[i % 2]) for i in range(8)])
    with pytest.warns(UserWarning, match=r"repeat every 2: .*layer_type \(sliding, full"):
        esper.shallow(model, "blocks", depth=4)
    assert awake(model) == [0, 1, 4, 5]


def test_a_depth_within_a_period_is_rounded_up():
    """Half of a pair is no model that anybody builds."""
    model = of([Typed(kind="ab"[i % 2]) for i in range(6)])
    with pytest.warns(UserWarning, match="2 where depth=1"):
        esper.shallow(model, "blocks", depth=1)
    assert awake(model) == [0, 1]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([Typed(index=i) for i in range(4)], r"differ in index \(0, 1, 2, 3\)"),
        ([Typed(drop_rate=0.1 * i) for i in range(4)], r"differ in drop_rate \(0\.0, 0\.1"),
        ([Typed(is_last=i == 3) for i in range(4)], "differ in is_last"),
    ],
)
def test_blocks_that_go_by_their_place_are_told_of(blocks, said):
    """An index, a drop rate, a last block that is special."""
    with pytest.warns(UserWarning, match=said):
        esper.shallow(of(blocks), "blocks", depth=2)


def test_blocks_are_told_of_below_the_block_itself():
    """The rate of a dropout inside counts as the block's."""
    model = Listed(4)
    for i, block in enumerate(model.blocks):
        block.drop = nn.Dropout(0.1 * i)
    with pytest.warns(UserWarning, match=r"drop\.p"):
        esper.shallow(model, "blocks", depth=2)


@pytest.mark.parametrize(
    "blocks",
    [
        [Typed(has_bias=i == 0) for i in range(4)],
        [Typed(layer_idx=i) for i in range(4)],
    ],
    ids=["first", "cache"],
)
def test_nothing_is_said_where_the_smaller_class_is_the_same(blocks):
    """A first block is first in both, and the address of a cache is no computation."""
    model = of(blocks)
    esper.shallow(model, "blocks", depth=2)
    assert awake(model) == [0, 2]


def test_a_cache_that_would_be_measured_by_a_sleeper_is_told_of():
    """Libraries read the length of a cache off its first layer."""
    with pytest.warns(UserWarning, match="do not generate with a cache"):
        esper.shallow(of([Typed(layer_idx=i) for i in range(4)]), "blocks", depth=1, keep=[2])


def test_gradients_of_before_do_not_stay():
    """An optimizer that steps on would move a sleeper by its last gradient."""
    model = made("list")
    model(torch.randn(5, 4)).sum().backward()
    esper.shallow(model, "blocks", depth=3)
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for p in model.blocks[0].parameters())


def names_of(module, prefix):
    """Return the names in a module of blocks 1 and 2 of a list of three."""
    below = {n for n in module.state_dict() if n.startswith((f"{prefix}1.", f"{prefix}2."))}
    return below | {f"_orig_mod.{name}" for name in below}


def test_sleepers_are_ignored_by_whichever_module_is_replicated():
    """Each module from the root down has the names as they are in it."""
    inner = Listed(3)
    root = nn.ModuleDict({"part": nn.Sequential(inner)})
    esper.shallow(inner, "blocks", depth=1, root=root)
    for module, prefix in (
        (root, "part.0.blocks."),
        (root["part"], "0.blocks."),
        (inner, "blocks."),
        (inner.blocks, ""),
    ):
        assert getattr(module, IGNORED) == names_of(module, prefix)
    assert not hasattr(inner.blocks[1], IGNORED)


def test_what_is_shared_with_an_awake_part_is_not_ignored():
    """A weight that is tied to the head has gradients."""
    model = Listed(3)
    model.blocks[1].down.bias = model.inner.bias
    esper.shallow(model, "blocks", depth=1)
    assert "blocks.1.down.weight" in getattr(model, IGNORED)
    assert "blocks.1.down.bias" not in getattr(model, IGNORED)


def test_awake_blocks_are_no_longer_ignored():
    """A replication that is made later has them, and what the owner had ignored stays so."""
    inner = Listed(3)
    root = nn.ModuleDict({"part": inner})
    setattr(root, IGNORED, ["part.head.weight"])
    esper.shallow(inner, "blocks", depth=1, root=root)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    esper.deepen(inner, optimizer, depth=3, ramp_updates=1)
    inner(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert not hasattr(inner, IGNORED)
    assert set(getattr(root, IGNORED)) == {"part.head.weight"}
    assert [key for m in root.modules() for key in vars(m) if "esper" in key] == []


def test_a_sleeping_block_is_not_sharded_by_itself():
    """The class that FSDP2 would make stands in the way, so the order is refused with the cure."""
    from torch.distributed.fsdp import FSDPModule

    model = Listed(3)
    esper.shallow(model, "blocks", depth=1)
    with pytest.raises(ValueError, match=r"call esper\.shallow after it"):
        type("FSDPBlock", (FSDPModule, type(model.blocks[1])), {})


def test_a_forward_that_was_replaced_in_sleep_is_found_when_it_wakes():
    """A block that would sleep on for good is an error that says what to remove."""
    model = Listed(3)
    esper.shallow(model, "blocks", depth=1)
    model.blocks[1].forward = torch.relu
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="forward of its own"):
        esper.deepen(model, optimizer, depth=3, ramp_updates=1)
    assert esper.asleep(model) == ("blocks.1", "blocks.2")


def test_a_block_that_was_parametrized_in_sleep_does_not_wake():
    """Taking the parametrization off would give it a class of ours back."""
    model = Listed(3)
    esper.shallow(model, "blocks", depth=1)
    model.blocks[1].scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model.blocks[1], "scale", nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="take that off, wake the block"):
        esper.deepen(model, optimizer, depth=3, ramp_updates=1)


def test_a_sleeping_block_is_no_site_and_what_is_in_it_is():
    """``wrap`` says why, and takes the layers inside."""
    model = Listed(3)
    esper.shallow(model, "blocks", depth=1)
    with pytest.raises(ValueError, match="it sleeps"):
        esper.wrap(model, select="blocks.1")
    esper.wrap(model)
    assert "blocks.1.up" in esper.layers(model)


def test_unwrap_names_what_is_not_awake(caplog):
    """Plain PyTorch is promised of all but the sleepers, which the log has."""
    model = Listed(3)
    esper.shallow(model, "blocks", depth=1)
    esper.unwrap(model)
    assert "blocks.1, blocks.2: not awake" in caplog.text
    assert esper.asleep(model) == ("blocks.1", "blocks.2")

"""``esper.deepen``: blocks come in with the optimizer's steps, and leave nothing of ours behind."""

import copy

import pytest
import torch
from sleepers import Listed, made, update
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.continuity.deepening import begin_deepening
from esper.continuity.ensemble import joined
from esper.seeds.shallow import depth_state

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def shallow(depth=2, num=6, optimizer=torch.optim.AdamW, **options):
    model = esper.shallow(made("list", num), "blocks", depth=depth)
    return model, optimizer(model.parameters(), lr=1e-2, **options)


def num_hooks(optimizer):
    return len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks)


def test_nothing_changes_when_blocks_are_told_to_wake():
    """At alpha 0 they sleep: the update that follows is the shallow model's, bit for bit."""
    runs = []
    for wakes in (False, True):
        model, optimizer = shallow()
        if wakes:
            esper.deepen(model, optimizer, depth=6, ramp_updates=3)
            assert len(esper.asleep(model)) == 4
        torch.manual_seed(1)
        update(model, optimizer, X)
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][key]) for key, value in runs[0].items())


def test_alpha_rises_with_the_steps_and_the_class_is_given_back_in_the_last():
    """A third at a time, over three updates; the hook goes in the same step."""
    model, optimizer = shallow()
    assert esper.deepen(model, optimizer, depth=6, ramp_updates=3) == tuple(
        f"blocks.{i}" for i in (1, 2, 4, 5)
    )
    shares = []
    for _ in range(3):
        update(model, optimizer, X)
        shares.append(set(depth_state(model).values()))
    assert [pytest.approx(each) for share in shares[:2] for each in share] == [1 / 3, 2 / 3]
    assert shares[2] == set()
    assert num_hooks(optimizer) == 0


def test_a_hook_behind_ours_is_not_disturbed():
    """A hook that was registered later is called in every step; ours goes with the next one."""
    model, optimizer = shallow()
    esper.deepen(model, optimizer, depth=6, ramp_updates=1)
    called = []
    handle = optimizer.register_step_post_hook(lambda *_: called.append(1))
    for _ in range(3):
        update(model, optimizer, X)
    handle.remove()
    assert len(called) == 3
    assert num_hooks(optimizer) == 0


def test_a_step_that_changes_nothing_does_not_count():
    """Steps without gradients, which a scaler or a guard dropped, move nothing."""
    model, optimizer = shallow()
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    optimizer.zero_grad()
    for _ in range(5):
        optimizer.step()
    assert len(esper.asleep(model)) == 4


def test_several_optimizers_wake_a_model_together():
    """An update is a step of the one that has made most."""
    model = esper.shallow(made("list"), "blocks", depth=3)
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizers = [torch.optim.Muon(weights), torch.optim.AdamW(rest)]
    esper.deepen(model, optimizers, depth=6, ramp_updates=2)
    for _ in range(2):
        model(X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not depth_state(model)
    assert sum(map(num_hooks, optimizers)) <= 1  # the second's step was not under way


def test_a_sleeper_has_no_optimizer_state():
    """Its moments begin with its first gradient, in the update in which it first counts."""
    model, optimizer = shallow()
    esper.deepen(model, optimizer, depth=6, ramp_updates=4)
    update(model, optimizer, X)
    assert not any(p in optimizer.state for p in model.blocks[1].parameters())
    update(model, optimizer, X)
    assert all(optimizer.state[p]["step"] == 1 for p in model.blocks[1].parameters())


def test_a_copy_has_weights_buffers_and_moments_of_the_block_before_it():
    """All of them at that moment, and nothing is shared: each goes its own way afterwards."""
    model, optimizer = shallow()
    for _ in range(3):
        update(model, optimizer, X)
    esper.deepen(model, optimizer, depth=6, ramp_updates=2, init="copy")
    for new, old in ((1, 0), (2, 0), (4, 3), (5, 3)):
        ours, theirs = model.blocks[new], model.blocks[old]
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            state, known = optimizer.state[p], optimizer.state[q]
            assert state.keys() == known.keys()
            assert all(torch.equal(value, known[key]) for key, value in state.items())
            tensors = [p, q, *state.values(), *known.values()]
            assert len({t.data_ptr() for t in tensors}) == len(tensors)
    for _ in range(3):
        update(model, optimizer, X)
    steps = {float(optimizer.state[p]["step"]) for p in model.blocks[1].parameters()}
    assert steps == {5.0}
    assert not torch.equal(model.blocks[1].up.weight, model.blocks[2].up.weight)


def test_fresh_blocks_keep_their_own_weights():
    """By default nothing is written."""
    model, optimizer = shallow()
    before = copy.deepcopy(model.state_dict())
    esper.deepen(model, optimizer, depth=6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("num", "awake", "depth", "woken"),
    [
        (12, 4, 6, [1, 7]),
        (12, 4, 12, [1, 2, 4, 5, 7, 8, 10, 11]),
        (6, 1, 2, [1]),
        (6, 0, 3, [0, 2, 4]),
    ],
)
def test_those_wake_that_lie_between(num, awake, depth, woken):
    """Whoever is awake stays awake, and of the others those wake that are evenly spread."""
    model, optimizer = shallow(awake, num)
    names = esper.deepen(model, optimizer, depth=depth)
    assert names == tuple(f"blocks.{i}" for i in woken)


def test_of_blocks_that_alternate_whole_periods_wake():
    """Pairs stay together."""
    model = Listed(8)
    for i, block in enumerate(model.blocks):
        block.kind = "ab"[i % 2]
    with pytest.warns(UserWarning, match="repeat every 2"):
        esper.shallow(model, "blocks", depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert esper.deepen(model, optimizer, depth=4) == ("blocks.2", "blocks.3")


def test_stages_follow_each_other_by_hand():
    """Deeper and deeper; while blocks are on their way none may follow."""
    model, optimizer = shallow(1)
    esper.deepen(model, optimizer, depth=3, ramp_updates=2)
    update(model, optimizer, X)
    with pytest.raises(ValueError, match=r"wake already, and are at alpha 0\.5"):
        esper.deepen(model, optimizer, depth=6)
    update(model, optimizer, X)
    esper.deepen(model, optimizer, depth=6, ramp_updates=1)
    update(model, optimizer, X)
    assert not depth_state(model)


def test_what_stopped_on_its_way_goes_on_from_there():
    """An optimizer that is gone moves nothing; another one goes on from the alpha that there is."""
    model, optimizer = shallow(2)
    esper.deepen(model, optimizer, depth=6, ramp_updates=4)
    update(model, optimizer, X)
    del optimizer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    update(model, optimizer, X)
    assert set(depth_state(model).values()) == {0.625}
    update(model, optimizer, X)
    assert not depth_state(model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"depth": 2}, "2 of the 6 blocks of 'blocks' are awake; depth is more"),
        ({"depth": 7}, "at most all of them"),
        ({"depth": 6, "path": "head"}, "no stack"),
        ({"depth": 6, "init": "zero"}, "'fresh', 'copy'"),
        ({"depth": 6, "ramp_updates": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    """With what was expected and found; nothing has changed then."""
    model, optimizer = shallow(2)
    with pytest.raises(ValueError, match=said):
        esper.deepen(model, optimizer, **given)
    assert num_hooks(optimizer) == 0


def test_a_model_in_which_nothing_sleeps_is_refused():
    """With and without a path."""
    model, optimizer = shallow(6)
    with pytest.raises(ValueError, match=r"call esper\.shallow"):
        esper.deepen(model, optimizer, depth=6)
    with pytest.raises(ValueError, match="no block of 'blocks' sleeps"):
        esper.deepen(model, optimizer, depth=6, path="blocks")


def test_of_two_stacks_one_is_named():
    """Which of them is meant cannot be guessed."""
    model = nn.ModuleDict({"encoder": Listed(3), "decoder": Listed(3)})
    for part in model:
        esper.shallow(model, f"{part}.blocks", depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"\('encoder\.blocks', 'decoder\.blocks'\)"):
        esper.deepen(model, optimizer, depth=3)
    assert esper.deepen(model, optimizer, depth=3, path="decoder.blocks")


def test_an_optimizer_without_the_sleepers_is_refused():
    """Blocks would wake and never learn."""
    model = esper.shallow(made("list"), "blocks", depth=3)
    awake = [p for name, p in model.named_parameters() if not name.startswith("blocks.1.")]
    with pytest.raises(ValueError, match=r"blocks\.1\.norm\.weight is to wake and is in no"):
        esper.deepen(model, torch.optim.SGD(awake, lr=0.1), depth=6)


def test_copies_need_a_block_like_them():
    """Without an awake one before, or with other shapes, fresh weights are the cure."""
    model = esper.shallow(Listed(3), "blocks", depth=1, keep=[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"no block before 'blocks\.0' is awake"):
        esper.deepen(model, optimizer, depth=3, init="copy")
    model = made("resnet", 3)
    esper.shallow(model, "stage", depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"they differ in .*conv1\.weight"):
        esper.deepen(model, optimizer, depth=3, init="copy")


def test_blocks_can_be_put_to_sleep_again():
    """Also in the update in which they were woken: the model is shallow then."""
    for ramp_updates in (1, 4):
        model, optimizer = shallow()
        mover = begin_deepening(
            model, joined(optimizer), depth=6, path=None, init="fresh", ramp_updates=ramp_updates
        )
        update(model, optimizer, X)
        mover.put_to_sleep()
        assert len(esper.asleep(model)) == 4
        assert num_hooks(optimizer) == 0
        model(X)


def test_schedules_and_groups_are_the_whole_model_s():
    """A scheduler of the whole run goes on over the waking of blocks."""
    model, optimizer = shallow(optimizer=torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    num_parameters = [len(group["params"]) for group in optimizer.param_groups]
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    for _ in range(4):
        update(model, optimizer, X)
        scheduler.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == num_parameters


def test_an_average_wakes_with_its_model():
    """``esper.follow`` lets an EMA sleep and wake as the model does, copies included."""
    model, optimizer = shallow()
    average = AveragedModel(model, avg_fn=lambda old, new, _: 0.5 * old + 0.5 * new)
    assert esper.follow(model, average) is average
    update(model, optimizer, X)
    average.update_parameters(model)
    esper.deepen(model, optimizer, depth=6, ramp_updates=2, init="copy")
    copied = average.module.blocks[1].up.weight
    assert torch.equal(copied, average.module.blocks[0].up.weight)
    for _ in range(2):
        update(model, optimizer, X)
        average.update_parameters(model)
        assert list(depth_state(average).values()) == list(depth_state(model).values())
    assert type(average.module.blocks[1]) is type(model.blocks[1])


def test_an_average_in_which_others_sleep_is_refused():
    """It would be averaged block by block with what it is not."""
    model, _ = shallow()
    with pytest.raises(ValueError, match=r"Make the average after esper\.shallow"):
        esper.follow(model, AveragedModel(made("list")))

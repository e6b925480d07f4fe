"""A run whose model is trained by several optimizers, by a wrapped one, or by the wrong one."""

from __future__ import annotations

import pytest
import torch
from growing import SHORT, batches, compute_loss, evaluate, growing, host, wrapped
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from esper.contracts.errors import GrowthError
from esper.growth.grower import Grower
from esper.growth.job import GrowthJob, grow
from esper.growth.policies import ByHand, Never
from esper.growth.twins import Twin
from esper.state.host_parts import is_in_a_seed
from esper.wrapping.wrap import wrap

BY_HAND = [("0", "mlp-4x4-w32")]
UNTIL_HELD = {
    "twin": 5 + SHORT["trial_updates"] + 4,
    "shadow": 2 + SHORT["audition_updates"] + SHORT["ramp_updates"] + 4,
}
"""Updates after which a kernel named by hand is in the model, by kind of trial."""


def muon_and_adamw(model, lr=1e-2):
    """The usual pair; AdamW's rate is far below Muon's."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [Muon(matrices, lr=lr), AdamW(vectors, lr=lr / 20)]


def train_on(batch, model, optimizers, grower):
    loss = compute_loss(model, batch)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    grower.step(loss, batch=batch)


def train(model, optimizers, num, grower):
    for batch in batches(num):
        train_on(batch, model, optimizers, grower)


def kernels_in(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {(names[id(p)], p.ndim) for p in held if is_in_a_seed(names[id(p)])}


@pytest.mark.parametrize(
    ("trial", "order"),
    [("twin", 1), ("shadow", -1), pytest.param("twin", -1, marks=pytest.mark.slow)],
)
def test_two_optimizers_share_a_kernel_and_let_it_go(trial, order):
    """Into the model and out of it: matrices to Muon, the rest to AdamW, and no trace."""
    model = wrap(host())
    pair = muon_and_adamw(model)[::order]
    grower = growing(model, pair, policy=ByHand(BY_HAND), trial=trial, hold_updates=50)
    muon, adamw = pair[::order]
    before = [len(g["params"]) for o in pair for g in o.param_groups]
    train(model, pair, UNTIL_HELD[trial], grower)
    assert [status.stage.name for status in grower.stages] == ["HOLDING"]
    assert {dim for _, dim in kernels_in(model, muon)} == {2}
    assert {dim for _, dim in kernels_in(model, adamw)} == {1}
    train(model, pair, 4, grower)
    assert all(p in o.state for o in pair for g in o.param_groups for p in g["params"])
    grower._stage._roll_back("the test wants it gone") if trial == "twin" else grower.close()
    grower.close()
    assert [len(g["params"]) for o in pair for g in o.param_groups] == before
    assert len(grower.report().grafts) == 1
    assert grower.updates == UNTIL_HELD[trial] + 4


def test_a_lower_rate_beside_a_higher_one_is_not_spent():
    """What AdamW trains is not sped up because Muon's rate is far above its own."""
    model = wrap(host())
    muon, adamw = muon_and_adamw(model)
    grower = growing(
        model, [muon, adamw], policy=ByHand(BY_HAND), hold_updates=50, warmup_updates=100
    )
    train(model, [muon, adamw], UNTIL_HELD["twin"], grower)
    factor = grower._run.factor
    joined = [p for p in adamw.param_groups[0]["params"] if factor._entries.get(id(p))]
    assert joined
    assert {factor._entries[id(p)].ceiling for p in joined} == {0.0}
    grower.close()


@pytest.mark.parametrize("order", [1, -1])
def test_twin_of_two_optimizers_follows_the_run(order):
    """Without a package in it, the twin under Muon and AdamW does what the run does."""
    model = wrap(host())
    pair = muon_and_adamw(model)[::order]
    grower = growing(model, pair, policy=Never())
    train(model, pair, 5, grower)
    twin = Twin(grower._run)
    for batch in batches(10):
        train_on(batch, model, pair, grower)
        twin.update([batch], grower._run.live_step())
    grower.close()
    pairs = zip(model.parameters(), twin.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_own_update_is_given_the_optimizers_that_were_handed_over():
    """As many, in their order, each a copy for the twin."""
    model = wrap(host())
    pair = muon_and_adamw(model)

    def update(twin, optimizers, batch):
        assert [type(optimizer) for optimizer in optimizers] == [Muon, AdamW]
        assert not set(map(id, optimizers)) & set(map(id, pair))
        for optimizer in optimizers:
            optimizer.zero_grad()
        compute_loss(twin, batch).backward()
        for optimizer in optimizers:
            optimizer.step()

    grower = growing(model, pair, policy=ByHand(BY_HAND), update=update)
    train(model, pair, 12, grower)
    assert [status.stage.name for status in grower.stages] == ["TRIAL"]
    grower.close()


def test_a_layer_of_another_optimizer_does_not_grow_and_is_named():
    """The report says which parameters, and what to do; the rest grows."""
    model, _ = wrapped()
    optimizer = AdamW([*model[0].parameters(), *model[1].parameters()])
    with growing(model, optimizer) as grower:
        assert "4" not in grower._run.layers
        note, *_ = grower.report().notes
    assert note.startswith("nothing grows at '4': 4.weight, 4.bias can be trained")
    assert "sequence" in note


def test_a_host_that_is_held_in_part_is_refused():
    """Together they hold it; one of them alone does not."""
    model = wrap(host())
    muon, adamw = muon_and_adamw(model)
    with growing(model, [adamw, muon]) as grower:
        assert list(grower._run.layers) == ["0", "1", "4"]
    with growing(model, adamw) as grower:
        assert list(grower._run.layers) == ["1"]


def test_a_layer_of_another_optimizer_cannot_be_named_by_hand():
    """The owner's wish is refused at once, with the reason."""
    model, _ = wrapped()
    optimizer = AdamW(model[4].parameters())
    with pytest.raises(GrowthError, match=r"nothing grows at '0': 0\.weight, 0\.bias"):
        growing(model, optimizer, policy=ByHand(BY_HAND))


def test_a_model_of_which_no_layer_is_trained_is_refused():
    """The optimizer holds something of the model, and nothing of a layer with seeds."""
    model = wrap(nn.Sequential(nn.PReLU(4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"nothing grows at '1'.*optimizer"):
        Grower(model, AdamW(model[0].parameters()))


@pytest.mark.parametrize(
    "hand_over", [lambda o: o, lambda o: [o], lambda o: (o,)], ids=["itself", "list", "tuple"]
)
def test_an_optimizer_of_another_model_is_refused_before_anything_is_hooked(hand_over):
    """No log, no hook: the run has not begun."""
    model, _ = wrapped()
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of them is the model's"):
        growing(model, hand_over(optimizer))
    assert not optimizer._optimizer_step_pre_hooks


def test_a_frozen_layer_may_grow():
    """It is trained by none because its owner froze it; its kernel is trained."""
    model, _ = wrapped()
    for p in model[0].parameters():
        p.requires_grad_(requires_grad=False)
    optimizer = AdamW([*model[1].parameters(), *model[4].parameters()])
    with growing(model, optimizer, policy=ByHand(BY_HAND)) as grower:
        assert "0" in grower._run.layers


@pytest.mark.parametrize("trial", ["twin", "shadow"])
def test_the_owners_groups_hold_for_the_run_and_its_twins(trial):
    """group_for= decides for the twins, the audition and the live model."""
    model = wrap(host())
    optimizer = AdamW([{"params": model.parameters()}, {"params": [], "lr": 1e-3}], lr=1e-2)
    grower = growing(
        model,
        optimizer,
        policy=ByHand(BY_HAND),
        trial=trial,
        hold_updates=50,
        group_for=lambda name, p: optimizer.param_groups[1],
    )
    if trial == "twin":
        train(model, [optimizer], 8, grower)
        for arm in grower._stage._arms:
            assert len(arm.twin.optimizer.param_groups[1]["params"]) == 4
    train(model, [optimizer], UNTIL_HELD[trial], grower)
    assert len(optimizer.param_groups[1]["params"]) == 4
    grower.close()


def test_names_of_a_run_are_the_models():
    """An optimizer that was built from names is told the full ones."""
    model = wrap(host())
    optimizer = AdamW(list(model.named_parameters()), lr=1e-2)
    grower = growing(model, optimizer, policy=ByHand(BY_HAND), hold_updates=50)
    train(model, [optimizer], UNTIL_HELD["twin"], grower)
    group, names = optimizer.param_groups[0], {id(p): n for n, p in model.named_parameters()}
    assert len(group["params"]) == len(names) > 6
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    grower.close()


class Slower(AdamW):
    """An owner's own, with a constructor of its own and a step that does more."""

    def __init__(self, model, share):
        self.share = share
        super().__init__(model.parameters(), lr=1e-2)

    def step(self, closure=None):
        before = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]
        super().step(closure)
        for group, old in zip(self.param_groups, before, strict=True):
            for p, q in zip(group["params"], old, strict=True):
                p.data.lerp_(q, self.share)


@pytest.mark.parametrize("trial", ["twin", "shadow"])
def test_a_run_under_a_class_of_the_owners(trial):
    """Audition and twins take the class, its settings and its step, not its constructor."""
    model = wrap(host())
    optimizer = Slower(model, 0.5)
    grower = growing(model, optimizer, policy=ByHand(BY_HAND), trial=trial)
    train(model, [optimizer], 80, grower)
    grower.close()
    (graft,) = grower.report().grafts
    assert graft.verdict != "in progress"


@pytest.mark.filterwarnings("ignore:nothing can grow")  # it is too short for that
def test_a_job_may_have_several_optimizers():
    """They step together."""
    model = host()
    pair = muon_and_adamw(model)
    data = batches(8)
    job = GrowthJob(
        model=model,
        optimizer=pair,
        train=data,
        gate=data,
        loss=lambda m, batch: compute_loss(m, batch).expand(32),
        epochs=1,
        grower={"evaluate": evaluate},
    )
    report = grow(job)
    assert report.updates == 8
    assert all(isinstance(optimizer, Optimizer) and optimizer.state for optimizer in pair)


@pytest.mark.parametrize("answer", [99, "a"])
def test_an_impossible_group_is_refused_when_the_grower_is_made(answer):
    """And not by the first graft, in the middle of a run."""
    model = host()
    optimizer = torch.optim.AdamW(model.parameters())
    wrap(model)
    with pytest.raises(ValueError, match="group_for"):
        Grower(
            model,
            optimizer,
            compute_loss=compute_loss,
            evaluate=evaluate,
            group_for=lambda name, p: answer,
        )

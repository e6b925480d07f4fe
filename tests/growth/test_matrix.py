"""Every optimizer at every kind of layer, through all that can become of a kernel."""

from __future__ import annotations

import matrix_runs
import pytest
import torch
from execution_hosts import KINDS
from fork_server import ForkServer
from matrix_runs import (
    CHECKPOINT,
    FOUND,
    HOLD,
    OPTIMIZERS,
    SQUARE,
    AcceleratedRun,
    MatrixRun,
    WakingRun,
    applies,
)

import esper

pytestmark = pytest.mark.usefixtures("short_trials")

SLICE = [
    ("adamw, fused", "linear"),
    ("muon", "attention"),
    ("registered", "conv2d"),
]
WAKING_SLICE = [("adafactor", "batch_norm2d"), ("registered", "encoder_layer")]
WHOLE = [(o, k) for o in OPTIMIZERS for k in KINDS if applies(o, k)]


def named(pairs):
    return ["-".join(pair) for pair in pairs]


@pytest.fixture(scope="module")
def fresh():
    """Forks processes in which nothing was built yet."""
    server = ForkServer(matrix_runs.__file__)
    yield server
    server.close()


def differing(one, other):
    """Return the names under which two pictures differ."""
    assert list(one) == list(other)
    return [
        name
        for name, value in one.items()
        if not (
            torch.equal(value, other[name])
            if isinstance(value, torch.Tensor)
            else value == other[name]
        )
    ]


def kernel_of(run):
    return [name for name, _ in run.model.named_parameters() if "_seeds" in name]


def carried(optimizer, kind, fresh, tmp_path):
    """Let a run come to its end, and others go on from its checkpoints; compare them."""
    whole = MatrixRun(optimizer, kind).train_to_the_switch()
    (trial,) = whole.grower.report().trials
    assert trial.taken == "candidate", trial
    plain = MatrixRun(optimizer, kind, policy=esper.Never()).train(whole.switch)
    assert kernel_of(whole)
    assert all(each.state for each in whole.bare)
    whole.train(whole.switch + 1).save(tmp_path / CHECKPOINT)
    whole.save_parts(tmp_path / "parts.pt")
    expected = whole.train_to_the_end().picture()
    assert [g.verdict for g in whole.grower.report().grafts] == ["fossilized"]

    back = MatrixRun(optimizer, kind).load(tmp_path / CHECKPOINT)
    back.measure.shift = 3.0
    back.train(back.switch + HOLD // 2)
    assert [t.verdict for t in back.grower.report().trials] == ["rolled back"]
    assert differing(back.picture(), plain.picture()) == []

    parts = MatrixRun(optimizer, kind).load_parts(tmp_path / "parts.pt").train_to_the_end()
    assert differing(parts.picture(), expected) == []
    through = AcceleratedRun(optimizer, kind).train_to_the_switch()
    through.train(through.switch + 1).save(tmp_path / "accelerate")
    again = AcceleratedRun(optimizer, kind).load(tmp_path / "accelerate").train_to_the_end()
    assert differing(again.picture(), expected) == []
    assert fresh.run(optimizer, kind, str(tmp_path))[0] is False
    assert differing(torch.load(tmp_path / FOUND, weights_only=True), expected) == []


def woken(optimizer, kind, tmp_path):
    """Let blocks wake, and another run go on with the waking; compare them."""
    whole = WakingRun(optimizer, kind).train(3)
    asleep = {id(p) for block in whole.model.blocks[1:] for p in block.parameters()}
    kept = any(id(p) in asleep for each in whole.bare for p in each.state)
    assert kept is (optimizer == "adagrad")  # which makes its state with the optimizer
    whole.wake().train(3)
    esper.save_checkpoint(tmp_path / CHECKPOINT, whole.model, whole.optimizers)
    expected = whole.train(8).picture()
    assert not esper.asleep(whole.model)
    trained = {id(p) for each in whole.bare for p, state in each.state.items() if state}
    assert asleep <= trained
    again = WakingRun(optimizer, kind)
    esper.load_checkpoint(tmp_path / CHECKPOINT, again.model, again.optimizers)
    assert differing(again.train(8).picture(), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "kind"), SLICE, ids=named(SLICE))
def test_optimizers_carry_kernels(optimizer, kind, fresh, tmp_path):
    """Tried, taken over, fossilized, rolled back, and gone on with from all kinds of files."""
    carried(optimizer, kind, fresh, tmp_path)


@pytest.mark.parametrize(("optimizer", "kind"), WAKING_SLICE, ids=named(WAKING_SLICE))
def test_optimizers_wake_blocks(optimizer, kind, tmp_path):
    """From no state at all, along the ramp, and gone on with from the middle of it."""
    woken(optimizer, kind, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("kind", SQUARE)
@pytest.mark.parametrize("optimizer", [each for each in OPTIMIZERS if each != "sparse"])
def test_every_optimizer_wakes_blocks_of_every_kind(optimizer, kind, tmp_path):
    """The whole of it."""
    woken(optimizer, kind, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize(("optimizer", "kind"), WHOLE, ids=named(WHOLE))
def test_every_optimizer_carries_kernels_at_every_kind_of_layer(optimizer, kind, fresh, tmp_path):
    """The whole of it."""
    carried(optimizer, kind, fresh, tmp_path)

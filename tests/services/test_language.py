"""The demo's language model by stages: a live run, and what was recorded."""

from __future__ import annotations

import pytest
import torch

from esper.seeds.shallow import asleep, shallow
from esper.services.language import (
    ByteModel,
    compute_loss,
    live_stages,
    recorded_stages,
)


def test_recorded_arms_say_that_they_are_recorded():
    """None of them was run in the demo, and one has what it saved, with its interval."""
    arms = recorded_stages()
    assert all(arm.recorded for arm in arms)
    assert any(arm.saved_at_equal_loss.low is not None for arm in arms)


def test_a_shallow_byte_model_is_trained_by_its_awake_blocks():
    """Sleeping blocks get no gradient, and the loss is that of a model of two blocks."""
    torch.manual_seed(0)
    model = shallow(ByteModel(), "blocks", depth=2)
    compute_loss(model, torch.randint(0, 256, (2, 17))).backward()
    assert len(asleep(model)) == 2
    assert all(p.grad is None for p in model.get_submodule(asleep(model)[0]).parameters())


@pytest.mark.torture
def test_the_live_run_takes_less_than_the_whole_model_and_claims_nothing():
    """Three arms with losses and FLOPs; saved is left to the recorded ones."""
    grown, small, whole = live_stages(50, lambda: None)
    assert grown.flops < whole.flops
    assert small.flops == pytest.approx(grown.flops, rel=0.02)
    assert all(arm.saved_at_equal_loss.mean is None for arm in (grown, small, whole))

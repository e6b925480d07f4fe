"""Hooks of an optimizer's steps that are closed wherever somebody is in a step."""

import pytest
import torch
from torch.optim import SGD

from esper.continuity.step_hooks import StepHooks

PLACES = ("before", "behind")


def an_optimizer():
    return SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def closed_in(optimizer, where, *, ours, others_follow):
    """Let hooks of which there are ``ours`` be closed by another's, and say what was called."""
    called, hooks = [], []

    def another(*_):
        called.append(where)
        hooks[0].close()

    places = {
        "before": optimizer.register_step_pre_hook,
        "behind": optimizer.register_step_post_hook,
    }
    given = {name: lambda *_, name=name: called.append(f"our {name}") for name in ours}
    named = {"before": given.get("before"), "after": given.get("behind")}
    if others_follow:
        hooks.append(StepHooks(optimizer, **named))
    places[where](another)
    if not others_follow:
        hooks.append(StepHooks(optimizer, **named))
    for place in PLACES:
        places[place](lambda *_, place=place: called.append(f"last {place}"))
    return called


@pytest.mark.parametrize("ours", [("before",), ("behind",), PLACES])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("others_follow", [True, False])
def test_who_closes_in_a_step_stops_nobody_else(ours, where, others_follow):
    """Everybody else is called in that step and the next, and ours no more.

    Nothing stays but, in the place of one before a step that others follow, one that does nothing.
    """
    optimizer = an_optimizer()
    called = closed_in(optimizer, where, ours=ours, others_follow=others_follow)
    optimizer.step()
    came_first = [
        f"our {name}"
        for name in ours
        if (name == "before" and where == "behind") or (name == where and others_follow)
    ]
    assert sorted(called) == sorted([*came_first, where, "last before", "last behind"])
    del called[:]
    for _ in range(2):
        optimizer.step()
    assert sorted(called) == sorted(2 * [where, "last before", "last behind"])
    stays = where == "before" and "before" in ours
    assert len(optimizer._optimizer_step_pre_hooks) == 1 + (where == "before") + stays
    assert len(optimizer._optimizer_step_post_hooks) == 1 + (where == "behind")


def test_the_last_hook_before_a_step_goes_in_its_turn():
    """Nobody is called behind it, so what stands in its place takes itself off."""
    optimizer, called, hooks = an_optimizer(), [], []
    optimizer.register_step_pre_hook(lambda *_: hooks[0].close())
    hooks.append(StepHooks(optimizer, before=lambda *_: called.append("ours")))
    optimizer.step()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert called == []


def test_the_last_hook_of_a_step_may_close_itself():
    """And leaves nothing, at once."""
    optimizer, called = an_optimizer(), []
    hooks = StepHooks(optimizer, before=called.append, after=lambda *_: hooks.close())
    hooks.close()
    hooks = StepHooks(optimizer, after=lambda *_: hooks.close())
    optimizer.step()
    assert called == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_hook_that_simply_goes_ends_the_step_of_others():
    """The control: torch goes through a dictionary that changed."""
    optimizer, handles = an_optimizer(), []
    handles.append(optimizer.register_step_post_hook(lambda *_: handles[0].remove()))
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="mutated during iteration"):
        optimizer.step()

"""First steps: the factor on the updates of parameters that appeared, and real updates counted."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from esper.continuity.warmup import UpdateFactor, peak_rate, rate_for_new

OPTIMIZERS = [
    pytest.param(lambda params: SGD(params, lr=0.1, momentum=0.9), id="sgd"),
    pytest.param(lambda params: Adam(params, lr=0.1), id="adam"),
    pytest.param(lambda params: AdamW(params, lr=0.1), id="adamw"),
]


def two_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(2)]


def give_gradients(params, step):
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_factor_scales_the_update_and_nothing_else(build):
    """Each update of a parameter that appeared is f times the plain one; others are untouched."""
    params = two_parameters()
    optimizer = build(params)
    factor = UpdateFactor(optimizer, [params[1]], warmup_updates=4)
    for step in range(6):
        twin = [nn.Parameter(p.detach().clone()) for p in params]
        plain = build(twin)
        for p, t in zip(params, twin, strict=True):
            state = optimizer.state.get(p, {})
            plain.state[t] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
            }
        before = params[1].detach().clone()
        give_gradients(params, step)
        give_gradients(twin, step)
        optimizer.step()
        plain.step()
        wanted = min(1.0, step / 4)
        assert torch.equal(params[0], twin[0])
        torch.testing.assert_close(params[1] - before, wanted * (twin[1] - before))
        if wanted == 0.0:
            assert torch.equal(params[1], before)
        if wanted == 1.0:
            assert torch.equal(params[1], twin[1])
    assert not factor.active


def hooks_of(optimizer):
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


@pytest.mark.parametrize("num_others", [1, 2])
def test_a_warm_up_that_ends_lets_every_other_hook_run(num_others):
    """Nothing is taken off the dictionary of hooks while torch goes through it."""
    params, ran = two_parameters(), []
    optimizer = SGD(params, lr=0.1)
    factor = UpdateFactor(optimizer, params, warmup_updates=2)
    for other in range(num_others):
        optimizer.register_step_post_hook(lambda *_, other=other: ran.append(other))
        optimizer.register_step_pre_hook(lambda *_, other=other: ran.append(other))
    for step in range(4):
        give_gradients(params, step)
        optimizer.step()
    assert not factor.active
    assert len(ran) == 8 * num_others


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_parameters_may_appear_and_go_inside_somebodys_hook(register):
    """A hook of the owner's may begin and close a warm-up, and those behind it run all the same."""
    params, ran = two_parameters(), []
    optimizer = SGD(params, lr=0.1)
    factor = UpdateFactor(optimizer, warmup_updates=2)
    acts = iter((lambda: factor.add(params), lambda: None, factor.close, lambda: None))
    getattr(optimizer, register)(lambda *_: next(acts)())
    getattr(optimizer, register)(lambda *_: ran.append(True))
    for step in range(4):
        give_gradients(params, step)
        before = params[1].detach().clone()
        optimizer.step()
    assert len(ran) == 4
    assert torch.equal(params[1], before - 0.1 * params[1].grad)


def test_close_removes_the_hooks_at_once():
    """Closing in the middle of a warm-up leaves no hook and the full update."""
    params = two_parameters()
    optimizer = SGD(params, lr=0.1)
    factor = UpdateFactor(optimizer, params)
    factor.close()
    assert not hooks_of(optimizer)
    assert factor.factor(params[0]) == 1.0


def test_parameter_without_a_gradient_does_not_warm_up():
    """A step that did not update the parameter does not count towards its warm-up."""
    params = two_parameters()
    optimizer = SGD(params, lr=0.1)
    factor = UpdateFactor(optimizer, params, warmup_updates=4)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert factor.factor(params[0]) == 0.25
    assert factor.factor(params[1]) == 0.0


def spent_run(rate=0.01, peak=1.0):
    param = nn.Parameter(torch.zeros(1))
    optimizer = SGD([param], lr=rate)
    optimizer.param_groups[0]["initial_lr"] = peak
    return param, optimizer


def test_spent_rate_starts_at_a_share_of_the_peak():
    """Where the host's rate is under a tenth of its peak, the update is that of 0.3 of the peak."""
    param, optimizer = spent_run()
    UpdateFactor(optimizer, [param], warmup_updates=0)
    param.grad = torch.ones(1)
    optimizer.step()
    assert param.item() == pytest.approx(-0.3, rel=1e-6)


def test_boosted_rate_decays_with_the_schedule():
    """When the host's rate halves, so does the boosted one."""
    param, optimizer = spent_run()
    factor = UpdateFactor(optimizer, [param], warmup_updates=0)
    optimizer.param_groups[0]["lr"] = 0.005
    assert factor.factor(param) * 0.005 == pytest.approx(0.15)


def test_boost_ends_where_the_schedule_rises_again():
    """A schedule that warms up again does not carry the boost beyond the host's own rate."""
    param, optimizer = spent_run()
    factor = UpdateFactor(optimizer, [param], warmup_updates=0)
    for rate, wanted in ((0.1, 0.3), (0.5, 0.5), (1.0, 1.0)):
        optimizer.param_groups[0]["lr"] = rate
        assert factor.factor(param) * rate == pytest.approx(wanted)


def test_rate_at_its_peak_gets_no_boost():
    """Where the host's rate is not spent, the factor ends at exactly 1."""
    param, optimizer = spent_run(rate=0.2)
    factor = UpdateFactor(optimizer, [param], warmup_updates=0)
    assert factor.factor(param) == 1.0
    assert not factor.active


def test_peak_that_was_watched_takes_precedence():
    """A peak that no scheduler left in the group can be handed over."""
    param, optimizer = spent_run(peak=0.01)
    factor = UpdateFactor(optimizer, warmup_updates=0)
    factor.add([param], peaks=[1.0])
    assert factor.factor(param) == pytest.approx(30.0)


def test_parameter_outside_the_optimizer_is_refused():
    """A factor on an update that never comes is a caller's mistake."""
    params = two_parameters()
    with pytest.raises(ValueError, match="append it first"):
        UpdateFactor(SGD(params[:1], lr=0.1), params[1:])


def test_warm_up_goes_on_where_it_was_saved():
    """A factor with the state of another gives the same updates from there."""
    runs = []
    for resumed in (False, True):
        params = two_parameters()
        optimizer = AdamW(params, lr=0.1)
        factor = UpdateFactor(optimizer, params, warmup_updates=10)
        for step in range(8):
            if resumed and step == 3:
                state = factor.state_dict(params)
                factor.close()
                factor = UpdateFactor(optimizer, warmup_updates=10)
                factor.load_state_dict(state, params)
            give_gradients(params, step)
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_peak_of_a_scheduled_group_is_read_off_it():
    """A cosine schedule leaves its peak in the group, and new parameters start at 0.3 of it."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = SGD([param], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was taken: only the rate is looked at
        for _ in range(9):
            scheduler.step()
    group = optimizer.param_groups[0]
    assert group["lr"] < 0.1
    assert peak_rate(group) == 1.0
    assert rate_for_new(group) == pytest.approx(0.3)

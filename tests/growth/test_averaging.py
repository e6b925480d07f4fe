"""Averaged weights: means over a part of a run, with running statistics that belong to them."""

from __future__ import annotations

import pytest
import torch
from growing import X, batches, compute_loss, state_of
from torch import nn

import esper
from esper.growth.averaging import WeightAverage, renew_statistics


def network(*, momentum=0.1):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, momentum=momentum)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.Dropout(0.3), nn.Linear(4, 1), nn.Flatten(0))


def drift(model, num):
    """Change a model at random so many times; yield it each time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator).to(p))
            model[1].running_mean.add_(1.0)
            model[1].num_batches_tracked.add_(1)
        yield model


def test_parameters_and_floating_buffers_are_averaged():
    """Integer ones are those of the last update."""
    model, average, seen = network(), WeightAverage(), []
    for each in drift(model, 7):
        average.add(each)
        seen.append(state_of(model))
    average.write_to(model)
    assert average.num_updates == 7
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([s[name] for s in seen]).mean(0))
        else:
            assert torch.equal(value, seen[-1][name])


def test_a_mask_of_infinities_is_its_own_mean():
    """As a buffer, as a parameter that takes no gradient, and in half precision."""
    mask = torch.full((3, 3), -torch.inf).triu(1)
    model = nn.Linear(3, 3)
    model.register_buffer("mask", mask.clone())
    model.register_buffer("narrow", mask.to(torch.bfloat16))
    model.frozen = nn.Parameter(mask.clone(), requires_grad=False)
    average = WeightAverage()
    for _ in range(3):
        average.add(model)
    average.write_to(model)
    assert torch.equal(model.mask, mask)
    assert torch.equal(model.narrow, mask.to(torch.bfloat16))
    assert torch.equal(model.frozen, mask)


def test_what_came_to_be_infinite_is_seen_in_the_mean():
    """A weight that broke in one of the updates is no number in their mean."""
    model, average = nn.Linear(2, 2), WeightAverage()
    average.add(model)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    average.add(model)
    average.add(model)
    average.write_to(model)
    assert not torch.isfinite(model.weight[0, 0])


def test_adding_to_an_average_changes_no_model():
    """And what is added later changes no value of before."""
    model, average = network(), WeightAverage()
    before = state_of(model)
    average.add(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    kept = average._means[0].clone()
    for _ in drift(model, 1):
        pass
    assert torch.equal(average._means[0], kept)


def test_average_of_one_model_is_that_model_bit_for_bit():
    """However often it is added."""
    model, average = network(), WeightAverage()
    before = state_of(model)
    for _ in range(3):
        average.add(model)
    average.write_to(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_half_precision_is_averaged_in_full():
    """Sixty-four updates of less than a rounding step each are not lost."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    average = WeightAverage()
    for step in range(64):
        with torch.no_grad():
            layer.weight.fill_(1.0 + (step % 2) * 2**-7)
        average.add(layer)
    assert average._means[0].dtype == torch.float32
    assert float(average._means[0]) == pytest.approx(1.0 + 2**-8)
    average.write_to(layer)
    assert layer.weight.dtype == torch.bfloat16


def test_tied_weights_are_averaged_once():
    """They stay tied, and their mean is of each update once."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = WeightAverage()
    average.add(model)
    assert len(average._means) == 3
    average.write_to(model)
    assert model[1].weight is model[0].weight


def test_kernels_are_averaged_and_their_alphas_are_not():
    """What a seed's kernel has learned is in the mean; how much it contributes is its slot's."""
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)))
    model[0].graft(0, nn.Linear(4, 4), alpha=0.5, example=X[:3])
    average, kernel = WeightAverage(), model[0].seed_kernel(0)
    average.add(model)
    with torch.no_grad():
        kernel.weight.add_(2.0)
    before = kernel.weight.detach().clone()
    model[0].set_alpha(0, 0.25)
    average.add(model)
    average.write_to(model)
    torch.testing.assert_close(kernel.weight.detach(), before - 1.0)
    assert model[0].alpha(0) == 0.25


def test_model_that_has_changed_its_shape_is_refused():
    """Means of other parameters are nobody's."""
    model, average = network(), WeightAverage()
    assert average.fits(model)
    average.add(model)
    other = nn.Sequential(nn.Linear(4, 4))
    assert not average.fits(other)
    with pytest.raises(ValueError, match="other parameters"):
        average.add(other)


def recorded(num=5):
    return batches(num)


def test_statistics_are_renewed_on_the_recorded_batches():
    """They are the mean of the batches' own, whatever the momentum and whatever was before."""
    model = network(momentum=0.01)
    with torch.no_grad():
        model[1].running_mean.fill_(99.0)
    parts = recorded()
    renew_statistics(model, parts, compute_loss, random_seed=0)
    hidden = [model[0](X[part]).detach() for part in parts]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0)
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0)
    )
    assert model[1].momentum == 0.01
    assert int(model[1].num_batches_tracked) == len(parts)


def test_renewing_leaves_everything_else():
    """Weights, gradients, modes and the random state, though dropout draws and a loss keeps."""
    model, count = network(), [0]
    before = state_of(model)
    random_state = torch.get_rng_state()

    def counting(m, batch):
        count[0] += 1
        return compute_loss(m, batch)

    renew_statistics(model, recorded(), counting, random_seed=0)
    assert count == [0]
    assert torch.equal(torch.get_rng_state(), random_state)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_models_that_are_compared_are_renewed_with_the_same_draws():
    """Two equal ones have equal statistics behind their dropout."""
    found = []
    for _ in range(2):
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))
        renew_statistics(model, recorded(), compute_loss, random_seed=3)
        found.append(model[1].running_mean.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["evaluates", "no batches"])
def test_statistics_that_are_the_owners_stay(how):
    """Of a norm that is held in evaluation mode, and where nothing was recorded."""
    model = network()
    with torch.no_grad():
        model[1].running_mean.fill_(9.0)
    if how == "evaluates":
        model[1].eval()
    parts = [] if how == "no batches" else recorded()
    renew_statistics(model, parts, compute_loss, random_seed=0)
    assert float(model[1].running_mean[0]) == 9.0

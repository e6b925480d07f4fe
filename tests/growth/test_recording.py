"""Recording at a site: what is kept is right, bounded, and leaves no trace in the run."""

import copy
import io

import pytest
import torch
from torch import nn

from esper.growth.recording import Recorder, finite_steps
from esper.seeds.shadow import shadow_pass


def network(*, inplace=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(inplace=inplace),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(3 * 5 * 5, 4),
        )


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 5, 5, generator=generator)
    return x, torch.randint(0, 4, (size,), generator=generator)


def train(model, num_steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(num_steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


def sites(model):
    return {"conv": model[0], "head": model[4]}


def test_recorded_run_is_bit_identical():
    """Weights and random state after recorded steps are those of a run that never recorded."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain, plain_state = train(network())
        torch.manual_seed(1)
        model = network()
        with Recorder(sites(model), samples_per_step=5) as recorder:
            recorded, recorded_state = train(model)
    assert all(o.num_samples == 20 for o in recorder.observations.values())
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert torch.equal(plain_state, recorded_state)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_that_of_each_samples_own_loss_at_the_output(inplace):
    """What is kept is input, output and per-sample gradient, also before an in-place ReLU."""
    model = network(inplace=inplace).eval()
    x, y = batch(0)
    with Recorder(sites(model), samples_per_step=16) as recorder:
        nn.functional.cross_entropy(model(x), y).backward()
    h = model[0](x).detach().requires_grad_()
    out = model[4](torch.relu(h).flatten(1))
    (wanted,) = torch.autograd.grad(nn.functional.cross_entropy(out, y, reduction="sum"), h)
    seen = recorder.observations["conv"]
    assert torch.equal(seen.inputs[0], x)
    assert torch.equal(seen.outputs[0], h)
    torch.testing.assert_close(seen.gradients[0], wanted)


def test_samples_of_input_output_and_gradient_belong_together():
    """A subsample keeps the same samples of all three."""
    model = network().eval()
    x, y = batch(0)
    with Recorder(sites(model), samples_per_step=5) as recorder:
        nn.functional.cross_entropy(model(x), y).backward()
    seen = recorder.observations["conv"]
    torch.testing.assert_close(model[0](seen.inputs[0]), seen.outputs[0])
    assert seen.num_samples == 5


def test_memory_is_bounded():
    """No site keeps more samples or elements than it may, however long the run."""
    model = network()
    layers = sites(model)
    with Recorder(layers, samples_per_step=4, max_samples=10) as recorder:
        assert not recorder.done
        train(model, 20)
    assert [o.num_samples for o in recorder.observations.values()] == [10, 10]
    with Recorder(layers, samples_per_step=4, max_samples=64, max_elements=4000) as recorder:
        train(model, 40)
    for seen in recorder.observations.values():
        kept = [*seen.inputs, *seen.outputs, *seen.gradients]
        assert 0 < sum(value.numel() for value in kept) <= 4000


def test_recorder_says_when_it_is_done():
    """Once every site has its samples there is nothing more to wait for."""
    model = network()
    with Recorder(sites(model), samples_per_step=8, max_samples=16) as recorder:
        train(model, 2)
        assert recorder.done


def test_closed_recorder_leaves_no_hook():
    """After closing there is no forward hook on any site, and nothing more is kept."""
    model = network()
    recorder = Recorder(sites(model))
    recorder.close()
    train(model, 1)
    assert not any(layer._forward_hooks for layer in sites(model).values())
    assert all(o.num_samples == 0 for o in recorder.observations.values())


def test_evaluation_and_shadow_passes_are_not_recorded():
    """Only training forwards of the run itself count."""
    model = network()
    x, y = batch(0)
    with Recorder(sites(model)) as recorder:
        with torch.no_grad():
            model(x)
        with shadow_pass(model):
            nn.functional.cross_entropy(model(x), y).backward()
    assert all(o.num_samples == 0 for o in recorder.observations.values())


def test_step_that_is_not_finite_is_left_out():
    """A gradient with a NaN is recorded as it came and passed over by whoever reads."""
    model = network()
    with Recorder(sites(model)) as recorder:
        for factor in (1.0, float("nan")):
            x, y = batch(0)
            (nn.functional.cross_entropy(model(x), y) * factor).backward()
    seen = recorder.observations["head"]
    assert len(seen.gradients) == 2
    assert len(list(finite_steps(seen))) == 1


def test_copies_and_files_of_the_model_are_not_recorded():
    """A model that is copied or saved while it is recorded is one that nobody records."""
    model = network()
    with Recorder(sites(model)) as recorder:
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            x, y = batch(0)
            nn.functional.cross_entropy(other(x), y).backward()
    assert all(o.num_samples == 0 for o in recorder.observations.values())

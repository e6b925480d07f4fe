"""Many seeds: few bytes each, wrapping linear in layers, steps linear in active seeds.

What is counted is calls, of Python and of C, which no machine makes slower.
"""

import gc
import sys
import tracemalloc
from collections import Counter

import pytest
import torch
from torch import nn

import esper
from esper.execution.host_class import adopt
from esper.state.host_parts import host_parameters
from esper.state.state_layout import KasminaStateLayout, SeedLifecycleState

BYTES_PER_SEED = 40
NUM_SEEDS = 8


def calls_of(function):
    """Return how many calls a function makes, itself included."""
    counted = Counter()
    gc.collect()
    gc.disable()
    sys.setprofile(lambda _frame, event, _argument: counted.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted["call"] + counted["c_call"]


def bytes_of(make):
    """Return the bytes that the interpreter holds more once `make` has run, and what it made."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        return tracemalloc.get_traced_memory()[0] - before, made
    finally:
        tracemalloc.stop()


ADVISING = pytest.mark.filterwarnings("ignore:nothing can grow")
"""A controller without a loss, whose step is what is counted."""


def stack(num_layers):
    """Return a model of small layers."""
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(num_layers)))


def test_a_layout_of_a_million_seeds_takes_at_most_40_bytes_each():
    """Arrays and all Python objects together, with some seeds that are not dormant."""

    def make():
        layout = KasminaStateLayout(1_000_000)
        for i in range(0, 1_000_000, 100_000):
            layout.transition_seed_state(i, SeedLifecycleState.LOADING)
            layout.transition_seed_state(i, SeedLifecycleState.ACTIVE, kernel_id=f"kernel{i}")
            layout.record_calls(i, [False, True])
        return layout

    size, layout = bytes_of(make)
    tensors = [value for value in vars(layout).values() if isinstance(value, torch.Tensor)]
    arrays = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert arrays == layout.bytes_per_seed * 1_000_000
    assert arrays <= size <= BYTES_PER_SEED * 1_000_000


@pytest.mark.slow
def test_a_layer_takes_at_most_40_bytes_for_each_seed_more():
    """Nothing outside the layout grows with the seeds of a layer either."""
    few, _ = bytes_of(lambda: adopt(nn.Linear(2, 2), name="few", num_seeds=NUM_SEEDS))
    more, _ = bytes_of(lambda: adopt(nn.Linear(2, 2), name="more", num_seeds=NUM_SEEDS + 50_000))
    assert (more - few) / 50_000 <= BYTES_PER_SEED


@pytest.mark.torture
@pytest.mark.parametrize("question", ["has_active_seeds", "get_contributing_seeds"])
def test_a_layout_answers_without_asking_every_seed(question):
    """The calls that a question costs do not grow with the seeds that are dormant."""
    counted = []
    for num_seeds in (10, 10_000):
        layout = KasminaStateLayout(num_seeds)
        last = num_seeds - 1
        layout.restore_seed(last, SeedLifecycleState.ACTIVE, alpha=0.5, kernel_id="kernel")
        counted.append(calls_of(getattr(layout, question)))
    assert counted[0] == counted[1]


@pytest.mark.torture
def test_wrapping_is_linear_in_the_layers():
    """The next hundred layers cost as many calls as the hundred before them."""
    esper.wrap(stack(2))  # classes are made once
    models = [stack(num_layers) for num_layers in (100, 200, 300)]
    counted = [calls_of(lambda m=model: esper.wrap(m, num_seeds=NUM_SEEDS)) for model in models]
    assert counted[2] - counted[1] == pytest.approx(counted[1] - counted[0], rel=0.01)


def test_a_thousand_layers_of_eight_seeds_compute_what_they_computed():
    """Wrapped, every layer has its seeds, and the output is the same, bit for bit."""
    model, x = stack(1000), torch.randn(3, 2)
    y = model(x)
    esper.wrap(model, num_seeds=NUM_SEEDS)
    assert sum(layer.num_seeds for layer in esper.layers(model).values()) == 1000 * NUM_SEEDS
    assert torch.equal(model(x), y)


def controlled(num_layers, num_active):
    """Return an optimizer and a Grower over a wrapped model with so many active seeds."""
    model, x = stack(num_layers), torch.zeros(2, 2, requires_grad=True)
    esper.wrap(model, num_seeds=NUM_SEEDS)
    for layer in list(esper.layers(model).values())[:num_active]:
        layer.graft(0, nn.Linear(2, 2), alpha=0.5, example=x.detach())
    trained, *others = (p for layer in esper.layers(model).values() for p in host_parameters(layer))
    for parameter in others:
        parameter.requires_grad_(requires_grad=False)
    trained.grad = torch.zeros_like(trained)
    optimizer = torch.optim.SGD([trained], lr=0.0)  # its own work does not grow with the model
    return optimizer, esper.Grower(model, optimizer)


def calls_of_a_step(num_layers, num_active):
    """Return the calls of the optimizer's and the Grower's step, once they are under way."""
    optimizer, grower = controlled(num_layers, num_active)

    def step():
        optimizer.step()
        grower.step()

    with grower:
        step()
        calls = calls_of(step)
        assert grower.updates == 2
        return calls


def fewest_calls_of_a_step(*cases):
    """Return the fewest calls of each case, a number of layers and of active ones, asked in turns.

    What earlier tests of the process left alive may add calls until it is collected, in any case.
    """
    rounds = [[calls_of_a_step(*case) for case in cases] for _ in range(2)]
    return [min(counted) for counted in zip(*rounds, strict=True)]


@ADVISING
@pytest.mark.slow
@pytest.mark.parametrize("num_active", [0, pytest.param(3, marks=pytest.mark.torture)])
def test_a_controller_step_does_not_look_at_dormant_layers(num_active):
    """Ten times the layers, the same calls in the optimizer's hook and in the Grower."""
    few, many = fewest_calls_of_a_step((10, num_active), (100, num_active))
    assert few == many


@ADVISING
@pytest.mark.torture
def test_a_controller_step_is_linear_in_the_active_seeds():
    """Each active seed more costs the same calls."""
    counted = fewest_calls_of_a_step((40, 5), (40, 10), (40, 15))
    assert counted[2] - counted[1] == counted[1] - counted[0] > 0

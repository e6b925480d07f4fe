"""A wrapped model whose seeds are dormant trains as the bare one does, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from wrapping_models import Mlp, cnn

import esper

MODELS = {"cnn": (cnn, (1, 8, 8)), "mlp": (Mlp, (6,))}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def train(model, make_optimizer, shape, perturbation=0.0):
    """Run 20 updates on batches and dropout masks that depend on nothing but the seed."""
    torch.manual_seed(1)
    optimizer = make_optimizer(model.parameters())
    losses = []
    for update in range(20):
        x, target = torch.randn(16, *shape), torch.randint(3, (16,))
        loss = nn.functional.cross_entropy(model(x), target) + perturbation * (update == 10)
        optimizer.zero_grad()
        (loss * (1.0 + perturbation)).backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("telemetry_enabled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_bit_identical(name, optimizer, telemetry_enabled):
    """Losses, parameters and buffers after 20 updates are equal, not merely close."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    bare = make()
    wrapped = esper.wrap(copy.deepcopy(bare), telemetry_enabled=telemetry_enabled)

    bare_losses, bare_tensors = train(bare, OPTIMIZERS[optimizer], shape)
    losses, tensors = train(wrapped, OPTIMIZERS[optimizer], shape)

    assert torch.equal(losses, bare_losses)
    assert all(torch.equal(a, b) for a, b in zip(tensors, bare_tensors, strict=True))


def test_the_comparison_sees_a_small_difference():
    """The control of the test above: a loss changed by one part in a million is seen."""
    torch.manual_seed(0)
    bare = Mlp()

    _, tensors = train(copy.deepcopy(bare), OPTIMIZERS["sgd"], (6,))
    _, others = train(copy.deepcopy(bare), OPTIMIZERS["sgd"], (6,), perturbation=1e-6)

    assert not all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))

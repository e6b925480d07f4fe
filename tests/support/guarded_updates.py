"""Updates under a guard: how a run steps, and what must be the same as without the seed."""

import torch
from torch import nn

UPDATES = 4


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def plain(model, optimizer, make_loss):
    loss = make_loss()
    loss.backward()
    optimizer.step()
    return loss


def clipped(model, optimizer, make_loss):
    loss = make_loss()
    loss.backward()
    # The bound is not met: summing norms in another order would change the last bit of a factor.
    nn.utils.clip_grad_norm_(model.parameters(), 1e3, error_if_nonfinite=True)
    optimizer.step()
    return loss


def scaled(model, optimizer, make_loss):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = make_loss()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "the scaler saw a gradient that is not finite"
    return loss


def closed(model, optimizer, make_loss):
    def closure():
        loss = make_loss()
        loss.backward()
        return loss

    return optimizer.step(closure)


def accumulated(model, optimizer, make_loss):
    for _ in range(2):
        loss = make_loss()
        loss.backward()
    optimizer.step()
    return loss


SETTINGS = {
    "plain": plain,
    "clip": clipped,
    "scaler": scaled,
    "closure": closed,
    "accumulated": accumulated,
}


def host_parameters(net):
    return [(n, p) for n, p in net.named_parameters() if "_seeds." not in n]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )

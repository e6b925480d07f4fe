"""A growing run in one file: what esper.save_checkpoint has of it goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from growing import SHORT, batches, compute_loss, evaluate, wrapped
from torch import nn

import esper

UPDATES = 150


def a_run(policy=None):
    model, optimizer = wrapped()
    named = esper.ByHand([("0", "mlp-4x4-w32")])
    options = {**SHORT, "compute_loss": compute_loss, "evaluate": evaluate}
    grower = esper.Grower(model, optimizer, horizon=UPDATES, policy=policy or named, **options)
    return {"model": model, "optimizer": optimizer, "grower": grower}


def go_on(run, start, end):
    for batch in list(batches(UPDATES))[start:end]:
        loss = compute_loss(run["model"], batch)
        run["optimizer"].zero_grad()
        loss.backward()
        run["optimizer"].step()
        run["grower"].step(loss, batch=batch)


def final(run):
    run["grower"].close()
    report = run["grower"].report()
    return run["model"].state_dict(), [trial.verdict for trial in report.trials], report.alphas


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [60, 90, 120])
def test_a_growing_run_goes_on_from_its_checkpoint(tmp_path, moment):
    """Behind the taking over, in the watch, after it; what is recorded or tried begins again."""
    whole = a_run()
    go_on(whole, 0, moment)
    esper.save_checkpoint(tmp_path / "run", **whole, extra={"batch": moment})
    go_on(whole, moment, UPDATES)
    expected, verdicts, _ = final(whole)

    again = a_run()
    start = esper.load_checkpoint(tmp_path / "run", **again)["batch"]
    go_on(again, start, UPDATES)
    found, told, _ = final(again)
    assert same(found, expected)
    assert told == verdicts == ["kept"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


def a_stack():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(4)))
    esper.shallow(model, "", depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = esper.Staged({0.3: 4})
    grower = esper.Grower(model, optimizer, horizon=60, policy=policy)
    return {"model": model, "optimizer": optimizer, "grower": grower}


def train_stack(run, start, end):
    for i in range(start, end):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        loss = (run["model"](x) - x.flip(1)).square().mean()
        run["optimizer"].zero_grad()
        loss.backward()
        run["optimizer"].step()
        run["grower"].step(loss)


@pytest.mark.parametrize("moment", [10, 20, 22, 40])
def test_waking_goes_on_from_its_checkpoint(tmp_path, moment):
    """Asleep, on the way and awake; alpha moves once an update, not twice."""
    whole = a_stack()
    train_stack(whole, 0, moment)
    esper.save_checkpoint(tmp_path / "run", **whole)
    train_stack(whole, moment, 60)
    again = a_stack()
    esper.load_checkpoint(tmp_path / "run", **again)
    train_stack(again, moment, 60)
    assert same(again["model"].state_dict(), whole["model"].state_dict())
    stages = [run["grower"].report().stages for run in (whole, again)]
    assert [s.ended_at for s in stages[0]] == [s.ended_at for s in stages[1]]
    assert [s.verdict for s in stages[1]] == ["awake"]

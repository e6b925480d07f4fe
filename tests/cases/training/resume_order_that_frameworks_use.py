"""Accelerate's load_state (and anyone who loads model and optimizer in one go): the optimizer was made
before the kernels were loaded, so its load_state_dict refuses; esper.sync_optimizer between the two is needed,
for which a framework has no place."""
import sys, tempfile, warnings

warnings.filterwarnings("ignore")
import torch
from accelerate import Accelerator
from torch import nn

import esper

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)

def build():
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)))
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

from esper.growth.policies import EveryN
torch.manual_seed(0)
x = torch.randn(1600, 4)
y = x[:, :1] * x[:, 1:2] + x[:, 2:3] * x[:, 3:]
gate = torch.arange(1000, 1600)
losses = lambda m, b: (m(x[b]) - y[b]).square().squeeze(1)
model, optimizer = build()
with esper.Grower(model, optimizer.optimizer, compute_loss=lambda m, b: losses(m, b).mean(), evaluate=lambda m: losses(m, gate),
        horizon=160, policy=EveryN(20), trial_updates=50, hold_updates=20, record_updates=4, overhead=100.0) as grower:
    for _ in range(110):
        rows = torch.randint(0, 1000, (50,))
        loss = losses(model, rows).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        grower.step(loss, batch=rows)
print([g.verdict for g in grower.report().grafts])
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator._models.clear(); accelerator._optimizers.clear()
    again, fresh = build()
    try:
        accelerator.load_state(folder)
    except ValueError as error:
        print("fault: accelerator.load_state raised:", error)
        sys.exit(1)
named = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
wrong = [n for n, p in again.named_parameters() if not torch.equal(fresh.state[p]["exp_avg"], named[n])]
print("fault: wrong moments:" if wrong else "mended", wrong)
sys.exit(bool(wrong))

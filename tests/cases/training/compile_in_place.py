"""module.compile() (in place) breaks when a kernel germinates: dynamo traces into Esper's own probe."""
import sys

import torch
from torch import nn

import esper
from esper.growth.policies import EveryN

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(1600, 4)
y = x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]
model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.compile(backend="aot_eager")
losses = lambda m, b: (m(x[b]) - y[b]).square()
gate = torch.arange(1000, 1600)
grower = esper.Grower(
    model, optimizer, compute_loss=lambda m, b: losses(m, b).mean(),
    evaluate=lambda m: losses(m, gate), horizon=160, policy=EveryN(20), trial_updates=50, hold_updates=20, record_updates=4, warmup_updates=20, overhead=100.0,
)
try:
    for u in range(140):
        rows = torch.randint(0, 1000, (50,))
        loss = losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=rows)
except Exception as error:
    print(f"fault at update {u}, stages {grower.stages}: {type(error).__name__}: {str(error)[:300]}")
    sys.exit(1)
print("mended:", [g.verdict for g in grower.report().grafts])

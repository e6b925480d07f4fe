"""A step post-hook that the user registers after an admission makes optimizer.step() raise.

Esper's warm-up removes its own post-hook from inside that hook; torch is iterating over the hooks then.
The same happens with two Growers on one optimizer, or a second Grower beside one that was not closed.
"""
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
losses = lambda m, b: (m(x[b]) - y[b]).square()
gate = torch.arange(1000, 1600)
grower = esper.Grower(
    model, optimizer, compute_loss=lambda m, b: losses(m, b).mean(),
    evaluate=lambda m: losses(m, gate), horizon=160, policy=EveryN(20), trial_updates=50, hold_updates=20, record_updates=4, warmup_updates=20, overhead=100.0,
)
steps = 0
try:
    for u in range(140):
        rows = torch.randint(0, 1000, (50,))
        loss = losses(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=rows)
        if steps == 0 and any(s.stage == "holding" for s in grower.stages):
            def count(*_):
                global steps
                steps += 1
            optimizer.register_step_post_hook(count)
except RuntimeError as error:
    print(f"fault: optimizer.step() raised at update {u}: {error}")
    sys.exit(1)
print("mended: the user's hook ran", steps, "times")

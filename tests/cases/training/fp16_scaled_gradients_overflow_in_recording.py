"""fp16 autocast with GradScaler at a scale that trains without skipping a step: recorded gradients are
multiplied by the batch size in fp16, overflow, and whole recorded steps are dropped; the ranking is of what is left."""
import json, sys, tempfile
from pathlib import Path

import torch
from torch import nn

import esper
from esper.growth.policies import EveryN

torch.set_num_threads(1)
x = torch.randn(1600, 4, generator=torch.Generator().manual_seed(0))
y = x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]
gate = torch.arange(1000, 1600)
losses = lambda m, b: (m(x[b]).float() - y[b]).square()

def ranked(scale):
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1, growth_interval=10**6)
    run_dir = tempfile.mkdtemp()
    grower = esper.Grower(model, optimizer, compute_loss=lambda m, b: losses(m, b).mean(), evaluate=lambda m: losses(m, gate),
        horizon=200, policy=EveryN(20), record_updates=4, trial_updates=50, hold_updates=10, overhead=100.0, run_dir=run_dir)
    rows_of = torch.Generator().manual_seed(1)
    for _ in range(26):
        rows = torch.randint(0, 1000, (50,), generator=rows_of)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = losses(model, rows).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        grower.step(loss, batch=rows)
    skipped = scaler.is_enabled() and scaler.get_scale() < scale
    grower.close()
    for line in Path(run_dir, "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "ranked":
            return {(r["site"], r["blueprint"]): (r["gain"], r["reason"]) for r in event["rows"]}, skipped

plain, _ = ranked(1.0)
bad = 0
for scale in (2.0**10, 2.0**14, 2.0**15):
    found, skipped = ranked(scale)
    best = next(iter(plain))
    print(f"scale {scale:.0f}, a step skipped: {skipped}; best site and kernel unscaled {best}: gain {plain[best][0]:.3f}, here {found.get(best)}; best here {next(iter(found))}")
    gain = found.get(best, (None,))[0]
    if not skipped and (gain is None or not 0.5 < gain / plain[best][0] < 2):
        bad = 1
print("fault: the scale changes gains and order" if bad else "mended")
sys.exit(bad)

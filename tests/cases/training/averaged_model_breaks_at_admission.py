"""An EMA made before growth does not survive the first admission: AveragedModel raises, and the
usual hand-written loop over zip(parameters) or state_dict keys averages wrong tensors or leaves the kernel out."""
import copy, sys

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper

torch.set_num_threads(1)
bad = 0

def by_zip(ema, model):
    with torch.no_grad():
        for e, p in zip(ema.parameters(), model.parameters()):
            e.mul_(0.5).add_(p, alpha=0.5)

def by_name(ema, model):
    live = model.state_dict()
    with torch.no_grad():
        for name, e in ema.state_dict().items():
            if e.is_floating_point():
                e.mul_(0.5).add_(live[name], alpha=0.5)

cases = {
    "AveragedModel": (lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)), lambda e, m: e.update_parameters(m)),
    "zip over parameters": (copy.deepcopy, by_zip),
    "names of the state_dict": (copy.deepcopy, by_name),
}
for name, (make, update) in cases.items():
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = esper.follow(model, make(model))
    model[0].graft(0, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), alpha=1.0, example=torch.randn(8, 4))
    esper.sync_optimizer(model, optimizer)
    x = torch.randn(8, 4)
    try:
        for _ in range(60):  # the model stands still, so its average becomes the model
            update(ema, model)
    except (RuntimeError, ValueError) as error:
        print(f"fault, {name}: {type(error).__name__}: {error}")
        bad = 1
        continue
    off = (ema(x) - model(x)).abs().max().item()
    if off > 1e-3:
        print(f"fault, {name}: no error, but the average's output is off by {off:.3f}")
        bad = 1
sys.exit(bad)

"""An optimizer made from named_parameters(): kernels get names like kernel.139884927881600 (by the
Grower) or the same '_seeds.0...' for several layers (by sync_optimizer), not the model's names."""
import sys

import torch
from torch import nn

import esper
from esper.continuity.optimizer import append_parameters

torch.set_num_threads(1)
torch.manual_seed(0)
model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=1e-2)
for layer in (model[0], model[2]):
    layer.graft(0, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), alpha=1.0, example=torch.randn(8, 4))
esper.sync_optimizer(model, optimizer)
real = {id(p): n for n, p in model.named_parameters()}
group = optimizer.param_groups[0]
wrong = [(n, real[id(p)]) for n, p in zip(group["param_names"], group["params"]) if n != real[id(p)]]
for name, expected in wrong:
    print(f"fault: param_names has {name!r}, the model calls it {expected!r}")
sys.exit(bool(wrong))

"""sync_optimizer's memory is looked up with setdefault(optimizer, _Link()): a link and a roster are built and thrown away each time."""
import sys, torch
torch.set_num_threads(1)
import esper
from esper.continuity import optimizer as continuity
model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
esper.sync_optimizer(model, optimizer)
made = []
real = continuity._Link.__init__
def counting(self):
    made.append(1); real(self)
continuity._Link.__init__ = counting
for _ in range(100):
    continuity.busy_layers(optimizer)
print(f"100 look-ups of one optimizer built {len(made)} links; expected 0")
sys.exit(1 if made else 0)

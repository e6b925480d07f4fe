"""The live line of a run shows one metric, named 'accuracy'; a language model's perplexity never appears."""
import sys, torch
torch.set_num_threads(1)
from torch import nn
import esper
from esper.growth.job import grow
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0))
X = torch.randn(256, 4); Y = X.sum(1)
rows = list(torch.arange(256).split(32))
loss = lambda m, r: (m(X[r]) - Y[r]).square()
seen = []
job = esper.GrowthJob(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), train=rows, gate=rows, loss=loss,
                      metrics=lambda m, r: {"perplexity": loss(m, r).exp()}, epochs=2)
grow(job, on_progress=lambda p: seen.append(p))
_row_text = str
text = _row_text(seen[-1].rows[0]); print("the row:", text)
sys.exit(0 if "perplexity" in text or "loss" in text else 1)

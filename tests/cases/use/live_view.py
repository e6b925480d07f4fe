"""The live table starts on the bar's line, has no loss, and the first plain line tells an absurd time."""
import sys, torch, esper
from torch import nn
torch.set_num_threads(1); torch.manual_seed(0)
X = torch.randn(1200, 4); Y = X[:, 0] * X[:, 1] + X[:, 2] * X[:, 3]


def train(x=X, y=Y, updates=600, pass_batch=True, foreign=False, **kw):
    model = esper.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)))
    owner = nn.Linear(2, 2) if foreign else model
    opt = torch.optim.AdamW(owner.parameters(), lr=1e-2)
    kw.setdefault("compute_loss", lambda m, b: (m(x[b]) - y[b]).square().mean())
    kw.setdefault("evaluate", lambda m: (m(x[800:]) - y[800:]).square())
    kw.setdefault("horizon", updates)
    grower = esper.Grower(model, opt, **kw)
    for _ in range(updates // 20):
        for b in torch.randperm(800).split(40):
            loss = (model(x[b]) - y[b]).square().mean()
            opt.zero_grad(); loss.backward(); opt.step()
            grower.step(loss, batch=b) if pass_batch else grower.step(loss)
        grower.end_epoch()
    grower.close()
    return grower.report()


def verdict(bad, text):
    print(("FAULT: " if bad else "ok: ") + text)
    sys.exit(1 if bad else 0)


import io
from rich.console import Console
from esper.cli.progress import _picture, progress_line
from esper.contracts.progress import Progress, ProgressRow
row = ProgressRow(name="run", update=5, parameters=121, grafts=())
p = Progress(done=960, total=1920, doing="epoch 1", rows=(row,))
out = io.StringIO(); Console(file=out, width=100, force_terminal=True, color_system=None).print(_picture(p, "line"))
lines = out.getvalue().splitlines(); print(out.getvalue())
glued = any("━" in l and "update" in l for l in lines)
eta = progress_line(Progress(done=1, total=1920, doing="epoch 1"), 10.0); print(eta)
verdict(glued or "5:19:" in eta, f"bar and table share a line: {glued}; no loss column: {'loss' not in out.getvalue()}")

"""verify='fork': a candidate refused at its audition never met a twin, but counts as not beating one."""
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


from esper.contracts.run_report import headline as not_beaten_in_run
report = train(updates=1600, attribution="trial", overhead=40.0)
met = [t for t in report.trials if t.effect is not None]
won = [t for t in met if t.verdict == "kept"]
lead = not_beaten_in_run(report)
print(lead); print(f"{len(report.grafts)} auditions, {len(met)} met a twin, {len(won)} beat it")
verdict(len(met) < len(report.grafts) and f"of {len(report.grafts)} tries" in lead,
        "auditions are counted as tries against a twin")

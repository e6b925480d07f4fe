"""Everything public can be called where an event loop runs, as in every notebook."""

import asyncio

import pytest
import torch
import torch.distributed.checkpoint as dcp
from growing import GATE_X, GATE_Y, batches, compute_loss, train, wrapped
from sleepers import HOSTS, made
from torch import nn

import esper
from esper.growth.policies import EveryN
from esper.state.site import describe_site

X = torch.randn(4, 4)


class Called:
    """Hands on what is public in esper, and remembers which functions were asked for."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(esper, name)


async def by_hand(public, folder):
    """A kernel is compiled, stored, loaded in both ways, averaged, exported and taken out."""
    public.in_shadow_pass()
    registry = public.open_registry(folder / "registry")
    model = public.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), source=registry)
    optimizer = torch.optim.AdamW(model.parameters())
    average = public.follow(model, torch.optim.swa_utils.AveragedModel(model))
    layer = public.layers(model)["0"]
    blueprint = public.default_catalog().blueprints_for(describe_site(layer))[0]
    digest = registry.put(public.compile_blueprint(blueprint).kernel_binary)
    assert await layer.load_kernel(0, digest)
    assert layer.load_kernel_sync(0, digest)
    layer.set_alpha(0, 0.5)
    public.sync_optimizer(model, optimizer)
    model(X).sum().backward()
    optimizer.step()
    average.update_parameters(model)
    public.maintain(model)
    public.export(model, folder / "plain", example=(X,))
    public.save_checkpoint(folder / "run.esper", model, optimizer)
    public.load_checkpoint(folder / "run.esper", model, optimizer)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    public.build_as_saved(folder / "dcp", model)
    public.skipped(model)
    layer.unload_kernel(0)
    public.restore(model)


async def in_depth(public):
    """Blocks sleep and wake, and an MLP is widened."""
    model = public.shallow(made("list"), HOSTS["list"].path, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    public.register_optimizer(Wrapper, lambda wrapper: wrapper.inner)
    public.deepen(model, optimizer, depth=len(public.asleep(model)) + 2, ramp_updates=1)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    public.widen(mlp, torch.optim.SGD(mlp.parameters()), "", intermediate=12)


class Wrapper:
    """An optimizer in a wrapper of the owner's."""


async def by_itself(public, folder):
    """A loop of one's own grows, and says so as it goes on and at its end."""
    model, optimizer = wrapped()
    told = []
    loader = [(GATE_X, GATE_Y)]
    measure = public.evaluate_on(loader, loss=lambda out, y: (out - y).square())
    options = {"record_updates": 4, "evaluate_every": 10, "horizon": 80, "overhead": 1000.0}
    with public.Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=measure,
        policy=EveryN(5),
        trial_updates=50,
        hold_updates=5,
        run_dir=folder / "run",
        on_progress=told.append,
        **options,
    ) as grower:
        train(model, optimizer, 66, grower)
    with public.profile(model):
        compute_loss(model, batches(1)[0])
    public.in_order(grower.suggest())
    report = grower.report()
    assert told
    assert report.trials
    assert report._repr_html_()
    assert str(report)
    public.unwrap(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.distributed is.*:UserWarning")
def test_everything_public_works_where_an_event_loop_runs(tmp_path):
    """No function starts a loop of its own, or waits for the one that runs."""
    public = Called()

    async def main():
        await by_hand(public, tmp_path)
        await in_depth(public)
        await by_itself(public, tmp_path)

    asyncio.run(main())
    functions = {name for name in esper.__all__ if name[0].islower()}
    assert functions <= public.names


def test_control_a_loop_inside_of_a_loop_fails():
    """What started one would be found."""

    async def main():
        work = asyncio.sleep(0)
        try:
            asyncio.run(work)
        finally:
            work.close()

    with pytest.raises(RuntimeError, match="cannot be called from a running event loop"):
        asyncio.run(main())

"""What each of two processes runs for the tests of sharded models that grow by hand."""

import contextlib
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from kernel_blueprints import mlp_blueprint
from replicated_ranks import GUARDS, NUM_STEPS, Kernel, Net, assert_ranks_agree, loss_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.compiler.codec import encode_kernel
from esper.compiler.lowering import lower
from esper.continuity import replicas


def shard(net, *, apart=True):
    """Shard a network: its first layer by itself, or with the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if apart:
        fully_shard(net.first, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded(*, late=True, guard="off", alpha=0.5, norm=False, apart=True, spread=shard, **settings):
    """Return a sharded model with a kernel in it, its optimizer, its layer and the kernel."""
    torch.manual_seed(0)
    net, kernel = esper.wrap(Net(norm=norm), select=["first", "last"]), Kernel()
    torch.manual_seed(0)
    example, made = torch.randn(3, 6), "off" if guard == "step" else guard
    if not late:
        net.first.graft(0, kernel, alpha=alpha, guard=made, example=example)
    model = spread(net) if spread is DistributedDataParallel else spread(net, apart=apart)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, **settings)
    if late:
        net.first.graft(0, kernel, alpha=alpha, guard=made, example=example)
    esper.sync_optimizer(model, optimizer)
    net.first.set_guard(0, guard)
    return model, optimizer, net.first, kernel


def full(tensors):
    """Return tensors as they are over all ranks."""
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def trained_by(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain_update(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


def clipped_update(model, optimizer, step):
    optimizer.zero_grad()
    loss_of(model, step).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()


def accumulating_update(model, optimizer, step):
    """Three micro-batches, the last of which synchronizes."""
    optimizer.zero_grad()
    for part in range(3):
        is_ddp = isinstance(model, DistributedDataParallel)
        if not is_ddp:
            model.set_requires_gradient_sync(part == 2)
        with model.no_sync() if is_ddp and part < 2 else contextlib.nullcontext():
            loss_of(model, step, part).backward()
    optimizer.step()


UPDATES = (plain_update, clipped_update, accumulating_update)


def trained(update=plain_update, *, before_step=lambda kernel, step: None, **settings):
    """Train; the ranks agree after every step. Return the parts of the run."""
    run = model, optimizer, _, kernel = sharded(**settings)
    for step in range(NUM_STEPS):
        before_step(kernel, step)
        update(model, optimizer, step)
        assert_ranks_agree(full(trained_by(optimizer)))
    return run


def falls_ill(mood, steps):
    def before_step(kernel, step):
        kernel.mood = mood if dist.get_rank() == 0 and step in steps else "well"

    return before_step


def kernels_train_as_beside_ddp():
    """However the model is sharded and updated, the numbers are those of replicas, to rounding."""
    for update in (clipped_update, accumulating_update):
        expected = full(trained_by(trained(update, spread=DistributedDataParallel)[1]))
        for settings in ({"apart": False, "foreach": True}, {"fused": True}, {"late": False}):
            found = full(trained_by(trained(update, **settings)[1]))
            assert all(
                torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)
            ), settings


def one_rank_at_fault():
    """Under every guard, for a kernel that came late or was there, at every step but the first."""
    for guard, update in zip(GUARDS, UPDATES, strict=True):
        for late in (True, False):
            ill = falls_ill("raises", range(1, NUM_STEPS))
            trained(update, before_step=ill, guard=guard, late=late)


def not_finite_on_one_rank():
    """Guarded, it costs a share or a step; the ranks go on alike."""
    for guard in ("always", "step"):
        for late, update in zip((True, False, True), UPDATES, strict=True):
            _, optimizer, layer, _ = trained(
                update, before_step=falls_ill("inf", (1,)), guard=guard, late=late
            )
            assert all(p.isfinite().all() for p in full(trained_by(optimizer)))
            assert layer.state_layout.contributes(0) is (guard == "always")


def isolated_and_given_up_on_one_rank():
    """Maintenance on rank 0 isolates a seed, and gives it up unprobed; every rank trains on."""
    for guard in ("always", "step"):
        for late, norm in ((True, False), (False, True)):
            model, optimizer, layer, kernel = sharded(guard=guard, late=late, norm=norm)
            falls_ill("raises", range(100))(kernel, 0)
            hosts = [p for name, p in model.named_parameters() if "_seeds" not in name]
            for step in range(13):
                plain_update(model, optimizer, step)
                with contextlib.suppress(esper.KernelExecutionError):
                    esper.maintain(model)
                assert_ranks_agree(full(hosts))
            esper.sync_optimizer(model, optimizer)
            plain_update(model, optimizer, 41)
            assert_ranks_agree(full(hosts))
            assert dist.get_rank() or layer.state_layout.state(0).name == "DORMANT"


def taking_one_out_restores_the_host():
    """Class, keys and numbers are those of a model that was never grown."""
    torch.manual_seed(0)
    bare, x = shard(Net()), torch.randn(3, 6)
    for late in (True, False):
        model, optimizer, layer, kernel = sharded(late=late)
        at_rest = {type(p).__name__ for p in layer.seed_kernel(0).parameters()}
        layer.unload_kernel(0)
        esper.sync_optimizer(model, optimizer)
        assert torch.equal(model(x), bare(x))
        assert list(model.state_dict()) == list(bare.state_dict())
        assert len(trained_by(optimizer)) == len(list(bare.parameters()))
        assert at_rest == {"DTensor"}
        if late:
            assert {type(p) for p in kernel.parameters()} == {nn.Parameter}
            assert torch.isfinite(kernel(x)).all()


def a_fossil_stays_in_the_plan():
    """A linear kernel does not fold into shards; it trains on, and its alpha is frozen."""
    model, optimizer, layer, kernel = sharded(guard="always")
    layer.fossilize(0)
    before = full(kernel.parameters())
    plain_update(model, optimizer, 0)
    assert layer.state_layout.contributes(0)
    after = full(kernel.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_ranks_agree(after)


def a_kernel_is_loaded_into_shards():
    """From a source, as into any layer."""
    registry = esper.open_registry("memory:")
    artifact_id = registry.put(encode_kernel(lower(mlp_blueprint())))
    torch.manual_seed(0)
    model = shard(esper.wrap(Net(), select=["first", "last"], source=registry))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    assert model.first.load_kernel_sync(0, artifact_id, alpha=0.5)
    esper.sync_optimizer(model, optimizer)
    for step in range(2):
        clipped_update(model, optimizer, step)
        assert_ranks_agree(full(trained_by(optimizer)))
    assert len(trained_by(optimizer)) > 4


def a_layer_that_is_spread_otherwise_is_refused():
    """Under tensor parallelism nobody knows what the ranks' gradients would mean."""
    net = esper.wrap(Net())
    parallelize_module(net, init_device_mesh("cpu", (2,)), {"first": ColwiseParallel()})
    try:
        net.first.graft(0, Kernel(), alpha=0.5, example=torch.randn(3, 6))
    except ValueError as error:
        assert "tensor parallelism" in str(error)  # noqa: PT017 - no pytest in these processes
    else:
        raise AssertionError("a graft into a layer under tensor parallelism was accepted")


def without_averaging_ranks_come_apart():
    """The control."""
    finish, replicas._Replication._finish = replicas._Replication._finish, lambda self: None
    try:
        model, optimizer, _, kernel = sharded()
        plain_update(model, optimizer, 0)
    finally:
        replicas._Replication._finish = finish
    value = kernel.linear.weight.to_local().detach()
    mine = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(mine, value)
    assert not torch.equal(*mine)


def shared_folder():
    """Return a folder that both ranks know."""
    told = [tempfile.mkdtemp()]
    dist.broadcast_object_list(told)
    return Path(told[0])


class Resumed:
    """A run with dropout and a schedule, that can be built as it began."""

    def __init__(self, *, spread=True):
        torch.manual_seed(0)
        net = esper.wrap(Net(norm=True), select=["first", "last"])
        net.norm = nn.Sequential(net.norm, nn.Dropout(0.3))
        self.model = shard(net) if spread else net
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        torch.manual_seed(dist.get_rank())

    def graft(self):
        kernel = instantiate_mlp()
        self.model.first.graft(0, kernel, alpha=0.5, example=torch.randn(3, 6))
        esper.sync_optimizer(self.model, self.optimizer)

    def train(self, steps):
        for step in steps:
            clipped_update(self.model, self.optimizer, step)
            self.scheduler.step()

    def state(self):
        moments = [v for state in self.optimizer.state.values() for v in state.values()]
        buffers = [b for name, b in self.model.named_buffers() if "_seeds" not in name]
        found = full([*self.model.parameters(), *moments]) + full(buffers)
        return [*found, torch.get_rng_state()]


def instantiate_mlp():
    return lower(mlp_blueprint())


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def a_checkpoint_goes_on_bit_for_bit():
    """One file of whole tensors, written by the first rank, with what each rank draws from."""
    path, run = shared_folder() / "run.esper", Resumed()
    run.train(range(2))
    run.graft()
    run.train(range(2, 4))
    parts = {"optimizer": run.optimizer, "scheduler": run.scheduler}
    esper.save_checkpoint(path, run.model, **parts, extra={"rank": dist.get_rank()})
    run.train(range(4, 7))
    again = Resumed()
    parts = {"optimizer": again.optimizer, "scheduler": again.scheduler}
    assert esper.load_checkpoint(path, again.model, **parts) == {"rank": dist.get_rank()}
    again.train(range(4, 7))
    assert_equal(again.state(), run.state())
    alone = Resumed(spread=False)
    parts = {"optimizer": alone.optimizer, "scheduler": alone.scheduler}
    assert esper.load_checkpoint(path, alone.model, **parts) == {"rank": 0}
    assert alone.model.first.seed_kernel(0) is not None
    assert len(list(path.parent.iterdir())) == 1


def a_distributed_checkpoint_goes_on_in_a_fresh_run():
    """Kernels are built from the folder, and tensors and moments are loaded in place, by name."""
    folder, run = shared_folder() / "folder", Resumed()
    run.train(range(2))
    run.graft()
    run.train(range(2, 4))
    model, optim = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)
    again = Resumed()
    esper.build_as_saved(folder, again.model, again.optimizer)
    model, optim = get_state_dict(again.model, again.optimizer)
    state = {"model": model, "optim": optim}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
    )
    for p, q in zip(again.model.parameters(), run.model.parameters(), strict=True):
        ours, theirs = again.optimizer.state[p], run.optimizer.state[q]
        assert_equal(full([p, *ours.values()]), full([q, *(theirs[name] for name in ours)]))
    clipped_update(again.model, again.optimizer, 5)
    assert_ranks_agree(full(trained_by(again.optimizer)))


def what_cannot_be_written_is_told_on_every_rank():
    """The others do not wait for the first one's file."""
    path = shared_folder() / "none" / "run.esper"
    try:
        esper.save_checkpoint(path, Resumed().model)
    except (OSError, esper.RankFailedError) as error:
        assert "run.esper" in str(error)  # noqa: PT017 - no pytest in these processes
    else:
        raise AssertionError("a file was written into no folder")


CASES = {
    case.__name__: case
    for case in (
        kernels_train_as_beside_ddp,
        one_rank_at_fault,
        not_finite_on_one_rank,
        isolated_and_given_up_on_one_rank,
        taking_one_out_restores_the_host,
        a_fossil_stays_in_the_plan,
        a_kernel_is_loaded_into_shards,
        a_layer_that_is_spread_otherwise_is_refused,
        without_averaging_ranks_come_apart,
        a_checkpoint_goes_on_bit_for_bit,
        a_distributed_checkpoint_goes_on_in_a_fresh_run,
        what_cannot_be_written_is_told_on_every_rank,
    )
}

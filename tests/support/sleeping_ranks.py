"""What each of two processes runs for the tests of blocks that sleep under DDP and FSDP2."""

import contextlib
import copy
import math

import torch
import torch.distributed as dist
from rank_cases import run_cases
from sleepers import Listed, Residual, made, smaller
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.seeds.shallow import depth_state


def loss_of(model, step, part=0):
    """Return the loss of a batch of this rank's own."""
    generator = torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank())
    return model(torch.randn(4, 4, generator=generator)).square().mean()


def plain_update(model, optimizer, step):
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def accumulating_update(model, optimizer, step):
    optimizer.zero_grad()
    with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
        loss_of(model, step).backward()
    loss_of(model, step, 1).backward()
    optimizer.step()


def host(depth=2, *, apart=False, dropout=False):
    """Return a shallow model, the same on every rank but, where told, for what sleeps."""
    model = made("list")
    for block in model.blocks:
        block.norm = nn.BatchNorm1d(8)
        block.train(dropout)
        block.norm.train()
    esper.shallow(model, "blocks", depth=depth)
    if apart:
        torch.manual_seed(dist.get_rank())
        for block in (model.blocks[i] for i in (1, 2, 4, 5)):
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.1, 0.3)
    return model


def values(model):
    return [t.detach().clone() for t in model.state_dict().values()]


def assert_ranks_agree(tensors):
    for value in tensors:
        mine = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(mine, value.contiguous())
        assert torch.equal(mine[0], mine[-1])


def state_of(optimizer):
    return [v for state in optimizer.state.values() for v in state.values()]


def raises(call, said):
    try:
        call()
    except ValueError as error:
        assert said in str(error), error  # noqa: PT017 - no pytest in these processes
    else:
        raise AssertionError(f"nothing was raised of {said!r}")


def sleeping_parameters_are_ignored():
    """A shallow model trains under DDP as the smaller one does, bit for bit, and none waits."""
    model = host()
    built = smaller(model, "list", [0, 3])
    for block in built.blocks:
        block.train(mode=False)
        block.norm.train()
    runs = []
    for each in (model, built):
        replicated = DistributedDataParallel(each)
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        for step in range(3):
            plain_update(replicated, optimizer, step)
        runs.append([each.blocks[i].up.weight for i in ((0, 3) if each is model else (0, 1))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def any_module_around_may_be_replicated():
    """The names are found on the root, on the model and on a part between them."""
    for pick in (lambda root: root, lambda root: root["part"], lambda root: root["part"][0]):
        inner = made("list")
        root = nn.ModuleDict({"part": nn.Sequential(inner)})
        esper.shallow(inner, "blocks", depth=2, root=root)
        module = pick(root)
        replicated = DistributedDataParallel(_Called(module, inner) if module is root else module)
        loss_of(replicated, 0).backward()
        loss_of(replicated, 1).backward()


class _Called(nn.Module):
    """Calls what is inside a root; it has the root's names as they are."""

    def __init__(self, root, inner):
        super().__init__()
        for name, module in root.named_children():
            setattr(self, name, module)
        self._call = [inner]
        names = root._ddp_params_and_buffers_to_ignore
        self._ddp_params_and_buffers_to_ignore = names

    def forward(self, x):
        return self._call[0](x)


def waking_is_equal_on_every_rank(init, update):
    """Values, moments and buffers are rank 0's, and stay equal while blocks come in and after."""
    model = DistributedDataParallel(host(apart=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        update(model, optimizer, step)
    before = copy.deepcopy(model.module.blocks[1].state_dict())
    esper.deepen(model, optimizer, depth=6, ramp_updates=3, init=init)
    assert_ranks_agree(list(model.parameters()))
    assert_ranks_agree(values(model.module.blocks[1]))
    if init == "fresh" and dist.get_rank() == 0:
        after = model.module.blocks[1].state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert_ranks_agree(state_of(optimizer))
    for step in range(2, 7):
        update(model, optimizer, step)
        assert_ranks_agree(list(model.parameters()))
        assert_ranks_agree(values(model.module.blocks[1]))
        assert_ranks_agree([v.float() for v in state_of(optimizer)])
    assert not depth_state(model)
    assert type(model.module.blocks[1]) is Residual
    assert isinstance(model, DistributedDataParallel)
    assert not torch.equal(before["up.weight"], model.module.blocks[1].up.weight)


def fresh_blocks():
    waking_is_equal_on_every_rank("fresh", plain_update)


def copied_blocks():
    waking_is_equal_on_every_rank("copy", plain_update)


def accumulated_gradients():
    waking_is_equal_on_every_rank("fresh", accumulating_update)


def woken_blocks_train_as_if_ddp_had_known_them():
    """Averaged beside DDP, to rounding, as one that was made with all blocks awake."""
    results = []
    for wakes in (True, False):
        model = made("list").eval()
        if wakes:
            esper.shallow(model, "blocks", depth=2)
        replicated = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if wakes:
            esper.deepen(replicated, optimizer, depth=6, ramp_updates=1)
            optimizer.zero_grad()
            loss = 0.0 * loss_of(replicated, 0)
            loss.backward()
            optimizer.step()
            optimizer.state.clear()
        for step in range(3):
            plain_update(replicated, optimizer, step)
        results.append(dict(model.named_parameters()))
    assert all(torch.allclose(p, results[1][n], atol=1e-6) for n, p in results[0].items())


def wrong_orders_are_refused():
    """With the cure: at the first forward, when blocks wake, and where ranks differ."""
    inner = made("list")
    model = DistributedDataParallel(inner)
    raises(lambda: esper.shallow(model, "blocks", depth=2), "call esper.shallow before it")
    esper.shallow(inner, "blocks", depth=2)
    raises(lambda: loss_of(model, 0), "call esper.shallow before it, with root=")
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    raises(lambda: esper.deepen(model, optimizer, depth=6), "before the blocks were put to sleep")
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    depth = 3 + dist.get_rank()
    raises(lambda: esper.deepen(model, optimizer, depth=depth), "the ranks wake other blocks")


def a_loss_that_spikes_on_one_rank_puts_blocks_to_sleep_on_all():
    """The ranks agree on going back, and train on together."""
    model = DistributedDataParallel(host())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = esper.Staged({0.4: 6})
    with esper.Grower(model, optimizer, horizon=100, policy=policy) as grower:
        for step in range(60):
            loss = plain_update(model, optimizer, step)
            is_bad = 44 < step < 50 and dist.get_rank() == 1
            grower.step(loss * 1e6 if is_bad else loss)
            assert_ranks_agree(list(model.parameters()))
    (stage,) = grower.report().stages
    assert stage.verdict == "put to sleep"
    assert stage.ended_at == 50
    assert len(esper.asleep(model)) == 4


def stages_in_a_replicated_run():
    """A planned stage under DDP ends awake and equal."""
    model = DistributedDataParallel(host(apart=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    policy = esper.Staged({0.5: 6}, init="copy")
    with esper.Grower(model, optimizer, horizon=20, policy=policy) as grower:
        for step in range(20):
            grower.step(plain_update(model, optimizer, step))
    assert grower.report().stages[0].verdict == "awake"
    assert math.isfinite(grower.report().stages[0].loss_after)
    assert_ranks_agree(list(model.parameters()))


class Counted:
    """How often each sharded module has gathered its parameters."""

    def __init__(self, model):
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

        self.names = {id(m): name for name, m in model.named_modules()}
        self.counts, self._class, self._unshard = {}, FSDPParamGroup, FSDPParamGroup.unshard

        def unshard(group, *args, **kwargs):
            name = self.names[id(group.modules[0])]
            self.counts[name] = self.counts.get(name, 0) + 1
            return self._unshard(group, *args, **kwargs)

        FSDPParamGroup.unshard = unshard

    def close(self):
        self._class.unshard = self._unshard
        return self.counts


def sharded(num=6, depth=2):
    """Return a model whose blocks are sharded one by one, most of them asleep."""
    model = made("list", num)
    for block in model.blocks:
        block.norm = nn.LayerNorm(8)
    model.eval()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return esper.shallow(model, "blocks", depth=depth)


def full(model):
    return {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}


def a_sleeping_block_is_not_gathered():
    """While it sleeps its parameters stay apart; awake it is gathered as its class is."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    counted = Counted(model)
    for step in range(3):
        plain_update(model, optimizer, step)
    counts = counted.close()
    assert counts["blocks.0"] >= 3
    assert counts["blocks.3"] >= 3
    assert not {f"blocks.{i}" for i in (1, 2, 4, 5)} & counts.keys()
    assert not any(p in optimizer.state for p in model.blocks[1].parameters())
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    counted = Counted(model)
    for step in range(3, 6):
        plain_update(model, optimizer, step)
    assert {f"blocks.{i}" for i in range(6)} <= counted.close().keys()


def sharded_stages_train_as_on_one_process():
    """Asleep, waking and awake, the numbers are those of the same run under DDP."""
    results = []
    for is_sharded in (True, False):
        if is_sharded:
            model = run = sharded()
            classes = [type(m) for m in sharded(depth=6).modules()]
        else:
            model = made("list")
            for block in model.blocks:
                block.norm = nn.LayerNorm(8)
            run = DistributedDataParallel(esper.shallow(model.eval(), "blocks", depth=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(7):
            if step == 2:
                esper.deepen(run, optimizer, depth=6, ramp_updates=3, init="copy")
            plain_update(run, optimizer, step)
        assert not depth_state(model)
        if is_sharded:
            assert [type(m) for m in model.modules()] == classes
        results.append(full(model) if is_sharded else dict(model.named_parameters()))
    assert all(torch.allclose(p, results[1][n], atol=1e-5) for n, p in results[0].items())


def sharding_a_sleeper_is_refused():
    """``fully_shard`` comes first."""
    model = esper.shallow(Listed(3), "blocks", depth=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    raises(lambda: fully_shard(model.blocks[1], mesh=mesh), "call esper.shallow after it")


def a_form_is_learned_of_a_sharded_block():
    """Gathered once, aside; its parameters are apart again, and no more is gathered for it."""
    model = made("tuple").eval()
    built = smaller(model, "tuple", [0, 3]).eval()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    esper.shallow(model, "blocks", depth=2)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    counted = Counted(model)
    found = [model(x) for _ in range(3)]
    counts = counted.close()
    assert all(torch.equal(each, built(x)) for each in found)
    assert sum(counts.get(f"blocks.{i}", 0) for i in (1, 2, 4, 5)) == 1
    assert all(hasattr(p, "full_tensor") for p in model.blocks[1].parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    esper.deepen(model, optimizer, depth=6, ramp_updates=2)
    for step in range(3):
        plain_update(model, optimizer, step)
    assert not depth_state(model)


def widening_is_refused():
    """The parameters that would be exchanged are held by FSDP2."""
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    raises(lambda: esper.widen(model, optimizer, "blocks.0", intermediate=32), "is in FSDP2")


def a_sharded_model_that_spikes_sleeps_again():
    """Shards, moments and classes are put back on every rank."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept = {}
    with esper.Grower(model, optimizer, horizon=100, policy=esper.Staged({0.4: 6})) as grower:
        for step in range(50):
            loss = plain_update(model, optimizer, step)
            is_bad = step > 44 and dist.get_rank() == 0
            if step == 39:
                kept = full(model)
            grower.step(loss * 1e6 if is_bad else loss)
    assert grower.report().stages[0].verdict == "put to sleep"
    now = full(model)
    assert all(torch.equal(value, now[name]) for name, value in kept.items())
    plain_update(model, optimizer, 50)


CASES = {
    case.__name__: case
    for case in (
        sleeping_parameters_are_ignored,
        any_module_around_may_be_replicated,
        fresh_blocks,
        copied_blocks,
        accumulated_gradients,
        woken_blocks_train_as_if_ddp_had_known_them,
        wrong_orders_are_refused,
        a_loss_that_spikes_on_one_rank_puts_blocks_to_sleep_on_all,
        stages_in_a_replicated_run,
        a_sleeping_block_is_not_gathered,
        sharded_stages_train_as_on_one_process,
        sharding_a_sleeper_is_refused,
        a_form_is_learned_of_a_sharded_block,
        widening_is_refused,
        a_sharded_model_that_spikes_sleeps_again,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    run_cases(CASES, *group)

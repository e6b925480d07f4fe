"""What each process of a distributed test runs; imported by the processes that a test starts."""

import copy
import logging

import torch
import torch.distributed as dist
from rank_cases import run_cases
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from wrapping_models import Bottleneck

import esper
from esper.state.layer_record import record_of


def net():
    """The same network on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


def grown():
    """The same network on every rank, with a kernel at its first layer."""
    model = esper.wrap(net())
    model[0].graft(0, Bottleneck(6), alpha=0.5, example=torch.randn(3, 6))
    return model


def replicate(model):
    return DistributedDataParallel(model)


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, num_updates=3):
    """Train on batches of the rank's own."""
    torch.manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(num_updates):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
    return model


def values(model):
    full = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().clone() for p in full]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def assert_ranks_agree(model):
    for value in values(model):
        mine = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(mine, value)
        assert torch.equal(mine[0], mine[-1])


def wrap_before_ddp():
    model = train(replicate(esper.wrap(net())))
    assert_same(values(model), values(train(replicate(net()))))
    assert list(esper.layers(model)) == ["module.0", "module.2"]


def wrap_after_ddp():
    model = train(esper.wrap(replicate(net())))
    assert_same(values(model), values(train(replicate(net()))))
    plain = esper.unwrap(model)
    assert type(plain.module[0]) is nn.Linear


def graft_before_ddp():
    model = train(replicate(grown()))
    assert_ranks_agree(model)
    assert not torch.equal(values(model)[2], values(grown())[2])
    assert model.module[0].get_stats()["execution_stats"]["fault_count"] == 0


def graft_after_ddp():
    """Each rank's kernel begins with weights of its own; those of rank 0 are what all train."""
    model = replicate(esper.wrap(net()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    model.module[0].graft(0, Bottleneck(6), alpha=0.5, example=torch.randn(3, 6))
    said = []
    logger = logging.getLogger("esper.continuity.optimizer")
    logger.addFilter(lambda record: said.append(record.getMessage()))
    esper.sync_optimizer(model, optimizer)
    assert any("set_guard(0, 'step')" in line for line in said) is (dist.get_world_size() > 1)
    before = values(model)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):  # micro-batches
            model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
    assert_ranks_agree(model)
    assert not any(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def one_rank_at_fault_stops_the_step_of_all():
    """A kernel that is not finite on rank 0 costs every rank this step, and isolates the seed."""
    model = replicate(esper.wrap(net()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = model.module[0]
    layer.graft(0, Bottleneck(6), alpha=0.5, example=torch.randn(3, 6))
    esper.sync_optimizer(model, optimizer)
    layer.set_guard(0, "step")
    before = [p.detach().clone() for p in net().parameters()]
    if dist.get_rank() == 0:
        layer.seed_kernel(0).register_forward_hook(lambda _, args, output: output * torch.inf)
    model(torch.randn(3, 6)).square().mean().backward()
    optimizer.step()
    assert layer.state_layout.state(0).name == "ERROR_RECOVERY"
    assert_same(values(model.module), before)


def fused_seeds_before_ddp():
    """Seeds that run as one have the gradients that they have without ranks."""
    torch.manual_seed(0)
    model, x = esper.wrap(nn.Sequential(nn.Linear(6, 6)), num_seeds=6), torch.randn(8, 6)
    for i in range(6):
        kernel = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6))
        model[0].graft(i, kernel, alpha=0.1 * i + 0.1, guard="off", example=x)
    alone = copy.deepcopy(model)
    alone(x).square().sum().backward()
    DistributedDataParallel(model, gradient_as_bucket_view=True)(x).square().sum().backward()
    assert record_of(model[0]).grouping.groups
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def wrap_before_fsdp():
    model = train(shard(esper.wrap(net())))
    assert_same(values(model), values(train(replicate(net()))))
    assert list(esper.layers(model)) == ["0", "2"]
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(esper.restore(model).model[0], esper.KasminaLayer)
    train(model)


def wrap_after_fsdp():
    model = shard(net())
    own_classes = [type(module) for module in model.modules()]
    train(esper.wrap(model))
    assert_same(values(model), values(train(replicate(net()))))
    esper.restore(model)
    assert [type(module) for module in model.modules()] == own_classes
    train(model)


def graft_before_fsdp():
    model, expected = shard(grown()), replicate(grown())
    assert_same(values(train(model)), values(train(expected)))
    for each in (model, expected.module):
        each[0].set_alpha(0, 0.25)
    assert_same(values(train(model)), values(train(expected)))
    for each in (model, expected.module):
        each[0].unload_kernel(0)
    assert len(list(model.parameters())) == 4
    train(model)


def checkpoint_under_fsdp():
    model, other = shard(grown()), shard(grown())
    train(model)
    set_model_state_dict(other, copy.deepcopy(get_model_state_dict(model)))
    assert_same(values(other), values(model))


CASES = {
    case.__name__: case
    for case in (
        wrap_before_ddp,
        wrap_after_ddp,
        graft_before_ddp,
        graft_after_ddp,
        one_rank_at_fault_stops_the_step_of_all,
        fused_seeds_before_ddp,
        wrap_before_fsdp,
        wrap_after_fsdp,
        graft_before_fsdp,
        checkpoint_under_fsdp,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    run_cases(CASES, *group)

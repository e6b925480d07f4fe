"""What each of two processes runs for the tests of replicated models that grow."""

import contextlib
import logging

import torch
import torch.distributed as dist
from rank_cases import run_cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper.continuity import replicas

GUARDS = ("always", "step", "off")
NUM_STEPS = 4


class Kernel(nn.Module):
    """A kernel that fails, or gives what is not finite, where it is told to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.mood = "well"

    def forward(self, x):
        if self.mood == "raises":
            msg = "out of memory, say"
            raise RuntimeError(msg)
        y = self.linear(x)
        return y * torch.inf if self.mood == "inf" else y


class Net(nn.Module):
    """Two layers; the first can be skipped."""

    def __init__(self, *, norm=False):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.skips = False

    def forward(self, x):
        return self.last(self.norm(x if self.skips else self.first(x).relu()))


def replicated(*, late=True, guard="off", alpha=0.5, norm=False, **settings):
    """Return a replicated model with a kernel in it, its optimizer, its layer and the kernel."""
    torch.manual_seed(0)
    net, kernel = esper.wrap(Net(norm=norm), select=["first", "last"]), Kernel()
    example, made = torch.randn(3, 6), "off" if guard == "step" else guard
    if not late:
        net.first.graft(0, kernel, alpha=alpha, guard=made, example=example)
    model = DistributedDataParallel(net, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    if late:
        net.first.graft(0, kernel, alpha=alpha, guard=made, example=example)
    esper.sync_optimizer(model, optimizer)
    net.first.set_guard(0, guard)
    return model, optimizer, net.first, kernel


def loss_of(model, step, part=0):
    """Return the loss of a batch of this rank's own."""
    generator = torch.Generator().manual_seed(100 * step + 10 * part + dist.get_rank())
    return model(torch.randn(4, 6, generator=generator)).square().mean()


def assert_ranks_agree(values):
    for value in values:
        mine = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(mine, value)
        assert torch.equal(mine[0], mine[-1])


def parameters(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


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
        with model.no_sync() if part < 2 else contextlib.nullcontext():
            loss_of(model, step, part).backward()
    optimizer.step()


def scaled_update(scaler):
    def update(model, optimizer, step):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        scaler.step(optimizer)
        scaler.update()

    return update


def trained(update, *, before_step=lambda kernel, step: None, **settings):
    """Train; the ranks agree after every step. Return what came out, and the layer."""
    model, optimizer, layer, kernel = replicated(**settings)
    for step in range(NUM_STEPS):
        before_step(kernel, step)
        update(model, optimizer, step)
        assert_ranks_agree(parameters(optimizer))
    return model, optimizer, layer


def assert_as_if_ddp_had_known(update):
    """A kernel that came late is trained as one that was there when DDP was made, to rounding."""
    results = []
    for late in (False, True):
        model, _, _ = trained(update, late=late)
        results.append(dict(model.named_parameters()))
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(p, results[1][name], atol=1e-5) for name, p in results[0].items())


def plain():
    assert_as_if_ddp_had_known(plain_update)


def clipping():
    assert_as_if_ddp_had_known(clipped_update)


def accumulating():
    assert_as_if_ddp_had_known(accumulating_update)


def scaled():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trained(scaled_update(scaler))


def overflow_of_one_rank_skips_the_step_of_all():
    """An infinite gradient of a kernel on one rank is one of the mean, before anybody asks."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, _, kernel = replicated()
    update = scaled_update(scaler)
    update(model, optimizer, 0)
    before = [p.clone() for p in parameters(optimizer)]
    if dist.get_rank() == 0:
        kernel.linear.weight.register_hook(lambda gradient: gradient * torch.inf)
    update(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(optimizer), strict=True))
    assert scaler.get_scale() == 4.0


def one_rank_skips_the_layer():
    """Its share of the mean is zero, in every way to train; DDP is told to expect it."""
    for late in (True, False):
        for update in (plain_update, clipped_update, accumulating_update):
            model, optimizer, _, _ = replicated(late=late, find_unused_parameters=True)
            for step in range(NUM_STEPS):
                model.module.skips = step == 1 and dist.get_rank() == 0
                update(model, optimizer, step)
                assert_ranks_agree(parameters(optimizer))


def all_ranks_skip_the_layer():
    """What no rank has a gradient for has none afterwards, and no weight decay."""
    model, optimizer, _, kernel = replicated(find_unused_parameters=True)
    model.module.skips = True
    before = kernel.linear.weight.detach().clone()
    plain_update(model, optimizer, 0)
    assert kernel.linear.weight.grad is None
    assert torch.equal(before, kernel.linear.weight)


def falls_ill(mood, steps):
    def before_step(kernel, step):
        kernel.mood = mood if dist.get_rank() == 0 and step in steps else "well"

    return before_step


def one_rank_at_fault():
    """Under every guard, for a kernel that came late or was there, once or at every step."""
    for guard in GUARDS:
        for late in (True, False):
            for steps in ((1,), range(1, NUM_STEPS)):
                for update in (plain_update, clipped_update, accumulating_update):
                    trained(update, before_step=falls_ill("raises", steps), guard=guard, late=late)


def not_finite_on_one_rank():
    """Guarded, it costs a share or a step; the ranks go on alike."""
    for guard in ("always", "step"):
        for late in (True, False):
            for update in (plain_update, clipped_update, accumulating_update):
                _, optimizer, _ = trained(
                    update, before_step=falls_ill("inf", (1,)), guard=guard, late=late
                )
                assert all(p.isfinite().all() for p in parameters(optimizer))


def isolated_and_given_up_on_one_rank():
    """Maintenance on rank 0 isolates a seed, and gives it up; every rank trains on."""
    for guard in GUARDS:
        for late, norm in ((True, False), (True, True), (False, False), (False, True)):
            model, optimizer, layer, kernel = replicated(guard=guard, late=late, norm=norm)
            falls_ill("raises", range(100))(kernel, 0)
            for step in range(40):
                plain_update(model, optimizer, step)
                with contextlib.suppress(esper.KernelExecutionError):
                    esper.maintain(model)
                assert_ranks_agree(p.detach() for p in net_parameters(model))
            esper.sync_optimizer(model, optimizer)
            plain_update(model, optimizer, 41)
            assert_ranks_agree(p.detach() for p in net_parameters(model))
            assert dist.get_rank() or not layer.state_layout.contributes(0)


def net_parameters(model):
    return [p for name, p in model.module.named_parameters() if "_seeds" not in name]


def a_seed_that_is_off_is_waited_for_by_nobody():
    """A kernel that DDP knows, at alpha 0 on every rank, then on, then unloaded."""
    model, optimizer, layer, _ = replicated(late=False, alpha=0.0)
    for step, change in enumerate(
        (None, lambda: layer.set_alpha(0, 0.5), None, lambda: layer.unload_kernel(0), None)
    ):
        if change is not None:
            change()
        plain_update(model, optimizer, step)
        assert_ranks_agree(p.detach() for p in net_parameters(model))


def a_backward_that_failed_is_forgotten():
    """The next one averages again."""
    model, optimizer, _, kernel = replicated()

    def fail(_):
        raise ZeroDivisionError

    handle = kernel.linear.weight.register_hook(fail)
    with contextlib.suppress(ZeroDivisionError):
        with model.no_sync():
            loss = loss_of(model, 0)
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    for step in range(1, 3):
        plain_update(model, optimizer, step)
        assert_ranks_agree(parameters(optimizer))


def outputs_of_any_form():
    """A tuple, a dict, an object that nobody can look into."""

    class Box:
        def __init__(self, value):
            self.value = value

    forms = (
        (lambda y: (y, None), lambda out: out[0]),
        (lambda y: {"logits": y}, lambda out: out["logits"]),
        (Box, lambda out: out.value),
    )
    for put, take in forms:
        model, optimizer, _, _ = replicated()
        model.module.register_forward_hook(lambda _, args, y, put=put: put(y))
        for step in range(2):
            plain_update(lambda x, m=model, t=take: t(m(x)), optimizer, step)
            assert_ranks_agree(parameters(optimizer))


def grown():
    """Return the states of a model that has grown, and of its optimizer."""
    torch.manual_seed(0)
    net = esper.wrap(Net(), select=["first", "last"])
    net.first.graft(0, "mlp-6x6-w32", alpha=0.5, example=torch.randn(3, 6))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    esper.sync_optimizer(net, optimizer)
    plain_update(net, optimizer, 0)
    return net.state_dict(), optimizer.state_dict()


def a_kernel_that_is_loaded_after_the_model_was_replicated():
    """By torch's own calls, as frameworks do, with the optimizer in line before, and without."""
    states = [grown()]
    dist.broadcast_object_list(states)
    for is_in_line in (True, False):
        net = esper.wrap(Net(), select=["first", "last"])
        model = DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if is_in_line:
            esper.sync_optimizer(model, optimizer)
        net.load_state_dict(states[0][0])
        optimizer.load_state_dict(states[0][1])
        assert any("_seeds" in name for name, _ in net.named_parameters())
        for step in range(1, NUM_STEPS):
            plain_update(model, optimizer, step)
            assert_ranks_agree(parameters(optimizer))


def averaging_in_the_steps_pre_hook():
    """The control: averaged as late as that, clipping has read gradients of the rank's own."""
    finish, replicas._Replication._finish = replicas._Replication._finish, lambda self: None
    try:
        model, optimizer, _, _ = replicated()
        own = replicas._replication(model)
        optimizer.register_step_pre_hook(lambda *_: finish(own))
        clipped_update(model, optimizer, 0)
    finally:
        replicas._Replication._finish = finish
    values = [torch.empty_like(parameters(optimizer)[0]) for _ in range(2)]
    dist.all_gather(values, parameters(optimizer)[0])
    norms = [torch.empty(1) for _ in range(2)]
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    dist.all_gather(norms, nn.utils.get_total_norm(gradients).reshape(1))
    assert not torch.equal(*values) or not torch.equal(*norms)


CASES = {
    case.__name__: case
    for case in (
        plain,
        clipping,
        accumulating,
        scaled,
        overflow_of_one_rank_skips_the_step_of_all,
        one_rank_skips_the_layer,
        all_ranks_skip_the_layer,
        one_rank_at_fault,
        not_finite_on_one_rank,
        isolated_and_given_up_on_one_rank,
        a_seed_that_is_off_is_waited_for_by_nobody,
        a_backward_that_failed_is_forgotten,
        outputs_of_any_form,
        a_kernel_that_is_loaded_after_the_model_was_replicated,
        averaging_in_the_steps_pre_hook,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    logging.disable(logging.CRITICAL)
    run_cases(CASES, *group)

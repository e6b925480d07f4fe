"""Checks of a device that is neither the CPU nor CUDA; a program that prints what they came to."""

import copy
import json
import sys
import tempfile
import traceback
from pathlib import Path

import python_device
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

import esper
from esper.contracts.lifecycle import SeedLifecycleState
from esper.growth.memory import available_bytes
from esper.seeds.step_guard import read_step_flags

KEPT = python_device.set_up()
DEVICE = torch.device(python_device.NAME)
HOSTS = {
    "linear": (lambda: nn.Linear(6, 6), (5, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, padding=1), (3, 2, 4, 4)),
    "layernorm": (lambda: nn.LayerNorm(6), (5, 6)),
    "batchnorm": (lambda: nn.BatchNorm2d(2), (3, 2, 4, 4)),
}
GUARDS = ("always", "step", "off")


def made(build, shape):
    """Return a host and an input there; the host's weights are drawn on the CPU."""
    torch.manual_seed(0)
    return build().to(DEVICE), torch.randn(shape).to(DEVICE)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).to(DEVICE)


def batch(rows=8):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def equal(one, other):
    assert torch.equal(one.cpu(), other.cpu()), (one.cpu() - other.cpu()).abs().max()


def close(one, other):
    torch.testing.assert_close(one.cpu(), other.cpu())


def a_tensor_there_is_none_of_the_cpu():
    """Or the other checks would say nothing."""
    x = batch()
    assert type(x) is torch.Tensor
    assert x.device.type == python_device.NAME
    assert (x + 1).device == x.device
    assert torch.accelerator.current_accelerator() == DEVICE
    close(x + x, x.cpu() * 2)


def dormant_layers_are_native():
    for build, shape in HOSTS.values():
        (plain, x), (wrapped, _) = made(build, shape), made(build, shape)
        esper.wrap(wrapped)
        equal(plain(x), wrapped(x))
        plain(x).sum().backward()
        wrapped(x).sum().backward()
        for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
            equal(ours.grad, theirs.grad)


def a_graft_is_the_formula():
    for build, shape in HOSTS.values():
        for guard in GUARDS:
            host, x = made(build, shape)
            esper.wrap(host)
            host.enable_step_guard()
            kernel = build().to(DEVICE)
            host.graft(0, kernel, alpha=0.25, example=x, guard=guard)
            close(host(x), host.default_layer(x) + 0.25 * kernel(x))
            host(x).sum().backward()
            assert all(p.grad is not None for p in kernel.parameters())
            host.set_alpha(0, 1.0)
            close(host(x), host.default_layer(x) + kernel(x))
            host.unload_kernel(0)
            equal(host(x), host.default_layer(x))


def kernels_are_swapped():
    model, x = esper.wrap(net()), batch()
    for random_seed in range(3):
        artifact = esper.compile_blueprint(mlp_blueprint(init_seed=random_seed))
        model[0].graft(0, artifact, alpha=0.5, example=x)
        y = model(x)
        model[0].unload_kernel(0)
        equal(model(x), net()(x))
        assert y.shape == (8, 3)


def asked_for():
    """Names of the operations since the calls were forgotten that read a number."""
    return [c for c in python_device.calls if "local_scalar" in c or "nonzero" in c]


def a_forward_waits_for_no_number():
    """On a device nobody looks, whatever the guard; in a training forward, and without one."""
    for guard in GUARDS:
        model, x = esper.wrap(net()), batch()
        model[0].enable_step_guard()
        model[0].graft(0, nn.Linear(6, 6).to(DEVICE), alpha=0.5, example=x, guard=guard)
        for context in (torch.enable_grad(), torch.no_grad()):
            python_device.calls.clear()
            with context:
                model(x)
            assert asked_for() == [], (guard, asked_for())


def a_backward_waits_for_no_number():
    """Nor does a guard look at a gradient, at the input's or a parameter's."""
    for guard in GUARDS:
        model, x = esper.wrap(net()), batch().requires_grad_()
        model[0].enable_step_guard()
        model[0].graft(0, nn.Linear(6, 6).to(DEVICE), alpha=0.5, example=x, guard=guard)
        loss = model(x).sum()
        python_device.calls.clear()
        loss.backward()
        assert asked_for() == [], (guard, asked_for())


def seeds_that_run_as_one_wait_for_no_number():
    """Their shares are made there, each for its guard, and a fault is its own seed's."""
    for guard in GUARDS:
        model, x = esper.wrap(net(), num_seeds=6), batch()
        model[0].enable_step_guard()
        for i in range(6):
            kernel = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 6)).to(DEVICE)
            model[0].graft(i, kernel, alpha=0.5, example=x, guard=guard)
        kernels = [model[0].seed_kernel(i) for i in range(6)]
        expected = model[0].default_layer(x) + sum(0.5 * kernel(x) for kernel in kernels)
        python_device.calls.clear()
        y = model[0](x)
        assert asked_for() == [], (guard, asked_for())
        assert any("bmm" in c for c in python_device.calls) == (guard == "step"), guard
        close(y, expected)
        python_device.calls.clear()
        y.square().sum().backward()
        assert asked_for() == [], (guard, asked_for())
        assert all(p.grad is not None for kernel in kernels for p in kernel.parameters())
        if guard == "off":
            continue
        with torch.no_grad():
            kernels[3][2].bias.fill_(torch.nan)
        model(x)
        faults = esper.maintain(model).faults if guard == "always" else read_step_flags([model[0]])
        assert [fault.seed_idx for fault in faults] == [3], (guard, faults)


def a_faulty_kernel_costs_its_share():
    model, x = esper.wrap(net()), batch()
    kernel = nn.Linear(6, 6).to(DEVICE)
    model[0].graft(0, kernel, alpha=0.5, example=x, guard="always")
    with torch.no_grad():
        kernel.weight.fill_(torch.nan)
    for _ in range(3):
        equal(model(x), net()(x))
        esper.maintain(model)
    assert model[0].state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    model[0].unload_kernel(0)


def a_bad_gradient_reaches_nobody():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.nan

    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.is_bad = nn.Linear(6, 6), False

        def forward(self, x):
            return Bad.apply(self.body(x)) if self.is_bad else self.body(x)

    model, x, kernel = esper.wrap(net()), batch(), Kernel().to(DEVICE)
    model[0].graft(0, kernel, alpha=0.5, example=x, guard="always")
    kernel.is_bad = True
    model(x).sum().backward()
    assert all(bool(p.grad.cpu().isfinite().all()) for p in model.parameters())
    assert esper.maintain(model).faults


def the_step_guard_drops_a_step():
    model, x = esper.wrap(net()), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    kernel = nn.Linear(6, 6).to(DEVICE)
    model[0].graft(0, kernel, alpha=0.5, guard="step", example=x)
    esper.sync_optimizer(model, optimizer)

    def update():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    first = model[2].weight.detach().cpu().clone()
    update()
    before = model[2].weight.detach().cpu().clone()
    assert not torch.equal(first, before)
    with torch.no_grad():
        kernel.weight.fill_(torch.nan)
    update()
    equal(model[2].weight.detach(), before)
    assert model[0].state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY


def a_fossil_folds():
    model, x = esper.wrap(net()), batch()
    model[0].graft(0, nn.Linear(6, 6).to(DEVICE), alpha=0.5, example=x)
    y = model(x)
    assert model[0].fossilize(0).folded
    close(model(x), y)
    plain = esper.unwrap(model)
    close(plain(x), y)
    assert type(plain[0]) is nn.Linear


def a_state_travels_both_ways():
    model, x = esper.wrap(net()), batch()
    model[0].graft(0, esper.compile_blueprint(mlp_blueprint()), alpha=0.5, example=x)
    state = model.state_dict()
    there, here = esper.wrap(net()), esper.wrap(net().to("cpu"))
    there.load_state_dict(state)
    here.load_state_dict({key: value.cpu() for key, value in state.items()})
    equal(there(x), model(x))
    close(here(x.cpu()), model(x))
    back = esper.wrap(net())
    back.load_state_dict(here.state_dict())
    equal(back(x), model(x))
    with tempfile.TemporaryDirectory() as folder:
        esper.save_checkpoint(Path(folder) / "run", model)
        loaded = esper.wrap(net())
        esper.load_checkpoint(Path(folder) / "run", loaded)
    equal(loaded(x), model(x))


def copies_are_of_their_own():
    model, x = esper.wrap(net()), batch()
    model[0].graft(0, nn.Linear(6, 6).to(DEVICE), alpha=0.5, example=x)
    copied = copy.deepcopy(model)
    equal(copied(x), model(x))
    with torch.no_grad():
        copied[0].weight.zero_()
    assert not torch.equal(copied(x).cpu(), model(x).cpu())


def grown(device):
    """Return a model that grew, and what its trials came to."""
    torch.manual_seed(0)
    x = torch.randn(600, 6)
    y = (x[:, :3] * x[:, 3:]).sum(1, keepdim=True).expand(-1, 3).contiguous()
    model = esper.wrap(net().to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def compute_loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(model):
        return (model(x[:400].to(device)) - y[:400].to(device)).square().mean(1)

    with esper.Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=evaluate,
        policy=esper.EveryN(5),
        budget=esper.Budget(latency=None),
        evaluate_every=5,
        record_updates=4,
        trial_updates=50,
        overhead=50.0,
        horizon=400,
        hold_updates=20,
    ) as grower:
        for i in range(110):
            rows = slice(400 + i % 160, 432 + i % 160)
            given = x[rows].to(device), y[rows].to(device)
            loss = compute_loss(model, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=given)
    trials = [(t.verdict, t.sites, t.blueprints) for t in grower.report().trials]
    return model, trials


def a_run_grows_there_as_on_the_cpu():
    """Up to the draws of its own generator, by which kernels of about equal worth are ordered."""
    model, trials = grown(DEVICE)
    _, expected = grown(torch.device("cpu"))
    assert trials[0][0] == expected[0][0] == "kept", (trials, expected)
    assert {*trials[0][1]} == {*expected[0][1]}
    assert {p.device.type for p in model.parameters()} == {python_device.NAME}
    assert {b.device.type for b in model.buffers()} == {python_device.NAME}


def memory_that_nobody_tells_is_not_guessed():
    assert available_bytes(DEVICE) is None


CHECKS = {
    check.__name__: check
    for check in (
        a_tensor_there_is_none_of_the_cpu,
        dormant_layers_are_native,
        a_graft_is_the_formula,
        kernels_are_swapped,
        a_forward_waits_for_no_number,
        a_backward_waits_for_no_number,
        seeds_that_run_as_one_wait_for_no_number,
        a_faulty_kernel_costs_its_share,
        a_bad_gradient_reaches_nobody,
        the_step_guard_drops_a_step,
        a_fossil_folds,
        a_state_travels_both_ways,
        copies_are_of_their_own,
        a_run_grows_there_as_on_the_cpu,
        memory_that_nobody_tells_is_not_guessed,
    )
}


def main():
    torch.set_num_threads(1)
    found = dict.fromkeys(CHECKS)
    for name, check in CHECKS.items():
        try:
            check()
        except Exception:  # noqa: BLE001 - whatever it is, it is told
            found[name] = traceback.format_exc(limit=-6)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()

"""Seeds of one form run as one: what the plan gives seed by seed, but for rounding."""

import collections
import copy
import dataclasses
import pickle
import re
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import esper
from esper.compiler.catalog import default_catalog
from esper.compiler.lowering import lower
from esper.compiler.parts import Noise
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.async_kasmina_conv2d_layer import AsyncKasminaConv2dLayer
from esper.execution.host_class import adopt
from esper.forward.class_change import become, choose_forward
from esper.forward.fused_runs import StepByStep
from esper.forward.generated_class import key_of
from esper.seeds.isolation import FIRST_RETRY_READINGS
from esper.seeds.maintenance import maintain
from esper.seeds.profiling import profile
from esper.seeds.shadow import shadow_pass
from esper.seeds.step_guard import read_step_flags
from esper.state.layer_record import record_of
from esper.state.site import describe_site

FEATURES, HIDDEN, CHANNELS = 6, 32, 4
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14}


def mlp(between=nn.ReLU, **options):
    """A kernel of two linear layers."""
    ends = nn.Linear(FEATURES, HIDDEN, **options), nn.Linear(HIDDEN, FEATURES, **options)
    return nn.Sequential(ends[0], *([between()] if between else []), ends[1])


def deep():
    """A kernel of three linear layers."""
    return nn.Sequential(mlp(nn.GELU), nn.Tanh(), nn.Linear(FEATURES, FEATURES))


def conv_block():
    """A kernel of two convolutions, the first with groups of channels."""
    first = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1, groups=2)
    return nn.Sequential(first, nn.SiLU(), nn.Conv2d(2 * CHANNELS, CHANNELS, 1, bias=False))


MLPS = {
    "relu": mlp,
    "gelu": lambda: mlp(nn.GELU),
    "silu": lambda: mlp(nn.SiLU),
    "tanh": lambda: mlp(nn.Tanh),
    "sigmoid": lambda: mlp(nn.Sigmoid),
    "low rank": lambda: mlp(None),
    "no bias": lambda: mlp(bias=False),
    "deep": deep,
    "linear": lambda: nn.Linear(FEATURES, FEATURES),
    "norm": lambda: nn.Sequential(nn.LayerNorm(FEATURES), *mlp(nn.GELU, bias=False)),
    "norm between": lambda: nn.Sequential(
        nn.Linear(FEATURES, 9), nn.RMSNorm(9), nn.Linear(9, FEATURES)
    ),
}
KERNELS = {
    **dict.fromkeys(MLPS, (lambda: nn.Linear(FEATURES, FEATURES), (3, 5, FEATURES))),
    "convolutions": (lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), (2, CHANNELS, 5, 5)),
}
MAKE = {**MLPS, "convolutions": conv_block}


def grown(kind="relu", num_seeds=6, dtype=torch.float32, guard="step", **options):
    """A layer with kernels of one form at alphas of their own."""
    make_host, shape = KERNELS[kind]
    layer = adopt(make_host().to(dtype), name="site", num_seeds=8)
    layer.enable_step_guard()
    x = torch.randn(shape, dtype=dtype)
    for i in range(num_seeds):
        alpha = (i + 1) / num_seeds
        kernel = MAKE[kind]().to(dtype)
        layer.graft(i, kernel, alpha=alpha, guard=guard, example=x, **options)
    return layer, x.requires_grad_()


def one_by_one(layer):
    """A copy whose seeds run one by one."""
    other = copy.deepcopy(layer)
    become(other, "active")
    return other


def kind_of(layer):
    return key_of(layer).kind


def results(layer, x):
    """The output, and the gradients of input, host and kernels, of a loss that is no sum."""
    layer.zero_grad()
    given = x.detach().clone().requires_grad_()
    y = layer(given)
    (y.square() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {"y": y, "x": given.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def assert_close(found, expected):
    """Check that tensors differ by rounding, relative to the largest of a place in all seeds."""
    assert found.keys() == expected.keys()
    largest = collections.Counter()
    for name, tensor in expected.items():
        place = re.sub(r"_seeds\.\d+", "", name)
        largest[place] = max(largest[place], float(tensor.detach().abs().max()))
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).detach().abs().max())
        relative = difference / largest[re.sub(r"_seeds\.\d+", "", name)]
        assert relative <= TOLERANCES[tensor.dtype], name


def also_slowly(usual, others):
    """Parameters, of which the variants are for the whole suite."""
    rest = [each for each in others if each not in usual]
    return [*usual, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


WAYS = [(guard, dtype) for guard in ("step", "off", "always") for dtype in TOLERANCES]


@pytest.mark.parametrize(
    ("kind", "guard", "dtype"),
    also_slowly(
        [(kind, "step", torch.float64) for kind in KERNELS]
        + [("relu", guard, torch.float32) for guard in ("step", "off", "always")],
        [(kind, *way) for kind in KERNELS for way in WAYS],
    ),
)
def test_fused_seeds_give_what_the_plan_gives(kind, guard, dtype):
    """Output and every gradient are those of the unfused plan, within 1e-6 of the largest."""
    layer, x = grown(kind, 8 if guard == "step" else 6, dtype, guard)
    assert kind_of(layer) == "fused"
    other = one_by_one(layer)
    assert_close(results(layer, x), results(other, x))
    with torch.no_grad():
        assert_close({"y": layer(x)}, {"y": other(x)})


CATALOG_SITES = {
    "linear": (lambda: nn.Linear(33, 20), (5, 33)),
    "convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 6)),
    "norm": (lambda: nn.LayerNorm(40), (3, 5, 40)),
}


@pytest.mark.parametrize("site", CATALOG_SITES)
def test_kernels_of_the_catalog_are_run_as_one(site):
    """Every small kernel that the catalog has for a site is fused."""
    make_host, shape = CATALOG_SITES[site]
    x = torch.randn(shape, dtype=torch.float64)
    offered = default_catalog().blueprints_for(describe_site(make_host()), capacity_only=False)
    for blueprint in [b for b in offered if b.id.endswith(("w32", "w16", "k3"))]:
        layer = adopt(make_host().double(), name="site", num_seeds=6)
        layer.enable_step_guard()
        for i in range(6):
            kernel = lower(dataclasses.replace(blueprint, init_seed=i)).double()
            for parameter in kernel.parameters():
                nn.init.normal_(parameter, std=0.3)
            layer.graft(i, kernel, alpha=0.5, guard="step", example=x)
        assert kind_of(layer) == "fused", blueprint.id
        assert_close(results(layer, x), results(one_by_one(layer), x))


def test_serial_kernels_read_the_hosts_output():
    """Kernels that read the host's output are run as one too, apart from those beside the host."""
    layer, x = grown(num_seeds=6, position="serial")
    layer.graft(6, mlp(), alpha=0.5, guard="step", example=x.detach())
    assert [seed.seed_idx for seed in record_of(layer).grouping.others] == [6]
    assert_close(results(layer, x), results(one_by_one(layer), x))


HOSTS = {
    "attention": (lambda: nn.MultiheadAttention(FEATURES, 2, batch_first=True), True),
    "norm": (lambda: nn.LayerNorm(FEATURES), False),
    "recurrent": (lambda: nn.GRU(FEATURES, FEATURES, batch_first=True), True),
    "block": (lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU()), False),
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_of_other_kinds(host):
    """Behind hosts that give tuples too, kernels are run as one."""
    make_host, gives_tuple = HOSTS[host]
    x = torch.randn(3, 5, FEATURES)
    layer = adopt(make_host(), name="site", num_seeds=6)
    layer.enable_step_guard()
    call = (x, x, x) if host == "attention" else (x,)
    for i in range(6):
        options = {"guard": "step", "position": "serial", "example": call}
        layer.graft(i, mlp(nn.GELU), alpha=0.1 * i + 0.1, **options)
    assert kind_of(layer) == "fused"
    found, expected = layer(*call), one_by_one(layer)(*call)
    assert isinstance(found, tuple) == gives_tuple
    if gives_tuple:
        found, expected = found[0], expected[0]
    assert_close({"y": found}, {"y": expected})


def test_nested_tensors_run_one_by_one():
    """Rows of several lengths give what the unfused plan gives, bit for bit."""
    layer, _ = grown()
    rows = [torch.randn(length, FEATURES) for length in (2, 4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert torch.equal(layer(nested).values(), one_by_one(layer)(nested).values())


def test_two_forms_and_a_kernel_by_itself():
    """Each form is a group of its own, and what has no equal runs by itself."""
    layer, x = grown("convolutions", num_seeds=3)
    for i in (3, 4, 5):
        kernel = nn.Conv2d(CHANNELS, CHANNELS, 1)
        layer.graft(i, kernel, alpha=0.7, guard="step", example=x.detach())
    alone = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    layer.graft(6, alone, alpha=0.5, guard="step", example=x.detach())
    grouping = record_of(layer).grouping
    assert [len(group.seeds) for group in grouping.groups] == [3, 3]
    assert [seed.seed_idx for seed in grouping.others] == [6]
    assert_close(results(layer, x), results(one_by_one(layer), x))


def test_frozen_kernels_get_no_gradient():
    """Parameters that are frozen stay without a gradient, and the others get theirs."""
    layer, x = grown()
    for seed in record_of(layer).plan[::2]:
        seed.slot.kernel[0].weight.requires_grad_(False)
    for seed in record_of(layer).plan:
        seed.slot.kernel[2].bias.requires_grad_(False)
    found, expected = results(layer, x), results(one_by_one(layer), x)
    missing = {name for name, gradient in found.items() if gradient is None}
    assert missing == {name for name, gradient in expected.items() if gradient is None}
    assert len(missing) == 3 + 6
    assert_close(
        {name: t for name, t in found.items() if name not in missing},
        {name: t for name, t in expected.items() if name not in missing},
    )


@pytest.mark.parametrize("kind", ["relu", "deep", "convolutions"])
def test_tied_kernels_add_their_gradients_up(kind):
    """A parameter that several kernels share gets what each of them gives it."""
    layer, x = grown(kind, num_seeds=6)
    first, *others = (seed.slot.kernel for seed in record_of(layer).plan)
    for kernel in others[:2]:
        kernel[-1].weight = first[-1].weight
    choose_forward(layer)
    assert kind_of(layer) == "fused"
    assert_close(results(layer, x), results(one_by_one(layer), x))


@pytest.mark.parametrize("kind", ["gelu", "norm between"])
def test_gradients_can_be_differentiated_again(kind):
    """A penalty on gradients has the gradients that it has seed by seed."""
    layer, x = grown(kind, dtype=torch.float64)
    other = one_by_one(layer)

    def penalty(site):
        given = x.detach().clone().requires_grad_()
        parameters = list(site.parameters())
        first = torch.autograd.grad(
            site(given).tanh().sum(), [given, *parameters], create_graph=True
        )
        total = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(total, [given, *parameters], allow_unused=True)

    for found, expected in zip(penalty(layer), penalty(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_transformations_run_seed_by_seed():
    """torch.func sees what it sees of the unfused plan, bit for bit."""
    layer, x = grown()
    other = one_by_one(layer)
    mapped = [torch.func.vmap(site)(x.detach()) for site in (layer, other)]
    assert torch.equal(*mapped)


@pytest.mark.parametrize(
    ("kind", "faulty"), [("relu", 0), ("relu", 5), ("deep", 5), ("convolutions", 0)]
)
def test_a_fault_costs_only_its_own_seed(kind, faulty):
    """Of six seeds run as one the faulty is isolated by the flag that it has by itself."""
    layer, x = grown(kind)
    with torch.no_grad():
        next(record_of(layer).seeds[faulty].slot.kernel.parameters()).fill_(torch.nan)
    layer(x).sum().backward()
    faults = read_step_flags([layer])
    assert [fault.seed_idx for fault in faults] == [faulty]
    states = [layer.state_layout.state(i) for i in range(6)]
    assert states.count(SeedLifecycleState.ERROR_RECOVERY) == 1
    assert states[faulty] == SeedLifecycleState.ERROR_RECOVERY
    assert torch.isfinite(layer(x)).all()


def test_clean_seeds_are_not_isolated():
    """The control: without a fault no flag is up."""
    layer, x = grown()
    layer(x).sum().backward()
    assert read_step_flags([layer]) == []


@pytest.mark.parametrize(
    ("of_host", "value"),
    also_slowly(
        [(0.0, torch.nan), (0.0, torch.inf), (3e38, 3e38), (-torch.inf, torch.inf)],
        [
            (of_host, value)
            for of_host in (0.0, 3e38, torch.inf, -torch.inf, torch.nan)
            for value in (torch.inf, -torch.inf, torch.nan, 3e38)
        ],
    ),
)
def test_what_is_a_fault_is_a_fault_when_fused(of_host, value):
    """Shares that are not finite, or overflow with the host's output, are flagged as by themselves.

    Only where both are infinite alike is a share at fault that would be excused by itself.
    """
    flags = []
    for is_fused in (True, False):
        layer, x = grown("linear")
        with torch.no_grad():
            layer.bias[0] = of_host
            record_of(layer).seeds[5].slot.kernel.bias[0] = value
        if not is_fused:
            become(layer, "active")
        layer(x)
        flags.append([seed.seen.step_flags().tolist() for seed in record_of(layer).plan])
    if value == of_host and value in (torch.inf, -torch.inf):
        assert flags[0][5][0]
        return
    assert flags[0] == flags[1]


@pytest.mark.parametrize("kind", ["tanh", "convolutions"])
@pytest.mark.parametrize("faulty", [None, 2])
def test_a_gradient_that_is_not_finite_costs_only_its_own_seed(kind, faulty):
    """Under ``guard="always"`` what one kernel gives back is left out and counted, and no more."""
    layer, x = grown(kind, guard="always")
    if faulty is not None:
        first, *_, last = record_of(layer).seeds[faulty].slot.kernel
        with torch.no_grad():
            for parameter in (first.weight, first.bias, last.bias):
                if parameter is not None:
                    parameter.zero_()
            last.weight.fill_(3e38)  # what it gives is 0, and its gradient infinite
    found = []
    for site in (layer, one_by_one(layer)):
        given = x.detach().clone().requires_grad_()
        (100 * site(given)).sum().backward()
        gradients = {name: p.grad for name, p in site.named_parameters()}
        faults = [fault.seed_idx for fault in maintain(site).faults]
        found.append((faults, {"x": given.grad, **gradients}))
    assert found[0][0] == found[1][0] == ([] if faulty is None else [faulty])
    assert all(bool(g.isfinite().all()) for g in found[0][1].values())
    assert_close(found[0][1], found[1][1])


def test_a_loss_that_is_not_finite_is_no_kernel_s_fault():
    """Under ``guard="always"`` nothing is counted where what comes in is not finite."""
    layer, x = grown(guard="always")
    (layer(x) * torch.inf).sum().backward()
    assert not maintain(layer).faults
    assert all(bool(p.grad.isfinite().all()) for p in layer.seed_kernel(0).parameters())


def test_values_that_are_not_finite_are_left_out_under_always():
    """A kernel that gives NaN costs its own share, as by itself, and is counted."""
    layer, x = grown(guard="always")
    other = one_by_one(layer)
    for site in (layer, other):
        with torch.no_grad():
            record_of(site).seeds[1].slot.kernel[2].bias.fill_(torch.nan)
    assert torch.equal(layer(x), other(x))
    assert torch.isfinite(layer(x)).all()
    assert [fault.seed_idx for fault in maintain(layer).faults] == [1]


class Broken(nn.Module):
    def forward(self, x):
        msg = "broken on purpose"
        raise RuntimeError(msg)


def test_a_kernel_that_raises_costs_only_its_own_share():
    """Where a part of a kernel was exchanged for one that raises, the others still contribute."""
    layer, x = grown()
    other = one_by_one(layer)
    for site in (layer, other):
        record_of(site).seeds[2].slot.kernel[1] = Broken()
    assert torch.equal(layer(x), other(x))
    for site in (layer, other):
        (fault,) = maintain(site).faults
        assert (fault.seed_idx, fault.faults) == (2, 1)


def exchange_part(kernel):
    kernel[1] = nn.Tanh()


def change_setting(kernel):
    kernel[1] = nn.GELU()
    kernel[1].approximate = "tanh"


def add_part(kernel):
    kernel.append(nn.Tanh())


def own_forward(kernel):
    kernel.forward = lambda x: 2 * x


def other_weight(kernel):
    kernel[0].weight = nn.Parameter(kernel[0].weight.detach() * 2)


def no_bias(kernel):
    kernel[2].bias = None


def wider(kernel):
    for i, width in ((0, 7), (2, FEATURES)):
        kernel[i].weight = nn.Parameter(torch.ones(width, 7 if i else FEATURES))
        kernel[i].bias = nn.Parameter(torch.ones(width))


@pytest.mark.parametrize(
    "change",
    [exchange_part, change_setting, add_part, own_forward, other_weight, no_bias, wider],
)
def test_what_is_changed_after_the_plan_is_followed(change):
    """A kernel that somebody changes is run as it is now, in the next forward."""
    layer, x = grown()
    before = layer(x)
    other = one_by_one(layer)
    for site in (layer, other):
        change(record_of(site).seeds[3].slot.kernel)
    assert not torch.equal(layer(x), before)
    assert_close({"y": layer(x)}, {"y": other(x)})


def test_writes_in_place_are_followed():
    """What an optimizer or ``.data`` writes to a parameter is read by the next forward."""
    layer, x = grown()
    other = one_by_one(layer)
    for site in (layer, other):
        kernel = record_of(site).seeds[0].slot.kernel
        kernel[0].weight.data.mul_(3.0)
        with torch.no_grad():
            kernel[2].bias.add_(1.0)
    assert_close({"y": layer(x)}, {"y": other(x)})


@pytest.mark.parametrize("part", ["kernel", "step"])
def test_hooks_on_kernels_are_called(part):
    """A hook that came after the plan was made is called in the next forward."""
    layer, x = grown()
    kernel = record_of(layer).seeds[1].slot.kernel
    before, calls = layer(x), []

    def hook(module, args, output):
        calls.append(module)
        return output + 1

    handle = (kernel if part == "kernel" else kernel[0]).register_forward_hook(hook)
    assert not torch.allclose(layer(x), before)
    handle.remove()
    assert len(calls) == 1
    assert torch.equal(layer(x), before)


def test_hooks_on_all_modules_are_called():
    """A hook of all modules is called for each kernel."""
    layer, x = grown()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    kernels = {id(seed.slot.kernel) for seed in record_of(layer).plan}
    assert kernels <= set(map(id, seen))


def test_hooks_on_parameters_are_called_once():
    """A tensor's own hook gets the gradient of its seed."""
    layer, x = grown()
    weight = record_of(layer).seeds[1].slot.kernel[0].weight
    seen = []
    weight.register_hook(seen.append)
    layer(x).square().sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


NOT_FUSED = {
    "dropout": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Dropout(0.5)),
    "noise": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), Noise(std=0.1)),
    "batch norm": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.BatchNorm1d(FEATURES)),
    "in place": lambda: mlp(lambda: nn.ReLU(inplace=True)),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES)),
    "norm by itself": lambda: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES)),
    "norm of two axes": lambda: nn.Sequential(nn.LayerNorm([FEATURES, FEATURES]), *mlp()),
    "own class": lambda: type("Own", (nn.Linear,), {})(FEATURES, FEATURES),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_kernels_that_are_not_known_run_one_by_one(name):
    """Kernels that draw, keep statistics, write in place or are of a class of one's own."""
    layer = adopt(nn.Linear(FEATURES, FEATURES), name="site", num_seeds=6)
    layer.enable_step_guard()
    x = torch.randn(8, FEATURES, FEATURES)
    for i in range(6):
        layer.graft(i, NOT_FUSED[name](), alpha=0.5, guard="step", example=x)
    assert kind_of(layer) == "active"


def test_what_goes_on_around_a_layer_decides():
    """Seeds run one by one in profiles, with telemetry, and where one replaces."""
    layer, x = grown()
    layer.telemetry_enabled = True
    assert kind_of(layer) == "active"
    layer.telemetry_enabled = False
    assert kind_of(layer) == "fused"
    with profile(layer):
        assert kind_of(layer) == "profiled"
    assert kind_of(layer) == "fused"
    layer.graft(7, mlp(), alpha=0.1, mode="replace", guard="step", example=x.detach())
    assert kind_of(layer) == "active"


def test_unlike_kernels_are_not_fused():
    """Kernels of other dtypes, shapes, guards or settings are of another form."""
    layer, x = grown(num_seeds=3)
    layer.graft(3, mlp(nn.GELU), alpha=0.5, guard="step", example=x.detach())
    layer.graft(4, mlp(), alpha=0.5, guard="off", example=x.detach())
    wide = nn.Sequential(nn.Linear(FEATURES, 9), nn.ReLU(), nn.Linear(9, FEATURES))
    layer.graft(5, wide, alpha=0.5, guard="step", example=x.detach())
    layer.graft(6, mlp(bias=False), alpha=0.5, guard="step", example=x.detach())
    assert kind_of(layer) == "active"


def test_kernels_may_carry_anything():
    """What their owner keeps in kernels, of whatever type, is no matter of the plan's."""
    layer, x = grown(num_seeds=0)
    for i in range(6):
        kernel = mlp()
        kernel[0].notes, kernel.notes = ([i], torch.ones(i)), {"number": [i]}
        layer.graft(i, kernel, alpha=0.5, guard="step", example=x.detach())
    assert kind_of(layer) == "fused"
    assert_close(results(layer, x), results(one_by_one(layer), x))


def twice(module, given):
    return 2 * type(module).forward(module, given)


@pytest.mark.parametrize("part", ["kernel", "step"])
def test_kernels_with_a_forward_of_their_own_run_one_by_one(part):
    """What an object's own forward does is not known, be it the kernel's or a step's."""
    layer, x = grown(num_seeds=0)
    for i in range(6):
        kernel = mlp()
        patched = kernel if part == "kernel" else kernel[0]
        patched.forward = types.MethodType(twice, patched)
        layer.graft(i, kernel, alpha=0.5, guard="step", example=x.detach())
    assert kind_of(layer) == "active"


def test_the_plan_follows_the_guard():
    """A guard that is set makes another plan at once."""
    layer, _ = grown(guard="always")
    for i in range(6):
        layer.set_guard(i, "step")
    assert kind_of(layer) == "fused"
    for i in range(3):
        layer.set_guard(i, "off")
    assert kind_of(layer) == "active"


def test_an_async_layer_runs_its_kernels_on_its_streams():
    """Kernels of an asynchronous convolution are not fused."""
    layer = AsyncKasminaConv2dLayer(CHANNELS, CHANNELS, 3, num_seeds=6, telemetry_enabled=False)
    layer.enable_step_guard()
    for i in range(4):
        layer.graft(i, nn.Conv2d(CHANNELS, CHANNELS, 3), alpha=0.5, guard="step")
    assert kind_of(layer) == "active"


def test_shadow_passes_run_seed_by_seed():
    """In a shadow pass the output is that of the unfused plan, bit for bit."""
    layer, x = grown()
    other = one_by_one(layer)
    with shadow_pass(layer), torch.no_grad():
        found = layer(x)
    assert torch.equal(found, other(x))


@pytest.mark.parametrize("num_seeds", [0, 1])
def test_dormant_layers_and_single_seeds_have_the_classes_they_had(num_seeds):
    """Nothing is added to a layer without seeds, or with one: the same class, the same function."""
    layer, _ = grown(num_seeds=num_seeds)
    assert kind_of(layer) == ("active" if num_seeds else "dormant")
    assert record_of(layer).grouping.groups == ()
    if not num_seeds:
        assert type(layer).forward is nn.Linear.forward


def test_alphas_and_states_come_and_go():
    """Seeds that go dormant, change alpha or are swapped leave a group as they leave the plan."""
    layer, x = grown(num_seeds=5)
    layer.unload_kernel(2)
    layer.set_alpha(0, 0.25)
    layer.graft(3, mlp(), alpha=1.0, guard="step", example=x.detach())
    assert kind_of(layer) == "fused"
    assert_close(results(layer, x), results(one_by_one(layer), x))
    layer.set_alpha(1, 0.0)
    assert kind_of(layer) == "active"


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deep", "pickle"],
)
def test_copies_are_fused_and_train_by_themselves(copied):
    """A copy gives the same bits, and its kernels are its own."""
    layer, x = grown()
    before = layer(x)
    other = copied(layer)
    assert kind_of(other) == "fused"
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(other(x), before)


def test_parameters_keep_memory_of_their_own():
    """No parameter of a fused layer shares memory with another: files hold each once."""
    layer, x = grown()
    results(layer, x)
    storages = [p.untyped_storage() for p in layer.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(
        storage.nbytes() == p.numel() * p.element_size()
        for storage, p in zip(storages, layer.parameters(), strict=True)
    )


def test_files_of_fused_layers(tmp_path):
    """A file holds each tensor once, and gives the layer's bits back."""
    layer, x = grown()
    expected = layer(x)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    torch.save(layer, tmp_path / "whole.pt")
    num_bytes = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert (tmp_path / "layer.safetensors").stat().st_size < num_bytes + 8000
    for state in (load_file(tmp_path / "layer.safetensors"), torch.load(tmp_path / "layer.pt")):
        other = copy.deepcopy(layer)
        other.enable_step_guard()
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.load_state_dict(state)
        assert kind_of(other) == "fused"
        assert torch.equal(other(x), expected)
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert kind_of(whole) == "fused"
    assert torch.equal(whole(x), expected)


def a_run():
    """A wrapped model, built as at the start of a run, and its optimizer."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(FEATURES, FEATURES)), num_seeds=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    return model, optimizer


def test_a_checkpoint_goes_on_fused_bit_for_bit(tmp_path):
    """A run that is resumed has the groups that it had, and makes the same updates."""
    x = torch.randn(5, FEATURES)
    model, optimizer = a_run()
    for i in range(6):
        model[0].graft(i, f"mlp-{FEATURES}x{FEATURES}-w32", guard="step", example=x)
    esper.sync_optimizer(model, optimizer)
    other, others = a_run()

    def update(model, optimizer):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()

    update(model, optimizer)
    esper.save_checkpoint(tmp_path / "run.esper", model, optimizer)
    esper.load_checkpoint(tmp_path / "run.esper", other, others)
    assert kind_of(model[0]) == kind_of(other[0]) == "fused"
    for _ in range(3):
        update(model, optimizer)
        update(other, others)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_that_is_loaded_is_followed(assign):
    """Values that are loaded, in place or as other parameters, are those of the next forward."""
    layer, x = grown()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert kind_of(layer) == "fused"
    assert torch.equal(layer(x), other(x))


def test_channels_last_inputs():
    """Convolutions run fused in torch's other memory format too."""
    layer, x = grown("convolutions")
    x = x.detach().to(memory_format=torch.channels_last)
    assert_close(results(layer, x), results(one_by_one(layer), x))


def test_calls_that_the_kernels_do_not_fit_run_one_by_one():
    """An image without a batch goes to each kernel by itself, as it always did."""
    layer, x = grown("convolutions")
    other = one_by_one(layer)
    assert torch.equal(layer(x[0]), other(x[0]))


def test_under_autocast_seeds_run_one_by_one():
    """Under autocast the output is that of the unfused plan, bit for bit."""
    layer, x = grown()
    other = one_by_one(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), other(x))


def test_checkpointing_gives_the_same_gradients():
    """Recomputed in a backward, fused kernels give the gradients that they give without."""
    layer, x = grown()
    expected = results(layer, x)
    layer.zero_grad()
    y = checkpoint(layer, x, use_reentrant=False)
    (y.square() * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_the_comparison_notices_a_share_that_is_off():
    """The control: an alpha that is a millionth off in one seed of eight is a failure."""
    layer, x = grown(num_seeds=8, dtype=torch.float64)
    other = one_by_one(layer)
    with torch.no_grad():
        record_of(layer).seeds[3].slot.alpha.mul_(1 + 1e-6)
    with pytest.raises(AssertionError, match="y"):
        assert_close({"y": layer(x)}, {"y": other(x)})


@pytest.mark.parametrize(
    ("kind", "dtype"),
    also_slowly(
        [(kind, torch.bfloat16) for kind in ("relu", "deep", "convolutions")],
        [(kind, torch.float16) for kind in ("relu", "deep", "convolutions")],
    ),
)
def test_kernels_of_half_precision(kind, dtype):
    """In half precision outputs differ by its rounding, and a fault is its own seed's."""
    layer, x = grown(kind)
    layer, x = layer.to(dtype), x.detach().to(dtype)
    assert kind_of(layer) == "fused"
    torch.testing.assert_close(layer(x), one_by_one(layer)(x), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        next(record_of(layer).seeds[4].slot.kernel.parameters()).fill_(torch.inf)
    layer(x).sum().backward()
    assert [fault.seed_idx for fault in read_step_flags([layer])] == [4]


@pytest.mark.parametrize("kind", ["relu", "deep", "convolutions"])
def test_batches_of_any_size(kind):
    """A batch of none and a batch of one give what they give one by one."""
    layer, x = grown(kind)
    other = one_by_one(layer)
    assert layer(x[:0]).shape == other(x[:0]).shape
    assert_close({"y": layer(x[:1])}, {"y": other(x[:1])})


def test_other_tensors_during_one_call():
    """Tensors that stand in for the parameters during a call are those that it runs with."""
    layer, x = grown()
    others = {name: 1.5 * p.detach() for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, others, (x,))
    expected = torch.func.functional_call(one_by_one(layer), others, (x,))
    assert_close({"y": found}, {"y": expected})
    assert not torch.allclose(found, layer(x))


def test_a_gradient_is_that_of_the_tensors_of_the_call():
    """Under ``guard="always"`` what is not finite is looked for once other tensors stand there."""
    layer, x = grown("sigmoid", guard="always")
    with torch.no_grad():
        record_of(layer).seeds[1].slot.kernel[0].weight[0, 0] = torch.inf
    others = {name: 1.5 * p.detach() for name, p in layer.named_parameters()}
    given = [x.detach().clone().requires_grad_() for _ in range(2)]
    for site, one in zip((layer, one_by_one(layer)), given, strict=True):
        torch.func.functional_call(site, others, (one,)).square().sum().backward()
        assert [fault.seed_idx for fault in maintain(site).faults] == [1]
    assert_close({"x": given[0].grad}, {"x": given[1].grad})


def test_inference_mode():
    """In inference mode a fused layer gives what it gives in training."""
    layer, x = grown()
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


def test_a_setting_that_is_changed_is_followed():
    """An activation that is set to something else runs so in the next forward."""
    layer, x = grown("gelu")
    other = one_by_one(layer)
    before = layer(x)
    for site in (layer, other):
        record_of(site).seeds[5].slot.kernel[1].approximate = "tanh"
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), other(x))


def test_fossils_are_run_with_the_others():
    """A fossil that stays in the plan is in the group of its form, and its fault is an alarm."""
    layer, x = grown()
    assert not layer.fossilize(2).folded
    assert kind_of(layer) == "fused"
    assert_close(results(layer, x), results(one_by_one(layer), x))
    with torch.no_grad():
        record_of(layer).seeds[2].slot.kernel[2].bias.fill_(torch.nan)
    layer(x).sum().backward()
    assert [fault.seed_idx for fault in read_step_flags([layer])] == [2]
    assert layer.state_layout.state(2) == SeedLifecycleState.FOSSILIZED


def test_an_isolated_seed_comes_back_into_its_group():
    """While a seed is isolated the others are a group, and it joins them when a probe passes."""
    layer, x = grown(num_seeds=7)
    weight = record_of(layer).seeds[1].slot.kernel[0].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    layer(x).sum().backward()
    read_step_flags([layer])
    assert len(record_of(layer).grouping.groups[0].seeds) == 6
    with torch.no_grad():
        weight.copy_(before)
    for _ in range(FIRST_RETRY_READINGS):
        maintain(layer)
    assert len(record_of(layer).grouping.groups[0].seeds) == 7
    assert_close(results(layer, x), results(one_by_one(layer), x))


@pytest.mark.parametrize("kind", ["relu", "deep", "convolutions"])
def test_the_work_is_counted_as_it_was(kind):
    """A fused pass has the FLOPs of the unfused one: a budget is not spent otherwise."""
    counts = []
    layer, x = grown(kind, num_seeds=8)
    for site in (layer, one_by_one(layer)):
        with FlopCounterMode(display=False) as counter:
            site(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_moving_the_model_is_followed():
    """After ``double()`` the kernels run fused in float64."""
    layer, x = grown()
    layer.double()
    other = one_by_one(layer)
    assert_close(results(layer, x.double()), results(other, x.double()))


def test_optimizers_train_fused_seeds_as_single_ones():
    """Ten updates, by a fused optimizer's kernels of torch, end where the unfused plan's end."""
    layer, x = grown(dtype=torch.float64)
    other = one_by_one(layer)
    for site in (layer, other):
        optimizer = torch.optim.AdamW(site.parameters(), lr=1e-2, foreach=True)
        for _ in range(10):
            optimizer.zero_grad()
            (site(x) - 1).square().mean().backward()
            optimizer.step()
    for found, expected in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_layers_have_the_graphs_that_they_had():
    """A fused plan is compiled as the unfused one; kernels of the same form make no graph."""
    torch._dynamo.reset()
    layer, x = grown()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend)
    expected = one_by_one(layer)(x)
    assert torch.equal(compiled(x), expected)
    num_graphs = len(graphs)
    for i in range(6):
        layer.graft(i, mlp(), alpha=0.5, guard="step", example=x.detach())
        compiled(x)
    layer.set_alpha(0, 0.75)
    compiled(x)
    assert len(graphs) == num_graphs
    torch._dynamo.reset()


def test_a_plan_made_again_is_the_same():
    """Choosing the forward again changes nothing."""
    layer, x = grown()
    before = layer(x)
    choose_forward(layer)
    assert kind_of(layer) == "fused"
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("masked", [False, True])
def test_a_clean_call_runs_a_group_once(masked, monkeypatch):
    """Also behind a host that is infinite where it masks, at which nobody can look."""
    layer, x = grown()
    with torch.no_grad():
        layer(x)
        layer.bias[0] = -torch.inf if masked else 0.0
    runs, run = [], StepByStep.__call__
    monkeypatch.setattr(StepByStep, "__call__", lambda *a, **k: runs.append(k) or run(*a, **k))
    with torch.no_grad():
        layer(x)
    assert runs == [{"is_watched": masked}]


WIDE = 1 << 13
ROWS = {
    "weights": (lambda: mlp_of(WIDE), 128, 8),
    "numbers between": (
        lambda: nn.Sequential(nn.Linear(FEATURES, 32), *mlp_of(8, reads=32)),
        8,
        1366,
    ),
    "shares": (lambda: nn.Sequential(*mlp(nn.GELU), nn.Tanh()), 8, 3641),
}
"""Kernels that are run as one with so many rows, and one by one with so many."""


def mlp_of(width, reads=FEATURES):
    return nn.Sequential(nn.Linear(reads, width), nn.GELU(), nn.Linear(width, FEATURES))


@pytest.mark.parametrize("limit", ROWS)
def test_calls_of_a_size_that_does_not_pay_run_one_by_one(limit, monkeypatch):
    """Where joined weights, or what is made for all seeds, cost more than they save."""
    make, pays, does_not = ROWS[limit]
    layer, x = grown(num_seeds=0)
    for i in range(6):
        layer.graft(i, make(), alpha=0.5, guard="step", example=x.detach())
    assert kind_of(layer) == "fused"
    runs, run = [], StepByStep.__call__
    monkeypatch.setattr(StepByStep, "__call__", lambda *a, **k: runs.append(k) or run(*a, **k))
    for num_rows, num_runs in ((pays, 1), (does_not, 0)):
        runs.clear()
        with torch.no_grad():
            layer(torch.randn(num_rows, FEATURES))
        assert len(runs) == num_runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["relu", "norm", "convolutions"])
def test_on_a_device_fused_seeds_wait_for_nothing(kind):
    """Forward and backward pass where every wait is an error, and give what the plan gives."""
    layer, x = grown(kind, dtype=torch.float64)
    layer, x = layer.cuda(), x.detach().cuda()
    other = one_by_one(layer)
    assert kind_of(layer) == "fused"
    for site in (layer, other):  # warm
        site(x).square().sum().backward()
    layer.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        y.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y, other(x), rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)

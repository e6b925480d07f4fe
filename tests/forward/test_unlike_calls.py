"""A call unlike the one that was probed: the host's output goes on, and masked places are data."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import esper
from esper.compiler.catalog import default_catalog
from esper.contracts.errors import KernelRefusedError
from esper.seeds.maintenance import maintain
from esper.seeds.step_guard import read_step_flags
from esper.state.site import describe_site

pytestmark = pytest.mark.usefixtures("with_and_without_a_look")

LOWEST = torch.finfo(torch.float32).min
SIZES = {"few": 6, "many": 600}


class Masked(nn.Module):
    """Gives scores of which every third is set to a value."""

    def __init__(self, value, size=6):
        super().__init__()
        self.scores, self.value = nn.Linear(4, size), value
        self.register_buffer("mask", torch.arange(size) % 3 == 2)

    def forward(self, x):
        return self.scores(x).masked_fill(self.mask.to(x.device), self.value)


def masked_site(value, size=6, *, alpha=0.5, guard="always", mode="add", kernel=None):
    """Return a wrapped masked host with a kernel, the kernel, an input, and what is unmasked."""
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(Masked(value, size)), select="0")
    net[0].enable_step_guard()
    kernel = kernel or nn.Linear(4, size)
    x = torch.randn(40, 4)
    net[0].graft(0, kernel, alpha=alpha, example=x, guard=guard, mode=mode)
    return net, kernel, x, ~net[0].mask


def host_alone(net, x):
    """Return what the host gives by itself."""
    return net[0].default_layer(x)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("guard", ["always", "step", "off"])
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, LOWEST, -1e38, 1e38])
def test_masked_places_are_data(value, mode, guard, size):
    """The kernel counts where the host is finite, and a masked place stays as the host has it."""
    net, kernel, x, kept = masked_site(value, size, guard=guard, mode=mode)
    with torch.no_grad():
        y, h, k = net(x), host_alone(net, x), kernel(x)
    want = h + 0.5 * k if mode == "add" else 0.5 * h + 0.5 * k
    assert torch.equal(y[:, kept], want[:, kept])
    assert torch.equal(y, want)
    assert not y.isnan().any()
    assert not maintain(net).faults


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
def test_a_kernel_that_takes_the_place_of_an_infinite_host_counts(value, size):
    """At alpha 1 the host has no part in the output, whatever it gives."""
    net, kernel, x, _ = masked_site(value, size, alpha=1.0, mode="replace")
    with torch.no_grad():
        assert torch.equal(net(x), kernel(x))
    assert not maintain(net).faults


def test_two_kernels_that_take_the_place_of_an_infinite_host_count():
    """Two halves of the place leave as little of the host as one whole."""
    net, kernel, x, _ = masked_site(-torch.inf, mode="replace")
    other = nn.Linear(4, 6)
    net[0].graft(1, other, alpha=0.5, mode="replace", example=x)
    with torch.no_grad():
        assert torch.equal(net(x), 0.5 * kernel(x) + 0.5 * other(x))


class Spoilt(nn.Module):
    """A linear layer that gives a value at some places, once it is told to."""

    def __init__(self, size):
        super().__init__()
        self.body, self.value, self.where = nn.Linear(4, size), None, 0

    def forward(self, x):
        y = self.body(x)
        if self.value is None:
            return y
        spoilt = torch.zeros_like(y)
        spoilt[:, self.where] = self.value
        return y + spoilt


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("place", [0, 2], ids=["unmasked", "masked"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("value", [-torch.inf, LOWEST, 0.0])
def test_a_faulty_kernel_behind_a_mask_is_left_out_and_counted(value, bad, place, size):
    """What the kernel gives must leave the host's finite and infinite values what they are."""
    net, kernel, x, _ = masked_site(value, size, kernel=Spoilt(size))
    kernel.value, kernel.where = bad, place
    with torch.no_grad():
        y, h = net(x), host_alone(net, x)
    is_harmless = place == 2 and bad == value
    assert torch.equal(y, h) != is_harmless
    assert len(maintain(net).faults) == (0 if is_harmless else 1)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_the_step_guard_sees_a_faulty_kernel_behind_a_mask(bad):
    """A mask is no excuse under guard='step' either, and without a fault there is no flag."""
    net, kernel, x, _ = masked_site(-torch.inf, guard="step", kernel=Spoilt(6))
    net(x).nan_to_num().sum().backward()
    assert not read_step_flags([net[0]])
    kernel.value = bad
    net(x)
    assert read_step_flags([net[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_large_finite_values_are_finite(dtype, size):
    """Values whose sum overflows are no fault, of a host or of a kernel, in any dtype."""
    torch.manual_seed(0)
    large = torch.finfo(dtype).max / 8
    net = esper.wrap(nn.Sequential(nn.Linear(size, size, dtype=dtype)))
    kernel = nn.Linear(size, size, dtype=dtype)
    net[0].graft(0, kernel, alpha=0.5, example=torch.zeros(2, size, dtype=dtype))
    for part in (net[0], kernel):
        nn.init.zeros_(part.weight)
        nn.init.constant_(part.bias, large)
    y = net(torch.zeros(40, size, dtype=dtype))
    assert torch.equal(y, torch.full_like(y, large) + 0.5 * torch.full_like(y, large))
    assert not maintain(net).faults


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_finite_gradients_are_finite(dtype):
    """A gradient whose sum overflows reaches the kernel's weights, and is no fault."""
    net = esper.wrap(nn.Sequential(nn.Linear(4, 4, dtype=dtype)))
    kernel = nn.Linear(4, 4, bias=False, dtype=dtype)  # a bias's gradient would be a sum
    x = torch.eye(4, dtype=dtype)
    net[0].graft(0, kernel, alpha=1.0, example=x)
    large = torch.finfo(dtype).max / 2
    net(x).backward(torch.full((4, 4), large, dtype=dtype))
    assert torch.equal(kernel.weight.grad, torch.full((4, 4), large, dtype=dtype))
    assert not maintain(net).faults


def test_a_nan_of_the_host_counts_neither_way():
    """Where the host itself gives NaN its output goes on, and nobody is at fault."""
    net, _, x, _ = masked_site(torch.nan)
    with torch.no_grad():
        assert torch.equal(net(x).nan_to_num(7.0), host_alone(net, x).nan_to_num(7.0))
    assert not maintain(net).faults


def test_a_serial_kernel_that_makes_nan_of_a_mask_is_refused():
    """What it would do at every call is said when it is grafted."""
    net = esper.wrap(nn.Sequential(Masked(-torch.inf)), select="0")
    with pytest.raises(KernelRefusedError, match="finite"):
        net[0].graft(0, nn.Linear(6, 6), alpha=0.5, position="serial", example=torch.randn(5, 4))


def test_an_empty_batch_passes():
    """Extremes of nothing are asked of nobody."""
    net, _, x, _ = masked_site(-torch.inf)
    for guard in ("always", "step", "off"):
        net[0].set_guard(0, guard)
        assert net(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("value", [-torch.inf, LOWEST])
def test_masked_places_are_data_in_compiled_code(value):
    """A graph follows the same rule."""
    net, kernel, x, _ = masked_site(value)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), host_alone(net, x) + 0.5 * kernel(x))
    assert not maintain(net).faults


class Head(nn.Module):
    """Gives a tensor, unless it is asked for something else."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x, give=None):
        h = self.body(x)
        return h if give is None else give(h)


GIVES = {
    "a dict": lambda h: {"logits": h},
    "a list": lambda h: [h],
    "integers": lambda h: h.argmax(-1),
    "bools": lambda h: h > 0,
    "nothing": lambda h: None,
    "an empty tuple": lambda h: (),
    "a tuple of integers": lambda h: (h.argmax(-1), h),
    "complex numbers": torch.fft.fft,
    "a sparse tensor": torch.Tensor.to_sparse,
    "a packed sequence": lambda h: pack_padded_sequence(h[None], [len(h)], batch_first=True),
}


@pytest.mark.parametrize("guard", ["always", "step", "off"])
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("give", GIVES.values(), ids=GIVES)
def test_what_no_share_can_be_added_to_goes_on_and_is_told(give, mode, guard):
    """The host's output comes out as it is; the calls are counted, and told by the next reading."""
    net = esper.wrap(nn.Sequential(Head()), select="0")
    site, x = net[0], torch.randn(3, 4)
    site.enable_step_guard()
    site.graft(0, nn.Linear(4, 4), alpha=0.5, mode=mode, guard=guard, example=x)
    found, want = site(x, give=give), site.default_layer(x, give=give)
    assert type(found) is type(want)
    site(x, give=give)
    site(x).sum().backward()
    read_step_flags([site])
    report = maintain(net)
    assert [each.calls for each in report.skipped] == [2]
    assert not report.faults
    assert site.get_stats()["execution_stats"]["skipped_count"] == 2


def test_a_reason_is_logged_once(caplog):
    """Every reading returns what was skipped; the log has each reason once."""
    net = esper.wrap(nn.Sequential(Head()), select="0")
    site, x = net[0], torch.randn(3, 4)
    site.graft(0, nn.Linear(4, 4), alpha=0.5, example=x)
    with caplog.at_level(logging.WARNING, "esper"):
        for _ in range(3):
            site(x, give=GIVES["a dict"])
            assert maintain(net).skipped
    (record,) = caplog.records
    assert record.getMessage() == (
        "seed 0 of layer '0': 1 calls went on without its kernel: its host gave dict, which no "
        "share can be added to"
    )


LAYOUTS = {"strided": torch.strided, "jagged": torch.jagged}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("guard", ["always", "step", "off"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_nested_tensor_keeps_layout_and_gradients(layout, guard):
    """Host and kernel train as on the rows one by one; the output can be added to the input."""
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(nn.Linear(4, 4)))
    net[0].enable_step_guard()
    kernel = nn.Linear(4, 4)
    net[0].graft(0, kernel, alpha=0.5, guard=guard, example=torch.randn(2, 5, 4))
    rows = [torch.randn(n, 4) for n in (5, 3, 2)]
    x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    y = net(x)
    assert y.layout == layout
    sum(row.square().sum() for row in (y + x).unbind()).backward()
    found = [
        p.grad for p in (*net[0].default_layer.parameters(recurse=False), *kernel.parameters())
    ]
    host, copied = copy.deepcopy(net[0].default_layer), copy.deepcopy(kernel)
    want = [host(row) + 0.5 * copied(row) for row in rows]
    own = [*host.parameters(recurse=False), *copied.parameters()]
    loss = sum((w + row).square().sum() for w, row in zip(want, rows, strict=True))
    expected = torch.autograd.grad(loss, own)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(y.unbind(), want, strict=True):
        torch.testing.assert_close(one, other)
    assert x.grad is not None


class Standardized(nn.Module):
    """Divides by a deviation over the batch, which of one sample is NaN."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x):
        y = self.body(x)
        return (y - y.mean(0)) / y.std(0)


NORMS = {
    "batch_norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
    "by_hand": Standardized,
}


@pytest.mark.parametrize("guard", ["always", "step"])
@pytest.mark.parametrize("num_calls", [1, 3], ids=["once", "three_times"])
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_the_rest_of_an_epoch_does_not_isolate_a_norm_kernel(make, num_calls, guard):
    """A batch of one sample goes on without the kernel, which stays; the calls are told."""
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(nn.Linear(6, 6)))
    net[0].enable_step_guard()
    net[0].graft(0, make(), alpha=0.5, guard=guard, example=torch.randn(8, 6))
    num_skipped = 0
    for i in range(200):
        is_rest = i % 10 == 9
        for _ in range(num_calls if is_rest else 1):
            net(torch.randn(1 if is_rest else 8, 6)).nan_to_num().sum().backward()
        report = maintain(net)
        assert not report.faults
        num_skipped += sum(each.calls for each in report.skipped)
    assert num_skipped == 20 * num_calls
    assert net[0].state_layout.state(0).name == "ACTIVE"


def test_a_kernel_that_fails_on_batches_is_isolated_all_the_same():
    """The control: calls of several samples count, whatever those of one have shown."""
    net, kernel, x, _ = masked_site(0.0, kernel=Spoilt(6))
    net(x)
    maintain(net)
    kernel.value = torch.nan
    for _ in range(3):
        net(x)
    maintain(net)
    assert net[0].state_layout.state(0).name == "ERROR_RECOVERY"


def test_a_kernel_that_never_worked_on_a_batch_is_isolated_by_single_samples():
    """Where all that was seen are single samples, they count."""
    net, kernel, x, _ = masked_site(0.0, kernel=Spoilt(6))
    kernel.value = torch.nan
    for _ in range(3):
        net(x[:1])
    maintain(net)
    assert net[0].state_layout.state(0).name == "ERROR_RECOVERY"


def test_kernels_of_the_catalog_count_beside_a_mask():
    """A blueprint's kernel is told from its host's mask as one by hand is."""
    net = esper.wrap(nn.Sequential(Masked(-torch.inf)), select="0")
    x = torch.randn(5, 4)
    h = host_alone(net, x)
    for blueprint in default_catalog().blueprints_for(describe_site(net[0]))[:3]:
        net[0].graft(0, blueprint, alpha=0.5, example=x)
        assert torch.equal(net(x).isinf(), h.isinf())
        assert not maintain(net).faults

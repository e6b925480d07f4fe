"""Recurrent layers as sites: kernels read what they give; packed sequences are passed on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from esper.compiler.catalog import default_catalog
from esper.contracts.errors import SeedLifecycleError
from esper.execution.host_class import adopt
from esper.execution.kasmina_recurrent_layer import KasminaRecurrentLayer
from esper.growth.causality import is_causal
from esper.growth.recording import Recorder
from esper.state.layer_call import LayerCall
from esper.state.site import describe_site, widths

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

HOSTS = {
    "lstm": lambda **more: nn.LSTM(5, 6, **more),
    "gru": lambda **more: nn.GRU(5, 6, **more),
    "rnn": lambda **more: nn.RNN(5, 6, nonlinearity="relu", **more),
}
SHAPES = {
    "batch_first": {"batch_first": True},
    "two_layers": {"num_layers": 2, "dropout": 0.25},
    "both_ways": {"bidirectional": True},
    "without_bias": {"bias": False},
}
EVERY = [(make, more) for make in HOSTS.values() for more in SHAPES.values()]
EVERY.append((HOSTS["lstm"], {"proj_size": 4, "bidirectional": True, "batch_first": True}))


@pytest.fixture(params=EVERY, ids=[f"{i}" for i in range(len(EVERY))])
def host(request):
    """A recurrent layer in evaluation."""
    make, more = request.param
    return make(**more).eval()


def grown(host, x):
    """Return a wrapped copy of a host with a kernel that contributes, and the kernel."""
    layer = adopt(copy.deepcopy(host), name="site", telemetry_enabled=True)
    kernel = nn.Linear(layer.output_size, layer.output_size)
    layer.graft(0, kernel, alpha=0.5, example=x)
    return layer, kernel


def hidden_of(host, num_sequences=None):
    """Return a hidden state for a batch of sequences, or for one without a batch."""
    num = host.num_layers * (2 if host.bidirectional else 1)
    batch = () if num_sequences is None else (num_sequences,)
    h = torch.randn(num, *batch, host.proj_size or host.hidden_size)
    return (h, torch.randn(num, *batch, host.hidden_size)) if host.mode == "LSTM" else h


def assert_same_hidden(left, right):
    left, right = ((s if isinstance(s, tuple) else (s,)) for s in (left, right))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("given", ["alone", "with_hidden", "without_batch"])
def test_a_kernel_reads_what_the_layer_gives_and_the_hidden_state_is_the_hosts(host, given):
    """For either place of the batch, several layers, both directions, projections, and hx."""
    has_batch = given != "without_batch"
    x = torch.randn(*((3, 3) if has_batch else (3,)), 5)
    call = (x,) if given == "alone" else (x, hidden_of(host, 3 if has_batch else None))
    layer, kernel = grown(host, LayerCall(call, {}))
    y, state = layer(*call)
    h, expected = host(*call)
    assert torch.equal(y, h + 0.5 * kernel(h))
    assert_same_hidden(state, expected)
    by_name, _ = layer(input=x, hx=call[1] if len(call) > 1 else None)
    assert torch.equal(by_name, y)


def packed(host, x):
    axis = 0 if host.batch_first else 1
    return pack_padded_sequence(
        x, [3, 2, 1], batch_first=host.batch_first, enforce_sorted=axis == 0
    )


def test_a_packed_sequence_is_passed_on_as_the_host_gives_it(host):
    """It is no error and no fault, and it counts as a call of the host alone."""
    x = torch.randn(3, 3, 5)
    layer, _ = grown(host, x)
    before = layer.kernel_execution_count
    y, state = layer(packed(host, x))
    h, expected = host(packed(host, x))
    assert isinstance(y, PackedSequence)
    assert torch.equal(y.data, h.data)
    assert torch.equal(y.batch_sizes, h.batch_sizes)
    assert_same_hidden(state, expected)
    assert layer.kernel_execution_count == before
    assert layer.forward_count == 1
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def test_a_shadow_pass_over_packed_sequences_leaves_no_trace():
    """A kernel on trial at such a layer is not run."""
    host, x = nn.LSTM(5, 6), torch.randn(3, 3, 5)
    layer = adopt(copy.deepcopy(host), name="site")
    with layer.shadow(0, nn.Linear(6, 6)):
        y, _ = layer(packed(host, x))
    assert torch.equal(y.data, host(packed(host, x))[0].data)


def test_a_kernel_cannot_be_probed_with_a_packed_sequence():
    """As an example it is refused, and nothing is grafted."""
    layer, x = adopt(nn.GRU(5, 6), name="site"), torch.randn(3, 3, 5)
    with pytest.raises(TypeError, match="this one gives PackedSequence"):
        layer.graft(0, nn.Linear(6, 6), example=packed(layer, x))
    assert layer.seed_kernel(0) is None


def test_the_layer_says_its_widths_by_the_hosts_own_words():
    """``input_size`` is the host's attribute, and may be set; the output counts directions."""
    for more, num_out in [({}, 6), ({"bidirectional": True}, 12), ({"proj_size": 2}, 2)]:
        layer = adopt(nn.LSTM(5, 6, **more), name="site")
        assert isinstance(layer, KasminaRecurrentLayer)
        assert (layer.input_size, layer.output_size) == widths(layer) == (5, num_out)
        assert layer.get_stats()["layer_info"]["input_size"] == 5
        assert layer.hidden_size == 6
    layer.input_size = 7
    assert layer.default_layer.input_size == 7


def test_a_layer_is_made_of_a_host_that_is_given():
    """The constructor takes a host and the options of any layer."""
    host = nn.GRU(5, 6)
    layer = KasminaRecurrentLayer(host, num_seeds=2)
    assert layer is host
    assert layer.num_seeds == 2
    with pytest.raises(ValueError, match="takes serial kernels only"):
        layer.graft(0, nn.Linear(5, 6), position="parallel", example=torch.randn(3, 3, 5))


def test_the_weights_stay_one_block():
    """What cuDNN reads is the list of the parameters themselves, in every state of the layer."""
    layer, _ = grown(nn.LSTM(5, 6), torch.randn(3, 3, 5))
    for each in (layer, copy.deepcopy(layer), layer.double(), layer.float()):
        held = [each.get_parameter(name) for name in each._flat_weights_names]
        assert all(a is b for a, b in zip(each._flat_weights, held, strict=True))
    layer.unload_kernel(0)
    layer.flatten_parameters()
    assert [n for n, _ in layer.named_parameters()] == layer._flat_weights_names


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_catalog_offers_kernels_by_step_and_along_the_sequence(bidirectional):
    """A layer that reads one way is causal and gets causal ones; both pass the probe."""
    x = torch.randn(3, 4, 5)
    layer = adopt(nn.GRU(5, 6, batch_first=True, bidirectional=bidirectional), name="site").eval()
    site = describe_site(layer, x, layer(x)[0])
    assert (site.kind, site.is_sequence, site.is_causal) == ("recurrent", True, not bidirectional)
    assert is_causal(layer, x) == site.is_causal
    blueprints = default_catalog().blueprints_for(site)
    assert {b.id.partition("-")[0] for b in blueprints} == {"mlp", "block"}
    before = layer(x)[0]
    for blueprint in blueprints:
        assert ("causal" in blueprint.id) == (blueprint.id[0] == "b" and not bidirectional)
        layer.graft(0, blueprint, example=x)
        assert layer.alpha(0) == 1.0
        assert torch.equal(layer(x)[0], before)


def test_kernels_along_the_sequence_need_the_batch_first():
    """Where the first axis is the steps, or there is no batch, they would mix samples."""
    for more, shape in [({}, (4, 3, 5)), ({"batch_first": True}, (4, 5))]:
        layer, x = adopt(nn.GRU(5, 6, **more), name="site"), torch.randn(shape)
        site = describe_site(layer, x, layer(x)[0])
        assert not site.is_sequence
        assert all(b.id.startswith("mlp-") for b in default_catalog().blueprints_for(site))


def test_an_affine_kernel_does_not_fold():
    """The certificate says that it would act on the recurrence; the fossil goes on contributing."""
    x = torch.randn(3, 3, 5)
    layer, _ = grown(nn.GRU(5, 6), x)
    y, _ = layer(x)
    certificate = layer.fossilize(0)
    assert not certificate.folded
    assert "a GRU reads at each step what it gave at the one before" in certificate.reason
    assert torch.equal(layer(x)[0], y)
    with pytest.raises(SeedLifecycleError):
        layer.unload_kernel(0)


def test_what_a_packed_sequence_gives_is_not_recorded():
    """A site that sees nothing else has no samples, and training goes on."""
    layer, x = adopt(nn.GRU(5, 6), name="site"), torch.randn(3, 3, 5)
    with Recorder({"site": layer}) as recorder:
        layer(packed(layer, x))[0].data.sum().backward()
    assert recorder.observations["site"].num_samples == 0


def test_samples_are_the_columns_where_the_steps_come_first():
    """What is recorded has the batch first, whatever the layer takes."""
    layer = adopt(nn.GRU(5, 6), name="site")
    with Recorder({"site": layer}) as recorder:
        layer(torch.randn(4, 3, 5))[0].sum().backward()
    assert recorder.observations["site"].inputs[0].shape == (3, 4, 5)

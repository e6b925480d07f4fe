"""A graft without an example: live at once where the host says what it takes, else soon."""

import contextlib
import copy
import logging
import pickle

import pytest
import torch
from execution_hosts import KINDS, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.contracts.errors import KernelRefusedError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt
from esper.state.made_call import made_calls

S = SeedLifecycleState
SILENT = ("block", "sequential", "encoder_layer", "layer_norm_without_affine")
"""Hosts that do not say what they take; a norm without parameters does not say in which dtype."""

SAYING = [name for name in KINDS if name not in SILENT]


def wrapped_host(name):
    """Return a host of a kind, and a wrapped copy of it; both in evaluation."""
    host = KINDS[name].make_host().eval()
    return host, adopt(copy.deepcopy(host), name="site")


def position_of(name):
    return KINDS[name].kind.positions[0]


# ---- an input made from what the host says it takes


@pytest.mark.parametrize("name", SAYING)
@pytest.mark.parametrize("position", ["parallel", "serial"])
def test_where_the_host_says_what_it_takes_a_graft_is_live_at_once(name, position):
    """It contributes in the very next call, without a fault, and may be set before it."""
    host, layer = wrapped_host(name)
    kind, x = KINDS[name], KINDS[name].make_input()
    if position not in kind.kind.positions or (name, position) == ("cross_attention", "parallel"):
        return  # the latter wants a mask, which is below
    layer.graft(
        0, kind.make_serial() if position == "serial" else kind.make_kernel(), position=position
    )
    layer.set_alpha(0, 0.5)
    assert not torch.equal(run(layer, x), run(host, x))
    stats = layer.get_stats()
    assert stats["execution_stats"]["fault_count"] == 0
    assert stats["seed_stats"]["waiting"] == []


@pytest.mark.parametrize("name", SAYING)
def test_a_made_input_leaves_no_trace(name):
    """The host's parameters, buffers and the random state are as before, in training too."""
    layer = adopt(KINDS[name].make_host().train(), name="site")
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    serial = KINDS[name].make_serial()
    after_making = torch.get_rng_state()
    layer.graft(0, serial, position="serial")
    assert torch.equal(torch.get_rng_state(), after_making)
    assert not torch.equal(state, after_making)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", SAYING)
def test_a_kernel_that_fits_no_made_input_is_refused_at_once(name):
    """Nothing has changed, and the message says what to do if the input was not a typical one."""
    _, layer = wrapped_host(name)
    with pytest.raises(KernelRefusedError, match="pass example="):
        layer.graft(0, nn.Flatten(0), position=position_of(name))
    assert layer.state_layout.state(0) == S.DORMANT
    assert layer.structure() == []


class Attends(nn.Module):
    """A kernel that wants sequences."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        assert x.ndim == 3
        return self.inner(x, x, x)[0]


class OverTime(nn.Module):
    """A kernel that convolves over the middle axis."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


SEQUENCES = {
    "attention": Attends,
    "over_time": OverTime,
    "norm_of_batch": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_kernel_may_want_more_axes_than_its_host(name):
    """A layer over the last axis is called with rows, sequences and images."""
    layer = esper.wrap(nn.Sequential(nn.Linear(6, 6)))[0]
    layer.graft(0, SEQUENCES[name](), alpha=0.5)
    assert layer.state_layout.state(0) == S.ACTIVE


BESIDE_THE_TABLE = {
    "conv_transpose1d": lambda: nn.ConvTranspose1d(6, 6, 3),
    "instance_norm1d": lambda: nn.InstanceNorm1d(6, affine=True),
    "instance_norm2d": lambda: nn.InstanceNorm2d(6, affine=True),
    "odd_conv": lambda: nn.Conv2d(6, 6, 7, stride=4, dilation=3, padding=3, padding_mode="reflect"),
    "norm_of_two_axes": lambda: nn.LayerNorm((5, 6)),
    "double": lambda: nn.Linear(6, 6).double(),
    "bfloat16": lambda: nn.Linear(6, 6).bfloat16(),
    "parametrized": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "bag_of_maxima": lambda: nn.EmbeddingBag(9, 6, mode="max"),
}


@pytest.mark.parametrize("name", BESIDE_THE_TABLE)
def test_what_torch_has_beside_the_table_says_it_too(name):
    """A kernel that keeps what it is given is live at once, in the host's dtype."""
    layer = adopt(BESIDE_THE_TABLE[name](), name="site")
    assert made_calls(layer)
    layer.graft(0, nn.Hardtanh(), alpha=0.5, position="serial")
    assert layer.state_layout.state(0) == S.ACTIVE


def test_a_host_that_a_made_input_would_change_is_left_to_its_next_call():
    """A table that scales the rows it reads would keep a trace; meta tensors have no numbers."""
    assert made_calls(nn.Embedding(9, 6, max_norm=1.0)) == []
    assert made_calls(nn.Linear(6, 6, device="meta")) == []


class _TakesNames(nn.Linear):
    """A subclass that takes something else than its base."""

    def forward(self, named):
        return super().forward(named["x"])


def test_a_subclass_that_takes_something_else_waits():
    """A made input that the host itself refuses says nothing about the kernel."""
    layer = adopt(_TakesNames(6, 6), name="site")
    layer.graft(0, nn.Linear(6, 6), position="serial")
    assert layer.state_layout.state(0) == S.LOADING


def test_a_kernel_that_wants_an_argument_waits_for_a_call_that_has_it():
    """A made call has what the host cannot do without, and no mask."""
    kind = KINDS["cross_attention"]
    layer = adopt(kind.make_host(), name="site")
    layer.graft(0, kind.make_kernel(), alpha=0.5)
    assert layer.state_layout.state(0) == S.LOADING
    run(layer, kind.make_input())
    assert layer.state_layout.state(0) == S.ACTIVE


# ---- what waits for a call of its layer


@pytest.mark.slow
@pytest.mark.parametrize("name", SILENT)
def test_elsewhere_the_next_forward_is_observed(name):
    """A graft waits in LOADING, its forward is the host's, and it is there afterwards."""
    host, layer = wrapped_host(name)
    x = KINDS[name].make_input()
    layer.graft(0, KINDS[name].make_kernel(), alpha=0.5)
    assert layer.state_layout.state(0) == S.LOADING
    assert layer.get_stats()["seed_stats"]["waiting"] == [0]
    assert torch.equal(run(layer, x), run(host, x))
    assert layer.state_layout.state(0) == S.ACTIVE
    assert not torch.equal(run(layer, x), run(host, x))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_a_refusal_while_waiting_does_not_break_the_forward(caplog):
    """A kernel that is refused at the observed forward leaves the seed dormant, and says why."""
    host, layer = wrapped_host("block")
    x = KINDS["block"].make_input()
    layer.graft(0, nn.Flatten(0))
    assert torch.equal(run(layer, x), run(host, x))
    assert layer.state_layout.state(0) == S.DORMANT
    assert "shape" in layer.get_stats()["seed_stats"]["refused"][0]
    assert "failed the shape check" in caplog.text


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("this backward fails on purpose")


class Failing(nn.Module):
    """A kernel whose backward raises, or which cannot be copied."""

    def __init__(self, body, how):
        super().__init__()
        self.body = body
        self.how = how

    def forward(self, x):
        return _BadBackward.apply(self.body(x))

    def __deepcopy__(self, memo):
        if self.how == "copy":
            raise RuntimeError("this copy fails on purpose")
        return Failing(copy.deepcopy(self.body, memo), self.how)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["backward", "copy"])
@pytest.mark.parametrize("name", SILENT)
def test_no_error_of_a_waiting_graft_reaches_the_forward(name, how):
    """Whatever goes wrong behind the observed forward, the host answers and the reason is kept."""
    host, layer = wrapped_host(name)
    x = KINDS[name].make_input()
    layer.graft(0, Failing(KINDS[name].make_serial(), how), position="serial")
    assert torch.equal(run(layer, x), run(host, x))
    assert layer.state_layout.state(0) == S.DORMANT
    assert "fails on purpose" in layer.get_stats()["seed_stats"]["refused"][0]


class TakesAList(nn.Module):
    """A host whose first input is no tensor."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, xs):
        return self.body(xs[0])


def test_a_waiting_graft_is_refused_where_the_input_is_no_tensor():
    """The seed does not hang in LOADING; the reason names what came."""
    layer = adopt(TakesAList(), name="site")
    layer.graft(0, nn.Linear(6, 6))
    layer([torch.randn(5, 6)])
    assert layer.state_layout.state(0) == S.DORMANT
    assert "found list" in layer.get_stats()["seed_stats"]["refused"][0]


def test_building_forgets_a_waiting_graft():
    """After build() the next forward grafts nothing."""
    host, layer = wrapped_host("block")
    x = KINDS["block"].make_input()
    layer.graft(0, KINDS["block"].make_kernel(), alpha=1.0)
    layer.build([])
    assert torch.equal(run(layer, x), run(host, x))
    assert layer.state_layout.state(0) == S.DORMANT


@pytest.mark.parametrize("given_up", ["cancel", "unload_kernel", "graft"])
def test_what_is_given_up_or_asked_for_anew_does_not_come_back(given_up):
    """Of two grafts the later one stands, and one that was cancelled leaves no hook."""
    _, layer = wrapped_host("block")
    x = KINDS["block"].make_input()
    layer.graft(0, nn.Linear(6, 6), alpha=0.5)
    later = nn.Linear(6, 6)
    if given_up == "graft":
        layer.graft(0, later, alpha=0.5, example=x)
    else:
        getattr(layer, given_up)(0)
    run(layer, x)
    assert layer.seed_kernel(0) is (later if given_up == "graft" else None)
    assert not layer._forward_hooks


class Bent(nn.Module):
    """A block of the user's own, which says nothing of what it takes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    """A block between two layers, checkpointed if told so."""

    def __init__(self, *, reentrant=None):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.site = Bent()
        self.last = nn.Linear(6, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.site(x))
        return self.last(checkpoint(self.site, x, use_reentrant=self.reentrant))


def waiting_net(**options):
    """Return a net whose block waits for a call, one without seeds, and a batch."""
    torch.manual_seed(0)
    plain = Net(**options)
    net = esper.wrap(copy.deepcopy(plain), select="site")
    return net, plain, torch.randn(5, 6)


def graft(net):
    net.site.graft(0, nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)), alpha=0.5)


def state(net):
    return net.site.state_layout.state(0)


def hooks_of(net):
    tables = [t for m in net.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    return [hook for table in tables for hook in table.values()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_waiting_model_waits_for_nothing(duplicate):
    """The copy is dormant and soon has no hook of ours; the original goes on waiting."""
    net, plain, x = waiting_net()
    graft(net)
    twin = duplicate(net)
    assert state(twin) == S.DORMANT
    assert not twin.site._forward_hooks
    assert torch.equal(twin(x), plain(x))
    assert hooks_of(twin) == []
    assert twin.site.get_stats()["seed_stats"]["waiting"] == []
    net(x)
    assert state(net) == S.ACTIVE


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_observed_step_is_the_hosts(reentrant):
    """Output and gradients are those without a graft; what runs again in the backward is alike."""
    net, plain, x = waiting_net(reentrant=reentrant)
    graft(net)
    for model in (net, plain):
        first, second = model(x).sum(), model(2.0 * x).sum()
        first.backward()
        second.backward()
    for name, theirs in plain.named_parameters():
        assert torch.equal(net.get_parameter(name).grad, theirs.grad)
    assert state(net) == S.LOADING
    assert not torch.equal(net(x), plain(x))
    assert state(net) == S.ACTIVE


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_whole_is_live_at_the_step_behind(reentrant):
    """What a step runs and what its backward runs again are alike, with and without the kernel."""
    net, plain, x = waiting_net()
    graft(net)
    x.requires_grad_()
    for _ in range(2):
        ours, theirs = (checkpoint(m, x, use_reentrant=reentrant) for m in (net, plain))
        is_live = state(net) == S.ACTIVE
        assert torch.equal(ours, theirs) != is_live
        direct = net(x) if is_live else plain(x)
        (wanted,) = torch.autograd.grad(direct.sum(), x)
        x.grad = None
        ours.sum().backward()
        assert torch.equal(x.grad, wanted)
    assert is_live


def test_a_probe_is_saved_as_usual_inside_of_hooks_on_saved_tensors():
    """Hooks of the owner's see the model's tensors and none of ours."""
    seen = {True: [], False: []}
    for grafts, shapes in seen.items():
        net, _, x = waiting_net()
        if grafts:
            graft(net)

        def pack(tensor, shapes=shapes):
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x).sum().backward()
        assert (state(net) == S.ACTIVE) == grafts
    assert seen[True] == seen[False]


def compiled(net, how, **options):
    """Compile a net; return what is called."""
    options = {"backend": "eager", **options}
    if how == "in_place":
        net.compile(**options)
    elif how == "layer_in_place":
        net.site.compile(**options)
    else:
        return torch.compile(net, **options)
    return net


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks for it
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["in_place", "layer_in_place", "wrapped"])
def test_a_graft_into_a_compiled_model_becomes_live(how, fullgraph):
    """A model that was compiled and called before sees the graft through, and is compiled still."""
    net, plain, x = waiting_net()
    called = compiled(net, how, fullgraph=fullgraph)
    assert torch.equal(called(x), plain(x))
    graft(net)
    assert torch.equal(called(x), plain(x))
    assert state(net) == S.ACTIVE
    assert not torch.equal(called(x), plain(x))
    called(x).sum().backward()
    assert esper.maintain(net).faults == ()
    in_place = {"in_place": net, "layer_in_place": net.site}.get(how)
    assert in_place is None or in_place._compiled_call_impl is not None


@pytest.mark.torture
@pytest.mark.parametrize("what", ["model", "function"])
def test_what_is_compiled_while_it_waits_is_live_at_the_next_maintenance(what):
    """A graph notes its input too; behind it nobody is called, so that the owner's call does it."""
    net, plain, x = waiting_net()
    graft(net)

    def function(x):
        return net(x)

    function = net if what == "model" else function
    called = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(called(x), plain(x))
    esper.maintain(net)
    assert state(net) == S.ACTIVE
    assert not torch.equal(called(x), plain(x))


def _gradient(net, x):
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(parameters)


def _per_sample(net, x):
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(p, row):
        return torch.func.functional_call(net, p, (row,)).sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)


ELSEWHERE = {
    "grad": _gradient,
    "per_sample": _per_sample,
    "vmap": lambda net, x: torch.func.vmap(net)(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x,)),
    "jacrev": lambda net, x: torch.func.jacrev(net)(x),
    "checkpointed_whole": lambda net, x: checkpoint(net, x, use_reentrant=False).sum().backward(),
}


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's jvp
@pytest.mark.slow
@pytest.mark.parametrize("how", ELSEWHERE)
def test_what_is_noted_inside_of_others_work_is_probed_outside(how):
    """Nothing is probed in a transform, or where tensors are saved; the next maintenance does."""
    net, _, x = waiting_net()
    graft(net)
    ELSEWHERE[how](net, x)
    assert state(net) == S.LOADING
    esper.maintain(net)
    assert state(net) == S.ACTIVE
    assert net.site.get_stats()["seed_stats"]["refused"] == {}


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        contextlib.nullcontext,
    ],
)
@pytest.mark.slow
def test_it_matters_not_how_the_noted_call_ran(context):
    """The kernel is live behind it, and may be trained."""
    net, _, x = waiting_net()
    graft(net)
    with context():
        net(x)
    assert state(net) == S.ACTIVE
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.site.seed_kernel(0).parameters())


@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, None])
def test_a_trace_of_the_model_is_no_call(trace):
    """What is handed through then are no numbers; the next call is taken."""
    net, _, x = waiting_net()
    graft(net)
    torch.fx.symbolic_trace(net) if trace else torch.export.export(net, (x,))
    assert state(net) == S.LOADING
    net(x)
    assert state(net) == S.ACTIVE


def test_a_model_that_was_put_into_another_since_is_followed():
    """The outermost forward is that of whoever holds it now."""
    net, _, x = waiting_net()
    graft(net)
    outer = nn.Sequential(net)
    outer(x)
    assert state(net) == S.LOADING
    outer(x)
    assert state(net) == S.ACTIVE
    assert not outer._forward_hooks


def test_a_graft_that_waits_says_so(caplog):
    """At once, when the optimizer is synced without it, and when no call comes."""
    net, _, x = waiting_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING):
        graft(net)
        assert "waits for a call" in caplog.text
        esper.sync_optimizer(net, optimizer)
        assert "does not have its kernel yet" in caplog.text
        for _ in range(4):
            esper.maintain(net)
        assert caplog.text.count("no call of its layer was seen") == 1
    num_before = len(optimizer.param_groups[0]["params"])
    net(x)
    esper.sync_optimizer(net, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == num_before + 4


def test_syncing_the_optimizer_takes_in_what_has_been_noted():
    """A call inside a checkpoint is enough: the kernel joins its host's group in one go."""
    net, _, x = waiting_net()
    graft(net)
    checkpoint(net, x, use_reentrant=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    esper.sync_optimizer(net, optimizer)
    assert state(net) == S.ACTIVE
    assert len(optimizer.param_groups[0]["params"]) == 6 + 4

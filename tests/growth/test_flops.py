"""FLOPs of what torch executes, as far as torch and the table beside it know its operations."""

from __future__ import annotations

import pytest
import torch
from growing import X, compute_loss, equal_states, growing, host, state_of, train, wrapped
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from esper.growth.flops import counting, update_flops
from esper.growth.policies import EveryN, Never

BATCH = torch.arange(32)


def flops_of(function):
    with counting() as counter:
        function()
    return counter.get_total_flops()


def test_forward_and_backward_of_a_linear_layer():
    """A multiply-add is two; the backward has the products for weight and input."""
    layer, x = nn.Linear(8, 4), torch.ones(3, 8, requires_grad=True)
    assert flops_of(lambda: layer(x).sum().backward()) == 3 * 2 * 8 * 4 * 3


def test_an_update_is_counted_without_a_trace():
    """Weights, statistics, gradients and random state stay as they were."""
    model = host(dropout=0.3)
    before, random_state = state_of(model), torch.get_rng_state()
    forward = 2 * 32 * (4 * 4 + 4)
    assert update_flops(model, compute_loss, BATCH) == 2 * forward + 2 * 32 * 4  # no input has one
    assert equal_states(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("policy", [Never(), EveryN(20)], ids=["never", "grows"])
def test_all_that_is_executed_stands_in_the_ledger(policy):
    """As a counter around the whole run sees it; a kernel's cost beside a forward is a hundredth.

    Tracing of a kernel executes nothing, and tells a counter nothing.
    """
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=policy)
    with counting() as counter:
        train(model, optimizer, 60, grower)
    work, executed = grower.report().work, counter.get_total_flops()
    assert type(executed) is int
    assert sum(work.values()) == pytest.approx(executed, rel=0.0 if grower.stages == () else 0.01)
    assert bool(grower.stages) is isinstance(policy, EveryN)


def test_kernels_count_where_they_contribute():
    """A grown model takes more, by what its kernel multiplies."""
    model, _ = wrapped()
    before = update_flops(model, compute_loss, BATCH)
    model[0].graft(0, nn.Linear(4, 4), alpha=1.0, example=X[:8])
    assert update_flops(model, compute_loss, BATCH) == before + 2 * 2 * 32 * 4 * 4


class Sees(TorchDispatchMode):
    """A mode of the owner's."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_of_the_owner_see_what_they_would_have_seen():
    """Ours stands inside of them, and an owner's counter counts the same as ours."""
    layer, x = nn.Linear(8, 4), torch.ones(3, 8)
    seen = []
    for counts in (False, True):
        with Sees() as mode:
            flops_of(lambda: layer(x)) if counts else layer(x)
        seen.append(mode.seen)
    assert seen[0] == seen[1]
    with FlopCounterMode(display=False) as outer:
        inner = flops_of(lambda: layer(x))
    assert inner == outer.get_total_flops() == 192


def test_no_hook_is_put_on_any_module():
    """A hook on all of them would make compiled code recompile."""
    with counting():
        assert not nn.modules.module._has_any_global_hook()


def test_what_was_compiled_stays_compiled():
    """Dynamo meets no mode: it would give the function up for good."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    layer, x = nn.Linear(8, 4), torch.ones(3, 8)
    compiled = torch.compile(lambda x: layer(x).relu(), backend=backend, fullgraph=True)
    compiled(x)
    assert flops_of(lambda: compiled(x)) == 192
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)
    assert len(graphs) == 1


def test_control_a_bare_counter_ends_compilation():
    """The control of the test above: torch's own counter is a mode that dynamo does not take."""
    compiled = torch.compile(lambda x: x.relu(), backend="eager", fullgraph=True)
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="no compiled frames"):
        compiled(torch.ones(3))


@pytest.mark.parametrize(("cls", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count(cls, gates):
    """Two products a step for each gate, layer and direction, and twice as much backward."""
    layer, x = cls(8, 16, 2, bidirectional=True), torch.rand(5, 3, 8, requires_grad=True)
    forward = gates * 2 * 15 * 2 * ((8 + 16) * 16 + (32 + 16) * 16)
    outputs = []
    assert flops_of(lambda: outputs.append(layer(x)[0])) == forward
    assert flops_of(lambda: outputs[0].sum().backward()) == pytest.approx(2 * forward, rel=0.1)


def test_the_fused_encoder_counts_as_the_other_one():
    """In evaluation torch runs a layer of it as one operation, which its counter does not know."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    x = torch.rand(3, 7, 16)
    found = []
    for training in (True, False):
        encoder.train(training)
        with torch.no_grad():
            found.append(flops_of(lambda: encoder(x)))
    assert found[0] == found[1] > 0


def test_fused_attention_counts_as_the_other_one():
    """Likewise ``nn.MultiheadAttention`` by itself."""
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.rand(3, 7, 16)
    trained = flops_of(lambda: attention(x, x, x))
    attention.eval()
    with torch.no_grad():
        assert flops_of(lambda: attention(x, x, x)) == trained > 0


def test_solves_count():
    """Of a ranking: ``n^3 / 3`` for a factor, ``n^2`` a column for a solve with one triangle."""
    f = torch.rand(20, 6, dtype=torch.float64)
    second = f.T @ f
    factor = torch.linalg.cholesky(second)
    assert flops_of(lambda: torch.linalg.cholesky(second)) == 6**3 // 3
    assert flops_of(lambda: torch.cholesky_solve(f.T, factor)) == 2 * 36 * 20
    solve = torch.linalg.solve_triangular
    assert flops_of(lambda: solve(factor, f.T, upper=False)) == 36 * 20


def test_what_nobody_knows_counts_nothing():
    """Elementwise operations and an optimizer's step."""
    model, optimizer = wrapped()
    compute_loss(model, BATCH).backward()
    assert flops_of(optimizer.step) == 0
    assert flops_of(lambda: torch.fft.fft(torch.ones(8)).abs().sum()) == 0

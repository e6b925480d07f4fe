"""Under torch.compile: one graph asleep, and two more a stage."""

import pytest
import torch
from sleepers import HOSTS, made, update
from torch._dynamo.testing import CompileCounter

import esper
from esper.seeds.shallow import depth_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

LEARNED = ("tuple",)
"""Hosts whose form has to be seen in a forward that runs."""


def compiled(name, depth=2, num=6, backend=None):
    torch.compiler.reset()
    counter = CompileCounter()
    model = esper.shallow(made(name, num), HOSTS[name].path, depth=depth)
    return model, torch.compile(model, fullgraph=True, backend=backend or counter), counter


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.torture] if i % 2 else []) for i, n in enumerate(HOSTS)],
)
def test_a_stage_makes_two_graphs(name):
    """Asleep one, waking one whatever alpha is, awake one; the numbers are eager's."""
    model, fast, counter = compiled(name)
    x, graphs = HOSTS[name].make_input(), []
    if name in LEARNED:
        model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def train(num):
        for _ in range(num):
            torch.manual_seed(1)
            expected = model.eval()(x)
            assert torch.allclose(fast(x), expected, atol=1e-5)
            update(model.train(), optimizer, x)
        graphs.append(counter.frame_count)

    train(2)
    esper.deepen(model, optimizer, depth=6, ramp_updates=4)
    train(4)
    train(2)
    assert graphs == [1, 2, 3]
    assert not depth_state(model)


def test_a_form_that_was_not_seen_is_asked_for():
    """The error says what to run before the model is compiled."""
    model, fast, _ = compiled("tuple")
    model.eval()
    x = HOSTS["tuple"].make_input()
    with pytest.raises(Exception, match="run one forward in this way before"):
        fast(x)
    model(x)
    assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_many_stages_stay_compiled():
    """The limit of dynamo is raised as for grafts: the ninth graph is compiled as the first."""
    model, fast, counter = compiled("list", depth=1, num=8)
    x, optimizer = torch.randn(5, 4), torch.optim.SGD(model.parameters(), lr=1e-2)
    fast(x)
    for depth in range(2, 9):
        esper.deepen(model, optimizer, depth=depth, ramp_updates=2)
        before = counter.frame_count
        for _ in range(2):
            loss = fast(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fast(x)
        assert counter.frame_count == before + 2
    assert counter.frame_count == 1 + 2 * 7


def test_compiled_training_is_eager_training():
    """With a real compiler behind it, along a whole stage."""
    results = []
    for backend in ("aot_eager", None):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = esper.shallow(made("resnet"), "stage", depth=2)
        run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        x = HOSTS["resnet"].make_input()
        update(run, optimizer, x)
        esper.deepen(run, optimizer, depth=6, ramp_updates=3)
        for _ in range(4):
            update(run, optimizer, x)
        results.append(model.state_dict())
    assert all(torch.allclose(v, results[1][k], atol=1e-5) for k, v in results[0].items())

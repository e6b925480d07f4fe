"""A profile names what seeds do, in torch's traces and in a table, and leaves nothing behind."""

import copy
import gc
import io
import json
import pickle
import sys
from collections import Counter

import pytest
import torch
from bad_kernels import BadKernel
from growing import growing, train, wrapped
from torch import nn
from torch.profiler import ProfilerActivity

import esper
from esper.state.layer_record import record_of

BOTH = {("fc", 0, "forward"): 2, ("fc", 0, "backward"): 2}


def grafted():
    """Return a model with a kernel at `fc`, and an input."""
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 8))
    model.add_module("act", nn.ReLU())
    model.add_module("head", nn.Linear(8, 4))
    esper.wrap(model)
    kernel = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model.fc.graft(0, kernel, alpha=0.5)
    return model, torch.randn(4, 8)


def update(model, x):
    """Do one forward and backward."""
    model(x).sum().backward()


def calls_of(function):
    """Return how many calls a function makes."""
    counted = Counter()
    gc.collect()
    gc.disable()
    sys.setprofile(lambda _frame, event, _argument: counted.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted["call"] + counted["c_call"]


def calls(profile):
    """Return the calls of each row."""
    return {(row.layer, row.seed_idx, row.work): row.calls for row in profile.rows}


def test_forward_and_backward_are_counted_and_timed():
    """Each call is one, whatever many nodes its backward has; a dormant layer has no row."""
    model, x = grafted()
    with esper.profile(model) as p:
        update(model, x)
        update(model, x)
    assert calls(p) == BOTH
    assert all(row.total_us > 0 for row in p.rows)
    table = str(p)
    assert "esper/fc/0/forward" in table
    assert "esper/fc/0/backward" in table
    assert "head" not in table


def test_the_ranges_are_in_the_trace_of_a_profiler_around_it(tmp_path):
    """As user annotations, the backward's on the nodes of the kernel and on no other."""
    model, x = grafted()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as trace, esper.profile(model):
        update(model, x)
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [e for e in found if e.get("name", "").startswith("esper/")]
    names = Counter(e["name"] for e in named)
    assert names["esper/fc/0/forward"] == 1
    assert names["esper/fc/0/backward"] >= 3
    ranges = [(e["ts"], e["ts"] + e["dur"]) for e in named if e["name"].endswith("backward")]
    products = [e for e in found if e.get("name") == "aten::mm"]
    inside = [e for e in products if any(a <= e["ts"] <= b for a, b in ranges)]
    # two linear layers of the kernel, the first of which reads data; the host's and the head's are
    # outside
    assert 0 < len(inside) < len(products)


def test_outside_of_a_profile_the_forward_is_the_one_that_there_was():
    """The same class and code before and after; while it runs, another class."""
    model, x = grafted()
    cls, code = type(model.fc), type(model.fc).forward.__code__
    with esper.profile(model) as p:
        assert type(model.fc) is not cls
    assert type(model.fc) is cls
    assert type(model.fc).forward.__code__ is code
    assert record_of(model.fc).profiles == ()
    update(model, x)
    assert p.rows == ()


@pytest.mark.slow
def test_outside_of_a_profile_a_forward_makes_the_calls_that_it_made():
    """Of Python and of C, counted; inside it makes more."""
    model, x = grafted()
    model(x)
    before = calls_of(lambda: model(x))
    with esper.profile(model):
        assert calls_of(lambda: model(x)) > before
    assert calls_of(lambda: model(x)) == before


def test_a_profile_changes_no_output_and_no_gradient():
    """Bit for bit."""
    model, x = grafted()
    twin = copy.deepcopy(model)
    update(twin, x)
    with esper.profile(model):
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, twin(x))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_profile_inside_another_fills_both():
    """What ends the inner one leaves the outer one going."""
    model, x = grafted()
    with esper.profile(model) as outer:
        with esper.profile(model) as inner:
            update(model, x)
        update(model, x)
    assert calls(inner) == dict.fromkeys(BOTH, 1)
    assert calls(outer) == BOTH


def test_an_error_inside_ends_the_profile():
    """It is raised as it is, and the model is as it was."""
    model, x = grafted()
    cls = type(model.fc)

    def fail():
        with esper.profile(model):
            model(x)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert type(model.fc) is cls


def test_a_kernel_that_raises_is_named_and_fenced_all_the_same():
    """The range ends, and the call has the host's output."""
    model, x = grafted()
    kernel = BadKernel(nn.Linear(8, 8), "raises")
    model.fc.graft(1, kernel, alpha=0.5)
    y = model(x)
    kernel.is_bad = True
    with esper.profile(model) as p:
        assert torch.equal(model(x), y)
    assert calls(p) == {("fc", 0, "forward"): 1, ("fc", 1, "forward"): 1}


def test_a_model_may_be_unwrapped_inside():
    """It has its own classes then, and afterwards."""
    model, x = grafted()
    with esper.profile(model) as p:
        model(x)
        plain = esper.unwrap(model)
    assert not esper.layers(plain)
    assert "Kasmina" not in type(plain.fc).__name__
    plain(x)
    assert calls(p) == {("fc", 0, "forward"): 1}


def test_seeds_may_come_and_go_inside():
    """One that is grafted inside is named, with its probe; the way back is taken then too."""
    model, x = grafted()
    with esper.profile(model) as p:
        model.head.graft(0, nn.Linear(8, 4), alpha=0.5, example=x)
        update(model, x)
        model.fc.unload_kernel(0)
        update(model, x)
    assert calls(p)["head", 0, "probe"] == 1
    assert calls(p)["head", 0, "forward"] == 2
    assert calls(p)["fc", 0, "forward"] == 1
    assert type(model.fc).forward is nn.Linear.forward


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_inside_is_not_profiled(copied):
    """It has the class and the record of a model that nobody profiles."""
    model, x = grafted()
    cls = type(model.fc)
    with esper.profile(model) as p:
        twin = copied(model)
        assert type(twin.fc) is cls
        update(twin, x)
    assert p.rows == ()
    assert record_of(twin.fc).profiles == ()


def test_a_model_is_saved_inside():
    """``torch.save`` of the whole model."""
    model, x = grafted()
    data = io.BytesIO()
    with esper.profile(model):
        torch.save(model, data)
    data.seek(0)
    loaded = torch.load(data, weights_only=False)
    assert torch.equal(loaded(x), model(x))


def test_a_profile_can_be_pickled():
    """With its rows."""
    model, x = grafted()
    with esper.profile(model) as p:
        update(model, x)
    assert pickle.loads(pickle.dumps(p)).rows == p.rows


def test_a_backward_after_the_block_is_not_counted():
    """Its forward was."""
    model, x = grafted()
    with esper.profile(model) as p:
        loss = model(x).sum()
    loss.backward()
    assert calls(p) == {("fc", 0, "forward"): 1}


def test_what_is_no_model_is_refused():
    """By name."""
    with pytest.raises(TypeError, match=r"profile takes a torch\.nn\.Module"):
        esper.profile("model")


@pytest.mark.slow
def test_compiled_code_stays_and_is_told():
    """No graph is made for the profile; with ``eager=True`` the ranges are there."""
    model, x = grafted()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        with esper.profile(compiled) as p:
            compiled(x)
        compiled(x)
    assert p.compiled == ("fc", "head")
    assert p.rows == ()
    assert "eager=True" in str(p)
    with esper.profile(compiled, eager=True) as p:
        compiled(x)
    assert calls(p) == {("fc", 0, "forward"): 1}
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)


@pytest.mark.slow
def test_probe_trial_and_verdict_are_named():
    """Of a package that a Grower tries while its model is profiled."""
    model, optimizer = wrapped()
    policy = esper.EveryN(1)
    with growing(model, optimizer, policy=policy) as grower, esper.profile(model) as p:
        train(model, optimizer, 60, grower)
    works = Counter(row.work for row in p.rows)
    assert {"probe", "trial", "verdict"} <= set(works)

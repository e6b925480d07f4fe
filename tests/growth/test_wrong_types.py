"""A value of a wrong type or out of range is refused where it is given, by its name."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from growing import growing, host, wrapped
from torch import nn

import esper
from esper.growth.detector import Detector
from esper.growth.job import GrowthJob
from esper.growth.policies import ByHand, DiminishingReturns, EveryN
from esper.growth.ranking import FirstOrderGain, GradientNorm, RandomChoice


@pytest.mark.parametrize("name", ["parameters", "total_parameters", "flops", "latency", "packages"])
@pytest.mark.parametrize(
    ("value", "error"), [("10%", TypeError), (True, TypeError), (-1, ValueError), (math.nan, None)]
)
def test_limit_of_a_budget_is_refused_by_its_name(name, value, error):
    """Percent as text, a bool, a negative number and NaN limit nothing."""
    with pytest.raises(error or (TypeError, ValueError), match=rf"Budget\({name}=\.\.\.\)"):
        esper.Budget(**{name: value})


@pytest.mark.parametrize("name", ["small_host", "small_graft"])
@pytest.mark.parametrize(
    ("value", "error"), [("1", TypeError), (0.5, TypeError), (None, TypeError), (-1, ValueError)]
)
def test_size_of_a_budget_is_a_count(name, value, error):
    """Parameters are whole, and there are 0 at least."""
    with pytest.raises(error, match=rf"Budget\({name}=\.\.\.\) is a count, at least 0; got"):
        esper.Budget(**{name: value})


def test_numbers_of_numpy_are_kept_as_plain_ones():
    """They are written to the log and to the report."""
    budget = esper.Budget(parameters=np.float32(0.5), packages=np.int64(2))
    assert json.loads(json.dumps(asdict(budget)))["packages"] == 2
    assert type(budget.parameters) is float


def test_budget_without_limits_is_one():
    """None and infinity lift a limit."""
    esper.Budget(parameters=None, total_parameters=math.inf, packages=None, latency=0)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EveryN("5"), TypeError, "updates is a whole number, at least 1; got '5'"),
        (lambda: EveryN(0), ValueError, "updates is a whole number, at least 1"),
        (lambda: EveryN(2.5), TypeError, "updates is a whole number, at least 1"),
        (lambda: ByHand([("0", "mlp", "3")]), TypeError, "update of '0' is a whole number"),
        (lambda: ByHand([("0", "mlp", -3)]), ValueError, "update of '0' is a whole number"),
        (lambda: ByHand([(0, "mlp")]), TypeError, "site is the name of a layer"),
        (lambda: DiminishingReturns("slow"), TypeError, "detector is a Detector, .*'slow'"),
        (lambda: Detector(window="5"), TypeError, "window is a number of evaluations"),
        (lambda: Detector(window=1), ValueError, "window is a number of evaluations"),
        (lambda: Detector(fraction="15%"), TypeError, "fraction is a share"),
        (lambda: Detector(deadline=None), TypeError, "deadline is a share"),
        (lambda: Detector(deadline=math.nan), ValueError, "deadline is a share"),
        (lambda: FirstOrderGain(ridge="small"), TypeError, "ridge is a finite number above 0"),
        (lambda: FirstOrderGain(ridge=-1.0), ValueError, "ridge is a finite number above 0"),
        (lambda: GradientNorm(random_seed="0"), TypeError, "random_seed is a whole number"),
        (lambda: RandomChoice(0.5), TypeError, "random_seed is a whole number"),
    ],
    ids=range(16),
)
def test_part_refuses_what_it_cannot_use(make, error, words):
    """Policies, detectors and rankings say so when they are made."""
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (esper.unwrap, ()),
        (esper.restore, ()),
        (esper.layers, ()),
        (esper.skipped, ()),
        (esper.maintain, ()),
        (esper.export, ("folder",)),
        (esper.sync_optimizer, (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),)),
        (esper.Grower, (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),)),
        (esper.follow, (nn.Linear(1, 1),)),
        (esper.wrap, ()),
    ],
)
def test_function_of_a_model_refuses_what_is_none(function, arguments):
    """By the function's name, before anything is touched."""
    with pytest.raises(TypeError, match=rf"{function.__name__} takes a torch\.nn\.Module.*str"):
        function("model", *arguments)


def test_optimizer_in_the_place_of_a_model_is_named_in_a_line():
    """Not with all its settings."""
    model = wrapped()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^Grower takes a torch\.nn\.Module; got SGD .*$"):
        esper.Grower(optimizer, model)


def test_an_iterator_is_put_in_order():
    """As a list is: to look at its entries first uses none of them up."""
    entries = [SimpleNamespace(gain=gain, site="0", blueprint="mlp") for gain in (1.0, None, 2.0)]
    assert [entry.gain for entry in esper.in_order(iter(entries))] == [2.0, 1.0, None]


@pytest.mark.parametrize("ranked", [5, None, "abc", [5]])
def test_what_is_no_ranking_has_no_order(ranked):
    """It is named, where a score was looked for in it."""
    with pytest.raises(TypeError, match=r"in_order takes RankedCandidates.*; got "):
        esper.in_order(ranked)


@pytest.mark.parametrize("index", ["0", None, 1.0, True])
def test_seed_index_is_a_whole_number(index):
    """A seed is named by its index."""
    layer = esper.wrap(nn.Sequential(nn.Linear(4, 4)))[0]
    with pytest.raises(TypeError, match="a seed index is a whole number, got"):
        layer.graft(index, nn.Linear(4, 4), example=torch.randn(4, 4))


@pytest.mark.parametrize("num_seeds", ["4", 2.0, True])
def test_number_of_seeds_is_a_whole_number(num_seeds):
    """Nothing is wrapped then."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises((TypeError, ValueError), match="num_seeds is a whole number"):
        esper.wrap(model, num_seeds=num_seeds)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("goal", "maximise"),
        ("goal", "Max"),
        ("trial", True),
        ("attribution", "all"),
        ("tries", 0),
        ("horizon", "600"),
        ("horizon", 600.0),
        ("lr_new", "0.3"),
        ("overhead", -1.0),
        ("min_effect", math.nan),
        ("random_seed", None),
        ("policy", "every"),
        ("ranking", FirstOrderGain),
        ("catalog", []),
        ("registry", 8000),
        ("registry", "ftp://kernels"),
        ("fit_like", 3),
        ("preload_bytes", -1),
        ("preload_bytes", "many"),
        ("budget", {"packages": 2}),
        ("clock", 3.0),
        ("sink", print),
        ("run_dir", 3),
        ("compute_loss", 0.5),
        ("evaluate", torch.ones(400)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_option_is_refused_by_the_constructor(option, value):
    """Each by its name; nothing was hooked by then."""
    model, optimizer = wrapped()
    with pytest.raises((TypeError, ValueError), match=option):
        growing(model, optimizer, **{option: value})
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("field", "value"),
    [("loss", 0.5), ("metrics", 3), ("scheduler", "cosine"), ("num_seeds", "4"), ("epochs", True)],
)
def test_field_of_a_job_is_refused_by_its_name(field, value):
    """Before anything is trained."""
    model = host()
    fields = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "train": [torch.arange(4)],
        "gate": [torch.arange(4)],
        "loss": lambda model, batch: model(batch),
        "epochs": 1,
    }
    with pytest.raises(TypeError, match=rf"GrowthJob\({field}=\.\.\.\)"):
        GrowthJob(**{**fields, field: value})

"""From a target's name to its job."""

import sys

import pytest

from esper.contracts.errors import GrowthError
from esper.growth.job import GrowthJob
from esper.services.target import find_function, make_job

MODULE = """
import torch
from torch import nn
from esper.growth.job import GrowthJob

def make(epochs=1, **more):
    model = nn.Linear(2, 2)
    return GrowthJob(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train=[(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))],
        gate=[(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))],
        loss=lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        ),
        epochs=epochs,
    )

def needs_more(size): ...
def no_epochs(): return make(epochs=0)
def returns_a_number(): return 3
a_number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of jobs, importable for as long as the test runs."""
    (tmp_path / "jobs_to_load.py").write_text(MODULE)
    (tmp_path / "jobs_without_torch.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "jobs_unfinished.py").write_text("def job(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "jobs_to_load"
    sys.modules.pop("jobs_to_load", None)


def load_job(target):
    return make_job(target, find_function(target))


def test_a_target_is_called_and_gives_its_job(module):
    """The function that the target names is called, and its job returned."""
    assert isinstance(load_job(f"{module}:make"), GrowthJob)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("jobs_to_load", "package.module:function, got 'jobs_to_load'"),
        (":make", "package.module:function"),
        ("jobs_to_load:", "package.module:function"),
        ("../jobs:make", "package.module:function"),
        ("no_such_module_here:job", "no module named 'no_such_module_here'"),
        ("jobs_to_load.inner:job", "jobs_to_load.inner"),
        ("jobs_without_torch:job", "needs 'no_such_module_at_all', which is not installed"),
        ("jobs_unfinished:job", "could not be imported: SyntaxError"),
        ("jobs_to_load:mak", "its functions are: make, needs_more"),
        ("jobs_to_load:a_number", "found int, which cannot be called"),
        ("jobs_to_load:needs_more", "missing 1 required positional argument: 'size'"),
        ("jobs_to_load:no_epochs", r"epochs=\.\.\.\) is a whole number, at least 1; got 0"),
        ("jobs_to_load:returns_a_number", "esper.GrowthJob; it returned int"),
    ],
)
def test_a_wrong_target_is_named_with_the_cure(module, target, words):
    """Each way in which a target can be wrong has an error that says what was found."""
    with pytest.raises(GrowthError, match=words):
        load_job(target)

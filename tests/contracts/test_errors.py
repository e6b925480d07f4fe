"""Errors travel: from a worker process, or through a copy, with all that they say."""

import copy
import pickle

import pytest

from esper.contracts import errors
from esper.contracts.errors import (
    BusUnavailableError,
    CircuitOpenError,
    EsperError,
    KernelRefusedError,
    TagMovedError,
)

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, EsperError)
]
MADE_OTHERWISE = {
    BusUnavailableError: lambda: BusUnavailableError("it does not answer", may_pass=True),
    CircuitOpenError: lambda: CircuitOpenError("kernels.example", 2.5),
    KernelRefusedError: lambda: KernelRefusedError("3.0 changes its input", check="in place"),
    TagMovedError: lambda: TagMovedError("mlp:prod points elsewhere by now", found="0" * 64),
}
WAYS = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_travels_whole(kind, way):
    """Its class, message, fields and notes are those of the one that was raised."""
    error = MADE_OTHERWISE.get(kind, lambda: kind("site '3': what was found"))()
    error.add_note("(while the first batch was tried)")
    found = WAYS[way](error)
    assert type(found) is kind
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))

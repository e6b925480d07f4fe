"""The table of kinds is whole: what it names is there, and each room has what a row needs."""

import importlib
import importlib.util
from dataclasses import replace

import pytest
from layer_kinds import missing
from torch import nn

from esper.compiler.catalog import CONTROLS
from esper.contracts.layer_kind import LAYER_KINDS, dotted_name, kind_of, kind_of_class
from esper.execution.host_class import FAMILIES, adopt
from esper.seeds.fold_target import FOLD_TARGETS
from esper.state.made_call import MADE_CALLS
from esper.state.site import SITE_READERS

INSTALLED = [
    kind
    for kind in LAYER_KINDS
    if all(importlib.util.find_spec(name.partition(".")[0]) for name in kind.host_classes)
]
"""The rows whose packages are there: transformers is a peer, not a dependency."""


def named(rows):
    return pytest.mark.parametrize("kind", rows, ids=[kind.name for kind in rows])


def resolved(name):
    """Return the class that a dotted name leads to."""
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


@named(INSTALLED)
def test_every_host_class_is_there_under_its_name(kind):
    """A dotted name leads to the class that says so of itself, and it is of the row's kind."""
    for name in kind.host_classes:
        cls = resolved(name)
        assert dotted_name(cls) == name
        assert kind_of_class(cls) is kind
        assert kind.is_host(cls)


@named(INSTALLED)
def test_a_subclass_is_of_the_kind_and_no_host_class(kind):
    """What somebody derives is taken as its base is, but not trusted to compute the same."""
    for name in kind.host_classes:
        derived = type("Derived", (resolved(name),), {"__module__": "somebody.elses"})
        assert kind_of_class(derived) is kind
        assert not kind.is_host(derived)


def test_names_of_rows_and_host_classes_are_told_once():
    """No two rows share a name or a class, and the rest are blocks."""
    names = [kind.name for kind in LAYER_KINDS]
    classes = [name for kind in LAYER_KINDS for name in kind.host_classes]
    assert len({*names}) == len(names)
    assert len({*classes}) == len(classes)
    assert kind_of(nn.PReLU()).name == "block"


def test_what_is_no_module_has_no_kind():
    """The error names what was found."""
    with pytest.raises(TypeError, match="found a list"):
        kind_of([])


def test_a_wrapped_layer_is_of_its_hosts_kind():
    """The layer's class comes from ours and the host's, and the host's says what it is."""
    assert kind_of(adopt(nn.Conv2d(2, 2, 1), name="site")).name == "conv2d"


@named(INSTALLED)
def test_every_row_has_all_that_it_needs(kind):
    """A description, a fold target or a reason, a layer class, kernels, controls, a test host."""
    assert missing(kind) == []


def test_a_row_that_is_added_by_half_is_noticed():
    """The control: a row with nothing behind it is told every place, and so is a single gap."""
    row = replace(
        LAYER_KINDS[0], name="half", site="half", family="KasminaHalfLayer", kernels=("half",)
    )
    assert len(missing(row)) == 7
    assert missing(replace(LAYER_KINDS[0], kernels=())) == [
        "esper.compiler.catalog.default_catalog",
        "tests/support/execution_hosts.py",
    ]


def test_nothing_is_registered_for_a_row_that_is_not_there():
    """What a room has is asked for by a row."""
    names = {kind.name for kind in LAYER_KINDS}
    assert SITE_READERS.keys() == names
    assert MADE_CALLS.keys() == names
    assert FOLD_TARGETS.keys() == names
    assert CONTROLS.keys() == {kind.site for kind in LAYER_KINDS}
    assert FAMILIES.keys() == {kind.family for kind in LAYER_KINDS}

"""The shape rules say what the modules really do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.compiler.operations import OPERATIONS, build_module, read_attributes

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def _really(op, attributes, shapes):
    """Run the module on real tensors; None where it refuses them."""
    operation = OPERATIONS[op]
    try:
        module = build_module(operation, read_attributes(operation, attributes), **CPU)
        return tuple(module(*(torch.zeros(shape) for shape in shapes)).shape)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return None


def _by_rule(op, attributes, shapes):
    operation = OPERATIONS[op]
    try:
        return operation.shape(read_attributes(operation, attributes), tuple(shapes))
    except ValueError:
        return None


LINEAR = {"in_features": 4, "out_features": 6}
LIFT = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
ATTENTION = {"embed_dim": 4, "num_heads": 2}

CASES = [
    ("linear", LINEAR, [(3, 4)]),
    ("linear", LINEAR, [(3, 2, 4)]),
    ("linear", LINEAR, [(3, 5)]),
    *[("activation", {"type": "gelu"}, [shape]) for shape in [(3,), (2, 3, 4)]],
    *[(op, {}, [(2, 3)]) for op in ("identity", "scale", "dropout")],
    ("noise", {"std": 0.1}, [(2, 3)]),
    *[
        (op, {"normalized_shape": wanted}, [shape])
        for op in ("layer_norm", "rms_norm")
        for wanted in [(4,), (3, 4)]
        for shape in [(2, 4), (2, 3, 4), (2, 4, 3), (4,)]
    ],
    *[
        ("group_norm", {"num_groups": groups, "num_channels": 4}, [shape])
        for groups in (2, 3)
        for shape in [(2, 4), (2, 4, 5), (2, 5, 4), (4,)]
    ],
    *[
        ("batch_norm", {"num_features": 4, "dims": dims}, [shape])
        for dims in (1, 2, 3)
        for shape in [(2, 4), (2, 4, 5), (2, 4, 5, 5), (2, 4, 5, 5, 5), (2, 5, 4)]
    ],
    *[
        ("multihead_attention", {**ATTENTION, "num_heads": heads}, shapes)
        for heads in (2, 3)
        for shapes in [
            [(2, 5, 4)],
            [(2, 5, 3)],
            [(2, 5, 4), (2, 6, 4), (2, 6, 4)],
            [(2, 5, 4), (2, 6, 4), (2, 7, 4)],
            [(2, 5, 4), (3, 6, 4), (3, 6, 4)],
        ]
    ],
    *[
        ("diagonal", {"num_features": 4, "dim": dim}, [shape])
        for dim in (-1, 1)
        for shape in [(4,), (2, 4), (2, 4, 5), (2, 5, 4)]
    ],
    *[
        ("diagonal", {"num_features": (3, 4), "dim": dim}, [shape])
        for dim in (-1, 1)
        for shape in [(3, 4), (2, 3, 4), (2, 4, 3)]
    ],
    *[
        ("mean_attention", {"embed_dim": 4}, shapes)
        for shapes in [
            [(2, 5, 4)],
            [(2, 5, 3)],
            [(2, 5, 4), (2, 6, 3)],
        ]
    ],
    *[
        ("conv_transpose2d", {**LIFT, **more}, [shape])
        for more in (
            {},
            {"stride": (1, 2), "padding": (0, 1), "output_padding": (0, 1)},
            {"stride": 2, "dilation": 3, "output_padding": 2, "groups": 2, "bias": False},
            {"output_padding": 1},
            {"padding": 3},
            {"groups": 3},
        )
        for shape in [(2, 4, 3, 5), (2, 3, 3, 5)]
    ],
    *[
        (op, {}, shapes)
        for op in ("add", "sub", "mul")
        for shapes in [
            [(2, 3), (2, 3)],
            [(2, 1), (1, 3)],
            [(3,), (2, 3)],
            [(2, 3), (2, 2)],
            [(4, 2, 3), (2, 1)],
        ]
    ],
]


@pytest.mark.parametrize(("op", "attributes", "shapes"), CASES)
def test_a_rule_gives_the_shape_of_the_real_output(op, attributes, shapes):
    """Rule and module agree on the shape, and on what they refuse."""
    assert _by_rule(op, attributes, shapes) == _really(op, attributes, shapes)


def test_every_rule_but_the_convolutions_is_compared():
    """No operation with a rule is left out above; the convolutions are below."""
    with_rule = {op for op, operation in OPERATIONS.items() if operation.shape is not None}
    assert with_rule - {op for op, *_ in CASES} == {"conv1d", "conv2d", "conv3d"}


@st.composite
def _convolutions(draw):
    axes = draw(st.integers(1, 3))
    per_axis = st.integers(1, 3) | st.tuples(*[st.integers(1, 3)] * axes)
    groups = draw(st.integers(1, 2))
    attributes = {
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.integers(1, 4)),
        "kernel_size": draw(per_axis | st.just(4)),
        "stride": draw(per_axis),
        "padding": draw(st.sampled_from(["same", "valid", 0, 1, 2, 3])),
        "dilation": draw(per_axis),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    channels = draw(st.sampled_from([attributes["in_channels"], 3]))
    shape = (2, channels, *draw(st.tuples(*[st.integers(1, 9)] * axes)))
    return f"conv{axes}d", attributes, shape


@pytest.mark.slow
@given(_convolutions())
@settings(max_examples=400, deadline=None, derandomize=True)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_rule_of_convolutions_gives_the_shape_of_the_real_output(case):
    """Rule and module agree for every stride, padding, dilation, group and padding mode."""
    op, attributes, shape = case
    assert _by_rule(op, attributes, [shape]) == _really(op, attributes, [shape])

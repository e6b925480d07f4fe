"""Each operation of the table with attributes of several kinds, and blueprints of one of them."""

from __future__ import annotations

import torch

from esper.compiler.operations import OPERATIONS, read_attributes
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec

HW, L, DHW = (4, "H", "W"), (4, "L"), (4, "D", "H", "W")
CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
ANY = ("*", 4)

# op_type, attributes, input shape, output shape, number of inputs
CASES = [
    ("linear", {"in_features": 4, "out_features": 6}, ANY, ("*", 6), 1),
    ("linear", {"in_features": 4, "out_features": 6, "bias": False}, ANY, ("*", 6), 1),
    ("conv1d", {**CONV, "padding": 1}, L, (6, "L"), 1),
    ("conv2d", {**CONV, "padding": "same", "dilation": 2}, HW, (6, "H", "W"), 1),
    ("conv2d", {**CONV, "stride": (2, 1), "groups": 2, "bias": False}, HW, (6, "OH", "OW"), 1),
    ("conv2d", {**CONV, "out_channels": 8, "groups": 4}, HW, (8, "OH", "OW"), 1),
    ("conv3d", {**CONV, "padding": 1, "padding_mode": "circular"}, DHW, (6, "D", "H", "W"), 1),
    ("conv_transpose2d", {**CONV, "padding": 1}, HW, (6, "H", "W"), 1),
    (
        "conv_transpose2d",
        {**CONV, "stride": 2, "output_padding": (1, 0), "groups": 2, "bias": False, "dilation": 2},
        HW,
        (6, "OH", "OW"),
        1,
    ),
    ("diagonal", {"num_features": 4}, ANY, ANY, 1),
    ("diagonal", {"num_features": 4, "dim": 1, "bias": False}, HW, HW, 1),
    *[("activation", {"type": name}, ANY, ANY, 1) for name in (
        "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "softplus"
    )],
    ("diagonal", {"num_features": (3, 4)}, (3, 4), (3, 4), 1),
    ("layer_norm", {"normalized_shape": 4}, ANY, ANY, 1),
    ("layer_norm", {"normalized_shape": (3, 4)}, (2, 3, 4), (2, 3, 4), 1),
    ("layer_norm", {"normalized_shape": (4,), "bias": False}, ANY, ANY, 1),
    ("group_norm", {"num_groups": 2, "num_channels": 4}, HW, HW, 1),
    ("rms_norm", {"normalized_shape": 4}, ANY, ANY, 1),
    ("rms_norm", {"normalized_shape": 4, "elementwise_affine": False}, ANY, ANY, 1),
    ("batch_norm", {"num_features": 4}, HW, HW, 1),
    ("batch_norm", {"num_features": 4, "dims": 1, "affine": False}, L, L, 1),
    ("batch_norm", {"num_features": 4, "dims": 3}, DHW, DHW, 1),
    ("dropout", {"p": 0.5}, ANY, ANY, 1),
    ("dropout", {"p": 0.0}, ANY, ANY, 1),
    ("max_pool", {"kernel_size": 2}, HW, (4, "OH", "OW"), 1),
    ("max_pool", {"kernel_size": 3, "stride": 1, "padding": 1, "dims": 1}, L, L, 1),
    ("max_pool", {"kernel_size": 2, "dilation": 3, "padding": 1}, HW, (4, "OH", "OW"), 1),
    ("max_pool", {"kernel_size": 3, "stride": 2, "ceil_mode": True}, HW, (4, "OH", "OW"), 1),
    ("avg_pool", {"kernel_size": 2, "dims": 3}, DHW, (4, "OD", "OH", "OW"), 1),
    ("adaptive_avg_pool", {"output_size": 2}, HW, (4, 2, 2), 1),
    ("adaptive_max_pool", {"output_size": 3, "dims": 1}, L, (4, 3), 1),
    ("flatten", {}, (4, 3, 2), (24,), 1),
    ("reshape", {"shape": (2, -1)}, (4, 3), (2, 6), 1),
    ("permute", {"dims": (2, 1)}, (4, 3), (3, 4), 1),
    ("identity", {}, ANY, ANY, 1),
    ("scale", {"factor": 0.5}, ANY, ANY, 1),
    ("add", {}, ANY, ANY, 3),
    ("sub", {}, ANY, ANY, 2),
    ("mul", {}, ANY, ANY, 3),
    ("concat", {"dim": 1}, HW, (8, "H", "W"), 2),
    ("concat", {"dim": -1}, ANY, ("*", 8), 2),
    ("matmul", {}, (4, 4), (4, 4), 2),
    ("mean_matmul", {}, (4, 4), (4, 4), 2),
    ("mean_attention", {"embed_dim": 4}, ("L", 4), ("L", 4), 1),
    ("mean_attention", {"embed_dim": 4, "bias": False}, ("L", 4), ("L", 4), 2),
    ("mean_attention", {"embed_dim": 4, "causal": True}, ("L", 4), ("L", 4), 1),
    ("multihead_attention", {"embed_dim": 4, "num_heads": 2}, ("L", 4), ("L", 4), 1),
    ("multihead_attention", {"embed_dim": 4, "num_heads": 2, "bias": False}, ("L", 4), ("L", 4), 3),
    ("multihead_attention", {"embed_dim": 4, "num_heads": 2, "causal": True}, *[("L", 4)] * 2, 1),
    ("noise", {"std": 0.1}, ANY, ANY, 1),
]  # fmt: skip
IDS = [f"{op}-{i}" for i, (op, *_) in enumerate(CASES)]


def blueprint_of(op, attributes, shape_in, shape_out, num_inputs, **changes):
    """One node of the operation; further inputs come through scales, so that they differ."""
    scales = [BlueprintNode(f"in{i}", "scale", {"factor": float(i)}) for i in range(1, num_inputs)]
    edges = [BlueprintEdge("input", "op", 0), BlueprintEdge("op", "output")]
    edges += [BlueprintEdge("input", node.id) for node in scales]
    edges += [BlueprintEdge(node.id, "op", i) for i, node in enumerate(scales, start=1)]
    operation = OPERATIONS[op]
    draws = operation.draws_random(
        read_attributes(operation, BlueprintNode("n", op, attributes).attributes)
    )
    fields = {
        "id": op,
        "nodes": (BlueprintNode("op", op, attributes), *scales),
        "edges": tuple(edges),
        "input_spec": TensorSpec(shape_in),
        "output_spec": TensorSpec(shape_out),
        "draws_random": draws,
    }
    return BlueprintIR(**{**fields, **changes})


def example_of(spec, batch=3, size=7):
    shape = spec.resolve((batch, 2), dict.fromkeys(spec.free_sizes, size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

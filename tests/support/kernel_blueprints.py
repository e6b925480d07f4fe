"""Blueprints of kernels that several tests graft."""

import itertools

from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec


def mlp_blueprint(n=6, **options):
    """Return a two-layer kernel for a linear layer of n features."""
    nodes = (
        BlueprintNode(id="up", op_type="linear", attributes={"in_features": n, "out_features": 3}),
        BlueprintNode(id="act", op_type="activation", attributes={"type": "tanh"}),
        BlueprintNode(
            id="down", op_type="linear", attributes={"in_features": 3, "out_features": n}
        ),
    )
    path = ("input", "up", "act", "down", "output")
    edges = tuple(BlueprintEdge(source=a, target=b) for a, b in itertools.pairwise(path))
    spec = TensorSpec(shape=("*", n))
    return BlueprintIR(
        id="mlp", nodes=nodes, edges=edges, input_spec=spec, output_spec=spec, **options
    )


def linear_blueprint(n=6, **options):
    """Return a kernel of one linear layer, which folds into a linear layer of n features."""
    node = BlueprintNode(
        id="map", op_type="linear", attributes={"in_features": n, "out_features": n}
    )
    edges = tuple(
        BlueprintEdge(source=a, target=b) for a, b in (("input", "map"), ("map", "output"))
    )
    spec = TensorSpec(shape=("*", n))
    return BlueprintIR(
        id="map", nodes=(node,), edges=edges, input_spec=spec, output_spec=spec, **options
    )

"""Wrapped models that have grown something, and what was exported of them."""

import importlib.util
import itertools

import torch
from wrapping_models import Bottleneck, Mlp

import esper
from esper import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec


def blueprint(size, activation="tanh", out=None, **settings):
    """A two-layer kernel that contributes something from birth."""
    nodes = (
        BlueprintNode("down", "linear", {"in_features": size, "out_features": 4}),
        BlueprintNode("bend", "activation", {"type": activation}),
        BlueprintNode("up", "linear", {"in_features": 4, "out_features": out or size}),
        BlueprintNode("drop", "dropout", {"p": 0.5}),
    )
    names = ["input", "down", "bend", "up", "drop", "output"]
    edges = tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(names))
    return BlueprintIR(
        id=f"mlp-{size}",
        nodes=nodes,
        edges=edges,
        input_spec=TensorSpec(("*", size)),
        output_spec=TensorSpec(("*", out or size)),
        draws_random=True,
        **settings,
    )


def grown_mlp():
    """An MLP with a blueprint's kernel at fc1 and a hand-made one at fc2, in evaluation mode."""
    torch.manual_seed(0)
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(1, blueprint(6, out=8), alpha=0.5, example=torch.randn(4, 6))
    model.fc2.graft(0, Bottleneck(8, 3), alpha=1.0, example=torch.randn(4, 8))
    model.fc2.graft(3, Bottleneck(8, 3), alpha=0.25, mode="replace", example=torch.randn(4, 8))
    return model


def load_grafts(folder):
    """Import the generated module of an export."""
    specification = importlib.util.spec_from_file_location("grafts", folder / "grafts.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module

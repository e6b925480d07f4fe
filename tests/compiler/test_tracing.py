"""Tracing finds kernels that are not one graph for all sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.compiler import tracing
from esper.compiler.lowering import lower
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import KernelCompilationError

IMAGE = TensorSpec((4, "H", "W"))


class _BranchesOnValue(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


class _BranchesOnBatch(nn.Module):
    def forward(self, x):
        return x if x.shape[0] == 6 else -x


class _BranchesOnHeight(nn.Module):
    def forward(self, x):
        return x if x.shape[2] == 5003 else -x


class _Raises(nn.Module):
    def forward(self, x):
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (_BranchesOnValue(), "does not trace"),
        (_Raises(), "on purpose"),
        (_BranchesOnBatch(), "particular sizes"),
        (_BranchesOnHeight(), "particular sizes"),
    ],
)
def test_a_kernel_that_is_not_one_graph_is_refused(kernel, word):
    """A branch on a value or a size, or an exception, is a KernelCompilationError."""
    with pytest.raises(KernelCompilationError, match=word):
        tracing.trace_symbolically(kernel, IMAGE)


@pytest.mark.slow
def test_a_module_by_hand_traces_and_is_left_alone():
    """The control: a plain module passes, and its buffers and the random state are untouched."""
    kernel = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in kernel.state_dict().items()}
    state = torch.get_rng_state()
    tracing.trace_symbolically(kernel, IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in kernel.state_dict().items())


def test_a_graph_is_traced_once_for_all_its_kernels():
    """A second kernel of the same graph adds nothing to what is remembered, another graph does."""

    def kernel(factor, init_seed):
        return lower(
            BlueprintIR(
                id="traced",
                nodes=(BlueprintNode("a", "scale", {"factor": factor}),),
                edges=(BlueprintEdge("input", "a"), BlueprintEdge("a", "output")),
                input_spec=IMAGE,
                output_spec=IMAGE,
                init_seed=init_seed,
            )
        )

    tracing.trace_symbolically(kernel(0.125, 0), IMAGE)
    remembered = set(tracing._traced)
    tracing.trace_symbolically(kernel(0.125, 1), IMAGE)
    assert set(tracing._traced) == remembered
    tracing.trace_symbolically(kernel(0.375, 1), IMAGE)
    assert len(set(tracing._traced) - remembered) == 1

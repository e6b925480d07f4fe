"""The TorchScript back end: what it refuses, and that it says so."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from esper.compiler.compile import compile_blueprint
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import (
    KernelCompilationError,
    KernelCorruptError,
    KernelExecutionError,
)
from esper.running.kernel_executor import RealKernelExecutor
from esper.running.torchscript import TorchScriptBackend

CPU = torch.device("cpu")
LINEAR = ("linear", {"in_features": 4, "out_features": 4})


def _blueprint(*node, draws_random=False):
    return BlueprintIR(
        id="one",
        nodes=(BlueprintNode("n", *node),),
        edges=(BlueprintEdge("input", "n"), BlueprintEdge("n", "output")),
        input_spec=TensorSpec(("*", 4)),
        output_spec=TensorSpec(("*", 4)),
        draws_random=draws_random,
    )


@pytest.fixture
def artifact():
    """Return a kernel of one linear layer."""
    return compile_blueprint(_blueprint(*LINEAR))


def test_a_saved_program_keeps_its_weights(artifact):
    """What is loaded computes what the artifact says, from weights of its own."""
    backend = TorchScriptBackend()

    program = backend.load(backend.save(artifact), device=CPU)

    weight, bias = program.parameters()
    x = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(program(x), nn.functional.linear(x, weight, bias))
        assert weight.abs().sum() > 0


class Planted(nn.Module):
    """A module that somebody else made into a TorchScript file."""

    def forward(self, x):
        """Return anything."""
        return x


def _elsewhere():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(Planted()), buffer)
    return buffer.getvalue()


def _changed(artifact):
    data = bytearray(TorchScriptBackend().save(artifact))
    data[len(data) // 2] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "make",
    [lambda _: b"", lambda _: _elsewhere(), _changed, lambda a: TorchScriptBackend().save(a)],
    ids=["nothing", "another program", "a bit changed", "another back end's"],
)
def test_a_program_that_was_not_written_here_is_not_parsed(artifact, make, monkeypatch):
    """Bytes that this back end did not write are refused before torch sees them."""
    data = make(artifact)
    backend = TorchScriptBackend()
    backend.save(artifact)
    parsed = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **_: parsed.append(args))

    with pytest.raises(KernelCorruptError, match="not written by this back end"):
        backend.load(data, device=CPU)

    assert parsed == []


@pytest.mark.parametrize("node", [("dropout", {"p": 0.5}), ("noise", {"std": 1.0})])
def test_kernels_that_draw_random_numbers_are_refused(node):
    """A trace would keep one mode for good, so it is not made."""
    executor = RealKernelExecutor(backend=TorchScriptBackend())

    with pytest.raises(KernelCompilationError, match="random"):
        executor.compile_kernel_sync(_blueprint(*node, draws_random=True))


def test_a_program_that_is_not_the_kernel_is_refused(artifact, monkeypatch):
    """A program that agrees at the size of the trace only is found out at another."""
    trace = torch.jit.trace

    def drifting(kernel, example, **settings):
        class Drifting(nn.Module):
            def __init__(self):
                super().__init__()
                self.kernel = kernel

            def forward(self, x):
                return self.kernel(x) + (x.shape[0] - len(example))

        return trace(Drifting(), example, **settings)

    monkeypatch.setattr(torch.jit, "trace", drifting)

    with pytest.raises(KernelCompilationError, match="cannot represent") as raised:
        TorchScriptBackend().build(artifact, device=CPU)

    assert isinstance(raised.value.__cause__, AssertionError)


def test_gradients_are_refused(artifact):
    """Where a gradient could be expected, the error names the cure."""
    executor = RealKernelExecutor(backend=TorchScriptBackend())

    with pytest.raises(KernelExecutionError, match="no_grad"):
        executor.execute_kernel_sync(artifact, torch.ones(2, 4))


def test_its_deprecation_is_contained(artifact):
    """Compiling warns of nothing, and the filters of warnings are as before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        TorchScriptBackend().build(artifact, device=CPU)
        assert warnings.filters == before


def test_only_the_last_programs_are_remembered(artifact, monkeypatch):
    """The memory of what was written is bounded; what is forgotten is refused."""
    monkeypatch.setattr("esper.running.torchscript._MAX_REMEMBERED", 1)
    backend = TorchScriptBackend()
    first = backend.save(artifact)
    second = backend.save(compile_blueprint(_blueprint("identity")))

    backend.load(second, device=CPU)
    with pytest.raises(KernelCorruptError):
        backend.load(first, device=CPU)

"""The executor: what it promises with every back end, and its books."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch._dynamo
from torch import nn

from esper.compiler.codec import decode_artifact
from esper.compiler.lowering import instantiate
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import (
    BlueprintError,
    KernelCompilationError,
    KernelExecutionError,
)
from esper.resilience.clock import ManualClock
from esper.running.backends import EagerBackend, TorchCompileBackend
from esper.running.kernel_executor import RealKernelExecutor, shared_executor
from esper.running.torchscript import TorchScriptBackend

BACKENDS = {
    "eager": EagerBackend,
    "torch.compile": lambda: TorchCompileBackend(compiler="aot_eager"),
    "torchscript": TorchScriptBackend,
}


def chain(input_spec, output_spec, *nodes, **fields):
    """Return a blueprint of operations in a row."""
    ids = ["input", *(f"n{i}" for i in range(len(nodes))), "output"]
    return BlueprintIR(
        id=fields.pop("id", "chain"),
        nodes=tuple(BlueprintNode(f"n{i}", *node) for i, node in enumerate(nodes)),
        edges=tuple(BlueprintEdge(*ends) for ends in pairwise(ids)),
        input_spec=TensorSpec(input_spec),
        output_spec=TensorSpec(output_spec),
        **fields,
    )


def mlp(width=8, **fields):
    """Return a blueprint of two linear layers, 4 features to 3."""
    return chain(
        ("*", 4),
        ("*", 3),
        ("linear", {"in_features": 4, "out_features": width}),
        ("activation", {"type": "gelu"}),
        ("linear", {"in_features": width, "out_features": 3}),
        **fields,
    )


def conv():
    """Return a blueprint of a convolution and a norm over open image sizes."""
    return chain(
        ("N", 4, "H", "W"),
        ("N", 6, "H", "W"),
        ("conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}),
        ("batch_norm", {"num_features": 6}),
        ("group_norm", {"num_groups": 2, "num_channels": 6}),
    )


BLUEPRINTS = {"mlp": (mlp(), [(2, 4), (3, 5, 4)]), "conv": (conv(), [(2, 4, 9, 7), (5, 4, 6, 6)])}


def draw(*shape):
    """Return the same normal numbers for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.fixture(params=sorted(BACKENDS))
def executor(request):
    """Return an executor with each back end in turn."""
    torch._dynamo.reset()
    return RealKernelExecutor(backend=BACKENDS[request.param]())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BLUEPRINTS))
def test_every_back_end_computes_the_kernel(executor, name):
    """For every open size the result is the lowered kernel's in evaluation mode."""
    blueprint, shapes = BLUEPRINTS[name]
    artifact = executor.compile_kernel_sync(blueprint)
    kernel = instantiate(artifact).eval()

    with torch.no_grad():
        for shape in shapes:
            x = draw(*shape)
            found = executor.execute_kernel_sync(artifact, x)
            torch.testing.assert_close(found, kernel(x))


def test_the_artifact_does_not_depend_on_the_back_end(executor):
    """One blueprint gives one artifact, bytes and id, whoever compiles it and how often."""
    artifact = executor.compile_kernel_sync(mlp())
    again = RealKernelExecutor().compile_kernel_sync(mlp(), "cpu")

    assert artifact.artifact_id == again.artifact_id
    assert artifact.kernel_binary == again.kernel_binary


def test_a_registry_s_bytes_execute(executor):
    """An artifact that was decoded from bytes is as good as the one that was compiled."""
    artifact = executor.compile_kernel_sync(mlp())
    elsewhere = decode_artifact(artifact.kernel_binary, artifact_id=artifact.artifact_id)

    with torch.inference_mode():
        found = executor.execute_kernel_sync(elsewhere, draw(2, 4))
        assert torch.equal(found, executor.execute_kernel_sync(artifact, draw(2, 4)))


def test_a_kernel_that_fails_is_named_with_its_cause(executor):
    """An input that the kernel does not take raises KernelExecutionError from torch's error."""
    artifact = executor.compile_kernel_sync(mlp())

    with torch.no_grad(), pytest.raises(KernelExecutionError, match=artifact.artifact_id) as raised:
        executor.execute_kernel_sync(artifact, draw(2, 5))

    assert isinstance(raised.value.__cause__, RuntimeError)
    assert executor.get_performance_stats()["execution"]["failed"] == 1


def test_the_asynchronous_twins_give_the_same(executor):
    """Awaiting compiles and executes as calling does, in the caller's grad mode."""

    async def both():
        artifact = await executor.compile_kernel(mlp())
        with torch.no_grad():
            return artifact, await executor.execute_kernel(artifact, draw(2, 4))

    artifact, output = asyncio.run(both())

    with torch.no_grad():
        assert torch.equal(output, executor.execute_kernel_sync(artifact, draw(2, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "torch.compile"])
def test_gradients_reach_the_kernel_from_plain_data(name):
    """With gradients enabled a kernel trains although its input is data."""
    executor = RealKernelExecutor(backend=BACKENDS[name]())
    artifact = executor.compile_kernel_sync(mlp())

    executor.execute_kernel_sync(artifact, draw(2, 4)).square().sum().backward()

    parameters = list(executor.module_of(artifact, "cpu").parameters())
    assert len(parameters) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_the_ambient_grad_mode_is_honoured():
    """Under no_grad nothing is recorded, even for an input that requires a gradient."""
    executor = RealKernelExecutor()
    artifact = executor.compile_kernel_sync(mlp())

    with torch.no_grad():
        output = executor.execute_kernel_sync(artifact, draw(2, 4).requires_grad_())

    assert not output.requires_grad


def test_a_module_built_in_inference_mode_trains_afterwards():
    """The grad mode of the first call does not mark the module for the next."""
    executor = RealKernelExecutor()
    artifact = executor.compile_kernel_sync(mlp())
    fresh = RealKernelExecutor()
    with torch.inference_mode():
        fresh.execute_kernel_sync(artifact, draw(2, 4))

    assert fresh.execute_kernel_sync(artifact, draw(2, 4)).requires_grad


@pytest.mark.slow
def test_results_depend_on_nothing_but_artifact_and_input():
    """A batch norm's statistics stay those of the artifact, however often it is executed."""
    executor = RealKernelExecutor()
    artifact = executor.compile_kernel_sync(conv())
    first = executor.execute_kernel_sync(artifact, draw(2, 4, 9, 7))
    executor.execute_kernel_sync(artifact, 100 + draw(5, 4, 6, 6))

    assert torch.equal(executor.execute_kernel_sync(artifact, draw(2, 4, 9, 7)), first)


def test_the_device_follows_the_input():
    """A kernel runs where its input is, wherever it was made ready."""
    executor = RealKernelExecutor()
    artifact = executor.compile_kernel_sync(mlp(), "cpu")

    assert executor.execute_kernel_sync(artifact, torch.empty(2, 4, device="meta")).is_meta
    assert executor.get_performance_stats()["device"] == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_runs_on_the_accelerator_and_is_timed_there():
    """Compiled for the CPU it runs on the GPU, where events say how long it took."""
    executor = RealKernelExecutor(device_timing=True)
    artifact = executor.compile_kernel_sync(mlp(), "cpu")

    output = executor.execute_kernel_sync(artifact, draw(2, 4).cuda())

    stats = executor.get_performance_stats()
    assert output.is_cuda
    assert stats["device"] == "cuda:0"
    assert stats["execution"]["last_us"] > 0


def test_autocast_is_the_caller_s(executor):
    """Under autocast a kernel computes in the autocast dtype, on the calling thread."""
    artifact = executor.compile_kernel_sync(mlp())

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert executor.execute_kernel_sync(artifact, draw(2, 4)).dtype == torch.bfloat16


@pytest.mark.slow
def test_more_kernels_than_torch_recompiles_stay_compiled():
    """The twelfth kernel is compiled like the first, and none is compiled twice."""
    compiled = []

    def count(graph, _example_inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    executor = RealKernelExecutor(backend=TorchCompileBackend(compiler=count))
    artifacts = [executor.compile_kernel_sync(mlp(width)) for width in range(4, 16)]
    assert compiled == []  # compilation waits for the first call
    with torch.no_grad():
        for artifact in artifacts * 2:
            executor.execute_kernel_sync(artifact, draw(2, 4))

    assert len(compiled) == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on import
def test_the_default_compiler_computes_the_kernel():
    """The kernel under torch.compile's own compiler gives the kernel's numbers."""
    torch._dynamo.reset()
    executor = RealKernelExecutor(backend=TorchCompileBackend())
    artifact = executor.compile_kernel_sync(mlp())

    found = executor.execute_kernel_sync(artifact, draw(2, 4))

    torch.testing.assert_close(found, instantiate(artifact)(draw(2, 4)))


def test_a_blueprint_that_breaks_a_rule_is_not_compiled():
    """KernelCompilationError names the blueprint, and its cause the broken rule."""
    executor = RealKernelExecutor()
    wrong = chain(("*", 4), ("*", 3), ("linear", {"in_features": 5, "out_features": 3}), id="wrong")

    with pytest.raises(KernelCompilationError, match="'wrong'") as raised:
        executor.compile_kernel_sync(wrong)

    assert isinstance(raised.value.__cause__, BlueprintError)
    compilation = executor.get_performance_stats()["compilation"]
    assert (compilation["count"], compilation["failed"]) == (0, 1)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_refused(device):
    """A kernel is made ready for devices of this machine only."""
    with pytest.raises(ValueError, match="expected 'auto'"):
        RealKernelExecutor().compile_kernel_sync(mlp(), device)


def test_what_is_no_kernel_is_refused():
    """Blueprints, artifacts and tensors are told apart before anything happens."""
    executor = RealKernelExecutor()
    artifact = executor.compile_kernel_sync(mlp())

    with pytest.raises(TypeError, match="BlueprintIR"):
        executor.compile_kernel_sync(artifact)
    with pytest.raises(TypeError, match="CompiledKernelArtifact"):
        executor.execute_kernel_sync(mlp(), draw(2, 4))
    with pytest.raises(TypeError, match="Tensor"):
        executor.execute_kernel_sync(artifact, [1.0])


class TickingBackend:
    """The eager back end; a module takes as long as its input says."""

    name = "ticking"

    def __init__(self, clock):
        self.clock = clock
        self.num_builds = 0

    def build(self, artifact, *, device):
        self.num_builds += 1
        clock = self.clock

        class Ticking(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(2**18))  # 1 MiB

            def forward(self, x):
                clock.advance(float(x))
                return x

        clock.advance(2.0)
        return Ticking()


def test_durations_are_quantiles_of_a_bounded_window():
    """Counts are of all time, the quantiles of the last durations, by the injected clock."""
    clock = ManualClock()
    executor = RealKernelExecutor(backend=TickingBackend(clock), clock=clock, window=4)
    artifact = executor.compile_kernel_sync(mlp())
    for seconds in (100.0, 1.0, 2.0, 3.0, 4.0):
        executor.execute_kernel_sync(artifact, torch.tensor(seconds))

    stats = executor.get_performance_stats()

    assert stats["compilation"]["count"] == 1
    assert stats["compilation"]["last_ms"] == 2000.0
    assert stats["execution"] == {
        "count": 5,
        "failed": 0,
        "mean_us": pytest.approx(2.5e6),
        "p50_us": pytest.approx(2.5e6),
        "p95_us": pytest.approx(3.85e6),
        "p99_us": pytest.approx(3.97e6),
        "last_us": 4e6,
    }
    assert stats["backend"] == "ticking"


def test_what_was_not_measured_is_none():
    """An executor that did nothing claims no durations and no device."""
    stats = RealKernelExecutor().get_performance_stats()

    assert stats["execution"]["count"] == stats["compilation"]["count"] == 0
    assert stats["execution"]["mean_us"] is stats["compilation"]["p95_ms"] is None
    assert stats["device"] is None


def test_the_module_least_recently_used_goes_first():
    """The bytes of modules stay within the budget, and what goes is built again when asked for."""
    clock = ManualClock()
    backend = TickingBackend(clock)
    executor = RealKernelExecutor(backend=backend, max_cache_size_mb=2)
    one, two, three = (executor.compile_kernel_sync(mlp(width)) for width in (4, 5, 6))
    assert executor.get_performance_stats()["cache"]["memory_mb"] == 2.0
    assert backend.num_builds == 3

    executor.module_of(two, "cpu")
    executor.module_of(one, "cpu")  # built again; three goes
    executor.module_of(two, "cpu")
    executor.module_of(three, "cpu")

    assert backend.num_builds == 5
    assert executor.get_performance_stats()["cache"]["evictions"] == 3


def test_a_module_larger_than_the_budget_evicts_nobody():
    """It is served, not kept, and what was kept stays."""
    executor = RealKernelExecutor(max_cache_size_mb=0.001)
    small = executor.compile_kernel_sync(mlp(4))
    kept = executor.module_of(small, "cpu")
    large = executor.compile_kernel_sync(mlp(1000))

    executor.execute_kernel_sync(large, draw(2, 4))

    assert executor.module_of(small, "cpu") is kept
    cache = executor.get_performance_stats()["cache"]
    assert (cache["modules_cached"], cache["oversize"], cache["evictions"]) == (1, 2, 0)


def test_threads_share_one_module():
    """Threads that ask for a kernel at once get the same module, and every call is counted."""
    executor = RealKernelExecutor()
    artifact = RealKernelExecutor().compile_kernel_sync(mlp())
    start = threading.Barrier(8)

    def work(_):
        start.wait()
        module = executor.module_of(artifact, "cpu")
        return module, [executor.execute_kernel_sync(artifact, draw(2, 4)) for _ in range(50)]

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))

    assert len({id(module) for module, _ in results}) == 1
    assert all(torch.equal(out, results[0][1][0]) for _, outs in results for out in outs)
    stats = executor.get_performance_stats()
    assert stats["execution"]["count"] == 400
    assert stats["cache"]["modules_cached"] == 1


def test_copies_of_an_executor():
    """A copy is the executor itself; a pickled one arrives empty, the shared one as itself."""
    executor = RealKernelExecutor(max_cache_size_mb=3)
    executor.compile_kernel_sync(mlp())

    assert copy.deepcopy(executor) is copy.copy(executor) is executor
    arrived = pickle.loads(pickle.dumps(executor))
    assert arrived.get_performance_stats()["cache"]["modules_cached"] == 0
    assert arrived.get_performance_stats()["cache"]["max_memory_mb"] == 3
    assert pickle.loads(pickle.dumps(shared_executor())) is shared_executor()


@pytest.mark.parametrize("settings", [{"window": 0}, {"max_cache_size_mb": -1}])
def test_numbers_out_of_range_are_refused(settings):
    """A window holds at least one duration, a budget no less than nothing."""
    with pytest.raises(ValueError, match="at least"):
        RealKernelExecutor(**settings)

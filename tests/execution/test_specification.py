"""What the specification's callers write works, but where a difference is listed with its reason.

The tables say what the specification says. A difference is what such a caller could notice: a
name, a parameter, its place, its default, a key, whether a call is awaited. Parameters and keys
beside the specification's are none, as long as nobody has to give them.
"""

from __future__ import annotations

import enum
import inspect

import pytest
import torch
from torch import nn

import esper.contracts.errors
import esper.execution

NAMES = [
    "KasminaLayer",
    "KasminaConv2dLayer",
    "AsyncKasminaConv2dLayer",
    "KasminaAttentionLayer",
    "KasminaLayerNormLayer",
    "KasminaBatchNormLayer",
    "KasminaStateLayout",
    "SeedLifecycleState",
    "KernelCache",
    "EnhancedKernelCache",
    "RealKernelExecutor",
    "KernelExecutionError",
    "KernelCompilationError",
    "ErrorRecoveryManager",
    "ErrorType",
    "HealthMonitor",
    "GradientSynchronizer",
    "StreamManager",
]
"""Its ``__all__``."""

EXCEPTIONS = [
    "KernelCompilationError",
    "KernelExecutionError",
    "KernelLoadError",
    "SeedLifecycleError",
    "CacheError",
    "AsyncExecutionError",
    "GradientSyncError",
]
"""Its exceptions, each a KasminaException."""

LAYER = "num_seeds=4, cache_size_mb=128, telemetry_enabled=True"
CONV = (
    "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True"
)
SIGNATURES = {
    "KasminaLayer": f"input_size, output_size, {LAYER}, original_layer=None",
    "KasminaLayer.load_kernel": "async self, seed_idx, artifact_id",
    "KasminaLayer.get_stats": "self",
    "KasminaConv2dLayer": f"{CONV}, *, {LAYER}",
    "AsyncKasminaConv2dLayer": f"{CONV}, *, {LAYER}",
    "KasminaAttentionLayer": f"embed_dim, num_heads, dropout=0.0, bias=True, *, {LAYER}",
    "KasminaLayerNormLayer": (f"normalized_shape, eps=1e-05, elementwise_affine=True, *, {LAYER}"),
    "KasminaBatchNormLayer": (
        "num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, *, "
        f"input_shape=(), {LAYER}"
    ),
    "KasminaStateLayout": "num_seeds, device",
    "KasminaStateLayout.get_active_seeds": "self",
    "KasminaStateLayout.get_dormant_seeds": "self",
    "KasminaStateLayout.has_active_seeds": "self",
    "KasminaStateLayout.transition_seed_state": "self, seed_idx, new_state, kernel_id=None",
    "KasminaStateLayout.increment_error_count": "self, seed_idx",
    "KasminaStateLayout.update_telemetry": "self, seed_idx, latency_us, health_score",
    "KernelCache": "max_cache_size_mb=512, max_entries=128",
    "KernelCache.load_kernel": "async self, artifact_id",
    "KernelCache.get_stats": "self",
    "EnhancedKernelCache": "*args, **kwargs",
    "EnhancedKernelCache.load_kernel": "async self, artifact_id",
    "EnhancedKernelCache.get_stats": "self",
    "RealKernelExecutor": "",
    "RealKernelExecutor.compile_kernel": "async self, blueprint, target_device='auto'",
    "RealKernelExecutor.execute_kernel": "async self, kernel_artifact, inputs",
    "RealKernelExecutor.get_performance_stats": "self",
    "ErrorRecoveryManager": "max_retries=3, base_delay=0.1",
    "ErrorRecoveryManager.recover_from_error": "async self, error, context, recovery_fn",
    "HealthMonitor": "window_size=100",
    "HealthMonitor.update_metrics": "self, errors, total, latency_ms, memory_percent",
    "HealthMonitor.compute_health_score": "self",
    "HealthMonitor.should_intervene": "self",
    "GradientSynchronizer": "",
    "GradientSynchronizer.synchronize_pending": "self, grad_futures",
    "GradientSynchronizer.get_stats": "self",
    "StreamManager": "num_streams=4",
    "StreamManager.get_stream": "self, seed_idx",
    "StreamManager.synchronize_all": "self",
    "StreamManager.get_stats": "self",
    "AsyncConv2dKernel.apply_async": "input_tensor, weight, bias, kernel_fn, stream",
}
"""Its signatures. What it passes on as ``**kwargs`` stands behind ``*``, by name."""

MEMBERS = {
    "SeedLifecycleState": {
        "DORMANT": 0,
        "LOADING": 1,
        "ACTIVE": 2,
        "ERROR_RECOVERY": 3,
        "FOSSILIZED": 4,
    },
    "ErrorType": {
        name: name.lower()
        for name in (
            "KERNEL_LOAD_FAILURE",
            "KERNEL_EXECUTION_ERROR",
            "OUT_OF_MEMORY",
            "DEVICE_ERROR",
            "NETWORK_ERROR",
            "VALIDATION_ERROR",
        )
    },
}
"""Its enumerations."""

OBJECTS = {
    "KasminaLayer": lambda cls: cls(4, 3),
    "KasminaConv2dLayer": lambda cls: cls(3, 4, 3),
    "AsyncKasminaConv2dLayer": lambda cls: cls(3, 4, 3),
    "KasminaAttentionLayer": lambda cls: cls(4, 2),
    "KasminaLayerNormLayer": lambda cls: cls(4),
    "KasminaBatchNormLayer": lambda cls: cls(4, input_shape=(1, 4, 2, 2)),
    "KasminaStateLayout": lambda cls: cls(2, torch.device("cpu")),
    "ErrorRecoveryManager": lambda cls: cls(),
    "HealthMonitor": lambda cls: cls(),
    "RealKernelExecutor": lambda cls: cls(),
    "GradientSynchronizer": lambda cls: cls(),
    "StreamManager": lambda cls: cls(),
}

OF_A_LAYER = [
    "input_size",
    "output_size",
    "num_seeds",
    "default_layer",
    "state_layout",
    "kernel_cache",
    "kernel_executor",
    "error_recovery",
    "telemetry_enabled",
    "forward_count",
    "kernel_execution_count",
]
ATTRIBUTES = {
    "KasminaLayer": OF_A_LAYER,
    "KasminaConv2dLayer": [*OF_A_LAYER, "conv_params"],
    "AsyncKasminaConv2dLayer": [*OF_A_LAYER, "stream_manager", "gradient_sync", "pending_grads"],
    "KasminaAttentionLayer": [*OF_A_LAYER, "embed_dim", "num_heads"],
    "KasminaLayerNormLayer": [*OF_A_LAYER, "normalized_shape", "eps"],
    "KasminaBatchNormLayer": [*OF_A_LAYER, "num_features"],
    "KasminaStateLayout": [
        "num_seeds",
        "device",
        "lifecycle_states",
        "active_kernel_id",
        "alpha_blend",
        "health_accumulator",
        "last_update_epoch",
        "exec_latency_us",
        "error_count",
        "fallback_active",
    ],
    "ErrorRecoveryManager": [
        "max_retries",
        "base_delay",
        "error_counts",
        "recovery_success",
        "circuit_breakers",
    ],
    "HealthMonitor": [
        "window_size",
        "error_rates",
        "latencies",
        "memory_usage",
        "error_threshold",
        "latency_threshold_ms",
        "memory_threshold_percent",
    ],
    "RealKernelExecutor": ["device"],
    "GradientSynchronizer": ["sync_count", "sync_time_total"],
    "StreamManager": ["num_streams", "streams", "stream_usage"],
}
"""Its public attributes."""

PERFORMANCE = {
    "compilation": ["count", "mean_ms", "p95_ms", "last_ms"],
    "execution": ["count", "mean_us", "p95_us", "last_us"],
    "cache": ["modules_cached", "memory_mb"],
    "device": [],
}
KEYS = {
    "KasminaLayer.get_stats": {
        "layer_info": ["input_size", "output_size", "num_seeds"],
        "execution_stats": ["forward_count", "kernel_execution_count", "kernel_execution_rate"],
        "seed_stats": ["active_seeds", "dormant_seeds", "error_recovery_seeds", "average_health"],
        "cache_stats": [],
        "performance": list(PERFORMANCE),
    },
    "RealKernelExecutor.get_performance_stats": PERFORMANCE,
    "GradientSynchronizer.get_stats": {
        "sync_count": [],
        "total_sync_time_ms": [],
        "avg_sync_time_ms": [],
    },
    "StreamManager.get_stats": {"num_streams": [], "stream_usage": [], "total_usage": []},
}
"""Keys of its statistics, and the keys below them."""

DIFFERENCES = {
    "RealKernelExecutor.device: absent": "36. The device follows the input; the statistics say "
    "where the last kernel ran.",
    "StreamManager.streams: absent": "66. Streams belong to a device, and a CPU has none; they are "
    "made when a tensor says which.",
    "GradientSynchronizer.sync_time_total: absent": "69. Nobody waits for a gradient here: what is "
    "measured is telling the device to, and its name says the unit, sync_time_total_s.",
    "ErrorRecoveryManager.circuit_breakers: absent": "25. One breaker for each endpoint, where it "
    "is asked, and never one that all errors of a type share.",
    "HealthMonitor.error_rates: absent": "73. An update is one sample of all that it measured, and "
    "what it did not measure is left out.",
    "HealthMonitor.latencies: absent": "73. As the error rates.",
    "HealthMonitor.memory_usage: absent": "73. As the error rates.",
    "HealthMonitor.error_threshold: absent": "73. The limits are one value, with these defaults: "
    "HealthMonitor.limits.",
    "HealthMonitor.latency_threshold_ms: absent": "73. As the limit of errors.",
    "HealthMonitor.memory_threshold_percent: absent": "73. As the limit of errors.",
}
"""Each difference, with the number of its erratum and the reason."""


def _resolve(path):
    found = esper.execution
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _parse(text):
    """Return parameters and defaults of a line of the table, and whether the call is awaited."""
    is_awaited = text.startswith("async ")
    scope = {}
    exec(f"def f({text.removeprefix('async ')}): pass", scope)
    return inspect.signature(scope["f"]).parameters, is_awaited


def _signature_differences(path, line):
    expected, is_awaited = _parse(line)
    target = _resolve(path)
    if inspect.iscoroutinefunction(target) != is_awaited:
        yield f"{path}: {'not ' if is_awaited else ''}awaited"
    found = inspect.signature(target).parameters
    kinds = {p.kind for p in found.values()}
    places = [p.name for p in found.values() if p.kind is not p.KEYWORD_ONLY]
    for place, (name, wanted) in enumerate(expected.items()):
        if name not in found:
            passed_on = wanted.VAR_KEYWORD if wanted.kind is wanted.KEYWORD_ONLY else wanted.kind
            if passed_on not in _VARIABLE or passed_on not in kinds:
                yield f"{path}({name}): absent"
            continue
        if wanted.default not in (wanted.empty, found[name].default):
            yield f"{path}({name}): default {_shown(found[name])}, not {_shown(wanted)}"
        if wanted.kind is not wanted.KEYWORD_ONLY and places[place : place + 1] != [name]:
            yield f"{path}({name}): in another place"
    for name, extra in found.items():
        if name not in expected and extra.kind not in _VARIABLE and extra.default is extra.empty:
            yield f"{path}({name}): demanded"


_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _shown(parameter):
    return "none" if parameter.default is parameter.empty else repr(parameter.default)


def _key_differences(path, keys):
    owner, method = path.split(".")
    found = getattr(OBJECTS[owner](_resolve(owner)), method)()
    for key, below in keys.items():
        if key not in found:
            yield f"{path}[{key!r}]: absent"
            continue
        for inner in below:
            if inner not in found[key]:
                yield f"{path}[{key!r}][{inner!r}]: absent"


def _attribute_differences():
    for owner, names in ATTRIBUTES.items():
        made = OBJECTS[owner](_resolve(owner))
        for name in names:
            try:
                getattr(made, name)
            except AttributeError:
                yield f"{owner}.{name}: absent"
            except esper.contracts.errors.EsperError as error:
                yield f"{owner}.{name}: raises {type(error).__name__}"


def _all_differences():
    exported = set(esper.execution.__all__)
    yield from (f"{name}: not exported" for name in NAMES if name not in exported)
    for path, line in SIGNATURES.items():
        yield from _signature_differences(path, line)
    for path, keys in KEYS.items():
        yield from _key_differences(path, keys)
    for name, members in MEMBERS.items():
        if {member.name: member.value for member in _resolve(name)} != members:
            yield f"{name}: other members"
    yield from _attribute_differences()


def test_every_difference_from_the_specification_is_listed():
    """There is no other difference than the listed ones, and each listed one exists."""
    assert sorted(_all_differences()) == sorted(DIFFERENCES)


def test_the_tables_cover_every_name():
    """Every name of the specification is held by at least one table."""
    held = {path.split(".")[0] for path in [*SIGNATURES, *MEMBERS, *EXCEPTIONS]}
    assert set(NAMES) <= held
    assert len(NAMES) == 18


def test_every_listed_difference_has_a_reason():
    """A reason begins with the number of its erratum."""
    assert all(reason.split(".")[0].isdigit() for reason in DIFFERENCES.values())


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_kasmina_exceptions(name):
    """Each of the specification's exceptions is caught as KasminaException."""
    assert issubclass(_resolve(name), _resolve("KasminaException"))


def test_the_whole_exception_tree_is_exported():
    """Every error of the engine comes from esper.execution, and is the one of contracts."""
    base = esper.contracts.errors.KasminaException
    tree = {
        name: found
        for name, found in vars(esper.contracts.errors).items()
        if isinstance(found, type) and issubclass(found, base)
    }
    exported = {name: getattr(esper.execution, name) for name in esper.execution.__all__}
    assert tree.items() <= exported.items()
    assert "AsyncConv2dKernel" in exported


def test_a_layer_s_performance_has_the_executor_s_keys():
    """What the executor measures has a key in a layer's statistics, whose values are its own."""
    layer, x = esper.execution.KasminaLayer(4, 4), torch.ones(2, 4)
    before = layer.get_stats()["performance"]
    layer.graft(0, nn.Linear(4, 4), alpha=0.5, example=x)
    layer(x)
    after = layer.get_stats()["performance"]

    for section, keys in PERFORMANCE.items():
        assert all(key in after[section] for key in keys)
    assert before["execution"] == {"count": 0, "mean_us": None, "p95_us": None, "last_us": None}
    assert before["cache"] == {"modules_cached": 0, "memory_mb": 0.0}
    assert after["execution"]["count"] == 1
    (timed_us,) = layer._kasmina.seeds[0].timed_us
    assert timed_us == after["latency_us"][0] > 0
    assert all(after["execution"][key] == timed_us for key in ("mean_us", "p95_us", "last_us"))
    assert after["cache"] == {"modules_cached": 1, "memory_mb": 20 * 4 / 2**20}
    assert after["device"] == "cpu"


def test_a_layer_is_called_by_its_host_s_signature():
    """The constructor's signature is the class's, and the object's is still the host's forward."""
    layer = esper.execution.KasminaLayer(4, 4)

    assert "input_size" in inspect.signature(esper.execution.KasminaLayer).parameters
    assert inspect.signature(layer) == inspect.signature(nn.Linear(4, 4))


def test_the_limits_of_health_are_the_specification_s():
    """A monitor without settings steps in where the specified one did."""
    limits = _resolve("HealthMonitor")().limits

    assert (limits.error_rate, limits.latency_ms, limits.memory_percent) == (0.1, 10.0, 90.0)


def test_states_are_integers():
    """A state can be an element of an integer tensor, as the specification has it."""
    assert issubclass(_resolve("SeedLifecycleState"), enum.IntEnum)


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        ("KasminaConv2dLayer", "KasminaLayer"),
        ("AsyncKasminaConv2dLayer", "KasminaConv2dLayer"),
        ("KasminaAttentionLayer", "KasminaLayer"),
        ("KasminaLayerNormLayer", "KasminaLayer"),
        ("KasminaBatchNormLayer", "KasminaLayer"),
        ("EnhancedKernelCache", "KernelCache"),
    ],
)
def test_inheritance_is_the_specification_s(child, parent):
    """What the specification calls a kind of something is one."""
    assert issubclass(_resolve(child), _resolve(parent))


def test_layers_get_the_host_s_number_of_dimensions():
    """Four sizes of an input make a BatchNorm2d, five a 3d, any other number a 1d."""
    make = _resolve("KasminaBatchNormLayer")
    for shape, host in (
        ((1, 4, 2, 2), nn.BatchNorm2d),
        ((1, 4, 2, 2, 2), nn.BatchNorm3d),
        ((1, 4), nn.BatchNorm1d),
    ):
        assert isinstance(make(4, input_shape=shape), host)


def test_the_search_finds_what_it_looks_for(monkeypatch):
    """The control: a changed default, place, name, key or export is a difference."""

    class Monitor:
        def __init__(self, window_size=99):
            self.latencies = []

        def update_metrics(self, total, errors, latency_ms, seconds):
            """Take them in another order, and something else."""

        async def compute_health_score(self):
            """Keep the caller waiting."""

        def should_intervene(self):
            """Do as specified."""

    monkeypatch.setattr(esper.execution, "HealthMonitor", Monitor)
    monkeypatch.setattr(esper.execution, "__all__", ["KernelCache"])

    assert set(_all_differences()) >= {
        "HealthMonitor(window_size): default 99, not 100",
        "HealthMonitor.update_metrics(errors): in another place",
        "HealthMonitor.update_metrics(memory_percent): absent",
        "HealthMonitor.update_metrics(seconds): demanded",
        "HealthMonitor.compute_health_score: awaited",
        "HealthMonitor.window_size: absent",
        "KasminaLayer: not exported",
    }

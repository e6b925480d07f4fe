"""Artifacts: exact both ways, and nothing that was tampered with becomes a kernel."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import random
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from kernel_blueprints import mlp_blueprint

from esper.compiler.codec import decode_artifact, encode_kernel
from esper.compiler.compile import compile_blueprint
from esper.compiler.lowering import instantiate, kernel_tensors, lower
from esper.contracts import artifact_format
from esper.contracts.artifact import KernelMetadata
from esper.contracts.artifact_format import TensorBytes
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.errors import BlueprintError, KernelCorruptError

GOLDEN = Path(__file__).parent / "golden" / "kernel-format-1.safetensors"


def _blueprint(**changes):
    nodes = (
        BlueprintNode("hidden", "linear", {"in_features": 4, "out_features": 8}),
        BlueprintNode("norm", "batch_norm", {"num_features": 8, "dims": 1}),
        BlueprintNode("act", "activation", {"type": "gelu"}),
        BlueprintNode("out", "linear", {"in_features": 8, "out_features": 3, "init": "zeros"}),
    )
    ids = ["input", "hidden", "norm", "act", "out", "output"]
    fields = {
        "id": "coded",
        "nodes": nodes,
        "edges": tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(ids)),
        "input_spec": TensorSpec((4,)),
        "output_spec": TensorSpec((3,)),
    }
    return BlueprintIR(**{**fields, **changes})


ARTIFACT = compile_blueprint(_blueprint(), lineage=("0" * 64,))
PARSED = artifact_format.parse(ARTIFACT.kernel_binary)


class _ManualClock:
    def __init__(self):
        self._now_s = 0.0

    def now(self):
        self._now_s += 0.25
        return self._now_s


def test_decoding_and_encoding_are_exact_in_both_directions():
    """decode(encode(x)) is x, and encode(decode(b)) is b."""
    decoded = decode_artifact(ARTIFACT.kernel_binary, artifact_id=ARTIFACT.artifact_id)
    assert decoded == ARTIFACT
    assert decoded.metadata == ARTIFACT.metadata
    assert decoded.blueprint == ARTIFACT.blueprint
    assert decoded.blueprint_id == "coded"
    kernel = instantiate(decoded)
    assert encode_kernel(kernel, lineage=decoded.metadata.lineage) == ARTIFACT.kernel_binary


def test_the_same_blueprint_compiles_to_the_same_id_and_others_do_not():
    """The id is the content: equal for equal content, whatever the clock says."""
    again = compile_blueprint(_blueprint(), lineage=("0" * 64,), clock=_ManualClock())
    assert again.artifact_id == ARTIFACT.artifact_id
    ids = {
        ARTIFACT.artifact_id,
        compile_blueprint(_blueprint()).artifact_id,
        compile_blueprint(_blueprint(init_seed=1)).artifact_id,
        compile_blueprint(_blueprint(id="renamed")).artifact_id,
    }
    assert len(ids) == 4


def test_the_record_is_beside_the_bytes():
    """Size, time and toolchain are measured and are not in the bytes."""
    record = compile_blueprint(_blueprint(), clock=_ManualClock()).record
    assert record.compilation_time_ms == 250.0
    assert record.size_bytes == len(compile_blueprint(_blueprint()).kernel_binary)
    assert record.toolchain == f"torch {torch.__version__}"
    assert torch.__version__.encode() not in ARTIFACT.kernel_binary


def test_metadata_says_what_the_kernel_is():
    """The parameter count, the zeroed tensor and the lineage are those of the kernel."""
    metadata = ARTIFACT.metadata
    assert metadata.parameter_count == sum(p.numel() for p in lower(_blueprint()).parameters())
    assert metadata.zeroed == "out.weight"
    assert metadata.blueprint_digest == _blueprint().digest
    assert metadata.lineage == ("0" * 64,)
    assert KernelMetadata.from_document(metadata.to_document()) == metadata


def test_a_trained_readout_is_no_longer_zeroed():
    """Metadata follow the weights: once the last layer has moved, nothing is zeroed."""
    tensors = dict(kernel_tensors(lower(_blueprint())))
    tensors["out.bias"] = torch.ones(3)
    trained = compile_blueprint(_blueprint(), tensors=tensors)
    assert trained.metadata.zeroed is None
    assert torch.equal(kernel_tensors(instantiate(trained))["out.bias"], torch.ones(3))


def test_a_node_may_have_a_dot_in_its_id():
    """Its tensors are told from those of others by all of its id."""
    nodes = tuple(
        dataclasses.replace(node, id=f"layer.{node.id}") if node.id == "out" else node
        for node in _blueprint().nodes
    )
    ids = ["input", "hidden", "norm", "act", "layer.out", "output"]
    edges = tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(ids))
    kernel = lower(_blueprint(nodes=nodes, edges=edges))
    assert decode_artifact(encode_kernel(kernel)).metadata.zeroed == "layer.out.weight"
    tensors = {**kernel_tensors(kernel), "layer.out.bias": torch.ones(3)}
    trained = compile_blueprint(kernel.blueprint, tensors=tensors)
    assert trained.metadata.zeroed is None


def test_a_dtype_that_artifacts_do_not_hold_is_refused():
    """The tensor is named; what would be written could not be read."""
    with pytest.raises(
        KernelCorruptError, match=r"tensor 'hidden\.weight' is of dtype .*float8_e4m3fn"
    ):
        encode_kernel(lower(_blueprint()).to(torch.float8_e4m3fn))


def test_weights_that_are_not_the_blueprints_are_refused():
    """Compiling with other tensors raises BlueprintError, with NaN KernelCorruptError."""
    tensors = dict(kernel_tensors(lower(_blueprint())))
    with pytest.raises(BlueprintError, match="tensors"):
        compile_blueprint(_blueprint(), tensors={"out.weight": torch.zeros(3, 8)})
    with pytest.raises(KernelCorruptError, match=r"out\.bias.*NaN"):
        compile_blueprint(_blueprint(), tensors={**tensors, "out.bias": torch.zeros(3) / 0})


def test_the_safetensors_library_reads_an_artifact():
    """Names and values are what the library sees."""
    loaded = safetensors.torch.load(ARTIFACT.kernel_binary)
    expected = kernel_tensors(instantiate(ARTIFACT))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_an_artifact_survives_copying(duplicate):
    """Copies are equal and decode to the same."""
    assert duplicate(ARTIFACT) == ARTIFACT
    assert duplicate(ARTIFACT).metadata == ARTIFACT.metadata


def _rewritten(*, header=None, blueprint=None, metadata=None, tensors=None):
    """The artifact with some of its content replaced, and its bytes canonical again."""
    new = dict(PARSED.header)
    new["blueprint"] = {**new["blueprint"], **(blueprint or {})}
    new["metadata"] = {**new["metadata"], **(metadata or {})}
    return artifact_format.encode({**new, **(header or {})}, {**PARSED.tensors, **(tensors or {})})


def _with_bias(shape, value):
    """The artifact with another bias of its last layer: 0, a value, 0."""
    data = torch.tensor([0.0, value, 0.0]).numpy().tobytes()
    return _rewritten(tensors={"out.bias": TensorBytes(dtype="F32", shape=shape, data=data)})


NODES = PARSED.header["blueprint"]["nodes"]
CONTRADICTS = "'coded' has metadata that contradict"
TAMPERED = {
    "kind": ("header has the fields", _rewritten(header={"kind": "other"})),
    "extra field": ("header has the fields", _rewritten(header={"code": "import os"})),
    "no blueprint": ("holds no blueprint", _rewritten(header={"blueprint": 7})),
    "newer blueprint": ("format 2 is newer", _rewritten(blueprint={"format_version": 2})),
    "nodes in another order": (
        "'coded' is not in canonical order",
        _rewritten(blueprint={"nodes": NODES[::-1]}),
    ),
    "unknown operation": (
        "breaks a rule: .*'exec'",
        _rewritten(blueprint={"nodes": [{**NODES[0], "op_type": "exec"}, *NODES[1:]]}),
    ),
    "other blueprint, valid": (CONTRADICTS, _rewritten(blueprint={"init_seed": 3})),
    "parameter count": (CONTRADICTS, _rewritten(metadata={"parameter_count": 1})),
    "zeroed": (CONTRADICTS, _rewritten(metadata={"zeroed": None})),
    "adds capacity": (CONTRADICTS, _rewritten(metadata={"adds_capacity": False})),
    "metadata field missing": ("metadata has the fields", _rewritten(header={"metadata": {}})),
    "metadata of another type": (
        "'parameter_count'",
        _rewritten(metadata={"parameter_count": True}),
    ),
    "lineage of another type": ("lineage is a list", _rewritten(metadata={"lineage": [1]})),
    "NaN": (r"'out\.bias' .*NaN", _with_bias((3,), float("nan"))),
    "infinity": (r"'out\.bias' .*infinity", _with_bias((3,), float("inf"))),
    "shape": (r"'out\.bias' should be", _with_bias((3, 1), 0.0)),
    "dtype": (
        r"'out\.bias' should be",
        _rewritten(tensors={"out.bias": TensorBytes(dtype="F16", shape=(3,), data=b"\0" * 6)}),
    ),
    "extra tensor": (
        "'x' should be absent",
        _rewritten(tensors={"x": TensorBytes(dtype="F32", shape=(1,), data=b"\0" * 4)}),
    ),
}


@pytest.mark.parametrize(("words", "data"), TAMPERED.values(), ids=TAMPERED)
def test_a_well_formed_file_with_wrong_content_is_refused(words, data):
    """Content that contradicts itself or breaks a rule is corrupt, even with its own digest."""
    with pytest.raises(KernelCorruptError, match=words):
        decode_artifact(data, artifact_id=artifact_format.digest_of(data))


def test_rewriting_without_a_change_gives_the_artifact():
    """The control of the test above."""
    assert _rewritten() == ARTIFACT.kernel_binary


def test_a_missing_tensor_is_refused():
    """An artifact with a tensor left out is corrupt, and the message names it."""
    fewer = {name: tensor for name, tensor in PARSED.tensors.items() if name != "out.bias"}
    with pytest.raises(KernelCorruptError, match=r"out\.bias"):
        decode_artifact(artifact_format.encode(PARSED.header, fewer))


def num_accepted(artifact, num, artifact_id):
    """Flip one of ``num`` bits of an artifact at a time; return how often it is decoded then."""
    data, accepted = artifact.kernel_binary, 0
    decode_artifact(data, artifact_id=artifact_id)
    for bit in random.Random(0).sample(range(8 * len(data)), num):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with suppress(KernelCorruptError):
            decode_artifact(bytes(flipped), artifact_id=artifact_id)
            accepted += 1
    return accepted


def test_single_bit_flips_of_an_artifact_are_all_refused():
    """4,096 flips anywhere in the file, each refused by the id."""
    assert num_accepted(ARTIFACT, 4_096, ARTIFACT.artifact_id) == 0


@pytest.mark.torture
def test_single_bit_flips_of_a_larger_artifact_are_all_refused():
    """65,536 flips of one that has as many bits and more."""
    artifact = compile_blueprint(mlp_blueprint(n=400))
    assert num_accepted(artifact, 65_536, artifact.artifact_id) == 0


def test_control_without_the_id_a_flipped_weight_is_read():
    """Where nobody says which bytes are meant, other numbers are as good as any."""
    assert num_accepted(ARTIFACT, 256, None) > 0


def test_artifacts_of_format_1_stay_readable():
    """A file written by the first release decodes, encodes to itself, and computes the same."""
    data = GOLDEN.read_bytes()
    artifact = decode_artifact(
        data, artifact_id="837638d1eedfa8a834599494e7fe910daa399d076473d1fae1954576eceb1279"
    )
    kernel = instantiate(artifact)
    assert encode_kernel(kernel, lineage=artifact.metadata.lineage) == data
    out = kernel.eval()(torch.tensor([[1.0, -2.0, 0.5, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[-2.12912, 1.59147, -2.128277]]))

"""A compiled kernel is tried on its own: what passes is measured, what does not is told why."""

import itertools
from dataclasses import replace

import pytest
import torch
from kernel_blueprints import linear_blueprint, mlp_blueprint

from esper.compiler.catalog import default_catalog
from esper.compiler.compile import compile_blueprint
from esper.contracts.artifact import CompiledKernelArtifact
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.contracts.compile_options import CompileOptions
from esper.contracts.site import SiteSpec
from esper.services import validation
from esper.services.compiling import compile_and_validate
from esper.services.validation import validate

pytestmark = pytest.mark.slow  # what traces first in a process takes seconds

CONVOLUTION = SiteSpec(
    kind="conv2d", in_features=4, out_features=6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1),
    dilation=(1, 1),
)  # fmt: skip
NORM = SiteSpec(kind="norm", in_features=8, out_features=8)


def of(*steps, n=6, **options):
    """Return a chain of operations from n features to n."""
    ids = [f"n{number}" for number in range(len(steps))]
    nodes = tuple(
        BlueprintNode(i, op, attributes) for i, (op, attributes) in zip(ids, steps, strict=True)
    )
    path = ["input", *ids, "output"]
    edges = tuple(BlueprintEdge(a, b) for a, b in itertools.pairwise(path))
    spec = TensorSpec(("*", n))
    return BlueprintIR(
        id="chain", nodes=nodes, edges=edges, input_spec=spec, output_spec=spec, **options
    )


@pytest.mark.parametrize("site", [CONVOLUTION, NORM], ids=["conv2d", "norm"])
def test_kernels_of_the_catalog_pass_and_are_measured(site):
    """Whatever stands in for their host gives the shape that they match."""
    for blueprint in default_catalog().blueprints_for(site)[:2]:
        found = compile_and_validate(blueprint, CompileOptions(batch=3, size=16))
        assert found.report["reason"] == ""
        findings = found.report["findings"]
        assert findings["identity_at_birth"] is True
        assert findings["input_shape"][0] == findings["output_shape"][0] == 3
        assert findings["parameters"] == found.artifact.metadata.parameter_count
        assert findings["size_bytes"] == len(found.artifact.kernel_binary)
        assert findings["latency_us"] > 0


def test_a_kernel_that_is_not_zero_at_birth_says_so():
    """It passes, and begins at alpha 0."""
    findings = compile_and_validate(mlp_blueprint()).report["findings"]
    assert findings["identity_at_birth"] is False


def test_peak_memory_is_what_a_forward_and_its_backward_hold():
    """Of one linear layer: its output, that one's gradient, and gradients of weights and input."""
    artifact = compile_blueprint(linear_blueprint(n=64))
    small, large = (
        validate(artifact, CompileOptions(batch=batch)).findings["peak_memory_bytes"]
        for batch in (8, 1024)
    )
    weights, sample = 4 * (64 * 64 + 64), 4 * 64
    assert weights <= small <= weights + 4 * 8 * sample + 4096
    assert 2 * 1016 * sample <= large - small <= 4 * 1016 * sample


def test_a_blueprint_that_breaks_a_rule_is_told_why():
    """A refusal is an answer: there is no artifact, and the reason names the node."""
    found = compile_and_validate(of(("linear", {"in_features": 5, "out_features": 6})))
    assert found.artifact is None
    assert found.report["passed"] is False
    assert "node 'n0' (linear)" in found.report["reason"]


def test_a_kernel_that_is_not_finite_does_not_pass(monkeypatch):
    """What any layer would refuse later is refused here; control: the same kernel as it was."""
    artifact = compile_blueprint(mlp_blueprint())
    assert validate(artifact).passed
    instantiate = validation.prepare_kernel

    def poisoned(layer, kernel: CompiledKernelArtifact):
        prepared = instantiate(layer, kernel)
        with torch.no_grad():
            next(prepared.module.parameters()).fill_(float("inf"))
        return prepared

    monkeypatch.setattr(validation, "prepare_kernel", poisoned)
    report = validate(artifact)
    assert not report.passed
    assert "failed the finite check" in report.reason
    assert report.findings == {}


def test_a_kernel_behind_its_host_gives_what_it_reads():
    """A serial one of another shape fits nowhere."""
    spec = TensorSpec(("*", 3))
    blueprint = replace(
        of(("linear", {"in_features": 6, "out_features": 3})), output_spec=spec, position="serial"
    )
    assert "gives the shape that it reads" in compile_and_validate(blueprint).report["reason"]


def test_an_input_that_is_too_much_is_told():
    """Options can ask for more than a kernel may take; nothing is allocated for that."""
    blueprint = default_catalog().blueprints_for(CONVOLUTION)[0]
    found = compile_and_validate(blueprint, CompileOptions(batch=4_096, size=4_096))
    assert "batch 4096 and size 4096" in found.report["reason"]


def test_trying_a_kernel_moves_no_random_state():
    """A kernel that draws is measured, and the next number is what it would have been."""
    blueprint = of(
        ("linear", {"in_features": 6, "out_features": 6}), ("dropout", {"p": 0.5}),
        draws_random=True,
    )  # fmt: skip
    before = torch.get_rng_state()
    assert compile_and_validate(blueprint).report["reason"] == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("document", [{"batch": 0}, {"size": True}, {"batch": 5_000}, {"more": 1}])
def test_options_that_are_none_are_refused(document):
    """Only what is known, and within its range."""
    with pytest.raises(ValueError, match="option"):
        CompileOptions.from_document(document)

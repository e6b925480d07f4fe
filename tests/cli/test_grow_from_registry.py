"""``esper grow --registry``, as a user types it."""

import sys
from dataclasses import replace

import pytest
import torch
from growing import wrapped
from typer.testing import CliRunner

from esper.cli.app import app
from esper.compiler.catalog import default_catalog
from esper.compiler.compile import compile_blueprint
from esper.contracts.report import run_report_from_json
from esper.registry.directory import DirectoryRegistry
from esper.services.settings import read_environment
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

SEED = "MC4CAQAwBQYDK2VwBCIEI"
"""How every PEM of Ed25519 begins; the rest is the key."""

JOB = """
import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, host
from esper import Budget, EveryN, GrowthJob
from esper.compiler.catalog import Catalog

def job():
    model = host()
    return GrowthJob(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train=list(zip(X.split(32), Y.split(32))) * 5,
        gate=[(GATE_X, GATE_Y)],
        loss=lambda model, batch: (model(batch[0]) - batch[1]).square(),
        epochs=1,
        grower={**SHORT, "policy": EveryN(60), "catalog": Catalog(entries=()),
                "budget": Budget(packages=1), "horizon": None},
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a job, and a registry with a kernel that fits its first layer."""
    (tmp_path / "job_with_a_registry.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    layer = layers(wrapped()[0])["0"]
    blueprint = default_catalog().blueprints_for(describe_site(layer, torch.zeros(2, 4)))[0]
    registry = DirectoryRegistry(tmp_path / "kernels")
    digest = registry.put(compile_blueprint(replace(blueprint, init_seed=5)).kernel_binary)
    registry.tag("mlp", "good", digest)
    registry.close()
    yield tmp_path, digest
    sys.modules.pop("job_with_a_registry", None)


@pytest.mark.slow
def test_a_run_grows_with_a_kernel_of_its_registry_and_reports(folder):
    """Terminal, report and page say which kernel came from there; the registry what it brought."""
    root, digest = folder
    result = CliRunner().invoke(
        app,
        ["grow", "job_with_a_registry:job", "--run-dir", "out", "--registry", "kernels"],
    )
    assert result.exit_code == 0, result.output
    assert "Kernels from a registry: 1" in result.stdout
    assert f"digest {digest}" in result.stdout
    assert "mlp:good" in result.stdout
    assert digest in (root / "out" / "report.html").read_text()
    report = run_report_from_json((root / "out" / "report.json").read_text())
    assert [g.is_of_a_registry for g in report.grafts] == [True]

    registry = DirectoryRegistry(root / "kernels")
    (told,) = registry.outcomes(digest)
    assert (told.run_id, told.verdict) == (report.run_id, report.grafts[0].verdict)
    registry.close()


@pytest.mark.slow
def test_with_trusted_keys_only_what_is_signed_grows(folder, monkeypatch):
    """A kernel that nobody has signed is never let in, and the run says so and goes on."""
    signing = pytest.importorskip("esper.registry.signing", reason="needs the extra sign")
    root, digest = folder
    pem = f"-----BEGIN PRIVATE KEY-----\n{SEED}{'A' * 43}\n-----END PRIVATE KEY-----\n"
    key = signing.SigningKey(pem.encode())
    monkeypatch.setenv("ESPER_TRUSTED_KEYS", key.public_text)
    words = ["grow", "job_with_a_registry:job", "--registry", "kernels", "--run-dir"]

    unsigned = CliRunner().invoke(app, [*words, "unsigned"])
    assert unsigned.exit_code == 0, unsigned.output
    assert run_report_from_json((root / "unsigned" / "report.json").read_text()).grafts == ()
    assert "not by a trusted key" in (root / "unsigned" / "events.jsonl").read_text()

    registry = DirectoryRegistry(root / "kernels")
    registry.attach_signature(key.sign(digest, now_s=1))
    registry.close()
    signed = CliRunner().invoke(app, [*words, "signed"])
    assert signed.exit_code == 0, signed.output
    (graft,) = run_report_from_json((root / "signed" / "report.json").read_text()).grafts
    assert graft.is_of_a_registry


def test_a_wrong_address_is_one_line(folder):
    """Nothing is trained, wherever the address comes from."""
    for words, environment in (
        (["--registry", "ftp://kernels"], {}),
        ([], {"URZA_API_URL": "ftp://kernels"}),
    ):
        result = CliRunner().invoke(
            app, ["grow", "job_with_a_registry:job", *words], env=environment
        )
        assert result.exit_code == 2
        assert "'ftp://kernels' is no address of kernels" in result.output


def test_the_address_is_a_setting():
    """One that is empty is none."""
    assert read_environment({"URZA_API_URL": "http://x"}).api_url == "http://x"
    assert read_environment({"URZA_API_URL": ""}).api_url is None


def test_the_help_says_every_kind_of_address_that_is_taken():
    """What `esper kernels` reaches a run grows from as well."""
    said = CliRunner().invoke(app, ["grow", "--help"]).output
    for kind in ("directory", "http://", "https://", "oci://", "hf://"):
        assert kind in said

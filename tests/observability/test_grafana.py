"""The dashboard for Grafana: a real Prometheus has a series for each of its expressions."""

import json
from importlib.resources import files

import httpx2
import pytest
from kernel_artifacts import artifact
from kernel_blueprints import mlp_blueprint
from prometheus_server import prometheus
from registries import served, token_for
from watched_job import job

pytest.importorskip("fastapi", reason="needs the extra server")
pytest.importorskip("prometheus_client", reason="needs the extra metrics")

from esper.growth.job import grow
from esper.observability.prometheus import PrometheusSink
from esper.registry.memory import MemoryRegistry

pytestmark = [pytest.mark.network, pytest.mark.slow]

DASHBOARD = json.loads(files("esper.observability").joinpath("grafana.json").read_text())


def expressions():
    """Return every expression of the dashboard, with Grafana's own variables filled in."""
    targets = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    told = [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    every = [*targets, *told]
    return [e.replace("$instance", ".*").replace("$__rate_interval", "1m") for e in every]


def use(address, token):
    """Publish a kernel, and ask for one to be compiled."""
    headers = {"Authorization": f"Bearer {token}"}
    with httpx2.Client(headers=headers, trust_env=False, timeout=30) as client:
        assert client.post(f"{address}/api/v1/kernels", content=artifact(1)).is_success
        body = {"blueprint": mlp_blueprint().to_document()}
        assert client.post(f"{address}/api/v1/blueprints", json=body).is_success


def test_every_expression_has_a_series(tmp_path):
    """A short run and a registry's server are asked; a name that is misspelt has none."""
    registry = MemoryRegistry()
    token = token_for(registry, "read", "publish")
    with PrometheusSink(0, "127.0.0.1") as page, served(registry) as address:
        run, server = f"127.0.0.1:{page.port}", address.removeprefix("http://")
        with prometheus(tmp_path / "prometheus", [(run, None), (server, token)]) as asked:
            asked.wait_for("esper_run_active == 0")
            use(address, token)
            grow(job(sink=page))
            for name in ("esper_trial_effect", "esper_metric", "esper_jobs", "esper_kernels > 0"):
                asked.wait_for(name)
            for expression in expressions():
                asked.wait_for(expression)
            assert asked.series("sum(esper_grafs)") == []
            assert {s["metric"]["stage"] for s in asked.series("esper_grafts")} >= {"culled"}


def test_the_dashboard_asks_for_what_there_is_and_for_a_run():
    """Panels have a title, a text, a unit and their own place, and runs can be chosen."""
    panels = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
    assert len(panels) == len({p["title"] for p in panels}) >= 20
    for panel in panels:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "instance"]

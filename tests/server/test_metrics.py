"""What a server measures, and that no label grows with what is kept."""

import pytest
from kernel_artifacts import artifact
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")
pytest.importorskip("prometheus_client", reason="needs the extra metrics")

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from esper.registry.memory import MemoryRegistry
from esper.server import metering

pytestmark = [pytest.mark.network, pytest.mark.slow]


def scraped(client):
    """Return every series: name with labels, and its value."""
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def asked(num_kernels):
    """Publish, look at and tag some kernels, ask for what there is not, and scrape."""
    registry = MemoryRegistry()
    token = token_for(registry, "read", "publish", "promote")
    headers = {"Authorization": f"Bearer {token}"}
    with (
        served(registry) as address,
        httpx2.Client(base_url=address, headers=headers, trust_env=False, timeout=30) as client,
    ):
        for number in range(num_kernels):
            data = artifact(number)
            digest = client.post("/api/v1/kernels", content=data).json()["id"]
            client.get(f"/api/v1/kernels/{digest}/binary")
            client.put(f"/api/v1/names/n{number}/tags/t", json={"digest": digest})
            client.get(f"/api/v1/nowhere/{number}")
            client.request(f"M{number}", "/api/v1/kernels")
        return scraped(client)


def value(series, name, **labels):
    return series[(name, *sorted(labels.items()))]


def test_requests_are_counted_by_route_and_status():
    """Counts, durations, bytes and what is kept are those of what was asked."""
    series = asked(3)
    published = {"method": "POST", "route": "/kernels", "status": "201"}
    assert value(series, "esper_requests_total", **published) == 3
    unknown = {"method": "GET", "route": "none", "status": "404"}
    assert value(series, "esper_requests_total", **unknown) == 3
    assert value(series, "esper_request_seconds_count", route="/kernels/{id}/binary") == 3
    assert value(series, "esper_request_seconds_bucket", route="/kernels", le="+Inf") == 6
    size_bytes = sum(len(artifact(number)) for number in range(3))
    assert value(series, "esper_body_bytes_total", direction="received") > size_bytes
    assert value(series, "esper_body_bytes_total", direction="sent") > size_bytes
    assert value(series, "esper_kernels") == 3
    assert value(series, "esper_kernel_bytes") == size_bytes
    assert value(series, "esper_jobs", status="UNVALIDATED") == 0


def test_no_label_grows_with_what_is_kept():
    """Ten times the kernels, names and strange methods are the same series, below 300."""
    few, many = asked(2), asked(20)
    assert few.keys() == many.keys()
    assert len(many) < 300


def test_control_a_label_of_the_address_is_caught(monkeypatch):
    """Where a route is counted by its address, more kernels are more series."""
    real = metering.MeteredApp.__call__

    async def by_address(self, scope, receive, send):
        await real(self, scope, receive, send)
        self._meter.count(scope["method"], scope["path"], 200, 0.0)

    monkeypatch.setattr(metering.MeteredApp, "__call__", by_address)
    assert len(asked(20)) > len(asked(2))

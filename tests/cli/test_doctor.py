"""``esper doctor``."""

import socket

import pytest
from collectors import collecting
from real_servers import find, free_ports, running, wait_until

from esper.cli import doctor
from esper.cli.doctor import (
    check_bus,
    check_collector,
    check_metrics_port,
    check_names,
    check_registry,
    check_run_dir,
    check_sandbox,
    check_torch,
    check_trackers,
    examine,
)
from esper.observability.prometheus import PrometheusSink
from esper.observability.spans import Collector
from esper.registry.directory import DirectoryRegistry
from esper.services import sandbox
from esper.services.settings import Environment, read_environment


def test_this_environment_is_well(tmp_path):
    """Where the tests run nothing is wrong, and versions, threads and devices are reported."""
    checks = {check.name: check for check in examine(tmp_path / "runs")}
    assert [check for check in checks.values() if check.cure] == []
    assert {"sandbox", "extra server", "extra sign"} <= checks.keys()
    assert {"python", "esper", "torch", "torch build", "threads", "devices"} <= checks.keys()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["esper", "esper-lang"])
def test_a_clash_of_names_is_a_problem(other):
    """Another distribution with the import name is named, with the commands that cure it."""
    check = check_names(["esper-morph", other])
    assert f"beside {other}," in check.found
    assert check.cure.startswith(f"pip uninstall {other}, then")


def test_our_own_name_is_no_clash():
    """The distribution itself, listed as often as it likes, is no problem."""
    assert check_names(["esper-morph", "Esper-Morph"]).cure == ""


@pytest.mark.parametrize(
    ("version", "is_well"),
    [(None, False), ("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True)],
)
def test_torch_must_be_recent(version, is_well):
    """A torch that is missing or older than 2.10 is a problem."""
    check = check_torch({"torch": version}.get)
    assert (check.cure == "") is is_well


def test_a_run_folder_that_cannot_be_is_a_problem(tmp_path):
    """A run folder below a file cannot be made, and the cure names the setting."""
    (tmp_path / "file").write_text("")
    check = check_run_dir(tmp_path / "file" / "runs")
    assert "cannot be written" in check.found
    assert "ESPER_RUN_DIR" in check.cure


def test_the_sandbox_is_told(monkeypatch):
    """Whether bubblewrap works is said, with the reason, and is no problem either way."""
    for reason, found in ((None, "bubblewrap works"), ("it is not installed", "not installed;")):
        monkeypatch.setattr(sandbox, "why_no_bubblewrap", lambda reason=reason: reason)
        check = check_sandbox()
        assert found in check.found
        assert check.cure == ""


def test_a_registry_that_does_not_answer_is_a_problem(tmp_path):
    """A directory that is there answers, one that is not and a port without a server do not."""
    DirectoryRegistry(tmp_path / "kernels").close()
    named = {"URZA_API_URL": str(tmp_path / "kernels")}
    assert check_registry(read_environment(named)).found.endswith("kernels answers")
    assert check_registry(read_environment({})).cure == ""
    for address in (str(tmp_path / "none"), "http://127.0.0.1:9", "ftp://x"):
        assert "URZA_API_URL" in check_registry(read_environment({"URZA_API_URL": address})).cure


@pytest.mark.slow
def test_every_address_is_asked_and_no_password_is_shown():
    """Bus, collector and port say whether somebody answers, and where nobody does what to do."""
    with collecting() as server, PrometheusSink(0) as page:
        named = {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": server.endpoint,
            "ESPER_METRICS_PORT": str(page.port),
        }
        environment, port = read_environment(named), page.port
        assert check_collector(environment).found == f"{server.endpoint} answers"
        assert check_metrics_port(environment).found.endswith("has the metrics of a run")
        assert len(server.requests) == 1
    assert check_metrics_port(environment).found.endswith("is free for a run")
    with socket.create_server(("", port)):
        assert "ESPER_METRICS_PORT" in check_metrics_port(environment).cure
    wrong = {
        "ESPER_BUS_URL": "redis://ann:secret@127.0.0.1:9/0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://ann:secret@127.0.0.1:9",
        "ESPER_REPORT_TO": "tensorboard,nobody",
        "URZA_API_URL": "http://ann:secret@127.0.0.1:9",
    }
    environment = read_environment(wrong)
    for check in (check_bus, check_collector, check_trackers, check_registry):
        found = check(environment)
        assert "secret" not in found.found
        assert found.cure
    nothing = read_environment({})
    for check in (check_bus, check_collector, check_trackers, check_metrics_port):
        assert check(nothing).cure == ""


def test_an_address_that_hangs_is_not_waited_for(monkeypatch):
    """One that takes a connection and says nothing costs what the doctor has for it."""
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.1)
    with collecting(None) as server:
        found = check_collector(Environment(collector=Collector(endpoint=server.endpoint)))
    assert found.found == f"{server.endpoint} does not answer within 0.1 s"
    assert found.cure


@pytest.mark.slow
def test_a_real_redis_answers_with_its_password(tmp_path):
    """The right password is taken, a wrong one refused and not shown."""
    program = find("redis-server")
    (port,) = free_ports(1)
    command = [program, "--port", str(port), "--save", "", "--requirepass", "secret"]
    with running([*command, "--dir", str(tmp_path)], tmp_path) as (process, log):
        wait_until(lambda: b"Ready to accept" in log.read_bytes(), process, log)
        for password, cure in (("secret", False), ("wrong", True)):
            found = check_bus(Environment(bus_url=f"redis://:{password}@127.0.0.1:{port}/0"))
            assert bool(found.cure) is cure
            assert password not in found.found.replace("wrong number", "")
            assert f"redis://127.0.0.1:{port}/0" in found.found

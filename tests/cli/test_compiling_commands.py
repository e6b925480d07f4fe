"""Blueprints and compiling, as they are typed; the page that explains them is what is run."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from registries import served, token_for
from typer.testing import CliRunner

from esper.cli.app import app
from esper.compiler.compile import compile_blueprint
from esper.compiler.drawing import draw
from esper.contracts.blueprint import BlueprintEdge, BlueprintIR, BlueprintNode, TensorSpec
from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry

PAGE = (Path(__file__).parents[2] / "docs" / "compiling.md").read_text(encoding="utf-8")
BLUEPRINT = re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1]
DRAWING = re.search(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)[1]
COMMANDS = re.findall(r"^    esper (.+)$", PAGE, flags=re.MULTILINE)


def typed(line, *more, status=0, **environment):
    """Run a command of the page; return what it printed, errors too."""
    result = CliRunner().invoke(app, [*line.split(), *more], env=environment)
    assert result.exit_code == status, result.output
    return result.output


def the(beginning):
    """Return the page's command that begins so."""
    (found,) = [line for line in COMMANDS if line.startswith(beginning)]
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder that has the page's blueprint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gated.json").write_text(BLUEPRINT)
    broken = BLUEPRINT.replace('"mul"', '"conv2d"')
    (tmp_path / "broken.json").write_text(broken)
    (tmp_path / "text.json").write_text("no blueprint")
    return tmp_path


def test_a_blueprint_is_checked_and_drawn(folder):
    """The drawing is the page's; what breaks a rule or is not there is status 1."""
    assert "416 parameters" in typed(the("blueprints check"))
    assert typed(the("blueprints draw")) == DRAWING
    assert json.loads(typed(the("blueprints check"), "--json"))["operations"] == 5
    for command in ("blueprints check", "blueprints draw"):
        assert "node 'product'" in typed(f"{command} broken.json", status=1)
        assert "strict JSON" in typed(f"{command} text.json", status=1)
        assert "nothing.json" in typed(f"{command} nothing.json", status=1)


def test_rails_cross_and_end_where_values_are_read():
    """A value that is read by several steps goes on past those that do not read it."""
    features = {"in_features": 8, "out_features": 8}
    nodes = [
        *(BlueprintNode(name, "linear", features) for name in "ac"),
        *(BlueprintNode(name, "activation", {"type": "relu"}) for name in "bd"),
        BlueprintNode("joined", "add"),
        BlueprintNode("product", "mul"),
    ]
    edges = ["input a", "a b", "b c", "input d", "c joined", "input joined", "joined product"]
    edges = [BlueprintEdge(*edge.split()) for edge in [*edges, "product output"]]
    edges.append(BlueprintEdge("d", "product", 1))
    spec = TensorSpec(("*", 8))
    blueprint = BlueprintIR(
        id="x", nodes=tuple(nodes), edges=tuple(edges), input_spec=spec, output_spec=spec
    )
    rails = [line.partition("  ")[0].rstrip() for line in draw(blueprint).split("\n")[2:]]
    assert rails == ["●", "├─●", "│ ●", "│ ●", "├─┼─●", "╰─● │", "", ""]
    assert [line[:6] for line in draw(blueprint).split("\n")[-2:]] == ["  ●─╯ ", "  ●   "]


@pytest.mark.slow
def test_a_blueprint_is_compiled_here(folder):
    """The artifact is written and published; one that breaks a rule is status 1 with its reason."""
    found = json.loads(typed(the("compile "), "--json"))
    artifact = compile_blueprint(BlueprintIR.from_json(BLUEPRINT.encode()))
    assert found["artifact_id"] == artifact.artifact_id
    assert (folder / "gated.kernel").read_bytes() == artifact.kernel_binary
    registry = DirectoryRegistry(folder / "kernels")
    assert registry.get(artifact.artifact_id) == artifact.kernel_binary
    (report,) = registry.validations(artifact.artifact_id)
    assert report.findings == found["findings"]
    assert f"VALIDATED {artifact.artifact_id}" in typed("compile gated.json")
    pushed = typed("compile gated.json --push kernels --token-file nothing", status=2)
    assert "cannot be read" in pushed
    assert "INVALID: node 'product'" in typed("compile broken.json", status=1)


def test_every_command_of_the_page_is_run_here():
    """A command that is added to the page is one that a test has to run."""
    run = ("check", "draw", "compile ", "compile-worker ", "submit", "show", "list")
    assert [line for line in COMMANDS if not line.removeprefix("blueprints ").startswith(run)] == []


def test_who_says_no_server_is_told(folder):
    """Each command that needs one says so, and what a sandbox may be."""
    for line in ("blueprints list", "blueprints submit gated.json", "compile-worker"):
        assert "URZA_API_URL" in typed(line, status=2)
    assert "auto, bwrap, process" in typed(
        "compile-worker --sandbox none", status=2, URZA_API_URL="http://127.0.0.1:1"
    )


def test_a_status_that_there_is_not_is_said_with_those_that_there_are():
    """The option, what it takes and what was found; no server is asked."""
    nobody = {"URZA_API_URL": "http://127.0.0.1:1"}
    said = " ".join(typed("blueprints list --status invalid", status=2, **nobody).split())
    assert "--status is one of UNVALIDATED, COMPILING, VALIDATED, INVALID, got 'invalid'" in said


@pytest.mark.network
def test_who_has_no_right_is_refused():
    """A server's 401 is status 1 of these commands, as it is of the others."""
    pytest.importorskip("fastapi", reason="needs the extra server")
    with served(MemoryRegistry()) as address:
        for line in ("blueprints list", "kernels list"):
            assert "none was sent: set URZA_API_TOKEN" in typed(
                line, status=1, URZA_API_URL=address
            )
            unknown = {"URZA_API_URL": address, "URZA_API_TOKEN": "x" * 32}
            assert "not known, or was revoked" in typed(line, status=1, **unknown)


@pytest.mark.slow
@pytest.mark.network
def test_a_worker_compiles_what_is_submitted(folder):
    """A real worker makes the artifact that is made here, keeps its report, and ends with 130."""
    pytest.importorskip("fastapi", reason="needs the extra server")
    registry = MemoryRegistry()
    with served(registry) as address:
        token = token_for(registry, "publish", "read", "work")
        (folder / "token").write_text(f"{token}\n")
        by_file = ("--token-file", str(folder / "token"))
        environment = {"URZA_API_TOKEN": token, "URZA_API_URL": address}

        def run(beginning, *more, job_id=""):
            line = the(beginning).replace("http://127.0.0.1:8000", address)
            return typed(re.sub(r"\bID\b", job_id, line), *more, **environment)

        command = [sys.executable, "-m", "esper", *the("compile-worker").split(), "--json"]
        command[command.index("http://127.0.0.1:8000")] = address
        with subprocess.Popen(
            [*command, *by_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as worker:
            try:
                job_id = json.loads(run("blueprints submit", "--json"))["id"]
                broken = typed("blueprints submit broken.json", **environment).split()[0]
                end_s = time.monotonic() + 60
                while registry.book.jobs.find(broken).report is None:
                    assert worker.poll() is None, worker.stderr.read().decode()
                    assert time.monotonic() < end_s, "the worker did nothing"
                    time.sleep(0.05)
                worker.send_signal(signal.SIGTERM)
                assert worker.wait(timeout=30) == 130
                told = [json.loads(line) for line in worker.stdout]
            finally:
                worker.kill()
        assert told[0]["job_id"] is None
        assert [each["job_id"] for each in told[1:]] == [job_id, broken]
        assert told[1]["said"].startswith("VALIDATED")
        assert broken in typed("blueprints list", *by_file, URZA_API_URL=address)
        shown = run("blueprints show", job_id=job_id)
        assert f"{job_id}  VALIDATED" in typed("blueprints list", **environment)
        assert run("blueprints list").split()[:2] == [broken, "INVALID"]
        assert "node 'product'" in typed(f"blueprints show {broken}", status=1, **environment)
        assert "submit it first" in typed(f"blueprints show {'0' * 32}", status=1, **environment)
        again = typed("blueprints submit broken.json --again", **environment)
        assert again.split() == [broken, "UNVALIDATED"]
    artifact = compile_blueprint(BlueprintIR.from_json(BLUEPRINT.encode()))
    assert f"artifact_id: {artifact.artifact_id}" in shown
    assert registry.get(artifact.artifact_id) == artifact.kernel_binary
    (report,) = registry.validations(artifact.artifact_id)
    assert report.findings["parameters"] == 416

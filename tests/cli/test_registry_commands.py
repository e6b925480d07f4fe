"""The commands of a registry, as whoever runs it types them."""

import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
from kernel_artifacts import artifact
from typer.testing import CliRunner

import esper
from esper.cli.app import app
from esper.contracts.errors import EsperError
from esper.registry.directory import DirectoryRegistry
from esper.services.settings import read_environment

DOCUMENT = Path(__file__).parents[2] / "docs" / "registry.md"


def typed(*words, status=0, **environment):
    """Run a command; return what it printed."""
    result = CliRunner().invoke(app, ["registry", *map(str, words)], env=environment)
    assert result.exit_code == status, result.output
    return result.output


def has_version_6():
    """Say whether this machine can be spoken to by a loopback address of version 6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_tokens_are_made_listed_and_revoked(tmp_path):
    """The text is printed once; the list has its id, name and scopes; a second revocation is 1."""
    made = json.loads(
        typed("token", "create", "ann", "--scope", "read", "--data", tmp_path, "--json")
    )
    assert (made["name"], made["scopes"]) == ("ann", ["read"])
    listed = typed("token", "list", "--data", tmp_path)
    assert made["id"] in listed
    assert made["token"] not in listed
    revoked = typed("token", "revoke", made["id"], "--data", tmp_path, "--json")
    assert json.loads(revoked) == {"id": made["id"], "revoked": True}
    assert "revoked" in typed("token", "list", "--data", tmp_path)
    typed("token", "revoke", made["id"], "--data", tmp_path, status=1)
    typed("token", "create", "ann", "--scope", "root", "--data", tmp_path, status=2)
    typed("token", "create", " ", "--scope", "read", "--data", tmp_path, status=2)


def test_a_directory_that_was_misspelt_is_not_made(tmp_path):
    """Looking at a registry that is not there is 1, and no empty one is found sound."""
    missing = tmp_path / "kernel"
    for words in (("verify",), ("gc",), ("migrate",), ("token", "list"), ("token", "revoke", "a")):
        assert "no such directory" in typed(*words, "--data", missing, status=1)
    assert not missing.exists()
    typed("token", "create", "ann", "--scope", "read", "--data", missing)


def test_verify_finds_what_is_damaged(tmp_path):
    """A sound registry is 0, and one with a damaged artifact 1 with its digest, once."""
    registry = DirectoryRegistry(tmp_path)
    digest = registry.put(artifact(1))
    assert json.loads(typed("verify", "--data", tmp_path, "--json"))["intact"] == 1
    (tmp_path / "blobs" / digest).write_bytes(b"damaged")
    said = typed("verify", "--data", tmp_path, status=1)
    assert said.splitlines() == [
        "0 intact, 1 damaged and put aside, 0 missing, 0 unreferenced",
        digest,
    ]
    assert "0 damaged and put aside, 1 missing" in typed("verify", "--data", tmp_path, status=1)
    registry.close()


def test_a_collection_can_be_looked_at_first(tmp_path):
    """A dry run names what would go, and nothing goes."""
    registry = DirectoryRegistry(tmp_path)
    digest = registry.put(artifact(1))
    registry.delete(digest)
    registry.collect(grace_s=0.0)
    words = ("gc", "--grace-s", "0", "--data", tmp_path)
    assert typed(*words, "--dry-run").split() == [digest]
    assert typed(*words).split() == [digest]
    assert typed(*words, "--dry-run") == ""
    registry.close()


def test_a_newer_registry_is_refused(tmp_path):
    """An older Esper leaves it alone, and says so with status 2."""
    DirectoryRegistry(tmp_path).close()
    assert "format" in typed("migrate", "--data", tmp_path)
    index = sqlite3.connect(tmp_path / "index.sqlite")
    index.execute("PRAGMA user_version = 1000")
    index.close()
    assert "newer Esper" in typed("migrate", "--data", tmp_path, status=2)


def test_where_a_registry_is_has_to_be_said_once(tmp_path):
    """A directory and a database at once, or half of the latter, are a mistake."""
    url = "postgresql://nobody@127.0.0.1:1/x"
    assert "a registry of its own" in typed(
        "verify", "--data", tmp_path, "--database", url, status=2
    )
    assert "given together" in typed("verify", "--database", url, status=2)
    assert "s3://bucket" in typed(
        "verify", status=2, ESPER_REGISTRY_DATABASE=url, ESPER_REGISTRY_BLOBS="ftp://x"
    )


def test_the_document_names_commands_that_there_are():
    """Every `esper registry` line of the page is one that the command line takes."""
    text = DOCUMENT.read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "registry.md", "exec"), {})
    lines = re.findall(r"^    esper registry (.+)$", text, flags=re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        words = line.split()
        depth = 2 if words[0] == "token" else 1
        shown = typed(*words[:depth], "--help", COLUMNS="200")
        assert [word for word in words if word.startswith("--") and word not in shown] == []


def test_a_token_comes_from_the_environment_or_from_a_file(tmp_path):
    """The owner's token is what is set, else the first line of the file that is named."""
    file = tmp_path / "token"
    file.write_text("of the file\nnot this\n")
    in_file = {"URZA_API_TOKEN_FILE": str(file)}
    assert read_environment(in_file).api_token == "of the file"
    assert read_environment({**in_file, "URZA_API_TOKEN": "set"}).api_token == "set"
    assert "set" not in repr(read_environment({"URZA_API_TOKEN": "set"}))
    with pytest.raises(EsperError, match="cannot be read"):
        read_environment({"URZA_API_TOKEN_FILE": str(tmp_path / "none")})


@pytest.mark.slow
@pytest.mark.network
def test_serve_works_at_once_and_loses_nothing_when_it_is_killed(tmp_path):
    """It prints a token, which opens it; what it answered is there after kill -9."""
    pytest.importorskip("fastapi", reason="needs the extra server")
    command = [sys.executable, "-m", "esper", "registry", "serve"]
    command += ["--data", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        token = process.stdout.readline().decode().strip().removeprefix("URZA_API_TOKEN=")
        said = [process.stderr.readline().decode() for _ in range(2)]
        address = said[1].split()[-1]
        registry = esper.open_registry(address, token=token)
        digest = registry.put(artifact(1))
        registry.tag("mlp", "prod", digest)
        assert httpx2.get(f"{address}/ready", trust_env=False).status_code == 200
        process.send_signal(signal.SIGKILL)
    registry.close()

    kept = DirectoryRegistry(tmp_path)
    assert kept.get(kept.resolve("mlp:prod")) == artifact(1)
    assert kept.history("mlp", "prod")[0].actor == "owner"
    assert kept.verify().quarantined == ()
    kept.close()


@pytest.mark.network
def test_no_token_is_made_where_nothing_is_served(tmp_path):
    """It could never be had again: the next who serves is shown the first one."""
    pytest.importorskip("fastapi", reason="needs the extra server")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        said = typed("serve", "--json", "--port", taken, "--data", tmp_path, status=2)
    assert "cannot listen" in said
    assert "token" not in said
    assert typed("token", "list", "--data", tmp_path) == ""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_serve_says_where_it_is_as_json(tmp_path, host):
    """Once it listens, as an address that can be opened; the token is there the first time only."""
    pytest.importorskip("fastapi", reason="needs the extra server")
    if ":" in host and not has_version_6():
        pytest.skip("this machine has no loopback address of version 6")
    command = [sys.executable, "-m", "esper", "registry", "serve", "--json"]
    command += ["--data", str(tmp_path), "--host", host, "--port", "0"]
    tokens = []
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as served:
            said = json.loads(served.stdout.readline())
            tokens.append(said["token"])
            with closing(esper.open_registry(said["address"], token=tokens[0])) as registry:
                assert registry.search() == []
            served.send_signal(signal.SIGTERM)
            assert served.stdout.read() == b""
    assert tokens[0]
    assert tokens[1] is None

"""The commands that look at kernels and move them, in a directory and over HTTP."""

import json
import os
import re
from pathlib import Path

import pytest
from kernel_artifacts import artifact
from registries import served, token_for
from typer.testing import CliRunner

import esper
from esper.cli import kernels
from esper.cli.app import app
from esper.contracts import artifact_format
from esper.contracts.kernel_reports import FieldReport
from esper.registry.book_access import SCOPES
from esper.registry.directory import DirectoryRegistry
from esper.services.settings import read_environment

DATA = [artifact(number) for number in range(3)]
DOCUMENT = Path(__file__).parents[2] / "docs" / "registry.md"
IDS = [artifact_format.digest_of(data) for data in DATA]
NAMES = {*("list", "show", "search", "push", "pull", "tag", "history", "rollback")}
NAMES |= {"verify", "sign", "deprecate", "copy"}
SEED = "MC4CAQAwBQYDK2VwBCIEI"
"""How every PEM of Ed25519 begins; the rest is the key."""


def pem(letter):
    """Return a private key as openssl writes it."""
    return f"-----BEGIN PRIVATE KEY-----\n{SEED}{letter * 43}\n-----END PRIVATE KEY-----\n"


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """Return a function that runs a command in a folder with three artifacts and two keys."""
    monkeypatch.chdir(tmp_path)
    for number, data in enumerate(DATA):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
    (tmp_path / "key.pem").write_text(pem("A"))
    (tmp_path / "other.pem").write_text(pem("B"))

    def run(*words, status=0, **environment):
        result = CliRunner().invoke(app, ["kernels", *words], env=environment)
        assert result.exit_code == status, result.output
        return result.output

    return run


def in_a_directory(tmp_path):
    yield {"URZA_API_URL": str(tmp_path / "store")}


def on_a_server(tmp_path):
    pytest.importorskip("fastapi", reason="needs the extra server")
    registry = DirectoryRegistry(tmp_path / "served")
    with served(registry) as address:
        yield {"URZA_API_URL": address, "URZA_API_TOKEN": token_for(registry, *SCOPES)}
    registry.close()


@pytest.fixture(
    params=[
        in_a_directory,
        pytest.param(on_a_server, marks=[pytest.mark.slow, pytest.mark.network]),
    ]
)
def place(request, tmp_path):
    """Return the environment of a registry of each kind."""
    yield from request.param(tmp_path)


def test_kernels_go_in_are_found_and_come_out(typed, place, tmp_path):
    """What was pushed is listed, found, shown and pulled, byte for byte."""
    pushed = typed("push", "0.safetensors", "1.safetensors", "--tag", "mlp:prod", **place)
    assert pushed.split() == IDS[:2]
    listed = typed("list", **place)
    assert re.search(rf"{IDS[1][:12]} .*kernel-1 .*mlp:prod", listed)
    found = json.loads(typed("search", "blueprint_id=kernel-0", "--json", **place))
    assert [entry["id"] for entry in found["kernels"]] == IDS[:1]
    assert typed("search", "mode=replace", status=1, **place)
    assert "max_parameter_count" in typed("search", "size=3", status=2, **place)
    shown = typed("show", IDS[0][:8], **place)
    assert re.search(rf"kernel +{IDS[0]}\n", shown)
    assert "by nobody" in shown
    typed("pull", "mlp:prod", **place)
    assert (tmp_path / f"{IDS[1]}.safetensors").read_bytes() == DATA[1]


def brought(contribution, run):
    """Return a report of the second kernel by a run of its own."""
    return FieldReport(
        artifact_id=IDS[1],
        blueprint_digest=f"{1:064x}",
        run_id=f"run-{run}",
        graft_id="1",
        site_kind="linear",
        in_features=4,
        out_features=4,
        metric="gate loss",
        unit="relative",
        contribution=contribution,
        standard_error=0.01,
        num_looks=300,
        verdict="fossilized",
    )


def test_what_has_worked_comes_first_and_says_how_well(typed, place):
    """By reports of runs, with the uncertainty; without any, nothing is said."""
    typed("push", "0.safetensors", "1.safetensors", **place)
    assert "has saved" not in typed("show", IDS[1], **place)
    assert "saved of" not in typed("search", "--order", "proven", **place)
    opened = esper.open_registry(place["URZA_API_URL"], token=place.get("URZA_API_TOKEN"))
    for run in range(20):
        opened.report_outcome(brought(0.2, run))
    opened.close()

    found = json.loads(typed("search", "--order", "proven", "--json", **place))["kernels"]
    assert [entry["id"] for entry in found] == [IDS[1], IDS[0]]
    shown = typed("show", IDS[1], **place)
    assert re.search(r"has saved +\+\d+\.\d% ± \d\.\d% of the loss, at least \+.*20 runs", shown)
    assert "order" in typed("search", "--order", "best", status=2, **place)


def test_names_move_remember_and_go_back(typed, place):
    """A name moves from where it was seen only, has a history, and rolls back."""
    typed("push", "0.safetensors", "1.safetensors", "--tag", "mlp:prod", **place)
    typed("tag", IDS[0], "mlp:prod", "--expected", "none", status=1, **place)
    typed("tag", IDS[0], "mlp:prod", "--expected", IDS[1], **place)
    assert json.loads(typed("rollback", "mlp:prod", "--json", **place))["id"] == IDS[1]
    moves = json.loads(typed("history", "mlp:prod", "--json", **place))["moves"]
    assert [move["digest"] for move in moves] == [IDS[1], IDS[0], IDS[1]]
    assert IDS[1][:12] in typed("history", "mlp:prod", **place)
    typed("history", "mlp:none", status=1, **place)
    typed("rollback", "mlp:none", status=1, **place)
    typed("tag", IDS[0], "mlp:once", **place)
    assert "never pointed elsewhere" in typed("rollback", "mlp:once", status=1, **place)


def test_a_kernel_is_pulled_into_a_pipe_and_through_a_link(typed, place, tmp_path):
    """What is no file stays what it is, and a link goes on leading where it did."""
    typed("push", "0.safetensors", **place)
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "linked")
    descriptor = os.open(pipe, os.O_RDWR)  # both ends: neither waits for the other
    typed("pull", IDS[0], "--output", str(pipe), **place)
    assert pipe.is_fifo()
    assert os.read(descriptor, 2 * len(DATA[0])) == DATA[0]
    os.close(descriptor)
    typed("pull", IDS[0], "--output", str(link), **place)
    assert link.is_symlink()
    assert (tmp_path / "linked").read_bytes() == DATA[0]


def test_what_others_wrote_gives_no_orders_to_a_terminal(typed, place):
    """A reason, a record and a refusal are shown as letters; as JSON they are what they are."""
    typed("push", "0.safetensors", **place)
    typed("deprecate", IDS[0], "--reason", "\x1b[2Jgone\x07", **place)
    assert "\x1b" not in typed("show", IDS[0], **place)
    assert json.loads(typed("show", IDS[0], "--json", **place))["deprecation"]["reason"] == (
        "\x1b[2Jgone\x07"
    )


def test_what_is_signed_is_verified_and_what_is_not_is_refused(typed, place, tmp_path):
    """With trusted keys only what they signed is pulled; the refused leaves no file."""
    pytest.importorskip("cryptography", reason="needs the extra sign")
    typed("push", "0.safetensors", "1.safetensors", **place)
    said = json.loads(typed("sign", IDS[0], "--key", "key.pem", "--json", **place))
    typed("sign", IDS[1], "--key", "other.pem", **place)
    (tmp_path / "trusted").write_text(f"# ours\n{said['public_key']}\n")
    for trusted in (said["public_key"], str(tmp_path / "trusted")):
        with_keys = {**place, "ESPER_TRUSTED_KEYS": trusted}
        assert ", trusted" in typed("verify", IDS[0], **with_keys)
        assert "not by a trusted key" in typed("verify", IDS[1], status=1, **with_keys)
        typed("pull", IDS[1], status=1, **with_keys)
    assert not (tmp_path / f"{IDS[1]}.safetensors").exists()
    assert "not checked" in typed("show", IDS[1], **place)
    assert "openssl genpkey" in typed("sign", IDS[0], "--key", "0.safetensors", status=2, **place)


def test_a_deprecation_is_said_and_taken_back(typed, place):
    """Why, and what to use instead, is shown; it is one or the other."""
    typed("push", "0.safetensors", "1.safetensors", **place)
    typed("deprecate", IDS[0], "--reason", "diverges", "--successor", IDS[1], **place)
    assert f"diverges; use {IDS[1]}" in typed("show", IDS[0], **place)
    typed("deprecate", IDS[0], "--undo", **place)
    assert "deprecated" not in typed("show", IDS[0], **place)
    typed("deprecate", IDS[0], status=2, **place)


def test_kernels_are_copied_with_what_is_said_of_them(typed, place, tmp_path):
    """Names, records, signatures and deprecations arrive, and copying again changes nothing."""
    pytest.importorskip("cryptography", reason="needs the extra sign")
    typed("push", "0.safetensors", "1.safetensors", "--tag", "mlp:prod", **place)
    typed("sign", "mlp:prod", "--key", "key.pem", **place)
    typed("deprecate", IDS[0], "--reason", "diverges", **place)
    source = place["URZA_API_URL"]
    for _ in range(2):
        copied = json.loads(typed("copy", source, "to", "--all", "--json", **place))["copied"]
    assert [(c["digest"], c["names"]) for c in copied] == [(IDS[0], []), (IDS[1], ["mlp:prod"])]

    registry = esper.open_registry(tmp_path / "to")
    assert registry.get(registry.resolve("mlp:prod")) == DATA[1]
    assert len(registry.signatures(IDS[1])) == 1
    assert registry.entry(IDS[0]).deprecation.reason == "diverges"
    assert len(registry.history("mlp", "prod")) == 1
    registry.close()
    assert typed("copy", source, "one", "mlp:prod", **place).split() == [IDS[1], "mlp:prod"]
    typed("copy", source, "one", status=2, **place)
    typed("copy", source, "one", "mlp:none", status=1, **place)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("show", "0" * 64), 1),
        (("show", "abcdef01"), 1),
        (("show", "mlp:none"), 1),
        (("pull", "no name"), 2),
        (("push", "none.safetensors"), 1),
        (("push", "key.pem"), 1),
        (("list", "--registry", "ftp://x"), 2),
        (("list", "--registry", "nowhere"), 1),
        (("list", "--registry", "http://127.0.0.1:9"), 2),
    ],
)
def test_refused_or_not_found_is_1_and_an_error_2(typed, tmp_path, words, status):
    """The status tells what is so from what went wrong; in one line, and nothing is made."""
    DirectoryRegistry(tmp_path / "store").close()
    said = typed(*words, status=status, URZA_API_URL=str(tmp_path / "store"))

    assert re.fullmatch(r"esper: .+\n", said)
    assert not (tmp_path / "nowhere").exists()


def test_looking_at_an_address_makes_no_directory(typed, tmp_path):
    """A directory that was misspelt is not found, in the form of an address, too."""
    missing = tmp_path / "missing"
    assert "no such directory" in typed("list", "--registry", missing.as_uri(), status=1)
    assert not missing.exists()
    typed("push", "0.safetensors", "--registry", missing.as_uri())
    typed("list", "--registry", "memory:")


def test_without_an_address_a_command_says_where_one_is_given(typed):
    """Neither option nor variable: which to set is said."""
    assert "URZA_API_URL" in typed("list", status=2, URZA_API_URL="")


def test_a_token_goes_to_its_own_address_only(monkeypatch):
    """The environment's token is never sent to another registry than the environment's."""
    from esper.services import registry_client

    sent = {}
    monkeypatch.setattr(
        registry_client, "open_registry", lambda url, *, token, **_: sent.update({url: token})
    )
    ours, theirs = "https://ours", "https://theirs"
    known = read_environment({"URZA_API_URL": ours, "URZA_API_TOKEN": "secret"})
    unknown = read_environment({"URZA_API_TOKEN": "secret"})

    registry_client.open_named(ours, known)
    registry_client.open_named(theirs, known)
    assert sent == {ours: "secret", theirs: None}
    registry_client.open_named(theirs, unknown)
    assert sent[theirs] == "secret"
    registry_client.open_named(theirs, unknown, takes_token=False)
    assert sent[theirs] is None


@pytest.mark.slow
def test_every_command_prints_json_and_says_what_it_reads_of_the_environment():
    """What a person reads, a program does, too."""
    commands = {
        command.name or command.callback.__name__: command
        for command in kernels.app.registered_commands
    }
    assert " ".join(commands) == (
        "list search show push pull tag history rollback verify sign deprecate copy"
    )
    for name, command in commands.items():
        shown = CliRunner().invoke(app, ["kernels", name, "--help"], env={"COLUMNS": "200"}).output
        assert "--json" in shown, name
        assert command.epilog == kernels.ENVIRONMENT


@pytest.mark.slow
def test_the_page_s_commands_do_what_it_says(typed, tmp_path):
    """Every `esper kernels` line of the page is typed, one after the other, and ends with 0."""
    pytest.importorskip("cryptography", reason="needs the extra sign")
    lines = re.findall(
        r"^    (?:export (\w+)=(\S+)|esper kernels (.+))$",
        DOCUMENT.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    typed("push", "0.safetensors", "--registry", "aside")
    signed = typed("sign", IDS[0], "--registry", "aside", "--key", "key.pem", "--json")
    (tmp_path / "trusted.txt").write_text(json.loads(signed)["public_key"])
    (tmp_path / "0.safetensors").rename(tmp_path / "wide.safetensors")
    (tmp_path / "1.safetensors").rename(tmp_path / "narrow.safetensors")

    environment, was = {}, set()
    for name, value, words in lines:
        if name:
            environment[name] = value
        else:
            typed(*words.split(), **environment)
            was.add(words.split()[0])
    assert was == NAMES

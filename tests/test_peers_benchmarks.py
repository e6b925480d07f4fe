"""The comparisons with peers: their document is what was kept, and peers may be absent."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
BESIDE = ROOT / "benchmarks" / "beside"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the comparisons, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(BESIDE))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BESIDE)):
            del sys.modules[name]


def a_result(*peers):
    return {"format_version": 1, "environment": {"torch": "2.13.0"}, "peers": list(peers)}


ROW = {"asked": "it is kept", "source": "peft#1", "peer": "lost", "esper": "kept"}


def test_document_is_what_the_kept_results_generate(load):
    """`docs/peers.md` holds what is in `benchmarks/results/peers/`, and nothing else."""
    assert (ROOT / "docs" / "peers.md").read_text() == load("document").as_markdown()


def test_every_peer_has_its_comparisons_and_a_pinned_version(load):
    """So that what is written can be found again."""
    peers = load("run").PEERS
    assert {path.stem for path in BESIDE.glob("*_rows.py")} - {"rank_rows"} == {
        f"{name}_rows" for name in peers
    }
    assert all("==" in requirement for requirement in peers.values())


def test_what_could_not_be_compared_is_named_with_the_reason(load, tmp_path):
    """A peer that was not installed, and a comparison that failed; the rest stays a table."""
    result = a_result(
        {
            "peer": "peft==1",
            "torch": "2.13.0",
            "rows": [ROW, {"failed": "merge: KeyError: 'x'"}],
            "absent": "",
        },
        {
            "peer": "gromo==2",
            "torch": "",
            "rows": [],
            "absent": "gromo==2 could not be installed: no wheel",
        },
    )
    (tmp_path / "here.json").write_text(json.dumps(result))
    text = load("document").as_markdown(tmp_path)
    assert "| it is kept (peft#1) | lost | kept |" in text
    assert "- not compared: merge: KeyError: 'x'" in text
    assert "### gromo 2\n\nNothing was compared: gromo==2 could not be installed: no wheel" in text


def test_a_result_of_a_newer_format_is_refused(load, tmp_path):
    """It is not told as if all of it were known."""
    (tmp_path / "here.json").write_text(json.dumps(a_result() | {"format_version": 2}))
    with pytest.raises(ValueError, match="of format 2; 1 is known"):
        load("document").as_markdown(tmp_path)


def test_a_comparison_that_fails_leaves_the_others(load, capsys):
    """It says how; what comes after it is made all the same."""
    comparison = load("comparison")

    def fails():
        raise KeyError("x")

    def works():
        return comparison.Comparison(**ROW)

    comparison.told([fails, works])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"failed": "fails: KeyError: 'x'"}, ROW]


def test_a_peer_that_cannot_be_had_is_named_by_what_pip_said(load):
    """Its error line, whatever pip says besides."""
    run = load("run")
    code = "import sys; sys.exit('WARNING: a\\nERROR: No matching distribution\\nnotice: b')"
    with pytest.raises(run.PeerError, match="not installed: ERROR: No matching distribution"):
        run._checked([sys.executable, "-c", code], "not installed")


def test_parameters_in_an_optimizer_are_counted(load):
    """Those that it has, of those that are asked for."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    assert load("comparison").held_by(optimizer, layer.parameters()) == "1 of 2"

"""Lightning under ``torchrun``: two ranks, one module that grows, replicated or in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytorch_lightning")

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each rank says, and what was written for people."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    made = subprocess.run(
        [*command, str(SUPPORT / "lightning_ranks.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return [json.loads((folder / f"rank {i}").read_text()) for i in range(2)], made.stderr


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("fit", ["whole", "resumed", "sharded whole", "folder resumed"])
def test_ranks_grow_together(told, fit):
    """They try, take over and keep the same, and their parameters are equal behind every batch."""
    one, other = (rank[fit] for rank in told[0])
    assert one == other
    assert one["apart"] == 0
    assert one["trials"][0] == ["kept", 267]  # two thirds of all 400, of which a rank has half
    assert any(verdict == "fossilized" for _, _, verdict in one["grafts"])


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("resumed", "whole"),
    [("resumed", "whole"), ("folder resumed", "sharded whole")],
)
def test_ranks_go_on_from_lightnings_checkpoint(told, resumed, whole):
    """With the bits of the fit that was not stopped."""
    for rank in told[0]:
        assert rank[resumed]["end"] == rank[whole]["end"]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_checkpoint_of_shards_is_never_a_smaller_model(told, kind):
    """A fresh module that is sharded before it loads has the kernels, and so the loss."""
    for rank in told[0]:
        assert rank[f"{kind} validated"] == rank["sharded whole"]["val_loss"]


@pytest.mark.slow
@pytest.mark.network
def test_nobody_is_told_of_copies_that_esper_makes(told):
    """A trial's copies of the model are no average that its owner has forgotten."""
    assert "a copy of the model" not in told[1]


@pytest.mark.slow
@pytest.mark.network
def test_a_rank_that_raises_alone_asks_the_other_nothing(told):
    """It ends with its own error, while the other waits for gradients; gloo ended the process."""
    assert told[0][1]["left"] == "rank 1 has had enough"

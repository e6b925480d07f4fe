"""Runs under ``torchrun`` whose ranks, or machines, are killed: they go on, and end as if not."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.network


def agent(folder, *kills, num_restarts=1, **options):
    """Start an agent with two ranks, which work in a folder."""
    folder.mkdir(exist_ok=True)
    given = {"nnodes": 1, "rdzv-endpoint": "127.0.0.1:0", **options}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--max-restarts={num_restarts}", "--monitor-interval=0.05"]
    command += ["--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
    command += [f"--{name}={value}" for name, value in given.items()]
    # without it restarted ranks may read from the shared store where those of before had listened
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, str(SUPPORT / "elastic_runs.py"), str(folder), *kills],
            env={**os.environ, **apart, "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def ended(*agents):
    """Let agents end, whatever happens; ranks are in sessions of their own, and end with theirs."""
    try:
        yield
    finally:
        for each in agents:
            if each.poll() is None:
                each.send_signal(signal.SIGTERM)
                each.wait()


def outcomes(folder):
    """Return what the ranks that worked in a folder came to."""
    return {path.name: path.read_text() for path in folder.glob("outcome *")}


def assert_as_if_never_killed(folder, *kills):
    with ended(made := agent(folder, *kills, num_restarts=len(kills))):
        assert made.wait() == 0, (folder / "log").read_text()[-3000:]
    assert len(list(folder.glob("killed *"))) == len(kills)
    assert outcomes(folder) == {"outcome 0": "equal", "outcome 1": "equal"}


@pytest.mark.slow
def test_a_run_of_which_a_rank_is_killed_ends_as_if_it_was_not(tmp_path):
    """Killed in its trial, it has parameters that are equal on every step, and the same bits."""
    assert_as_if_never_killed(tmp_path, "1@50")


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("random_seed", range(10))
def test_a_run_may_be_killed_again_and_again(tmp_path, random_seed):
    """At the switch of one rank, in trial, watch and after, five times in a run."""
    draw = random.Random(random_seed)
    kills = [f"{draw.randrange(2)}@{update}" for update in sorted(draw.sample(range(1, 115), 4))]
    assert_as_if_never_killed(tmp_path, *kills, f"{random_seed % 2}@switch")


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_a_machine_that_is_killed_may_come_again(tmp_path):
    """Two agents share no folder; one rank fetches for all, and the run ends with the same bits.

    The checkpoint lies with the first alone, and each time that ranks begin the kernel is fetched.
    """
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shared = {"nnodes": 2, "rdzv-endpoint": f"127.0.0.1:{free_port()}", "rdzv-id": "run"}
    kills = [f"agent:{rank}@100" for rank in range(4)]  # all of them that the machine has

    def other():
        return agent(theirs, *kills, num_restarts=3, **shared, **{"rdzv-conf": "is_host=0"})

    host = agent(ours, num_restarts=3, **shared, **{"rdzv-conf": "is_host=1"})
    with ended(host, killed := other()):
        assert killed.wait() == -signal.SIGKILL
        with ended(again := other()):
            assert (host.wait(), again.wait()) == (0, 0), (ours / "log").read_text()[-3000:]
    assert {**outcomes(ours), **outcomes(theirs)} == {f"outcome {i}": "equal" for i in range(4)}
    fetches = [p.read_text() for p in tmp_path.glob("*/fetches")]
    assert "".join(fetches) == 2 * "rank 0\n"

"""The examples: a user's own loop, and a job for the command."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples' data needs the extra demo")

EXAMPLES = Path(__file__).parent.parent / "examples"


def _example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_runs():
    """A few epochs of the user's own loop end with a report and an accuracy."""
    with pytest.warns(UserWarning, match="nothing can grow: a package takes"):
        text = _example("own_loop").main(epochs=3)
    assert "84 updates, 1,210 parameters before and 1,210 after" in text
    assert "Test accuracy: " in text


@pytest.mark.slow
def test_own_loop_takes_over_what_beat_the_run():
    """With default settings, and what it ends with is plain torch."""
    text = _example("own_loop").main()
    assert "candidate against live run, loss saved" in text
    assert "fossilized" in text
    assert "1,210 parameters before and 1,210 after" not in text


@pytest.mark.torture
@pytest.mark.network
def test_ddp_grows_on_two_ranks_and_goes_on_by_itself(tmp_path):
    """Started by torchrun, and once more for an epoch beyond: it begins where it had ended."""
    for epochs, began in (("2", 0), ("2", 2)):
        assert f"Began at epoch {began}. Test accuracy: " in _under_torchrun(tmp_path, epochs)


@pytest.mark.torture
@pytest.mark.network
@pytest.mark.timeout(600)
def test_ddp_takes_over_what_beat_the_run(tmp_path):
    """With the settings that it has, on shares of the held-out digits."""
    text = _under_torchrun(tmp_path, "60")
    assert "Trials: " in text
    assert "fossilized" in text


def _under_torchrun(folder, epochs):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [str(EXAMPLES / "ddp.py"), str(folder / "ddp.esper"), epochs]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    settings = {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join(sys.path)
    made = subprocess.run(
        command,
        env={**os.environ, **settings, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


def test_job_runs_a_few_epochs_through_the_commands_door():
    """The job is a GrowthJob of the right shape, and two epochs of it train."""
    from esper.growth.job import grow

    with pytest.warns(UserWarning, match="nothing can grow: a package takes"):
        report = grow(_example("job").job(epochs=2))
    assert report.updates == 94
    assert set(report.test_metrics) == {"loss"}


@pytest.mark.torture
def test_job_grows_with_default_settings(tmp_path, monkeypatch):
    """`esper grow` with nothing but defaults grows the job, to less than half the host's loss."""
    from esper.growth.job import grow
    from esper.services.run_job import run_job

    monkeypatch.syspath_prepend(str(EXAMPLES.parent))
    grown = run_job("examples.job:job", run_dir=tmp_path).report
    sys.modules.pop("examples.job")
    assert [g.verdict for g in grown.grafts].count("fossilized") >= 1
    assert (tmp_path / "events.jsonl").stat().st_size > 0
    from esper.growth.policies import Never

    job = _example("job").job()
    alone = grow(_with_policy(job, Never()))
    assert grown.test_metrics["loss"] < alone.test_metrics["loss"] / 2


def _with_policy(job, policy):
    from dataclasses import replace

    return replace(job, grower={"policy": policy})


FRAMEWORKS = {
    "lightning_digits": "pytorch_lightning",
    "transformers_digits": "transformers",
    "accelerate_digits": "accelerate",
}
QUIET = (
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*number of training batches",
    "ignore:.*exists and is not empty",
)


@pytest.mark.slow
@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_frameworks_run_is_stopped_and_resumed(name, capsys):
    """By the framework's own checkpoint, and the report is of the whole run."""
    pytest.importorskip(FRAMEWORKS[name])
    with pytest.warns(UserWarning, match="nothing can grow: a package takes"):
        _example(name).main(epochs=2)
    told = capsys.readouterr().out
    assert "the machine went down behind update 28" in told
    assert "56 updates, 1,210 parameters before and 1,210 after" in told


@pytest.mark.torture
@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_frameworks_run_grows_with_one_line(name, capsys):
    """With default settings a package is kept, and its kernels come back from the checkpoint."""
    pytest.importorskip(FRAMEWORKS[name])
    accuracy = _example(name).main()
    told = capsys.readouterr().out
    assert "1,120 updates, 1,210 parameters before and" in told
    assert ": kept (" in told
    assert accuracy > 0.9


@pytest.mark.torture
def test_a_frozen_layer_learns_what_is_new():
    """Ten digits where fine-tuning behind it does not, and the old ones are not forgotten."""
    found = _example("new_classes").main()
    gain = found[True, True]["all digits"] - found[True, False]["all digits"]
    assert gain > 0.05
    assert all(result["old digits"] > 0.85 for result in found.values())


@pytest.mark.slow
def test_new_classes_stand_beside_fine_tuning(capsys):
    """A few epochs of it say what is known before and after, grown and not, frozen and not."""
    with pytest.warns(UserWarning, match="nothing can grow: a package takes"):
        found = _example("new_classes").main(epochs=1)
    assert set(found) == {(frozen, grows) for frozen in (True, False) for grows in (True, False)}
    assert capsys.readouterr().out.count("of the old digits") == 5

"""A device that is neither the CPU nor CUDA: what holds there is held by no word of either.

It is torch's back end PrivateUse1, written in Python (``support/python_device.py``), and changes a
process for good; so the checks run in one of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "support" / "device_checks.py"
NAMES = (
    "a_tensor_there_is_none_of_the_cpu",
    "dormant_layers_are_native",
    "a_graft_is_the_formula",
    "kernels_are_swapped",
    "a_forward_waits_for_no_number",
    "a_backward_waits_for_no_number",
    "seeds_that_run_as_one_wait_for_no_number",
    "a_faulty_kernel_costs_its_share",
    "a_bad_gradient_reaches_nobody",
    "the_step_guard_drops_a_step",
    "a_fossil_folds",
    "a_state_travels_both_ways",
    "copies_are_of_their_own",
    "a_run_grows_there_as_on_the_cpu",
    "memory_that_nobody_tells_is_not_guessed",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    """What each check came to: None where it held, else how it failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", CHECKS],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_on_another_device(found, name):
    """The check held there."""
    assert found[name] is None, found[name]


def test_every_check_is_looked_at(found):
    """None is forgotten here."""
    assert found.keys() == {*NAMES}

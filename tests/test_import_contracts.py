"""The walls between rooms hold, and an import that must not be there is noticed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import esper

ROOT = Path(__file__).parent.parent
HOT_PATH, ENGINE = "hot-path-never-waits", "engine-opens-no-socket"
PLANTED = {
    "nothing": (HOT_PATH, "forward/blending.py", "", True),
    "the cache, in the forward": (
        HOT_PATH,
        "forward/blending.py",
        "from esper.fetching.kernel_cache import KernelCache",
        False,
    ),
    "the cache, below the forward": (
        HOT_PATH,
        "state/seed_slot.py",
        "from esper.fetching.kernel_cache import KernelCache",
        False,
    ),
    "an event loop, in the forward": (HOT_PATH, "forward/fence.py", "import asyncio", False),
    "a socket, in the caches": (ENGINE, "fetching/kernel_cache.py", "import socket", False),
}


def _check(source, contract):
    """Run one contract on a copy of the package; return whether it is kept, and what was said."""
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [command, "--config", ROOT / "pyproject.toml", "--contract", contract, "--no-cache"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("planted", PLANTED)
def test_the_forward_imports_nothing_that_can_wait(planted, tmp_path):
    """The contract is kept as the code is, and broken by one import of what may wait."""
    pytest.importorskip("importlinter", reason="needs import-linter: it is what is tested")
    contract, file, line, is_kept = PLANTED[planted]
    shutil.copytree(Path(esper.__file__).parent, tmp_path / "esper")
    path = tmp_path / "esper" / file
    head = "from __future__ import annotations\n"
    path.write_text(path.read_text().replace(head, f"{head}\n{line}\n", 1))
    kept, said = _check(tmp_path, contract)
    assert kept is is_kept, said
    if not is_kept:
        assert "BROKEN" in said
        assert line.split()[1] in said

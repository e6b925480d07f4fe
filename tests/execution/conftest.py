"""Makes `execution_hosts` and `bad_kernels` importable, here and in processes that tests start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from execution_hosts import KINDS


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    """Each kind of layer that the engine's promises are checked on."""
    return KINDS[request.param]

"""The benchmarks run, and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / "benchmarks" / "run.py"


@pytest.mark.slow
def test_quick_run_writes_every_row_with_its_environment(tmp_path):
    """`benchmarks/run.py --quick` prints each row that its JSON file holds."""
    pytest.importorskip("sklearn", reason="the rankings' data needs the extra demo")
    printed = subprocess.run(
        [sys.executable, str(RUN), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert {"torch", "python", "platform", "threads"} <= set(result["environment"])
    names = [row["name"] for row in result["costs"]]
    rankings = [row["ranking"] for row in result["rankings"]]
    assert len(names) == 9
    assert rankings == ["FirstOrderGain", "GradientNorm", "RandomChoice"]
    assert [name for name in names + rankings if name not in printed] == []
    assert all(row["value"] > 0 for row in result["costs"] if row["unit"] == "x")

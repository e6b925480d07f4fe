"""The only reader of the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the commands take from the environment.

    Attributes:
        run_dir: Folder under which runs are written; ``ESPER_RUN_DIR``, by default ``runs``.
        traceback: Whether errors are shown with their traceback; ``ESPER_TRACEBACK=1``.
    """

    run_dir: Path = Path("runs")
    traceback: bool = False


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read what is set, an empty variable being one that is not set.

    Args:
        variables: By name; None reads the process's own.

    Raises:
        EsperError: A variable has a value that it cannot have.
    """
    values = os.environ if variables is None else variables
    traceback = values.get("ESPER_TRACEBACK", "") or "0"
    if traceback not in ("0", "1"):
        msg = f"ESPER_TRACEBACK is 0 or 1, got {traceback!r}; unset it or set one of them"
        raise EsperError(msg)
    run_dir = Path(values.get("ESPER_RUN_DIR", "") or "runs")
    return Environment(run_dir=run_dir, traceback=traceback == "1")

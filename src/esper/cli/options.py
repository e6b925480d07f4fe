"""Options that several groups of commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="Its first line is the registry's token.")
]

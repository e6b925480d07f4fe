"""The commands. None of them imports torch before it has work for it."""

from esper.cli.app import main

__all__ = ["main"]

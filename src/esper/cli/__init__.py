"""The commands: the only place that prints, and that starts an event loop.

None of them imports torch before it has work for it. The door is ``app``.
"""

from esper.cli.app import main

__all__ = ["main"]

"""Where artifacts are kept, by digest: in memory, in a directory, or on a server.

Bytes only: nothing here imports torch or builds a kernel. The door is ``open_registry``; what every
registry must do is the port in ``contracts.ports``. ``AsyncRegistry`` awaits one.
"""

from __future__ import annotations

from esper.registry.async_registry import AsyncRegistry
from esper.registry.open import open_registry

__all__ = ["AsyncRegistry", "open_registry"]

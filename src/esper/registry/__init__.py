"""Where artifacts are kept, by digest: in memory, in a directory, or behind an HTTP address.

Bytes only: nothing here imports torch or builds a kernel. The door is ``open_registry``; what every
registry must do is the port in ``contracts.ports``.
"""

from __future__ import annotations

from esper.registry.open import open_registry

__all__ = ["open_registry"]

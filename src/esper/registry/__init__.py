"""Where artifacts are kept, by digest: in memory, in a directory, or behind an HTTP address."""

from __future__ import annotations

from esper.registry.open import open, open_registry  # noqa: A004 - registry.open() is how it is called

__all__ = ["open", "open_registry"]

"""Where artifacts are kept: by digest, in memory or in a directory."""

from __future__ import annotations

from esper.registry.open import open  # noqa: A004 - registry.open() is how it is called

__all__ = ["open"]

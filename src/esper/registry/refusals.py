"""What registries refuse, and the words that all of them say it in."""

from __future__ import annotations

from esper.contracts.errors import KernelNotFoundError


def not_published(digest: str) -> KernelNotFoundError:
    """Return the error of a digest that nothing is published under."""
    msg = f"no kernel {digest} is published here; put it first, or look with search()"
    return KernelNotFoundError(msg)


def no_such_tag(name: str, tag: str) -> KernelNotFoundError:
    """Return the error of a tag that is not there."""
    msg = f"there is no {name}:{tag} here; set it with tag(), or look with history()"
    return KernelNotFoundError(msg)


def still_tagged(digest: str, tags: tuple[str, ...]) -> ValueError:
    """Return the error of withdrawing what a tag points to."""
    msg = f"{digest} is still {', '.join(tags)}; move or untag that first"
    return ValueError(msg)


def check_grace(grace_s: float) -> None:
    """Refuse a grace period that is negative.

    Raises:
        ValueError: It is.
    """
    if not grace_s >= 0:
        msg = f"a grace period is at least 0 s, found {grace_s}"
        raise ValueError(msg)

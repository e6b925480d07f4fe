"""From one registry to another: bytes under the same digest, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.contracts.reference import is_digest, split_reference

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from esper.contracts.ports import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One artifact that is in both registries now.

    Attributes:
        digest: The artifact.
        names: Every ``name:tag`` that was pointed to it in the target, sorted.
        num_signatures: Signatures that went with it.
    """

    digest: str
    names: tuple[str, ...]
    num_signatures: int


def copy(source: Registry, target: Registry, references: Iterable[str]) -> Iterator[Copied]:
    """Copy artifacts, one after the other; yields each when it is there. May be repeated.

    Record, signatures and deprecation go with an artifact. Where it is named, its ``name:tag`` is
    pointed to it in the target, wherever it pointed there.

    Args:
        source: Where they are.
        target: Where they go.
        references: Digests, and ``name:tag``.

    Raises:
        KernelNotFoundError: The source has none of that name.
        ValueError: A reference is neither a digest nor ``name:tag``.
    """
    for reference in references:
        is_named = not is_digest(reference)
        digest = source.resolve(reference) if is_named else reference
        yield _copy_one(source, target, digest, (reference,) if is_named else ())


def copy_all(source: Registry, target: Registry) -> Iterator[Copied]:
    """Copy every artifact with all of its names; see :func:`copy`."""
    for entry in source.search():
        yield _copy_one(source, target, entry.digest, entry.tags)


def _copy_one(source: Registry, target: Registry, digest: str, names: tuple[str, ...]) -> Copied:
    entry, signatures = source.entry(digest), source.signatures(digest)
    target.put(source.get(digest), digest=digest, record=entry.record)
    for signature in signatures:
        target.attach_signature(signature)
    if entry.deprecation is not None:
        said = entry.deprecation
        target.deprecate(digest, reason=said.reason, successor=said.successor, actor=said.actor)
    for name in names:
        target.tag(*split_reference(name), digest)
    return Copied(digest=digest, names=tuple(sorted(names)), num_signatures=len(signatures))

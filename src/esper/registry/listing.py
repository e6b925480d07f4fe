"""What registries without a book of their own do alike: search what they list, and look at it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from esper.contracts.errors import KernelCorruptError, KernelNotFoundError
from esper.contracts.ports import RegistryCheck
from esper.registry.memory import empty_book
from esper.registry.refusals import check_limit
from esper.registry.screening import Screened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.contracts.ports import KernelSource, RegistryEntry, SearchOrder


def search_among(
    entries: Iterable[RegistryEntry],
    criteria: Mapping[str, object],
    *,
    limit: int | None,
    after: int | None,
    order: SearchOrder,
) -> list[RegistryEntry]:
    """Return those of the entries that meet the criteria.

    See :meth:`~esper.contracts.ports.Registry.search`; the entries' numbers all differ.

    Raises:
        TypeError, ValueError: As there.
    """
    check_limit(limit)
    listed = {entry.digest: entry for entry in entries}
    book = empty_book()
    for entry in listed.values():
        screened = Screened(
            digest=entry.digest,
            metadata=entry.metadata,
            record=json.dumps(entry.record),
            size_bytes=entry.size_bytes,
        )
        book.artifacts.publish(screened, entry.published_at_s or 0.0)
        if entry.deprecation is not None:
            book.reports.deprecate(
                entry.digest,
                reason=entry.deprecation.reason,
                successor=entry.deprecation.successor,
                actor=entry.deprecation.actor,
                now_s=entry.deprecation.deprecated_at_s,
            )
        book.artifacts.renumber(entry.digest, entry.number)
    found = book.artifacts.search(criteria, limit=limit, after=after, order=order)
    return [listed[each.digest] for each in found]


def verify_among(
    digests: Iterable[str], source: KernelSource, *, after: str, limit: int | None
) -> RegistryCheck:
    """Fetch everything, as :meth:`~esper.contracts.ports.Registry.verify` does.

    What cannot be served is counted as missing; nothing can be put aside.
    """
    wanted = sorted(digest for digest in digests if digest > after)
    looked = wanted[:limit]
    missing = tuple(digest for digest in looked if not _is_intact(source, digest))
    return RegistryCheck(
        intact=len(looked) - len(missing),
        quarantined=(),
        missing=missing,
        unreferenced=(),
        after=looked[-1] if len(looked) < len(wanted) else None,
    )


def _is_intact(source: KernelSource, digest: str) -> bool:
    try:
        source.fetch(digest)
    except (KernelCorruptError, KernelNotFoundError):
        return False
    return True

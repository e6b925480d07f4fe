"""A search in what a store without a book of its own lists: the same criteria, by the same text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from esper.registry.memory import empty_book
from esper.registry.refusals import check_limit
from esper.registry.screening import Screened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.contracts.ports import RegistryEntry, SearchOrder


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

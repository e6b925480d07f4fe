"""The chapter of artifacts: what is published, and which bytes are to be collected."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, final

from esper.contracts.artifact import KernelMetadata
from esper.contracts.kernel_reports import Deprecation
from esper.contracts.ports import RegistryEntry
from esper.registry import criteria, schema, standings
from esper.registry.database import NO_LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.contracts.ports import SearchOrder
    from esper.registry.database import Database, Row
    from esper.registry.screening import Screened

_ORDERS: Final[dict[str, tuple[str, str]]] = {
    "oldest": ("seq > :after", "seq"),
    "newest": ("seq < :after", "seq DESC"),
    "proven": (standings.BEYOND, standings.PROVEN),
}
"""Order -> which entries come after one, and how they are sorted."""

_COLUMNS: Final = ("digest", "size_bytes", "metadata", "record", "published_at_s", *schema.SEARCHED)
_PUBLISH: Final = (
    f"INSERT INTO artifacts ({', '.join(_COLUMNS)}) "  # noqa: S608 - names of our own
    f"VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) ON CONFLICT (digest) DO NOTHING"
)
_SEARCH: Final = f"""
    SELECT artifacts.seq, artifacts.digest, size_bytes, metadata, record, published_at_s,
        {standings.COLUMNS}, reason, successor, actor, deprecated_at_s
    FROM artifacts LEFT JOIN deprecations ON deprecations.digest = artifacts.digest
    {standings.JOIN}
    WHERE {{condition}} ORDER BY {{order}} LIMIT :limit"""  # noqa: S608 - words of our own
_TAGS: Final = """
    SELECT tags.digest, tags.name, tags.tag FROM tags
    JOIN artifacts ON artifacts.digest = tags.digest WHERE seq >= :first AND seq <= :last"""


@final
class Artifacts:
    """What is published. A row here is what makes an artifact so.

    Args:
        database: Who keeps it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def publish(self, screened: Screened, now_s: float) -> None:
        """Enter an artifact, whose bytes are there; a digest that is entered stays as it is."""
        self._database.rows("DELETE FROM condemned WHERE digest = :digest", digest=screened.digest)
        self._database.rows(
            _PUBLISH,
            digest=screened.digest,
            size_bytes=screened.size_bytes,
            metadata=json.dumps(screened.metadata.to_document(), sort_keys=True),
            record=screened.record,
            published_at_s=now_s,
            **schema.columns_of(screened.metadata),
        )

    def renumber(self, digest: str, number: int) -> None:
        """Give an artifact another place in the order of publishing, which nobody else has."""
        self._database.rows(
            "UPDATE artifacts SET seq = :number WHERE digest = :digest",
            number=number,
            digest=digest,
        )

    def withdraw(self, digest: str) -> None:
        """Strike an artifact, to which no tag points."""
        self._database.rows("DELETE FROM artifacts WHERE digest = :digest", digest=digest)

    def size(self, digest: str) -> int | None:
        """Return the length in bytes of what is published; None where nothing is."""
        found = self._database.rows(
            "SELECT size_bytes FROM artifacts WHERE digest = :digest", digest=digest
        )
        return int(found[0][0]) if found else None

    def digests(self) -> set[str]:
        """Return the digests of all that is published."""
        return {digest for (digest,) in self._database.rows("SELECT digest FROM artifacts")}

    def totals(self) -> tuple[int, int]:
        """Return how many artifacts are published, and their bytes."""
        ((count, size_bytes),) = self._database.rows(
            "SELECT count(*), coalesce(sum(size_bytes), 0) FROM artifacts"
        )
        return int(count), int(size_bytes)

    def search(
        self,
        wanted: Mapping[str, object],
        *,
        limit: int | None,
        after: int | None,
        order: SearchOrder,
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        condition, values = criteria.as_sql(wanted)
        if order not in _ORDERS:
            msg = f"an order is one of {', '.join(_ORDERS)}, found {order!r:.100}"
            raise ValueError(msg)
        beyond, sorting = _ORDERS[order]
        values["at_kind"] = at_kind = str(wanted.get("kind") or standings.EVERY_KIND)
        if after is not None:
            condition, values["after"] = f"{condition} AND {beyond}", after
            if order == "proven":
                values |= standings.place_of(self._database, after, at_kind)
        return self._entries(condition, sorting, values, limit)

    def entry(self, digest: str) -> RegistryEntry | None:
        """Return what is known of one artifact; None where it is not published."""
        values: dict[str, object] = {"digest": digest, "at_kind": standings.EVERY_KIND}
        found = self._entries("artifacts.digest = :digest", "seq", values, None)
        return found[0] if found else None

    def condemned(self) -> dict[str, float]:
        """Return since when which bytes have been seen without an artifact."""
        return dict(self._database.rows("SELECT digest, since_s FROM condemned"))

    def condemn(self, since_s: Mapping[str, float]) -> None:
        """Remember which bytes are without an artifact now, and since when."""
        self._database.rows("DELETE FROM condemned")
        for digest, seconds in since_s.items():
            self._database.rows(
                "INSERT INTO condemned VALUES (:digest, :since_s)", digest=digest, since_s=seconds
            )

    def _entries(
        self, condition: str, sorting: str, values: dict[str, object], limit: int | None
    ) -> list[RegistryEntry]:
        statement = _SEARCH.format(condition=condition, order=sorting)
        found = self._database.rows(statement, **values, limit=limit or NO_LIMIT)
        tags = self._tags_of(found)
        return [_entry(row, tags) for row in found]

    def _tags_of(self, found: list[Row]) -> dict[str, list[str]]:
        """Return the tags of what was found, by digest."""
        tags: dict[str, list[str]] = {}
        numbers = [row[0] for row in found]
        if numbers:
            span = {"first": min(numbers), "last": max(numbers)}
            for digest, name, tag in self._database.rows(_TAGS, **span):
                tags.setdefault(digest, []).append(f"{name}:{tag}")
        return tags


def _entry(row: Row, tags: Mapping[str, list[str]]) -> RegistryEntry:
    number, digest, size_bytes, metadata, record, published_at_s, *said = row
    reason, successor, actor, deprecated_at_s = said[4:]
    return RegistryEntry(
        digest=digest,
        size_bytes=size_bytes,
        metadata=KernelMetadata.from_document(json.loads(metadata)),
        record=json.loads(record),
        tags=tuple(sorted(tags.get(digest, ()))),
        number=number,
        published_at_s=published_at_s,
        deprecation=None
        if reason is None
        else Deprecation(
            reason=reason, successor=successor, actor=actor, deprecated_at_s=deprecated_at_s
        ),
        standing=standings.standing_of(tuple(said[:4])),
    )

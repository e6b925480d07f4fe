"""The chapter of names: where each tag points, and where it pointed."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from esper.contracts.ports import ANY, TagMove
from esper.registry import refusals
from esper.registry.database import NO_LIMIT

if TYPE_CHECKING:
    from esper.registry.database import Database

_Key = tuple[str, str]


@final
class Tags:
    """Names that move, and remember.

    Args:
        database: Who keeps them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def pointed_to(self, key: _Key) -> str | None:
        """Return where a tag points, or None."""
        found = self._database.rows(
            "SELECT digest FROM tags WHERE name = :name AND tag = :tag", **_named(key)
        )
        return str(found[0][0]) if found else None

    def move(
        self,
        key: _Key,
        digest: str | None,
        *,
        expected: str | None,
        actor: str | None,
        now_s: float,
    ) -> None:
        """Point a tag to an artifact, or with None to nothing; inside a transaction.

        Raises:
            TagMovedError: It does not point to ``expected``, which is not ``ANY``.
            KernelNotFoundError: It is to be taken away, and is not there.
        """
        found = self.pointed_to(key)
        if expected != ANY and found != expected:
            raise refusals.tag_moved(*key, found)
        if digest is None:
            if found is None:
                raise refusals.no_such_tag(*key)
            self._database.rows("DELETE FROM tags WHERE name = :name AND tag = :tag", **_named(key))
        elif found != digest:
            self._database.rows(
                "INSERT INTO tags (name, tag, digest) VALUES (:name, :tag, :digest) "
                "ON CONFLICT (name, tag) DO UPDATE SET digest = excluded.digest",
                **_named(key),
                digest=digest,
            )
        if found != digest:
            self._database.rows(
                "INSERT INTO tag_moves (name, tag, digest, moved_at_s, actor) "
                "VALUES (:name, :tag, :digest, :now_s, :actor)",
                **_named(key),
                digest=digest,
                now_s=now_s,
                actor=actor,
            )

    def of_digest(self, digest: str) -> tuple[str, ...]:
        """Return every ``name:tag`` that points to an artifact, sorted."""
        found = self._database.rows("SELECT name, tag FROM tags WHERE digest = :d", d=digest)
        return tuple(sorted(f"{name}:{tag}" for name, tag in found))

    def names(self, *, limit: int | None, after: str) -> list[str]:
        """Return the names that have a tag, sorted; see ``Registry.names``."""
        found = self._database.rows(
            "SELECT DISTINCT name FROM tags WHERE name > :after ORDER BY name LIMIT :limit",
            after=after,
            limit=limit or NO_LIMIT,
        )
        return [name for (name,) in found]

    def of_name(self, name: str) -> dict[str, str]:
        """Return where each tag of a name points, sorted."""
        return dict(
            self._database.rows(
                "SELECT tag, digest FROM tags WHERE name = :name ORDER BY tag", name=name
            )
        )

    def history(self, key: _Key) -> list[TagMove]:
        """Return every move of a tag, oldest first."""
        moves = self._database.rows(
            "SELECT digest, moved_at_s, actor FROM tag_moves "
            "WHERE name = :name AND tag = :tag ORDER BY seq",
            **_named(key),
        )
        return [
            TagMove(digest=digest, moved_at_s=moved_at_s, actor=actor)
            for digest, moved_at_s, actor in moves
        ]


def _named(key: _Key) -> dict[str, str]:
    return {"name": key[0], "tag": key[1]}

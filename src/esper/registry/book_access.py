"""The chapters of who may do what, and of who did."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from esper.registry.refusals import check_token

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.registry.database import Database

SCOPES: Final = ("read", "publish", "promote", "work", "admin")
"""Rights that a token may have. None of them implies another."""

_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What is kept of a token; not its text.

    Attributes:
        id: Short name, by which it is revoked.
        name: Whose it is, for people and the audit.
        scopes: What it may do, of ``SCOPES``.
        created_at_s: When, in seconds since 1970.
        revoked_at_s: When it ended; None where it counts.
    """

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at_s: float
    revoked_at_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the audit.

    Attributes:
        number: Its place.
        at_s: When, in seconds since 1970.
        actor: Name of the token that asked for it.
        action: What was done, for example ``"publish"``.
        subject: To what: a digest, or ``name:tag``.
        detail: What else there is to say.
    """

    number: int
    at_s: float
    actor: str
    action: str
    subject: str
    detail: str


@final
class Tokens:
    """Tokens of 32 random bytes, of which the sha256 is kept.

    A slow hash protects passwords that can be guessed; these cannot be.

    Args:
        database: Who keeps them.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, name: str, scopes: Iterable[str], *, now_s: float, text: str | None = None
    ) -> tuple[str, Token]:
        """Make a token; its text is returned here and can never be had again.

        Args:
            name: Whose it is.
            scopes: What it may do.
            now_s: Seconds since 1970.
            text: A text that somebody else has chosen, at least 16 characters; None makes one.

        Raises:
            ValueError: The name is empty, a scope is none of ``SCOPES``, there is none, or the
                text is too short, or no header can carry it.
        """
        if not name.strip():
            msg = "a token has a name, by which the audit says whose it is; this one is empty"
            raise ValueError(msg)
        asked = set(scopes)
        if not asked or asked - set(SCOPES):
            msg = f"a token has scopes of {', '.join(SCOPES)}, found {sorted(asked) or 'none'}"
            raise ValueError(msg)
        if text is not None and len(text) < 16:
            msg = "a token has at least 16 characters, and this one has fewer; leave one to be made"
            raise ValueError(msg)
        if text is not None:
            check_token(text)
        text = text or secrets.token_urlsafe(_BYTES)
        self._database.rows(
            "INSERT INTO tokens (id, name, sha256, scopes, created_at_s) "
            "VALUES (:id, :name, :sha256, :scopes, :now_s) ON CONFLICT (sha256) DO NOTHING",
            id=secrets.token_hex(6),
            name=name,
            sha256=_hashed(text),
            scopes=" ".join(scope for scope in SCOPES if scope in asked),
            now_s=now_s,
        )
        found = self.find(text)
        if found is None:
            msg = f"this token was revoked, and does not come back; choose another for {name!r}"
            raise ValueError(msg)
        return text, found

    def find(self, text: str) -> Token | None:
        """Return the token with a text, where there is one that counts."""
        sha256 = _hashed(text)
        for found, *row in self._database.rows(
            "SELECT sha256, id, name, scopes, created_at_s, revoked_at_s FROM tokens "
            "WHERE sha256 = :sha256 AND revoked_at_s IS NULL",
            sha256=sha256,
        ):
            if hmac.compare_digest(str(found), sha256):
                return _token(*row)
        return None

    def all(self) -> list[Token]:
        """Return every token, oldest first, the revoked ones too."""
        return [
            _token(*row)
            for row in self._database.rows(
                "SELECT id, name, scopes, created_at_s, revoked_at_s FROM tokens "
                "ORDER BY created_at_s, id"
            )
        ]

    def revoke(self, token_id: str, *, now_s: float) -> bool:
        """End a token; says whether there was one that counted."""
        return bool(
            self._database.rows(
                "UPDATE tokens SET revoked_at_s = :now_s "
                "WHERE id = :id AND revoked_at_s IS NULL RETURNING id",
                id=token_id,
                now_s=now_s,
            )
        )


@final
class Audit:
    """Who did what, line by line; nothing here is ever changed.

    Args:
        database: Who keeps it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, actor: str, action: str, subject: str, *, now_s: float, detail: str = "") -> None:
        """Add a line, in the transaction of what it tells of: neither is without the other."""
        self._database.rows(
            "INSERT INTO audit (at_s, actor, action, subject, detail) "
            "VALUES (:now_s, :actor, :action, :subject, :detail)",
            now_s=now_s,
            actor=actor,
            action=action,
            subject=subject,
            detail=detail,
        )

    def lines(self, *, limit: int, after: int = 0) -> list[AuditEntry]:
        """Return the lines after one, oldest first."""
        found = self._database.rows(
            "SELECT seq, at_s, actor, action, subject, detail FROM audit "
            "WHERE seq > :after ORDER BY seq LIMIT :limit",
            after=after,
            limit=limit,
        )
        return [
            AuditEntry(number=n, at_s=at, actor=who, action=what, subject=which, detail=more)
            for n, at, who, what, which, more in found
        ]


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _token(
    token_id: str, name: str, scopes: str, created_at_s: float, revoked_at_s: float | None
) -> Token:
    return Token(
        id=token_id,
        name=name,
        scopes=tuple(scopes.split()),
        created_at_s=created_at_s,
        revoked_at_s=revoked_at_s,
    )

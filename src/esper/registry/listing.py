"""What registries without a book of their own do alike: search what they list, and look at it.

They keep no reports either: whoever brings one is told where it could be kept.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NoReturn

from esper.contracts import reference
from esper.contracts.errors import KernelCorruptError, KernelNotFoundError, KernelSourceRefused
from esper.contracts.ports import RegistryCheck, RegistryEntry
from esper.registry.memory import empty_book
from esper.registry.refusals import check_limit
from esper.registry.screening import Screened

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.contracts.kernel_reports import FieldReport, ValidationReport
    from esper.contracts.ports import KernelSource, SearchOrder


class WithoutReports(ABC):
    """The part of a :class:`~esper.contracts.ports.Registry` in a store that keeps no reports.

    Nothing here is overridden but what is abstract.

    Attributes:
        keeps_reports: That it does not; a registry that does need not say so.
    """

    keeps_reports: ClassVar[bool] = False

    @property
    @abstractmethod
    def _what_it_is(self) -> str:
        """Its address and what is there, in words."""

    def report_outcome(self, report: FieldReport) -> None:  # noqa: ARG002 - the port's
        """Raise: none is kept; see :class:`~esper.contracts.ports.Registry`."""
        self._cannot("keeps no reports")

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return nothing: none is kept; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return []

    def report_validation(self, report: ValidationReport) -> None:  # noqa: ARG002 - the port's
        """Raise: none is kept; see :class:`~esper.contracts.ports.Registry`."""
        self._cannot("keeps no reports")

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return nothing: none is kept; see :class:`~esper.contracts.ports.Registry`."""
        reference.check_digest(digest)
        return []

    def _cannot(self, what: str) -> NoReturn:
        msg = (
            f"{self._what_it_is}, which {what}; a directory or a server of `esper registry serve` "
            "does that"
        )
        raise KernelSourceRefused(msg)


def entry_of(screened: Screened, *, number: int, published_at_s: float) -> RegistryEntry:
    """Return what is known of an artifact that is published now."""
    return RegistryEntry(
        digest=screened.digest,
        size_bytes=screened.size_bytes,
        metadata=screened.metadata,
        record=json.loads(screened.record),
        tags=(),
        number=number,
        published_at_s=published_at_s,
    )


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

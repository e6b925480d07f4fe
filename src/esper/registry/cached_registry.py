"""A registry elsewhere with a cache on this machine, which serves it where it does not answer."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Protocol, final

from esper.contracts.artifact_format import digest_of
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.contracts.ports import ANY, Registry
from esper.contracts.reference import split_reference
from esper.contracts.signature import KernelSignature
from esper.registry import refusals
from esper.resilience.clock import wall_time_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from esper.contracts.kernel_reports import FieldReport, ValidationReport
    from esper.contracts.ports import (
        RegistryCheck,
        RegistryEntry,
        SearchCriteria,
        SearchOrder,
        TagMove,
    )
    from esper.registry.disk_cache import DiskCache
    from esper.registry.endpoint import Endpoint
    from esper.registry.http import Shelf

_logger = logging.getLogger(__name__)


class RemoteRegistry(Registry, Protocol):
    """A registry that is asked over a network."""

    @property
    def address(self) -> str:
        """What opens it."""
        ...

    @property
    def endpoint(self) -> Endpoint:
        """What guards it."""
        ...

    def fetch(self, digest: str, *, shelf: Shelf | None = None, waited_s: float = 0.0) -> bytes:
        """Return an artifact's bytes, going on from what is on the shelf.

        Of the time that it may take, ``waited_s`` have passed.
        """
        ...


@final
class CachedRegistry:
    """A :class:`~esper.contracts.ports.Registry`: another one, of which what was had is kept.

    An artifact is served from the cache, and fetched where it is not there. A tag and signatures
    are asked for, and are what they were where the registry does not answer. Offline nothing is
    asked, no socket is opened, and what is not in the cache raises ``KernelSourceSuspended``; so
    does every operation that needs the registry. That there is no such kernel or tag is not
    remembered.

    Args:
        remote: Who is asked.
        cache: What is kept.
        offline: Whether nothing is to be asked.
        wall_s: Seconds since 1970, for when a tag was seen.
    """

    def __init__(
        self,
        remote: RemoteRegistry,
        cache: DiskCache,
        *,
        offline: bool = False,
        wall_s: Callable[[], float] = wall_time_s,
    ) -> None:
        self._remote = remote
        self._cache = cache
        self._is_offline = offline
        self._wall_s = wall_s

    @property
    def address(self) -> str:
        """What opens the registry that is asked."""
        return self._remote.address

    @property
    def endpoint(self) -> Endpoint:
        """What guards the registry that is asked."""
        return self._remote.endpoint

    @property
    def keeps_reports(self) -> bool:
        """Whether the registry that is asked keeps reports."""
        return bool(getattr(self._remote, "keeps_reports", True))

    def fetch(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`.

        Where another is fetching it into the same cache, its bytes are waited for, for half of
        the time that a fetch may take.
        """
        held = self._cache.get(digest)
        if held is not None:
            return held
        remote = self._asked(f"for kernel {digest}, which is not in the cache {self._cache.folder}")
        begun_s = time.monotonic()
        with self._cache.receive(digest, wait_s=remote.endpoint.timeout_s / 2) as part:
            held = self._cache.get(digest)
            if held is not None:
                return held  # another has fetched it since the first look
            data = remote.fetch(digest, shelf=part, waited_s=time.monotonic() - begun_s)
            if digest_of(data) != digest:
                part.clear()
                msg = f"{self.address} answered with other bytes than those of {digest}"
                raise KernelCorruptError(msg)
            part.is_whole = part.size_bytes == len(data)
        return data

    get = fetch

    def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        held = self._cache.get(digest)
        return (
            self._asked(f"for the length of {digest}").stat(digest) if held is None else len(held)
        )

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`."""
        refusals.check_range(start, length)
        held = self._cache.get(digest)
        if held is None:
            return self._asked(f"for a part of {digest}").read(digest, start, length)
        return held[start : start + length]

    def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        if self._is_offline:
            return self._cache.get(digest) is not None
        return self._remote.exists(digest)

    def resolve(self, reference: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`.

        Where the registry does not answer, where it was last seen to point.
        """
        split_reference(reference)
        try:
            remote = self._asked(f"for {reference}")
            digest = remote.resolve(reference)
        except KernelSourceRefused:
            raise
        except KernelNotFoundError:
            self._cache.forget(self.address, reference)
            raise
        except KernelSourceUnavailable as error:
            return self._as_last_seen(reference, error)
        self._cache.remember(self.address, reference, digest, self._wall_s())
        return digest

    def signatures(self, digest: str) -> list[KernelSignature]:
        """Return the signatures of an artifact; see :class:`~esper.contracts.ports.Registry`.

        Where the registry does not answer, those that it had when it was last asked. Whether they
        are true is for those to say who trust a key.
        """
        try:
            found = self._asked(f"for signatures of {digest}").signatures(digest)
        except KernelSourceRefused:
            raise
        except KernelSourceUnavailable as error:
            return self._signatures_as_last_seen(digest, error)
        text = json.dumps([signature.to_document() for signature in found]).encode()
        self._cache.remember_signatures(self.address, digest, text)
        return found

    def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`."""
        self._asked("to keep a signature").attach_signature(signature)

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of an artifact; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked(f"for {digest}").entry(digest)

    def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked("to publish").put(data, digest=digest, record=record)

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        remote = self._asked("to search")
        return remote.search(limit=limit, after=after, order=order, **criteria)

    def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked("for names").names(limit=limit, after=after)

    def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked(f"for the tags of {name}").tags(name)

    def tag(
        self,
        name: str,
        tag: str,
        digest: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,
    ) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`."""
        remote = self._asked(f"to move {name}:{tag}")
        remote.tag(name, tag, digest, expected=expected, actor=actor)

    def untag(
        self, name: str, tag: str, *, expected: str | None = ANY, actor: str | None = None
    ) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        self._asked(f"to remove {name}:{tag}").untag(name, tag, expected=expected, actor=actor)

    def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked(f"for the history of {name}:{tag}").history(name, tag)

    def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        self._asked(f"to withdraw {digest}").delete(digest)

    def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked("to collect").collect(grace_s=grace_s)

    def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked("to verify").verify(after=after, limit=limit)

    def deprecate(
        self,
        digest: str,
        *,
        reason: str,
        successor: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Say not to use an artifact; see :class:`~esper.contracts.ports.Registry`."""
        remote = self._asked(f"to deprecate {digest}")
        remote.deprecate(digest, reason=reason, successor=successor, actor=actor)

    def reinstate(self, digest: str) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        self._asked(f"to reinstate {digest}").reinstate(digest)

    def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft brought; see :class:`~esper.contracts.ports.Registry`."""
        self._asked("to report an outcome").report_outcome(report)

    def outcomes(self, digest: str) -> list[FieldReport]:
        """Return what grafts brought; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked(f"for outcomes of {digest}").outcomes(digest)

    def report_validation(self, report: ValidationReport) -> None:
        """Keep what a validation found; see :class:`~esper.contracts.ports.Registry`."""
        self._asked("to report a validation").report_validation(report)

    def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations found; see :class:`~esper.contracts.ports.Registry`."""
        return self._asked(f"for validations of {digest}").validations(digest)

    def close(self) -> None:
        """Close connections; a later request opens others."""
        self._remote.close()

    def _asked(self, what: str) -> RemoteRegistry:
        """Return who is asked.

        Raises:
            KernelSourceSuspended: Nobody is.
        """
        if self._is_offline:
            msg = f"{self.address} is not asked {what}: this is offline (ESPER_OFFLINE, offline=)"
            raise KernelSourceSuspended(msg)
        return self._remote

    def _as_last_seen(self, reference: str, error: KernelSourceUnavailable) -> str:
        seen = self._cache.recall(self.address, reference)
        if seen is None:
            raise error
        digest, seen_at_s = seen
        ago_s = self._wall_s() - seen_at_s
        _logger.warning(
            "%s is %s, as %s said %.0f s ago: %s", reference, digest, self.address, ago_s, error
        )
        return digest

    def _signatures_as_last_seen(
        self, digest: str, error: KernelSourceUnavailable
    ) -> list[KernelSignature]:
        text = self._cache.recall_signatures(self.address, digest)
        if text is None:
            raise error
        try:
            return [KernelSignature.from_document(each) for each in json.loads(text)]
        except (TypeError, ValueError, RecursionError):
            raise error from None  # what is on the disk was altered, and is as if it were not there

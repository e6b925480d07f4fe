"""A registry for event loops: the same operations, each awaited while a thread asks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, final

from esper.contracts.ports import ANY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from esper.contracts.kernel_reports import FieldReport, ValidationReport
    from esper.contracts.ports import (
        Registry,
        RegistryCheck,
        RegistryEntry,
        SearchCriteria,
        SearchOrder,
        TagMove,
    )
    from esper.contracts.signature import KernelSignature


@final
class AsyncRegistry:
    """Every operation of a :class:`~esper.contracts.ports.Registry`, to be awaited.

    It has no state, so that any number of loops may share one. Who is cancelled goes on at once;
    the thread that asked for it ends by the registry's own deadline, and what it fetched is in the
    cache. A put or a move that is cancelled may have been done.

    Args:
        registry: Who is asked. It stays the caller's, to be closed.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    async def put(
        self,
        data: bytes,
        *,
        digest: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str:
        """Publish one artifact; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.put, data, digest=digest, record=record)

    async def fetch(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`."""
        return await asyncio.to_thread(self.registry.fetch, digest)

    get = fetch

    async def stat(self, digest: str) -> int:
        """Return an artifact's length; see :class:`~esper.contracts.ports.RangedSource`."""
        return await asyncio.to_thread(self.registry.stat, digest)

    async def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`."""
        return await asyncio.to_thread(self.registry.read, digest, start, length)

    async def exists(self, digest: str) -> bool:
        """Say whether an artifact can be had; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.exists, digest)

    async def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of an artifact; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.entry, digest)

    async def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what meets the criteria; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(
            self.registry.search, limit=limit, after=after, order=order, **criteria
        )

    async def names(self, *, limit: int | None = None, after: str = "") -> list[str]:
        """Return the names that have tags; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.names, limit=limit, after=after)

    async def tags(self, name: str) -> dict[str, str]:
        """Return a name's tags; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.tags, name)

    async def tag(
        self,
        name: str,
        tag: str,
        digest: str,
        *,
        expected: str | None = ANY,
        actor: str | None = None,
    ) -> None:
        """Point a tag to an artifact; see :class:`~esper.contracts.ports.Registry`."""
        move = self.registry.tag
        await asyncio.to_thread(move, name, tag, digest, expected=expected, actor=actor)

    async def untag(
        self, name: str, tag: str, *, expected: str | None = ANY, actor: str | None = None
    ) -> None:
        """Take a tag away; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.untag, name, tag, expected=expected, actor=actor)

    async def resolve(self, reference: str) -> str:
        """Return where a tag points; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.resolve, reference)

    async def history(self, name: str, tag: str) -> list[TagMove]:
        """Return a tag's moves; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.history, name, tag)

    async def delete(self, digest: str) -> None:
        """Withdraw an artifact; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.delete, digest)

    async def collect(self, *, grace_s: float = 86_400.0) -> tuple[str, ...]:
        """Remove unreferenced bytes; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.collect, grace_s=grace_s)

    async def verify(self, *, after: str = "", limit: int | None = None) -> RegistryCheck:
        """Look at everything; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.verify, after=after, limit=limit)

    async def deprecate(
        self,
        digest: str,
        *,
        reason: str,
        successor: str | None = None,
        actor: str | None = None,
    ) -> None:
        """Say not to use an artifact; see :class:`~esper.contracts.ports.Registry`."""
        say = self.registry.deprecate
        await asyncio.to_thread(say, digest, reason=reason, successor=successor, actor=actor)

    async def reinstate(self, digest: str) -> None:
        """Take a deprecation back; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.reinstate, digest)

    async def report_outcome(self, report: FieldReport) -> None:
        """Keep what a graft brought; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.report_outcome, report)

    async def outcomes(self, digest: str) -> list[FieldReport]:
        """Return what grafts brought; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.outcomes, digest)

    async def report_validation(self, report: ValidationReport) -> None:
        """Keep what a validation found; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.report_validation, report)

    async def validations(self, digest: str) -> list[ValidationReport]:
        """Return what validations found; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.validations, digest)

    async def attach_signature(self, signature: KernelSignature) -> None:
        """Keep a signature; see :class:`~esper.contracts.ports.Registry`."""
        await asyncio.to_thread(self.registry.attach_signature, signature)

    async def signatures(self, digest: str) -> list[KernelSignature]:
        """Return an artifact's signatures; see :class:`~esper.contracts.ports.Registry`."""
        return await asyncio.to_thread(self.registry.signatures, digest)

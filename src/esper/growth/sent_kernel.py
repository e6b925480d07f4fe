"""Kernels that one rank compiled or fetched, on every rank: made once, and sent to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.compiler.codec import decode_artifact
from esper.continuity.replicas import of_first_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from esper.contracts.artifact import CompiledKernelArtifact

_DIGEST_DIGITS: Final = 64
_LENGTH_BYTES: Final = 8


def kernel_of_first_rank(
    given: nn.Module, make: Callable[[], CompiledKernelArtifact]
) -> CompiledKernelArtifact:
    """Return what the first rank makes; the others verify the bytes that they are sent.

    Args:
        given: The live model, which may be replicated.
        make: Called on the first rank alone.

    Raises:
        RankFailedError: It failed there. On that rank its own error is raised.
    """
    mine: list[CompiledKernelArtifact] = []

    def made() -> bytes:
        mine.append(make())
        return mine[0].artifact_id.encode() + mine[0].kernel_binary

    sent = of_first_rank(given, made)
    if mine:
        return mine[0]
    digest = sent[:_DIGEST_DIGITS].decode()
    return decode_artifact(sent[_DIGEST_DIGITS:], artifact_id=digest)


def kernels_of_first_rank(
    given: nn.Module, mine: Sequence[CompiledKernelArtifact]
) -> list[CompiledKernelArtifact]:
    """Return the kernels that the first rank has; the others verify the bytes that they are sent.

    Args:
        given: The live model, which may be replicated.
        mine: Those of this rank, which count on the first alone.

    Raises:
        RankFailedError: The first rank has failed.
    """
    is_first = False

    def packed() -> bytes:
        nonlocal is_first
        is_first = True
        return b"".join(
            a.artifact_id.encode()
            + len(a.kernel_binary).to_bytes(_LENGTH_BYTES, "big")
            + a.kernel_binary
            for a in mine
        )

    sent = of_first_rank(given, packed)
    return list(mine) if is_first else list(_unpacked(sent))


def _unpacked(sent: bytes) -> Iterator[CompiledKernelArtifact]:
    """Verify and decode several kernels, each behind its digest and its length."""
    place = 0
    while place < len(sent):
        digest = sent[place : place + _DIGEST_DIGITS].decode()
        start = place + _DIGEST_DIGITS + _LENGTH_BYTES
        place = start + int.from_bytes(sent[start - _LENGTH_BYTES : start], "big")
        yield decode_artifact(sent[start:place], artifact_id=digest)

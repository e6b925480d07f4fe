"""A kernel that one rank compiled or fetched, on every rank: made once, and sent to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.compiler.codec import decode_artifact
from esper.continuity.replicas import of_first_rank

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from esper.contracts.artifact import CompiledKernelArtifact

_DIGEST_DIGITS: Final = 64


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

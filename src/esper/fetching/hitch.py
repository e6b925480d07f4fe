"""What went wrong between a run and its registry, beside the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.contracts.errors import KernelSourceRefused, KernelSourceUnavailable

if TYPE_CHECKING:
    from esper.contracts.choices import RegistryOperation


@dataclass(frozen=True, slots=True, kw_only=True)
class Hitch:
    """Why something asked of a registry has not been done.

    Attributes:
        operation: What the registry was asked.
        digest: The artifact; empty for a search.
        error: What the registry answered, or that it did not.
        is_final: Whether it is not asked again.
    """

    operation: RegistryOperation
    digest: str
    error: Exception
    is_final: bool


def is_answer(error: Exception) -> bool:
    """Say whether an error is a registry's answer, so that it is no use to ask again."""
    is_outage = isinstance(error, KernelSourceUnavailable)
    return not is_outage or isinstance(error, KernelSourceRefused)

"""What registries refuse, and the words that all of them say it in."""

from __future__ import annotations

import re
from typing import Final

from esper.contracts.errors import (
    JobLostError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceUnavailable,
    TagMovedError,
)
from esper.contracts.signature import MOST_OF_ONE_KERNEL, KernelSignature

LONGEST_REASON: Final = 1_000
_SENDABLE: Final = re.compile("[!-~](?:[ -~]*[!-~])?")


def not_published(digest: str) -> KernelNotFoundError:
    """Return the error of a digest that nothing is published under."""
    msg = f"no kernel {digest} is published here; put it first, or look with search()"
    return KernelNotFoundError(msg)


def bytes_gone(digest: str, place: str) -> KernelCorruptError:
    """Return the error of an artifact that is published and whose bytes cannot be served."""
    msg = (
        f"the stored bytes of {digest} were damaged or are gone; what was left of them is in "
        f"{place}; put the artifact again to repair it"
    )
    return KernelCorruptError(msg)


def book_lost(book: str, blobs: str, num_artifacts: int) -> KernelSourceUnavailable:
    """Return the error of a book that is gone while artifacts are there."""
    msg = (
        f"{book} is gone or empty, and artifacts lie in {blobs} ({num_artifacts}): what they are "
        "and which of them are published stood there. Put it back from a backup; or move the "
        "artifacts away, or name another place for them, to begin anew, and publish again what you "
        "want of them"
    )
    return KernelSourceUnavailable(msg)


def bytes_of_another_book(book: str, blobs: str) -> KernelSourceUnavailable:
    """Return the error of a book beside bytes that are not its own."""
    msg = (
        f"the artifacts in {blobs} are of another book than {book}, which may be one that was lost "
        "and begun anew: it would have all of them collected. Put the other back from a backup, or "
        "give each book a place of its own; or move everything away that is in blobs/ there, to "
        "begin anew, and publish again what you want of it"
    )
    return KernelSourceUnavailable(msg)


def no_such_tag(name: str, tag: str) -> KernelNotFoundError:
    """Return the error of a tag that is not there."""
    msg = f"there is no {name}:{tag} here; set it with tag(), or look with history()"
    return KernelNotFoundError(msg)


def no_way_back(name: str, tag: str) -> KernelNotFoundError:
    """Return the error of a tag that never pointed elsewhere."""
    msg = f"{name}:{tag} has never pointed elsewhere; look with history()"
    return KernelNotFoundError(msg)


def keep_signature(signature: KernelSignature, kept: list[KernelSignature]) -> bool:
    """Put a signature to those that are kept, and say whether it was not there yet.

    Raises:
        ValueError: There are as many as are kept.
    """
    if signature in kept:
        return False
    if len(kept) >= MOST_OF_ONE_KERNEL:
        digest = signature.artifact_id
        msg = f"{digest} has {MOST_OF_ONE_KERNEL} signatures, and no more are kept of one artifact"
        raise ValueError(msg)
    kept.append(signature)
    return True


def no_such_job(job_id: str) -> KernelNotFoundError:
    """Return the error of a job that nobody asked for."""
    msg = f"there is no blueprint {job_id} here; submit it first, or look at the list"
    return KernelNotFoundError(msg)


def job_lost(job_id: str, worker: str, attempt: int) -> JobLostError:
    """Return the error of a worker whose job is another's by now, or was finished."""
    msg = (
        f"job {job_id} is not with {worker!r} at attempt {attempt} any more; what was done for it "
        "changes nothing: claim another"
    )
    return JobLostError(msg)


class StillTaggedError(ValueError):
    """What a tag points to cannot be withdrawn."""


class TooLargeError(ValueError):
    """An artifact is longer than the registry takes."""


def still_tagged(digest: str, tags: tuple[str, ...]) -> StillTaggedError:
    """Return the error of withdrawing what a tag points to."""
    msg = f"{digest} is still {', '.join(tags)}; move or untag that first"
    return StillTaggedError(msg)


def check_grace(grace_s: float) -> None:
    """Refuse a grace period that is negative.

    Raises:
        ValueError: It is.
    """
    if not grace_s >= 0:
        msg = f"a grace period is at least 0 s, found {grace_s}"
        raise ValueError(msg)


def tag_moved(name: str, tag: str, found: str | None) -> TagMovedError:
    """Return the error of a tag that is not where its mover has seen it."""
    place = "is not there any more" if found is None else f"points to {found} by now"
    msg = f"{name}:{tag} {place}, and was not moved; look at its history, and decide again"
    return TagMovedError(msg, found=found)


def check_token(text: str) -> None:
    """Refuse a token that no header can carry, and do not say it.

    Raises:
        ValueError: It is one.
    """
    if _SENDABLE.fullmatch(text) is None:
        msg = (
            "a token is made of letters, digits and signs of ASCII, on one line and without spaces "
            "at its ends, and this one is not"
        )
        raise ValueError(msg)


def check_limit(limit: int | None) -> None:
    """Refuse a page without room.

    Raises:
        ValueError: It has none.
    """
    if limit is not None and limit < 1:
        msg = f"a limit is at least 1, found {limit}; leave it out for everything"
        raise ValueError(msg)


def check_range(start: int, length: int) -> None:
    """Refuse a part that begins or ends before the first byte.

    Raises:
        ValueError: It does.
    """
    if start < 0 or length < 0:
        msg = f"a part has a start and a length of at least 0, found {start} and {length}"
        raise ValueError(msg)


def check_reason(reason: str) -> None:
    """Refuse a deprecation that does not say why.

    Raises:
        ValueError: The reason is empty, or too long to be read.
    """
    if not 0 < len(reason.strip()) <= len(reason) <= LONGEST_REASON:
        msg = f"a deprecation says why in 1 to {LONGEST_REASON} characters, found {reason!r:.100}"
        raise ValueError(msg)

"""What a repository of the Hub knows of the kernels in it: one file beside them (ADR 0029).

kernels/DIGEST  an artifact's bytes
index.json      {"format_version": "1.0",
                 "kernels": {DIGEST: what our own server says of it, without its tags},
                 "tags": {"NAME:TAG": every move, oldest first},
                 "signatures": {DIGEST: those of it, oldest first}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import KernelCorruptError, KernelSourceUnavailable
from esper.contracts.reference import check_digest, split_reference
from esper.contracts.signature import KernelSignature
from esper.registry import documents, refusals

if TYPE_CHECKING:
    from esper.contracts.ports import RegistryEntry, TagMove

_VERSION: Final = "1.0"
_NOT_TO_BE_READ: Final = (
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
    KernelCorruptError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubIndex:
    """The kernels of a repository, and its tags.

    Attributes:
        kernels: Entries by digest, without their tags.
        moves: Every move of a tag by ``name:tag``, oldest first.
        signatures: Those of an artifact by its digest, oldest first.
    """

    kernels: dict[str, RegistryEntry] = field(default_factory=dict)
    moves: dict[str, list[TagMove]] = field(default_factory=dict)
    signatures: dict[str, list[KernelSignature]] = field(default_factory=dict)

    @classmethod
    def read(cls, data: bytes, place: str) -> HubIndex:
        """Read the file.

        Raises:
            KernelSourceUnavailable: It cannot be read, or a newer Esper wrote it.
        """
        try:
            said = json.loads(data)
            is_known = str(said["format_version"]).partition(".")[0] == "1"
            kernels = [documents.to_entry(each) for each in said["kernels"].values()]
            moves = {
                ":".join(split_reference(name)): [documents.to_move(move) for move in found]
                for name, found in said["tags"].items()
            }
            signatures = {
                digest: [KernelSignature.from_document(each) for each in found]
                for digest, found in said["signatures"].items()
            }
            for entry in kernels:
                check_digest(entry.digest)
        except _NOT_TO_BE_READ as error:
            msg = f"{place} holds an index that is not to be read: {error!r:.200}"
            raise KernelSourceUnavailable(msg) from error
        if not is_known:
            msg = f"{place} was written by a newer Esper; install that"
            raise KernelSourceUnavailable(msg)
        known = {entry.digest: entry for entry in kernels}
        return cls(kernels=known, moves=moves, signatures=signatures)

    def text(self) -> bytes:
        """Return the file."""
        document = {
            "format_version": _VERSION,
            "kernels": {digest: documents.of_entry(e) for digest, e in self.kernels.items()},
            "tags": {
                name: [documents.of_move(move) for move in moves]
                for name, moves in self.moves.items()
            },
            "signatures": {
                digest: [signature.to_document() for signature in found]
                for digest, found in self.signatures.items()
            },
        }
        return json.dumps(document, indent=1, sort_keys=True).encode()

    def pointed(self, name: str, tag: str) -> str | None:
        """Return the digest that a tag points to; None where there is no such tag."""
        moves = self.moves.get(f"{name}:{tag}")
        return moves[-1].digest if moves else None

    def pointing(self) -> dict[tuple[str, str], str]:
        """Return where every tag points, sorted."""
        names = sorted(split_reference(each) for each in self.moves)
        found = ((key, self.pointed(*key)) for key in names)
        return {key: digest for key, digest in found if digest is not None}

    def entry(self, digest: str) -> RegistryEntry:
        """Return what is known of one artifact, without its tags.

        Raises:
            KernelNotFoundError: It is not published.
        """
        if digest not in self.kernels:
            raise refusals.not_published(digest)
        return self.kernels[digest]

    def entries(self) -> list[RegistryEntry]:
        """Return what is known of every artifact, with its tags."""
        tags: dict[str, list[str]] = {}
        for (name, tag), digest in self.pointing().items():
            tags.setdefault(digest, []).append(f"{name}:{tag}")
        return [
            replace(entry, tags=tuple(sorted(tags.get(entry.digest, ()))))
            for entry in self.kernels.values()
        ]

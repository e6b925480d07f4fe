"""A registry of which only what a trusted key has signed is read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, final

from esper.contracts import artifact_format
from esper.contracts.errors import EsperError, KernelCorruptError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from esper.contracts.ports import Registry
    from esper.contracts.signature import KernelSignature


class Trust(Protocol):
    """Whose signatures count; :class:`esper.registry.signing.TrustedKeys` is one."""

    def check(self, digest: str, signatures: Iterable[KernelSignature]) -> object:
        """Return where one of the signatures counts.

        Raises:
            KernelRefusedError: None does.
        """


@final
class TrustedSource:
    """A :class:`~esper.contracts.ports.Registry` whose kernels come signed, or not at all.

    Before bytes are fetched, their signatures are: of what nobody trusted has signed, no byte is
    read. A signature names the sha256 of the bytes, with which they are compared as ever. All that
    is not reading goes to the registry as it is.

    Args:
        registry: Where kernels and signatures are.
        trust: Whose signatures count.
    """

    def __init__(self, registry: Registry, trust: Trust) -> None:
        self._registry = registry
        self._trust = trust

    def fetch(self, digest: str) -> bytes:
        """Return an artifact's bytes; see :class:`~esper.contracts.ports.KernelSource`.

        Raises:
            KernelRefusedError: No trusted key has signed it.
            KernelCorruptError: The registry gave other bytes than those that were signed.
        """
        self._trust.check(digest, self._registry.signatures(digest))
        data = self._registry.fetch(digest)
        found = artifact_format.digest_of(data)
        if found != digest:
            msg = f"the bytes given for {digest}, which is signed, have the digest {found}"
            raise KernelCorruptError(msg)
        return data

    get = fetch

    def read(self, digest: str, start: int, length: int) -> bytes:
        """Return a part of an artifact; see :class:`~esper.contracts.ports.RangedSource`.

        Raises:
            KernelRefusedError: No trusted key has signed it.
        """
        self._trust.check(digest, self._registry.signatures(digest))
        return self._registry.read(digest, start, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def __reduce__(self) -> tuple[object, ...]:
        return TrustedSource, (self._registry, self._trust)


def keys_of(text: str) -> Trust:
    """Return trusted keys; see :class:`esper.registry.signing.TrustedKeys`.

    Raises:
        EsperError: The extra is not installed.
        ValueError: There is no key in the text, or something else.
    """
    with sign_extra():
        from esper.registry.signing import TrustedKeys  # cryptography comes with it: late
    return TrustedKeys(text)


@contextmanager
def sign_extra() -> Iterator[None]:
    """Say how to install what signatures need.

    Raises:
        EsperError: It is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        msg = "signatures need the extra 'sign': pip install 'esper-morph[sign]'"
        raise EsperError(msg) from error

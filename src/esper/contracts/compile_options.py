"""How a blueprint is to be compiled and tried, beyond what it says itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject

ANY_TOOLCHAIN: Final = "any"
"""The toolchain of a job that whoever comes first may compile."""

_MOST: Final = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What a compiled kernel is tried on.

    Attributes:
        batch: Samples in the input, from 1 to 4,096.
        size: Length of each free axis of the input spec (``"H"``, ``"W"``), from 1 to 4,096; more
            where the kernel's windows need more.

    Raises:
        ValueError: A number is none of these.
    """

    batch: int = 8
    size: int = 32

    def __post_init__(self) -> None:
        for name in ("batch", "size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MOST:
                msg = f"the option {name} is an integer from 1 to {_MOST}, found {value!r:.80}"
                raise ValueError(msg)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: JsonObject) -> Self:
        """Read the JSON form, in which what has its default may be left out.

        Raises:
            ValueError: It has other fields, or a value that it cannot have.
        """
        known = {field.name for field in fields(cls)}
        if not document.keys() <= known:
            msg = f"options are {sorted(known)}, found {sorted(document)!r:.200}"
            raise ValueError(msg)
        return cls(**document)  # type: ignore[arg-type] # it looks at every field itself

"""HTML and SVG built from elements, so that no text reaches a page unescaped."""

from __future__ import annotations

from html import escape
from typing import Final

_VOID: Final = frozenset({"base", "meta", "br", "hr", "input", "link"})


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element; children that are not :class:`Markup` are escaped, as attributes are.

    Args:
        name: Name of the element.
        children: What it contains, in order.
        attributes: By name; ``class_`` is ``class`` and ``view_box`` is ``viewBox``, other
            underscores become hyphens. None leaves an attribute out.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            parts.append(f'{_attribute_name(key)}="{escape(str(shown))}"')
    opening = " ".join(parts)
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Return the children one after another, each escaped unless it is markup."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    )


def _attribute_name(key: str) -> str:
    return "viewBox" if key == "view_box" else key.rstrip("_").replace("_", "-")

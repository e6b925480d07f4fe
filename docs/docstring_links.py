"""What griffe has to be told about Esper's docstrings before mkdocstrings makes pages of them.

Docstrings name objects by roles, ``:meth:`graft```, which Markdown does not know: they become
links where the reference has the object, and code where it has not. A role on a page whose object
does not exist becomes a link to nowhere, which `make docs` refuses. Classes of layers take their
arguments in ``_construct``, because their ``__new__`` passes all of them on; that is shown.
"""

from __future__ import annotations

import re
from typing import Final

import griffe

ROLE: Final = re.compile(r":(?:attr|class|data|func|meth):`~?([^`]+)`")


class DocstringLinks(griffe.Extension):
    """Turn roles into links, and give layers the signature of their constructor."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Link what the docstring of an object names."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """Show ``_construct``, where a class has one, as what calling the class takes."""
        construct = cls.members.get("_construct")
        if isinstance(construct, griffe.Function):
            _, *parameters = construct.parameters  # the first is the class
            shown = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
            cls.set_member("__init__", shown)


def _link(obj: griffe.Object, name: str) -> str:
    """Return a link to what ``name`` means in the docstring of ``obj``, as HTML."""
    try:
        path, may_be_left_out = _path(obj, name), " optional"
    except (griffe.NameResolutionError, KeyError):
        path, may_be_left_out = name, ""
    return f'<autoref{may_be_left_out} identifier="{path}"><code>{name}</code></autoref>'


def _path(obj: griffe.Object, name: str) -> str:
    """Return the full path of what ``name`` means: a member, inherited ones too, or a global.

    Raises:
        NameResolutionError: The first part of the name means nothing here.
        KeyError: A later part does.
    """
    first, *rest = name.split(".")
    package = obj.package
    scope = obj if obj.is_class else obj.parent
    if first == package.name:
        found = package
    elif scope is not None and scope.is_class and first in scope.all_members:
        found = scope.all_members[first]
    else:
        found = package[obj.resolve(first).removeprefix(f"{package.name}.")]
    for part in rest:
        found = found.all_members[part]
    return found.canonical_path

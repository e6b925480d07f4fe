"""Write ``docs/rest.md`` from the OpenAPI document of the registry's server.

    python docs/rest_document.py

It holds nothing that the document does not say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from esper.registry.memory import MemoryRegistry
from esper.server.app import build_api

PAGE: Final = Path(__file__).parent / "rest.md"
_HEAD: Final = """\
# The registry over HTTP

Written by `python docs/rest_document.py` from what the server itself documents at
`/api/v1/openapi.json`; do not change it by hand. How to run a server, and what its answers
promise, is in [A registry](registry.md).

An operation needs the scope beside its address, as `Authorization: Bearer TOKEN`; none implies
another. A refusal is `application/problem+json` (RFC 9457) whose `type` ends in a word for
programs. Any operation may answer these, and what else it may answer stands with it. Headers of
RFC 9110 mean what they mean there: `If-None-Match` where a kernel, its bytes or a tag is read,
`Range` and `If-Range` for its bytes, and `If-Match: "DIGEST"` or `If-None-Match: *` where a tag
is moved or taken away.

{refusals}
"""


def as_markdown() -> str:
    """Return the page."""
    document = build_api(MemoryRegistry()).openapi()
    found = [
        (operation["tags"][0], method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    common = set.intersection(*(set(o["responses"]) for *_, o in found if "security" in o))
    common = {status for status in common if status >= "400"}
    refusals = next(o["responses"] for *_, o in found if "security" in o)
    parts = [_HEAD.format(refusals=_statuses(refusals, common))]
    for tag in dict.fromkeys(tag for tag, *_ in found):
        parts.append(f"## {tag.capitalize()}\n")
        parts += [_section(*rest, common) for name, *rest in found if name == tag]
    return "\n".join([*parts, _forms(document)])


def _section(method: str, path: str, operation: dict[str, Any], common: set[str]) -> str:
    scopes = [s for each in operation.get("security", []) for s in next(iter(each.values()))]
    lines = [f"### {method} {path}\n", f"{operation['description']}\n"]
    lines.append(f"Scope: {', '.join(f'`{s}`' for s in scopes) or 'none; open to all'}.\n")
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            (f"`{p['name']}`", p["in"], _form(p["schema"]), p.get("description", ""))
            for p in parameters
        ]
        lines.append(_table(("parameter", "in", "form", "what"), rows))
    body = _schema_of(operation.get("requestBody"))
    if body:
        lines.append(f"Body: {_described(body)}\n")
    own = {status: a for status, a in operation["responses"].items() if status not in common}
    lines.append(_answers(own))
    return "\n".join(lines)


def _answers(responses: dict[str, Any]) -> str:
    rows = []
    for status, answer in sorted(responses.items()):
        schema = _schema_of(answer)
        what = "" if schema is None or status >= "400" else _described(schema)
        said = answer["description"].replace("Successful Response", "Done")
        rows.append((status, f"{said}; {what}" if what else said))
    return _table(("status", "answer"), rows)


def _statuses(responses: dict[str, Any], chosen: set[str]) -> str:
    rows = [(status, responses[status]["description"]) for status in sorted(chosen)]
    return _table(("status", "why"), rows).rstrip()


def _schema_of(holder: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the schema of a body; None where it has none."""
    for media_type, content in (holder or {}).get("content", {}).items():
        schema: dict[str, Any] = content.get("schema") or {}
        return schema if schema.get("$ref") else {"title": f"`{media_type}`"}
    return None


def _described(schema: dict[str, Any]) -> str:
    """Return what a body is: the name of a form, or a media type."""
    return _form(schema) if "$ref" in schema else str(schema["title"])


def _forms(document: dict[str, Any]) -> str:
    """Return every form with its fields."""
    parts = ["## Forms\n"]
    for name, model in sorted(document["components"]["schemas"].items()):
        required = set(model.get("required", ()))
        rows = [
            (f"`{field}`", _form(form), "" if field in required else "may be left out")
            for field, form in model["properties"].items()
        ]
        heads = ("field", "form", "")
        parts.append(f"### {name}\n\n{model['description']}\n\n{_table(heads, rows)}")
    return "\n".join(parts)


def _form(schema: dict[str, Any]) -> str:
    """Return what a value looks like, in words."""
    if "anyOf" in schema:
        return " or ".join(_form(each) for each in schema["anyOf"])
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(f"`{value}`" for value in values)
    words = [str(schema.get("type", "any"))]
    if words == ["array"]:
        words = [f"list of {_form(schema['items'])}"]
    if "pattern" in schema:
        words.append(f"`{schema['pattern']}`")
    for name, sign in (("minimum", "at least"), ("maximum", "at most"), ("maxLength", "at most")):
        if name in schema:
            words.append(f"{sign} {schema[name]}")
    return " ".join(words)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


if __name__ == "__main__":
    PAGE.write_text(as_markdown(), encoding="utf-8")

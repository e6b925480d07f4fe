"""What the ``esper kernels`` commands print for people."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from esper.cli.console import printable
from esper.cli.tables import SHOWN_OF_DIGEST, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from esper.contracts.ports import RegistryEntry, TagMove
    from esper.contracts.standing import Standing


def print_entries(console: Console, entries: Sequence[RegistryEntry]) -> None:
    """Print what was found, a line each, and how it has done where there are reports of any."""
    heads: tuple[str, ...] = ("kernel", "blueprint", "reads", "gives", ">parameters", ">bytes")
    heads += ("names", "published")
    rows: list[tuple[str, ...]] = [
        (
            entry.digest[:SHOWN_OF_DIGEST],
            entry.metadata.blueprint_id,
            _spec(entry.metadata.input_spec.shape),
            _spec(entry.metadata.output_spec.shape),
            f"{entry.metadata.parameter_count:,}",
            f"{entry.size_bytes:,}",
            " ".join(entry.tags) + ("" if entry.deprecation is None else " (deprecated)"),
            _when(entry.published_at_s),
        )
        for entry in entries
    ]
    if any(entry.standing is not None for entry in entries):
        heads = (*heads, ">saved of the loss", ">at least, 95 %", ">runs")
        rows = [
            (*row, *_standing(entry.standing)) for row, entry in zip(rows, entries, strict=True)
        ]
    print_table(console, "Kernels", heads, rows)


def print_entry(console: Console, entry: RegistryEntry, signed: Sequence[str]) -> None:
    """Print all that is known of one kernel, and who has signed it."""
    metadata = entry.metadata
    lines = {
        "kernel": entry.digest,
        "blueprint": f"{metadata.blueprint_id} ({metadata.blueprint_digest[:SHOWN_OF_DIGEST]})",
        "reads, gives": f"{_spec(metadata.input_spec.shape)}, {_spec(metadata.output_spec.shape)} "
        f"{metadata.dtype}",
        "at a site": f"{metadata.position}, {metadata.mode}",
        "parameters": f"{metadata.parameter_count:,}",
        "bytes": f"{entry.size_bytes:,}",
        "names": " ".join(entry.tags) or "none",
        "published": _when(entry.published_at_s),
        "signed": "; ".join(signed) or "by nobody",
    }
    if entry.standing is not None:
        saved, at_least, runs = _standing(entry.standing)
        lines["has saved"] = f"{saved} of the loss, at least {at_least} at 95 %, reports of {runs}"
        lines["has saved"] += " run" if entry.standing.num_runs == 1 else " runs"
    if entry.deprecation is not None:
        successor = entry.deprecation.successor
        after = "" if successor is None else f"; use {successor}"
        lines["deprecated"] = f"{entry.deprecation.reason}{after}"
    lines |= {f"record, {name}": str(value) for name, value in entry.record.items()}
    width = max(map(len, lines))
    for name, text in lines.items():
        console.print(printable(f"{name:{width}}  {text}"), soft_wrap=True)


def print_history(console: Console, name: str, moves: Sequence[TagMove]) -> None:
    """Print every move of a tag, oldest first."""
    rows = [
        (_when(m.moved_at_s), (m.digest or "taken away")[:SHOWN_OF_DIGEST], m.actor or "")
        for m in moves
    ]
    print_table(console, f"Where {name} pointed", ("from", "kernel", "moved by"), rows)


def _spec(shape: Sequence[int | str]) -> str:
    return " x ".join(str(size) for size in shape)


def _standing(standing: Standing | None) -> tuple[str, str, str]:
    """Return the pooled effect with its standard error, what it is above, and of how many runs."""
    if standing is None:
        return "", "", ""
    effect = f"{standing.effect:+.1%} ± {standing.standard_error:.1%}"
    return effect, f"{standing.lower:+.1%}", f"{standing.num_runs:,}"


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")

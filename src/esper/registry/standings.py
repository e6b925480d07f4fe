"""How blueprints stand: field reports pooled when they come in, so that a search only sorts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from esper.contracts.kernel_reports import FieldReport
from esper.contracts.standing import Standing, pooled

if TYPE_CHECKING:
    from esper.registry.database import Database

EVERY_KIND: Final = ""
"""Stands for sites of whatever kind; no kind is called so."""

_MOST_POOLED: Final = 1_000
"""Reports of a blueprint that are pooled at most, the newest."""

_GROUP: Final = "CASE WHEN effect > 0 THEN 0 WHEN effect IS NULL THEN 1 ELSE 2 END"
_LOWER: Final = "COALESCE(lower_bound, 0.0)"

JOIN: Final = (
    "LEFT JOIN standings ON of_blueprint = artifacts.blueprint_digest AND at_kind = :at_kind"
)
COLUMNS: Final = "effect, standard_error, lower_bound, num_runs"
OF_ARTIFACT: Final = (
    "COALESCE((SELECT blueprint_digest FROM artifacts WHERE artifacts.digest = :digest), :said)"
)
"""The blueprint that a report is about: the artifact's own, whatever the report says."""
PROVEN: Final = f"{_GROUP}, {_LOWER} DESC, seq"
"""The order of what is proven; see ``SearchOrder``."""
BEYOND: Final = (
    f"({_GROUP} > :group OR {_GROUP} = :group AND ({_LOWER} < :lower OR "
    f"{_LOWER} = :lower AND seq > :after))"
)
"""What comes after an entry in that order; for the values that :func:`place_of` returns."""
_PLACE: Final = f"SELECT {_GROUP}, {_LOWER} FROM artifacts {JOIN} WHERE seq = :after"  # noqa: S608 - words of our own


def pool(database: Database, blueprint_digest: str, site_kind: str) -> None:
    """Pool the reports of a blueprint anew: at sites of a kind, and at all."""
    for kind in (site_kind, EVERY_KIND):
        where = "" if kind == EVERY_KIND else "AND site_kind = :site_kind "
        found = database.rows(
            "SELECT report FROM outcomes WHERE blueprint_digest = :blueprint_digest "  # noqa: S608 - words of our own
            f"{where}ORDER BY seq DESC LIMIT :limit",
            blueprint_digest=blueprint_digest,
            limit=_MOST_POOLED,
            **({"site_kind": kind} if where else {}),
        )
        standing = pooled(FieldReport.from_document(json.loads(text)) for (text,) in found)
        if standing is not None:
            _keep(database, blueprint_digest, kind, standing)


def place_of(database: Database, after: int, at_kind: str) -> dict[str, object]:
    """Return where an entry stands; one that was withdrawn stood where nothing is known."""
    found = database.rows(_PLACE, after=after, at_kind=at_kind) or [(1, 0.0)]
    return {"group": found[0][0], "lower": found[0][1]}


def standing_of(row: tuple[object, ...]) -> Standing | None:
    """Read the columns of a standing; None where there is none."""
    effect, standard_error, lower, num_runs = row
    if effect is None:
        return None
    return Standing(effect=effect, standard_error=standard_error, lower=lower, num_runs=num_runs)  # type: ignore[arg-type] # as the table says


def _keep(database: Database, blueprint_digest: str, kind: str, standing: Standing) -> None:
    database.rows(
        "INSERT INTO standings "
        "VALUES (:blueprint, :kind, :effect, :standard_error, :lower, :num_runs) "
        "ON CONFLICT (of_blueprint, at_kind) DO UPDATE SET effect = excluded.effect, "
        "standard_error = excluded.standard_error, lower_bound = excluded.lower_bound, "
        "num_runs = excluded.num_runs",
        blueprint=blueprint_digest,
        kind=kind,
        effect=standing.effect,
        standard_error=standing.standard_error,
        lower=standing.lower,
        num_runs=standing.num_runs,
    )

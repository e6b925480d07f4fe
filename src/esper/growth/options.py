"""Every keyword of the Grower: the numbers of :class:`GrowthSettings`, and parts to put in."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Final, ForwardRef, ParamSpec

from esper.contracts.arguments import check_type, whole_number
from esper.growth.budget import Budget
from esper.growth.callbacks import TAKES, check_function
from esper.growth.policies import check_policy
from esper.growth.settings import GrowthSettings, SettingOptions

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from esper.compiler.catalog import Catalog
    from esper.continuity.placement import GroupFor
    from esper.contracts.ports import Clock, EventSink, Registry
    from esper.contracts.progress import ProgressRow
    from esper.growth.batch import LossFunction, OwnUpdate
    from esper.growth.policies import Policy
    from esper.growth.ranking import Ranking


P = ParamSpec("P")


class GrowerOptions(SettingOptions, total=False):
    """What :class:`esper.Grower` takes by keyword, and what ``GrowthJob(grower=...)`` may hold.

    What each means is told in :class:`esper.Grower`.
    """

    compute_loss: LossFunction | None
    evaluate: Callable[[nn.Module], object] | None
    update: OwnUpdate | None
    twin: Callable[[], nn.Module] | None
    group_for: GroupFor | None
    policy: Policy | None
    ranking: Ranking | None
    catalog: Catalog | None
    registry: Registry | str | Path | None
    preload_bytes: int | None
    budget: Budget | None
    run_dir: str | Path | None
    fit_like: str | Path | None
    clock: Clock | None
    sink: EventSink | None
    on_progress: Callable[[ProgressRow], object] | None


PARTS: Final = tuple(
    name for name in GrowerOptions.__annotations__ if name not in SettingOptions.__annotations__
)
"""Names of the options that are no numbers; None leaves each at its default."""

_GONE: Final = {
    "verify": 'attribution="trial", "run" or "none" says what a package is held against beside the '
    "live run",
    "looks": "a verdict is read once, on weights averaged over the second half of the trial",
    "candidates": "the best kernels of all sites are tried together, as a package",
    "embargo": "tries= says after how many refusals nothing more is tried",
}
"""Arguments of before, and what to do instead."""

_METHODS: Final = {
    "ranking": ("rank",),
    "catalog": ("blueprints_for",),
    "registry": ("put", "get", "search", "report_outcome"),
    "clock": ("now",),
    "sink": ("publish",),
}
"""What a part is asked for; one that lacks a method is refused before anything is trained."""


def check_options(options: Mapping[str, object]) -> GrowthSettings:
    """Refuse options that the Grower does not take, and return the settings among them.

    Args:
        options: Values by name.

    Raises:
        TypeError: A name is unknown, or a value is of the wrong type.
        ValueError: A setting is out of its range.
    """
    known = [*PARTS, *SettingOptions.__annotations__]
    for name in options:
        if name not in known:
            raise TypeError(_unknown(name, known))
    for name in PARTS:
        part = options.get(name)
        if part is not None:
            _check_part(name, part)
    return GrowthSettings.of(options)


def _unknown(name: str, known: list[str]) -> str:
    if name == "settings":
        return (
            "the Grower takes each setting by its name: Grower(model, optimizer, "
            "**settings.as_options())"
        )
    if name in _GONE:
        return f"{name!r} is none of the Grower's arguments any more; {_GONE[name]}"
    nearest = difflib.get_close_matches(str(name), known, n=1)
    cure = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(sorted(known))}"
    return f"{name!r} is none of the Grower's arguments; {cure}"


def _check_part(name: str, part: object) -> None:
    """Refuse a part that cannot do its work."""
    if name in TAKES:
        check_function(name, part)
    if name == "budget":
        check_type(name, part, Budget, "an esper.Budget")
    if name in ("run_dir", "fit_like"):
        check_type(name, part, (str, os.PathLike), "a path")
    if name == "preload_bytes":
        whole_number(name, part, least=0)
    if name == "policy":
        check_policy(name, part)
    if name == "registry" and isinstance(part, (str, os.PathLike)):
        return
    methods = _METHODS.get(name, ())
    if methods and isinstance(part, type):
        msg = f"{name} is an object, got the class {part.__name__}; make one of it"
        raise TypeError(msg)
    missing = [method for method in methods if not hasattr(part, method)]
    if missing:
        is_registry = name == "registry"
        what = f"{name} is an address, or has" if is_registry else f"{name} has"
        cure = "; esper.open_registry(address) opens one" if is_registry else ""
        msg = f"{what} the method {missing[0]}(); {type(part).__name__} has none{cure}"
        raise TypeError(msg)


def show_options(init: Callable[P, None]) -> Callable[P, None]:
    """Let ``help`` and ``inspect.signature`` show every option by name in place of ``**options``.

    Args:
        init: A constructor whose last parameter is ``**options: Unpack[GrowerOptions]``.
    """
    written = inspect.signature(init)
    own = [p for p in written.parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = dict.fromkeys(PARTS) | {f.name: f.default for f in fields(GrowthSettings)}
    shown = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=_written_type(GrowerOptions.__annotations__[name]),
        )
        for name, default in defaults.items()
    ]
    init.__dict__["__signature__"] = written.replace(parameters=[*own, *shown])
    return init


def _written_type(annotation: object) -> str:
    """Return an annotation as it stands in the source."""
    return annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else str(annotation)

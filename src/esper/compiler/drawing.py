"""A blueprint drawn as text: its operations in the order in which they run, and what each reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.compiler.lowering import checked_plan
from esper.contracts.blueprint import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.compiler.graph import Plan, Step
    from esper.contracts.blueprint import BlueprintIR, TensorSpec

_UNSAID: Final = {"init_after"}
_FREE: Final = -1


def draw(blueprint: BlueprintIR) -> str:
    """Return a blueprint as lines of text: a rail for each value that is still to be read.

    Raises:
        BlueprintError: The blueprint breaks a rule.
    """
    made = checked_plan(blueprint)
    rows = [(INPUT, _spec(blueprint.input_spec), "")]
    rows += [(step.id, _words(step), _read_by(step, made)) for step in made.steps]
    rows.append((OUTPUT, _spec(blueprint.output_spec), made.steps[-1].id))
    rails = _rails(made)
    rail, name, what = (
        max(map(len, column))
        for column in (rails, [row[0] for row in rows], [row[1] for row in rows])
    )
    head = (
        f"{blueprint.id}: {blueprint.mode}, {blueprint.position}, "
        f"{made.parameter_count:,} parameters, {blueprint.input_spec.dtype}"
    )
    lines = [
        f"{drawn:{rail}}  {row[0]:{name}}  {row[1]:{what}}  {row[2] and '<- ' + row[2]}".rstrip()
        for drawn, row in zip(rails, rows, strict=True)
    ]
    return "\n".join([head, "", *lines])


def _rails(made: Plan) -> list[str]:
    """Return the rails at each row: the input's, each step's, and the output's."""
    wiring: list[Sequence[int]] = [(), *(step.inputs for step in made.steps), (len(made.steps),)]
    last_read = {value: row for row, inputs in enumerate(wiring) for value in inputs}
    lanes: list[int] = []
    drawn = []
    for row, inputs in enumerate(wiring):
        read = [lanes.index(value) for value in dict.fromkeys(inputs)]
        ending = [lane for lane in read if last_read[lanes[lane]] == row]
        free = [lane for lane, value in enumerate(lanes) if value == _FREE]
        lane = next(iter([*ending, *free]), len(lanes))
        if lane == len(lanes):
            lanes.append(_FREE)
        drawn.append(_rail(lanes, lane, read, ending))
        for each in ending:
            lanes[each] = _FREE
        lanes[lane] = row
        while lanes[-1] == _FREE:
            lanes.pop()
    return drawn


def _rail(lanes: Sequence[int], own: int, read: Sequence[int], ending: Sequence[int]) -> str:
    """Return one row of rails: a dot in a step's own lane, and lines to the lanes that it reads."""
    left, right = min([own, *read]), max([own, *read])
    text = ""
    for lane, value in enumerate(lanes):
        is_between = left < lane < right
        if lane == own:
            mark = "●"
        elif lane in ending:
            mark = "╯" if lane == right else "╰" if lane == left else "┴"
        elif lane in read:
            mark = "┤" if lane == right else "├" if lane == left else "┼"
        elif value == _FREE:
            mark = "─" if is_between else " "
        else:
            mark = "┼" if is_between else "│"
        text += mark + ("─" if left <= lane < right else " ")
    return text.rstrip()


def _read_by(step: Step, made: Plan) -> str:
    return ", ".join(INPUT if i == 0 else made.steps[i - 1].id for i in step.inputs)


def _words(step: Step) -> str:
    """Return an operation with the settings that are not its defaults."""
    known = step.operation.attributes
    said = [
        f"{name}={_text(value)}"
        for name, value in step.settings.items()
        if name not in _UNSAID
        and value not in (known[name].default, (known[name].default,) * known[name].spread)
    ]
    return " ".join([step.op_type, *said])


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _spec(spec: TensorSpec) -> str:
    return f"[{', '.join(map(str, spec.shape))}]"

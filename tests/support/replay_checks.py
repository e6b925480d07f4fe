"""What a log can know of a run, taken out of a report."""

from dataclasses import fields, is_dataclass

from esper.observability.replay import NOT_IN_A_LOG


def in_a_log(value):
    """Return a report, or a part of one, as plain values without what no event tells."""
    if isinstance(value, tuple):
        return tuple(map(in_a_log, value))
    if not is_dataclass(value):
        return value
    absent = NOT_IN_A_LOG.get(type(value).__name__, ())
    return {f.name: in_a_log(getattr(value, f.name)) for f in fields(value) if f.name not in absent}

"""What every row of the table of kinds must have elsewhere, and which of it is missing."""

from execution_hosts import KINDS

from esper.compiler.catalog import CONTROLS, default_catalog
from esper.execution.host_class import FAMILIES
from esper.seeds.fold_target import FOLD_TARGETS
from esper.state.made_call import MADE_CALLS
from esper.state.site import SITE_READERS


def missing(kind):
    """Return what the rooms and the suites lack for a row, each by where it belongs."""
    offered = {entry.name for entry in default_catalog().entries}
    found = {
        "esper.state.site.SITE_READERS": kind.name in SITE_READERS,
        "esper.state.made_call.MADE_CALLS": kind.name in MADE_CALLS,
        "esper.seeds.fold_target.FOLD_TARGETS": kind.name in FOLD_TARGETS,
        "esper.execution.host_class.FAMILIES": kind.family in FAMILIES,
        "esper.compiler.catalog.CONTROLS": kind.site in CONTROLS,
        "esper.compiler.catalog.default_catalog": {*kind.kernels} <= offered and kind.kernels,
        "tests/support/execution_hosts.py": kind in [host.kind for host in KINDS.values()],
    }
    return [place for place, is_there in found.items() if not is_there]

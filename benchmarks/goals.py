"""The table: what each line measures, what it is meant to reach, and why where it does not."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the table.

    Attributes:
        row: Number of the row; a row may have several lines.
        key: What measurements name it by.
        what: What is measured, for people.
        unit: ``"x"``, ``"us"``, ``"ms"``, ``"B"``, or empty for a count.
        limit: The largest value that meets the goal; None where there is none.
        at_least: Whether ``limit`` is the smallest such value instead.
        reason: Why the goal is missed, found by profiling; empty where it is met.
    """

    row: int
    key: str
    what: str
    unit: str
    limit: float | None = None
    at_least: bool = False
    reason: str = ""

    def is_met(self, value: float) -> bool | None:
        """Say whether a value reaches the goal; None where there is none."""
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = (
    Goal(
        row=1,
        key="dormant",
        what="dormant layer over the bare module, Linear(8, 8), batch 1",
        unit="x",
        limit=1.02,
    ),
    Goal(
        row=1,
        key="dormant wide",
        what="dormant layer over the bare module, Linear(512, 512), batch 32",
        unit="x",
        limit=1.02,
    ),
    Goal(
        row=1,
        key="instructions",
        what="dormant layer over the bare module, instructions, Linear(8, 8), batch 1",
        unit="x",
        limit=1.02,
    ),
    Goal(
        row=2,
        key="telemetry",
        what="dormant layer with telemetry, over the bare module",
        unit="us",
        limit=1.0,
    ),
    Goal(
        row=2,
        key="telemetry compiled",
        what="operations that telemetry adds to a compiled graph, dormant and active",
        unit="",
        limit=0,
    ),
    Goal(
        row=3,
        key="step",
        what="active seed, guard=step, eager, forward + backward, over by hand",
        unit="x",
        limit=1.05,
    ),
    Goal(
        row=3,
        key="always",
        what="active seed, guard=always, eager, forward + backward, over by hand",
        unit="x",
        limit=1.10,
        reason=(
            "the hooks that look at the gradients of four parameters and of the kernel's input "
            "take three quarters of it, each a sum, its reading and a call of Python of 3 us"
        ),
    ),
    Goal(
        row=3,
        key="always compiled",
        what="active seed, guard=always, compiled, forward + backward, over by hand compiled",
        unit="x",
        limit=1.05,
        reason=(
            "hooks on four parameters outside of the graph take a third of it, the pass over the "
            "sum in the forward another, the gates in the backward and the guards of the plan the "
            "rest; maxima in place of sums, no ring, and no gate on the input each changed less "
            "than the noise"
        ),
    ),
    Goal(
        row=3,
        key="flags",
        what="guard=step: reading the flag of one seed before a step",
        unit="us",
    ),
    Goal(
        row=3,
        key="fused 4",
        what="4 seeds of one form over one kernel 4 times as wide, guard=step, eager",
        unit="x",
        limit=1.15,
        reason=(
            "weights are joined in every forward, their gradients are cut up, and 12 more "
            "parameters take one; in a batch of 512 that weighs less"
        ),
    ),
    Goal(
        row=3,
        key="fused 8",
        what="8 seeds of one form over one kernel 8 times as wide, guard=step, eager",
        unit="x",
        limit=1.15,
        reason=(
            "weights are joined in every forward, their gradients are cut up, and 28 more "
            "parameters take one; in a batch of 512 that weighs less"
        ),
    ),
    Goal(
        row=3,
        key="fused many",
        what="8 seeds of one form over one kernel 8 times as wide, guard=step, eager, batch 512",
        unit="x",
        limit=1.15,
    ),
    Goal(
        row=3,
        key="fused convolutions",
        what="8 seeds of two convolutions over one kernel 8 times as wide, guard=step, eager",
        unit="x",
    ),
    Goal(
        row=3,
        key="stacked",
        what="not used: 8 kernels of attention by torch.func on stacked parameters, over singly",
        unit="x",
    ),
    Goal(
        row=3,
        key="chain",
        what="not used: inference of a chain 512-32-512 by one map, made in the call, over layers",
        unit="x",
    ),
    Goal(
        row=3,
        key="fused compiled",
        what="8 seeds of one form, compiled, over the same plan one by one, compiled",
        unit="x",
        limit=1.02,
        reason="it is the same graph: what differs is the noise of the machine",
    ),
    Goal(
        row=4,
        key="fossil",
        what="fossil that stays in the plan, guard=off, forward + backward, over by hand",
        unit="x",
        limit=1.02,
    ),
    Goal(row=4, key="folded", what="fossil by folding over the bare host", unit="x", limit=1.02),
    Goal(row=5, key="breaks", what="torch.compile: graph breaks, all events", unit="", limit=0),
    Goal(row=5, key="recompiles dormant", what="recompiles while dormant", unit="", limit=0),
    Goal(row=5, key="recompiles alpha", what="recompiles per change of alpha", unit="", limit=0),
    Goal(
        row=5,
        key="recompiles swap",
        what="recompiles per swap to the same kernel graph",
        unit="",
        limit=0,
    ),
    Goal(row=5, key="recompiles idle", what="recompiles per dormant and back", unit="", limit=0),
    Goal(row=5, key="recompiles morph", what="recompiles per new kernel graph", unit="", limit=1),
    Goal(
        row=5,
        key="still compiled",
        what="share of calls that ran compiled, over 20 different morphs",
        unit="",
        limit=1.0,
        at_least=True,
    ),
    Goal(
        row=6,
        key="live first",
        what="kernel in the cache -> live, first time at a site, probe included",
        unit="ms",
        limit=3.0,
    ),
    Goal(
        row=6,
        key="live again",
        what="kernel in the cache -> live, again",
        unit="ms",
        limit=0.5,
        reason=(
            "making the kernel from its artifact takes two fifths, putting it in (slot, gates, "
            "plan) another two; what is probed at a site is remembered, so no arithmetic is left"
        ),
    ),
    Goal(
        row=7,
        key="live directory",
        what="kernel in a local directory -> live, first time at a site",
        unit="ms",
        limit=5.0,
    ),
    Goal(
        row=7,
        key="live directory over PEFT",
        what="kernel in a local directory -> live, first time at a site, over PEFT load_adapter",
        unit="x",
        limit=2.0,
    ),
    Goal(
        row=7,
        key="live directory again over PEFT",
        what="kernel in a local directory -> live, its probe remembered, over PEFT load_adapter",
        unit="x",
        limit=1.0,
    ),
    Goal(
        row=8,
        key="live http",
        what="1 MB kernel over HTTP on loopback -> live, first time at a site",
        unit="ms",
        limit=15.0,
    ),
    Goal(
        row=9,
        key="cache hit",
        what="cache hit over cachetools",
        unit="x",
        limit=1.5,
    ),
    Goal(
        row=10,
        key="transition",
        what="transition of a seed's state, checked and counted",
        unit="us",
        limit=0.5,
    ),
    Goal(
        row=11,
        key="failing",
        what="kernel that raises: the same forward gives the host's output, added to the host",
        unit="us",
        limit=50.0,
    ),
    Goal(
        row=12,
        key="stored",
        what="blueprint -> artifact stored in a directory, warm",
        unit="ms",
        limit=10.0,
    ),
    Goal(
        row=13,
        key="arrays",
        what="arrays of a layout, bytes a seed",
        unit="B",
        limit=40.0,
    ),
    Goal(
        row=13,
        key="memory",
        what="process memory of one layout of 1,000,000 seeds, bytes a seed",
        unit="B",
        limit=40.0,
    ),
    Goal(
        row=14,
        key="wrap",
        what="wrap: time a layer at 1,000 layers x 8 seeds, over that at 250",
        unit="x",
        limit=1.25,
    ),
    Goal(row=14, key="wrap layer", what="wrap: time a layer at 1,000 layers x 8 seeds", unit="us"),
    Goal(
        row=14,
        key="step size",
        what="controller step with 8 active seeds: at 1,000 layers over at 10",
        unit="x",
        limit=1.25,
    ),
    Goal(
        row=14,
        key="step idle",
        what="controller step at 1,000 layers x 8 seeds, all dormant",
        unit="us",
    ),
    Goal(
        row=14,
        key="step seed",
        what="controller step: added by each active seed (guard=always, one call to read)",
        unit="us",
    ),
    Goal(
        row=15,
        key="gpu syncs",
        what="on a GPU: forwards that waited for the device",
        unit="",
        limit=0,
    ),
    Goal(
        row=15,
        key="gpu graph",
        what="on a GPU: active layer captured in a CUDA graph (1 is yes)",
        unit="",
        limit=1,
        at_least=True,
    ),
    Goal(
        row=15,
        key="gpu async",
        what="on a GPU: synchronous over asynchronous convolution, batch 1, 4 seeds",
        unit="x",
        limit=1.2,
        at_least=True,
    ),
    Goal(
        row=16,
        key="controller",
        what="an update of 1,051,000 parameters under a controller, all dormant, over one without",
        unit="x",
        limit=1.01,
        reason=(
            "hooks before and behind the optimizer's step and a call that counts update, work and "
            "loss, which the training has driven out of the processor's caches; nothing else is "
            "asked while nothing is due, and what is left is a count each"
        ),
    ),
    Goal(
        row=17,
        key="metadata",
        what="requests a second for what is known of a kernel, over those of a bare FastAPI route",
        unit="x",
        limit=0.65,
        at_least=True,
    ),
)

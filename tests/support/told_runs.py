"""Events as runs tell them, made by hand."""

from __future__ import annotations

import itertools

from esper.contracts.events import (
    Detected,
    Evaluated,
    Fossilized,
    GateRead,
    Noted,
    PassengerRemoved,
    Ranked,
    RegistryUnavailable,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    StageChanged,
    TakenOver,
    TrialRead,
    TrialStarted,
)


def told_run(num_packages=1, run_id="0" * 32):
    """Yield a run whose packages, of two kernels each, are taken over or refused by turns."""
    seq, update = itertools.count(), 0

    def at():
        return {"update": update, "time_s": update / 10, "run_id": run_id, "seq": next(seq)}

    yield RunStarted(**at(), settings={"overhead": 0.5, "goal": "min", "horizon": None})
    for package in range(1, num_packages + 1):
        update += 10
        grafts, sites = (2 * package - 1, 2 * package), (f"layer.{package}.a", f"layer.{package}.b")
        blueprints, taken = ("mlp-4x4", "gated-4x4"), package % 2 == 1
        yield Evaluated(
            **at(), gate_loss=1 / package, train_loss=2 / package, metrics={"accuracy": 0.5}
        )
        yield Detected(**at(), grow=True, verdict="diminishing", reason="it slows down")
        yield Ranked(**at(), rows=[{"site": sites[0]}], refused=[{"site": sites[1]}])
        for stage, before in (("germinated", ""), ("trial", "germinated")):
            for graft, site, blueprint in zip(grafts, sites, blueprints, strict=True):
                yield StageChanged(
                    **at(),
                    graft=graft,
                    site=site,
                    seed_idx=0,
                    blueprint=blueprint,
                    artifact_id=f"{graft:064x}",
                    before=before,
                    after=stage,
                    reason="",
                    package=package,
                )
        both = {"package": package, "grafts": grafts, "sites": sites}
        yield TrialStarted(**at(), **both, blueprints=blueprints, parameters=99, trial_updates=5)
        update += 5
        verdict = "taken over" if taken else "refused"
        yield TrialRead(
            **at(),
            package=package,
            sites=sites,
            verdict=verdict,
            reason="z = 4",
            effect=0.5,
            stderr=0.1,
            z=4.0,
            flops=1e9,
        )
        if taken:
            yield TakenOver(**at(), **both, taken="candidate")
            update += 5
            yield PassengerRemoved(
                **at(),
                package=package,
                graft=grafts[1],
                site=sites[1],
                rise=0.0,
                upper=0.1,
                allowed=0.2,
                reason="it does without",
            )
            yield Fossilized(
                **at(), graft=grafts[0], site=sites[0], folded=False, rel_diff=None, reason=""
            )
        else:
            yield RolledBack(**at(), graft=grafts[0], updates_lost=5, reason="it rose")
        yield GateRead(
            **at(),
            graft=grafts[0],
            gate="admission",
            passed=taken,
            effect=0.5,
            stderr=0.1,
            z=5.0,
            level=0.05,
            samples=200,
            reason="read",
        )
        yield SeedFaulted(
            **at(), site=sites[0], seed_idx=0, faults=3, state="active", reason="it raised"
        )
        yield RegistryUnavailable(
            **at(), operation="put", artifact_id=f"{package:064x}", reason="refused"
        )
        yield Noted(**at(), text="a word")
    yield RunEnded(**at(), grafts_admitted=2, grafts_fossilized=1, reason="done")

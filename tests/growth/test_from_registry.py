"""Kernels of a registry in a run: asked for beside it, verified, ranked, judged and reported."""

import re
import threading
from dataclasses import replace

import pytest
import torch
from growing import compute_loss, equal_states, evaluate, growing, state_of, train, wrapped

from esper.compiler.catalog import Catalog, default_catalog
from esper.compiler.codec import encode_kernel
from esper.compiler.compile import compile_blueprint
from esper.compiler.linear_form import linear_form
from esper.compiler.lowering import instantiate
from esper.contracts.errors import KernelSourceRefused, KernelSourceUnavailable
from esper.contracts.events import RegistryUnavailable
from esper.contracts.kernel_reports import FieldReport
from esper.contracts.lifecycle import GraftStage
from esper.contracts.run_records import GraftRecord
from esper.growth.budget import Budget
from esper.growth.grower import Grower
from esper.growth.offers import name_of
from esper.growth.policies import EveryN
from esper.observability.report_page import run_page
from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

pytestmark = pytest.mark.slow

UPDATES = 120
EMPTY = Catalog(entries=())
"""No kernel of the run's own, so that what grows is a registry's."""
ONE_PACKAGE = {"catalog": EMPTY, "budget": Budget(packages=1)}


@pytest.fixture(autouse=True)
def closes_soon(monkeypatch):
    """Let a registry that is down hold up the end of a run for a moment only."""
    monkeypatch.setattr("esper.growth.grower.CLOSING_S", 0.2)


class Watched(MemoryRegistry):
    """Remembers by which thread it was asked what; its answers are waited for in ``settled``."""

    def __init__(self):
        super().__init__()
        self.calls, self.tampered = [], {}

    def search(self, **asked):
        self.calls.append(("search", threading.current_thread()))
        return super().search(**asked)

    def fetch(self, digest):
        self.calls.append(("fetch", threading.current_thread()))
        return self.tampered.get(digest) or super().get(digest)

    get = fetch

    def report_outcome(self, report):
        self.calls.append(("report", threading.current_thread()))
        super().report_outcome(report)


class Down(MemoryRegistry):
    """Answers nothing."""

    def search(self, **asked):
        raise KernelSourceUnavailable("it did not answer")

    put = fetch = get = report_outcome = search


@pytest.mark.parametrize("name", ["mlp", "m" * 64])
def test_the_linear_form_of_a_registrys_kernel_is_told_as_its_own(name):
    """What a run took over in a kernel's place is shown under its name, with its digest."""
    artifact = compile_blueprint(replace(kernels_for()[0], id=name))
    shown = name_of(artifact)
    form = linear_form(replace(artifact.blueprint, id=shown)).id
    assert form == f"{shown}-linear"

    _, grower, _ = grown(MemoryRegistry(), num=20)
    record = GraftRecord(
        graft=1,
        site="0",
        seed_idx=0,
        blueprint=form,
        artifact_id=artifact.artifact_id,
        stage=GraftStage.FOSSILIZED,
        verdict="kept",
        reason="it was kept",
        parameters=1,
        germinated_at=0,
    )
    report = replace(grower.report(), grafts=(record,))
    assert f"{form}: digest {artifact.artifact_id}" in str(report)
    assert re.search(rf"{form}.*{artifact.artifact_id}", run_page(report))
    elsewhere = replace(record, artifact_id="0" * 64)
    assert not elsewhere.is_of_a_registry


def kernels_for(site="0"):
    layer = layers(wrapped()[0])[site]
    width = layer.in_features
    return default_catalog().blueprints_for(describe_site(layer, torch.zeros(2, width)))


def published(registry, *blueprints):
    return [registry.put(compile_blueprint(b).kernel_binary) for b in blueprints]


def settle(grower):
    """Wait until the registry has been asked all that there is to ask."""
    preloader = grower._run.offers._preloader
    assert preloader.settle(20)


def grown(registry, *, num=UPDATES, settles=True, **options):
    """Train a run that asks early and decides late, so that answers are there."""
    torch.manual_seed(0)
    model, optimizer = wrapped()
    events = []
    given = {"registry": registry, **ONE_PACKAGE, "policy": EveryN(40), **options}
    with growing(model, optimizer, sink=Notebook(events), **given) as grower:
        for part in range(num // 20):
            train(model, optimizer, 20, grower, random_seed=part)
            if settles:
                settle(grower)
    return model, grower, events


class Notebook:
    never_waits = True

    def __init__(self, events):
        self.publish = events.append


def test_a_kernel_that_fits_grows_in_the_run(tmp_path):
    """It comes by search, under a name with its digest; no step asked the registry anything."""
    registry = Watched()
    digests = published(registry, *kernels_for()[:2])
    registry.tag("mlp", "good", digests[0])
    registry.calls.clear()
    _, grower, _ = grown(registry)

    report = grower.report()
    (trial,) = report.trials
    assert trial.verdict == "kept"
    assert not [note for note in report.notes if "not offered" in note], "at the norm beside it"
    (graft,) = [g for g in report.grafts if g.site == "0"]
    assert graft.artifact_id in digests
    assert graft.blueprint.endswith(f".{graft.artifact_id[:12]}")
    assert graft.is_of_a_registry
    assert f"{graft.blueprint}: digest {graft.artifact_id}" in str(report)
    page = run_page(report)
    (row,) = re.findall(rf"<tr>(?:(?!</tr>).)*<td[^>]*>{graft.artifact_id}</td></tr>", page)
    assert graft.blueprint in row
    assert "fetched, verified, probed" in {e.reason for e in report.timeline if e.graft == 1}
    assert any("is a registry's" in note and graft.artifact_id in note for note in report.notes)
    assert {what for what, _ in registry.calls} == {"search", "fetch", "report"}
    assert threading.current_thread() not in {thread for _, thread in registry.calls}


def test_what_is_done_to_a_kernel_is_told_with_how_long_it_took():
    """A registry's is fetched, loaded and probed; the run's own is compiled in place of a fetch."""
    registry = Watched()
    digests = published(registry, *kernels_for()[:2])
    _, _, theirs = grown(registry, num=80)
    _, _, own = grown(None, catalog=None, settles=False, num=80)

    fetched = [e for e in theirs if e.kind == "kernel_prepared" and e.what == "fetch"]
    assert sorted(e.artifact_id for e in fetched) == sorted(digests)
    assert all(e.took_s > 0 for e in fetched)
    assert done_before_germination(theirs) == [("load", "probe")]
    assert set(done_before_germination(own)) == {("compile", "load", "probe")}
    assert not [e for e in own if e.kind == "kernel_prepared" and e.took_s is not None]


def done_before_germination(events):
    """Return, for each kernel that germinated, what the run itself did to it, in order."""
    done, found = [], []
    for event in events:
        if event.kind == "kernel_prepared" and event.what != "fetch":
            done.append(event.what)
        elif event.kind == "stage_changed" and not event.before:
            found.append(tuple(done))
            done = []
    return found


def test_it_is_ranked_beside_the_catalog():
    """What is on offer at the site is the catalog's and the registry's, in one ranking."""
    registry = Watched()
    mine, theirs = kernels_for()[:2]
    (digest,) = published(registry, replace(theirs, init_seed=7))
    _, _, events = grown(registry, catalog=None, num=80)
    ranked = next(e for e in events if e.kind == "ranked")
    names = [row["blueprint"] for row in ranked.rows if row["site"] == "0"]
    assert mine.id in names
    assert f"{theirs.id}.{digest[:12]}" in names


def test_a_kernel_that_the_catalog_makes_is_not_offered_twice():
    """A run's own kernels come back in a search, and are the same."""
    registry = Watched()
    published(registry, *kernels_for())
    _, _, events = grown(registry, catalog=None, num=80)
    ranked = next(e for e in events if e.kind == "ranked")
    assert not [row for row in ranked.rows if re.search(r"\.[0-9a-f]{12}$", row["blueprint"])]


def test_a_trained_kernel_enters_at_the_alpha_that_its_probe_allows():
    """Its last layer is not zero: it begins at alpha 0 and is ramped in, like any."""
    registry = Watched()
    made = compile_blueprint(kernels_for()[0])
    trained = with_weights(made, 0.1)
    digest = registry.put(trained)
    _, grower, _ = grown(registry)
    (graft,) = [g for g in grower.report().grafts if g.site == "0"]
    assert graft.artifact_id == digest
    assert grower.report().trials[0].effect is not None


def with_weights(artifact, value):
    """Return an artifact's bytes with every weight set: it is the identity no more."""
    module = instantiate(artifact)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(value)
    return encode_kernel(module)


def test_what_is_tampered_with_never_enters():
    """Verified before it can be chosen; the journal has it once, and the next best is taken."""
    registry = Watched()
    bad, good = published(registry, *kernels_for()[:2])
    registry.tampered[bad] = registry.get(good)
    _, grower, _ = grown(registry)

    report = grower.report()
    assert {g.artifact_id for g in report.grafts if g.site == "0"} == {good}
    assert len([n for n in report.notes if bad[:12] in n and "not offered" in n]) == 1


def test_what_a_search_should_not_have_given_is_offered_where_it_fits_only():
    """A registry that answers with everything does not decide what is tried where."""
    registry = Watched()
    digests = published(registry, *kernels_for("4")[:1])
    registry.search = lambda **_: MemoryRegistry.search(registry)
    _, grower, _ = grown(registry)
    assert {g.site for g in grower.report().grafts} == {"4"}
    assert {g.artifact_id for g in grower.report().grafts} == set(digests)


def test_a_registry_that_is_down_costs_a_run_nothing():
    """The same weights bit for bit as without one, one event of the search, nothing raised."""
    alone, _, _ = grown(None, catalog=None, settles=False, num=60)
    down, _, events = grown(Down(), catalog=None, num=60)
    assert equal_states(state_of(alone), state_of(down))
    told = [e for e in events if isinstance(e, RegistryUnavailable)]
    assert [e.operation for e in told].count("search") == 1


def test_answers_are_taken_at_a_decision_only():
    """What comes while sites are recorded waits for the next: a ranking is of what was taken."""
    registry = Watched()
    (digest,) = published(registry, kernels_for()[0])
    may_answer = threading.Event()
    registry.search = lambda **asked: (
        may_answer.wait(20) and MemoryRegistry.search(registry, **asked)
    )
    torch.manual_seed(0)
    model, optimizer = wrapped()
    events = []
    given = {**ONE_PACKAGE, "policy": EveryN(40), "sink": Notebook(events)}
    with growing(model, optimizer, registry=registry, **given) as grower:
        train(model, optimizer, 42, grower)
        may_answer.set()
        settle(grower)
        train(model, optimizer, 58, grower, random_seed=1)
    first, second = (e for e in events if e.kind == "ranked")
    assert (first.update, first.rows) == (44, [])
    assert digest[:12] in second.rows[0]["blueprint"]


def test_every_decided_graft_is_reported_once():
    """With what its package brought, relative to the loss, under run and graft."""
    registry = Watched()
    (digest,) = published(registry, kernels_for()[0])
    _, grower, _ = grown(registry)

    report = grower.report()
    (trial,) = report.trials
    (told,) = registry.outcomes(digest)
    assert (told.run_id, told.graft_id, told.verdict) == (report.run_id, "1", "fossilized")
    assert (told.site_kind, told.in_features, told.out_features) == ("linear", 4, 4)
    assert (told.unit, told.num_looks) == ("relative", trial.samples)
    before = next(e for e in reversed(report.evaluations) if e.update <= trial.decided_at)
    assert told.contribution == pytest.approx(trial.effect / len(trial.grafts) / before.gate_loss)
    (entry,) = registry.search(order="proven")
    assert entry.standing.effect > 0


def test_a_refused_kernel_is_reported_as_well():
    """Reports of the lucky alone would say that everything works."""
    registry = Watched()
    (digest,) = published(registry, kernels_for()[0])
    _, grower, _ = grown(registry, min_effect=1e6)
    assert [t.verdict for t in grower.report().trials] == ["refused"]
    assert [r.verdict for r in registry.outcomes(digest)] == ["refused in trial"]


class Refuses(Watched):
    """Refuses every report: for want of a right, or since it keeps none."""

    def report_outcome(self, report):
        self.calls.append(("report", threading.current_thread()))
        raise KernelSourceRefused(f"no reports of {report.artifact_id}")


def refused_reports(registry):
    """Let a run decide more than one graft; return how many reports it sent, and its notes."""
    published(registry, kernels_for()[0], kernels_for("4")[0])
    _, grower, _ = grown(registry, min_effect=1e6)
    assert len([g for g in grower.report().grafts if g.decided_at is not None]) == 2
    num_sent = [what for what, _ in registry.calls].count("report")
    return num_sent, [note for note in grower.report().notes if "report" in note]


def test_of_reports_that_are_refused_the_first_is_told():
    """Who can give the right reads it once, and not again for every kernel."""
    num_sent, notes = refused_reports(Refuses())
    assert num_sent == 2
    (note,) = notes
    assert "refused what was reported" in note


def test_a_registry_that_keeps_no_reports_is_sent_none():
    """It says so itself, as one of images does; nobody can change that, and nobody is told."""
    registry = Refuses()
    registry.keeps_reports = False
    assert refused_reports(registry) == (0, [])


def test_what_is_proven_meets_the_same_gate():
    """However good its reports are, the run's own held-out data decide: they are an order only."""
    registry = Watched()
    blueprint = kernels_for()[0]
    (digest,) = published(registry, blueprint)
    for run in range(30):
        report = FieldReport(
            artifact_id=digest,
            blueprint_digest=blueprint.digest,
            run_id=f"run-{run}",
            graft_id="1",
            site_kind="linear",
            in_features=4,
            out_features=4,
            metric="gate loss",
            unit="relative",
            contribution=0.9,
            standard_error=0.01,
            num_looks=300,
            verdict="fossilized",
        )
        registry.report_outcome(report)
    (entry,) = registry.search(order="proven")
    assert entry.standing.lower > 0.5
    _, grower, _ = grown(registry, min_effect=1e6)

    report = grower.report()
    assert [(t.verdict, t.grafts) for t in report.trials] == [("refused", (1,))]
    assert [g.artifact_id for g in report.grafts] == [digest]
    assert report.parameters_after == report.parameters_before


def test_reports_that_could_not_be_sent_are_sent_by_the_next_run(tmp_path):
    """The folder keeps them while the registry is down; the next run of the folder sends them."""

    class Fails(DirectoryRegistry):
        def report_outcome(self, report):
            raise KernelSourceUnavailable("it did not answer")

    fails = Fails(tmp_path / "kernels")
    (digest,) = published(fails, kernels_for()[0])
    _, grower, _ = grown(fails, run_dir=tmp_path / "run")
    assert any("has not taken 1 of the field reports" in n for n in grower.report().notes)
    assert fails.outcomes(digest) == []
    fails.close()

    registry = DirectoryRegistry(tmp_path / "kernels")
    grown(registry, run_dir=tmp_path / "run", num=20)
    assert [r.run_id for r in registry.outcomes(digest)] == [grower.report().run_id]
    assert not (tmp_path / "run" / "outbox").exists()
    registry.close()


def test_a_resumed_run_has_the_kernels_that_it_had():
    """It ends bit for bit as the run that was not stopped, and reports its graft once."""
    registry = Watched()
    digests = published(registry, *kernels_for()[:2])

    def run(stop_at=None, state=None):
        torch.manual_seed(0)
        model, optimizer = wrapped()
        given = {"registry": registry, **ONE_PACKAGE, "policy": EveryN(40)}
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        grower = growing(model, optimizer, **given)
        first = 0
        if state is not None:
            grower.load_state_dict(state["grower"])
            torch.set_rng_state(state["random"])
            first = stop_at
        for part in range(first, UPDATES // 20):
            if state is None and part == stop_at:
                saved = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "grower": grower.state_dict(),
                    "random": torch.get_rng_state(),
                }
                grower._run.outbox.close()  # the process ends; what was decided was sent
                return saved
            train(model, optimizer, 20, grower, random_seed=part)
            settle(grower)
        grower.close()
        return model, grower

    whole, whole_grower = run()
    cut = run(stop_at=1)
    gone = {"model", "optimizer", "grower", "random"}
    assert gone == set(cut)
    resumed, grower = run(stop_at=1, state=cut)
    assert equal_states(state_of(whole), state_of(resumed))
    assert [g.artifact_id for g in grower.report().grafts] == [
        g.artifact_id for g in whole_grower.report().grafts
    ]
    runs = {r.run_id for d in digests for r in registry.outcomes(d)}
    assert len(runs) == 2, "the whole run's and the cut one's, whichever process sent it"


@pytest.mark.parametrize("wrong", [3, b"kernels", MemoryRegistry, object(), ["kernels"]])
def test_what_is_no_registry_is_refused_at_once(wrong):
    """Before anything is hooked, with what it may be."""
    model, optimizer = wrapped()
    with pytest.raises(TypeError, match=r"registry is an (address|object)"):
        Grower(model, optimizer, compute_loss=compute_loss, evaluate=evaluate, registry=wrong)


def test_an_address_is_opened_and_closed(tmp_path):
    """A directory by its path; what grew is published there."""
    _, grower, _ = grown(str(tmp_path / "kernels"), catalog=None, num=80)
    registry = DirectoryRegistry(tmp_path / "kernels")
    found = {entry.digest for entry in registry.search()}
    assert found == {g.artifact_id for g in grower.report().grafts}
    registry.close()

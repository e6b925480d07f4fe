"""A run and its registry: kernels are published beside it, and named ones are fetched before it."""

import threading

import pytest
import torch
from growing import equal_states, growing, state_of, train, wrapped

from esper.compiler.catalog import default_catalog
from esper.compiler.codec import decode_artifact
from esper.compiler.compile import compile_blueprint
from esper.contracts.artifact_format import digest_of
from esper.contracts.errors import GrowthError, KernelSourceUnavailable
from esper.contracts.events import RegistryUnavailable
from esper.growth.policies import ByHand
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk_cache import DiskCache
from esper.registry.memory import MemoryRegistry
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

UPDATES = 40


class Watched(MemoryRegistry):
    """Remembers by which thread it was asked."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def put(self, data, **more):
        self.threads.append(threading.current_thread())
        return super().put(data, **more)

    def get(self, digest):
        self.threads.append(threading.current_thread())
        return super().get(digest)

    fetch = get


class Down(MemoryRegistry):
    """Answers nothing."""

    def put(self, data, **more):
        raise KernelSourceUnavailable("it did not answer")


class Notebook:
    """Keeps every event."""

    never_waits = True

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


def blueprint():
    """Return a kernel that the first layer of the host is offered."""
    layer = layers(wrapped()[0])["0"]
    return default_catalog().blueprints_for(describe_site(layer, torch.zeros(2, 4)))[0]


def grown(registry, *, kernel=None, run_dir=None):
    """Grow one kernel by hand into a trial, and end there; return what there was to see."""
    torch.manual_seed(0)
    model, optimizer = wrapped()
    notebook = Notebook()
    policy = ByHand([("0", kernel or blueprint())])
    options = {"policy": policy, "registry": registry, "sink": notebook, "run_dir": run_dir}
    with growing(model, optimizer, **options) as grower:
        train(model, optimizer, UPDATES, grower)
    return model, grower, notebook.events


class Elsewhere(MemoryRegistry):
    """Has an address, as a registry behind a network does, and may be down."""

    address = "http://kernels"


class ElsewhereAndDown(Down):
    """The same one while it does not answer."""

    address = Elsewhere.address


def test_what_could_not_be_sent_is_sent_by_the_next_run_through_a_cache(tmp_path):
    """A disk cache before a registry hides nothing of whose the parcels in a folder are."""
    _, _, events = grown(
        CachedRegistry(ElsewhereAndDown(), DiskCache(tmp_path / "cache")), run_dir=tmp_path / "run"
    )
    (left,) = {e.artifact_id for e in events if isinstance(e, RegistryUnavailable)}
    elsewhere = Elsewhere()
    model, optimizer = wrapped()
    cached = CachedRegistry(elsewhere, DiskCache(tmp_path / "cache"))
    with growing(model, optimizer, registry=cached, run_dir=tmp_path / "run"):
        pass
    assert elsewhere.exists(left)


def test_a_kernel_is_published_beside_the_run():
    """It is in the registry at the end, and no step asked for anything."""
    registry = Watched()
    _, grower, _ = grown(registry)

    (graft,) = grower.report().grafts
    assert [entry.digest for entry in registry.search()] == [graft.artifact_id]
    assert threading.current_thread() not in registry.threads


def test_a_registry_that_is_down_costs_a_run_nothing(tmp_path):
    """The same weights bit for bit; an event says it, and the run's folder keeps the kernel."""
    up, _, _ = grown(None)
    down, grower, events = grown(Down(), run_dir=tmp_path / "run")

    assert equal_states(state_of(up), state_of(down))
    (told,) = [event for event in events if isinstance(event, RegistryUnavailable)]
    (graft,) = grower.report().grafts
    assert (told.operation, told.artifact_id) == ("put", graft.artifact_id)
    assert "it did not answer" in told.reason
    kept = (tmp_path / "run" / "outbox" / graft.artifact_id).read_bytes()
    assert digest_of(kept) == graft.artifact_id
    assert any("has not taken 1 of the kernels" in note for note in grower.report().notes)


def test_a_kernel_named_by_its_digest_is_fetched_before_the_run():
    """What grows is that very kernel, and no step asked the registry for it."""
    registry = Watched()
    made = compile_blueprint(blueprint())
    digest = registry.put(made.kernel_binary)
    _, grower, _ = grown(registry, kernel=digest)

    assert [graft.artifact_id for graft in grower.report().grafts] == [digest]
    assert decode_artifact(registry.get(digest)).blueprint.id == grower.report().grafts[0].blueprint


@pytest.mark.parametrize(
    ("registry", "told"),
    [(None, "there is no registry="), (MemoryRegistry(), "the registry does not have it")],
)
def test_a_kernel_that_is_not_to_be_had_is_refused_at_once(registry, told):
    """Before anything is hooked; the model and the optimizer are free for the next Grower."""
    with pytest.raises(GrowthError, match=told):
        grown(registry, kernel="0" * 64)

"""What every registry promises, whoever implements it."""

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_artifacts import artifact

from esper.contracts.errors import KernelCorruptError, KernelNotFoundError
from esper.contracts.ports import TagMove

NOBODY = "0" * 64


def test_a_published_artifact_comes_back_byte_for_byte(registry):
    """What was put under its digest is what get and fetch return."""
    data = artifact(1)
    digest = registry.put(data)

    assert digest == hashlib.sha256(data).hexdigest()
    assert registry.get(digest) == registry.fetch(digest) == data


def test_an_unknown_digest_is_answered_not_found(registry):
    """A digest that nobody published is an answer of its own, not a failure of the storage."""
    assert not registry.exists(NOBODY)
    with pytest.raises(KernelNotFoundError, match=NOBODY):
        registry.get(NOBODY)


@pytest.mark.parametrize("name", ["", "../etc/passwd", "A" * 64, NOBODY + "\n", NOBODY[1:]])
def test_only_a_digest_is_an_address(registry, name):
    """Nothing but 64 lower-case hexadecimal digits is ever looked up."""
    for operation in (registry.get, registry.exists, registry.delete):
        with pytest.raises(ValueError, match="is not a digest"):
            operation(name)


def test_bytes_that_are_no_artifact_are_not_stored(registry):
    """A put verifies the format before anything is stored."""
    data = artifact(1)[:-1] + b"\x00\x00"

    with pytest.raises(KernelCorruptError):
        registry.put(data)

    assert not registry.exists(hashlib.sha256(data).hexdigest())
    assert registry.verify().unreferenced == ()


def test_bytes_of_another_digest_are_not_stored(registry):
    """A publisher who says which digest it sends is told when something else arrives."""
    data = artifact(1)

    with pytest.raises(KernelCorruptError, match="send again"):
        registry.put(data, digest=NOBODY)

    assert not registry.exists(hashlib.sha256(data).hexdigest())


def test_an_artifact_over_the_size_limit_is_refused(registry):
    """What fills the limit is taken, and what passes it is not."""
    overhead = len(artifact(1, size=10_000)) - 40_000
    filling = artifact(1, size=(100_000 - overhead) // 4)
    assert 99_990 < len(filling) <= 100_000

    registry.put(filling)
    with pytest.raises(ValueError, match="takes 100000"):
        registry.put(artifact(1, size=25_000))


def test_putting_again_changes_nothing(registry):
    """The same bytes may be published twice; the first record stays."""
    data = artifact(1)
    digest = registry.put(data, record={"toolchain": "first"})

    assert registry.put(data, record={"toolchain": "second"}) == digest

    (entry,) = registry.search()
    assert entry.record == {"toolchain": "first"}


def test_a_record_is_json(registry):
    """A record comes back as JSON values, and what is not JSON is refused before storing."""
    data = artifact(1)
    with pytest.raises(ValueError, match="kept as JSON"):
        registry.put(data, record={"when": object()})
    assert registry.search() == []

    registry.put(data, record={"sizes": (1, 2)})
    assert registry.search()[0].record == {"sizes": [1, 2]}


def test_search_returns_what_meets_every_criterion_oldest_first(registry):
    """Exact fields, flags and ranges combine, and the order is the order of publishing."""
    small = registry.put(artifact(2, size=10, adds_capacity=False))
    middle = registry.put(artifact(1, size=20))
    large = registry.put(artifact(0, size=30, mode="replace"))

    def found(**criteria):
        return [entry.digest for entry in registry.search(**criteria)]

    assert found() == [small, middle, large]
    assert found(blueprint_id="kernel-1") == [middle]
    assert found(adds_capacity=True) == [middle, large]
    assert found(adds_capacity=False) == [small]
    assert found(min_parameter_count=20) == [middle, large]
    assert found(max_parameter_count=20) == [small, middle]
    assert found(min_parameter_count=11, max_parameter_count=29) == [middle]
    assert found(adds_capacity=True, mode="replace", position="parallel") == [large]
    assert found(blueprint_id="kernel-1", mode="replace") == []


def test_an_entry_says_what_the_header_says(registry):
    """Size, metadata and tags of an entry are those of the artifact."""
    data = artifact(7, size=12, zeroed="weight", lineage=(NOBODY,))
    digest = registry.put(data)
    registry.tag("mlp", "latest", digest)
    registry.tag("mlp", "b-1", digest)

    (entry,) = registry.search()

    assert (entry.digest, entry.size_bytes) == (digest, len(data))
    assert entry.tags == ("mlp:b-1", "mlp:latest")
    assert (entry.metadata.blueprint_id, entry.metadata.zeroed) == ("kernel-7", "weight")
    assert entry.metadata.lineage == (NOBODY,)


def test_an_unknown_criterion_is_a_type_error(registry):
    """A misspelt criterion is never taken for one that everything meets."""
    with pytest.raises(TypeError, match="paramter_count"):
        registry.search(paramter_count=3)


def test_a_tag_moves_and_remembers(registry, wall):
    """A tag points to the latest digest, and its history to all of them with their times."""
    first, second = registry.put(artifact(1)), registry.put(artifact(2))
    for now_s, digest in ((10.0, first), (20.0, second), (25.0, second)):
        wall.now_s = now_s
        registry.tag("mlp", "latest", digest)
    assert registry.resolve("mlp:latest") == second

    wall.now_s = 30.0
    registry.untag("mlp", "latest")

    with pytest.raises(KernelNotFoundError, match="mlp:latest"):
        registry.resolve("mlp:latest")
    assert registry.history("mlp", "latest") == [
        TagMove(digest=first, moved_at_s=10.0),
        TagMove(digest=second, moved_at_s=20.0),
        TagMove(digest=None, moved_at_s=30.0),
    ]


def test_a_tag_needs_a_published_artifact(registry):
    """A tag never points to nothing, and a tag that is not there cannot be taken away."""
    with pytest.raises(KernelNotFoundError):
        registry.tag("mlp", "latest", NOBODY)
    with pytest.raises(KernelNotFoundError):
        registry.untag("mlp", "latest")
    assert registry.history("mlp", "latest") == []


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "Upper", "a/b", "a:b", "a b", "x" * 65, "a\n"]
)
def test_names_keep_to_one_alphabet(registry, name):
    """Names and tags match [a-z0-9][a-z0-9._-]{0,63} and nothing else, wherever they are given."""
    digest = registry.put(artifact(1))
    for pair in ((name, "latest"), ("mlp", name)):
        with pytest.raises(ValueError, match="expected"):
            registry.tag(*pair, digest)
        with pytest.raises(ValueError, match="expected"):
            registry.history(*pair)
        with pytest.raises(ValueError, match="expected"):
            registry.resolve(":".join(pair))


def test_the_longest_name_is_taken(registry):
    """A name of 64 characters of the alphabet is a name."""
    name = "0" + "a._-" * 15 + "xyz"
    digest = registry.put(artifact(1))

    registry.tag(name, name, digest)

    assert registry.resolve(f"{name}:{name}") == digest


def test_what_is_tagged_cannot_be_withdrawn(registry):
    """Deleting is refused while a tag points there, and works once it does not."""
    digest = registry.put(artifact(1))
    registry.tag("mlp", "latest", digest)
    with pytest.raises(ValueError, match="mlp:latest"):
        registry.delete(digest)
    assert registry.exists(digest)

    registry.untag("mlp", "latest")
    registry.delete(digest)

    assert not registry.exists(digest)
    with pytest.raises(KernelNotFoundError):
        registry.get(digest)
    with pytest.raises(KernelNotFoundError):
        registry.delete(digest)


def test_bytes_go_after_two_collections_a_grace_period_apart(registry, wall):
    """The first collection only marks; one that comes too early takes nothing."""
    kept, withdrawn = registry.put(artifact(1)), registry.put(artifact(2))
    registry.delete(withdrawn)

    assert registry.collect(grace_s=60.0) == ()
    wall.now_s += 59.0
    assert registry.collect(grace_s=60.0) == ()
    assert registry.verify().unreferenced == (withdrawn,)
    wall.now_s += 1.0
    assert registry.collect(grace_s=60.0) == (withdrawn,)
    assert registry.verify().unreferenced == ()
    assert registry.get(kept) == artifact(1)


def test_publishing_again_saves_bytes_from_collection(registry, wall):
    """A digest that comes back starts its grace period anew when it is withdrawn again."""
    digest = registry.put(artifact(1))
    registry.delete(digest)
    registry.collect(grace_s=60.0)
    registry.put(artifact(1))
    wall.now_s += 1_000.0
    assert registry.collect(grace_s=60.0) == ()
    assert registry.get(digest) == artifact(1)

    registry.delete(digest)

    assert registry.collect(grace_s=60.0) == ()


def test_a_withdrawal_undone_between_two_collections_starts_anew(registry, wall):
    """Being published in between counts, though no collection looked at that time."""
    digest = registry.put(artifact(1))
    registry.delete(digest)
    registry.collect(grace_s=60.0)
    wall.now_s += 1_000.0
    registry.put(artifact(1))
    registry.delete(digest)

    assert registry.collect(grace_s=60.0) == ()


@pytest.mark.parametrize("grace_s", [-1.0, float("nan")])
def test_a_grace_period_is_not_negative(registry, grace_s):
    """A grace period that could hasten a removal is refused."""
    with pytest.raises(ValueError, match="at least 0"):
        registry.collect(grace_s=grace_s)


def test_verify_counts_what_is_intact(registry):
    """A look at a sound registry finds every artifact and nothing else."""
    for number in range(3):
        registry.put(artifact(number))

    check = registry.verify()

    assert (check.intact, check.quarantined, check.missing, check.unreferenced) == (3, (), (), ())


def test_threads_may_publish_and_read_at_once(registry):
    """Eight threads that publish, read and tag the same twenty artifacts lose nothing."""

    def work(number):
        digest = registry.put(artifact(number % 20))
        registry.tag("mlp", f"t{number}", digest)
        return registry.get(digest) == artifact(number % 20)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(80)))
    assert len(registry.search()) == 20
    assert registry.resolve("mlp:t79") == registry.resolve("mlp:t59")


def test_closing_twice_does_nothing(registry):
    """A registry may be closed by whoever is last, and again."""
    registry.close()
    registry.close()


def test_a_pickled_registry_still_has_its_artifacts(registry):
    """A registry can travel to another process with what refers to it."""
    digest = registry.put(artifact(1))

    copy = pickle.loads(pickle.dumps(registry))

    assert copy.get(digest) == artifact(1)
    copy.close()

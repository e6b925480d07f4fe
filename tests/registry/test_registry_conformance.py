"""What every registry promises, whoever implements it."""

import hashlib
import pickle
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_artifacts import artifact
from registries import in_a_directory, in_memory

from esper.contracts.blueprint import TensorSpec
from esper.contracts.errors import KernelCorruptError, KernelNotFoundError, TagMovedError
from esper.contracts.kernel_reports import FieldReport, ValidationReport
from esper.contracts.ports import TagMove
from esper.contracts.signature import KernelSignature

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


def test_search_finds_what_fits_a_site(registry):
    """Kind, widths and dtype are a site's; what a serial kernel reads is what the site gives."""
    flat, image = TensorSpec(("*", 8)), TensorSpec((8, "H", "W"))
    widening = registry.put(artifact(0, input_spec=flat, output_spec=TensorSpec(("*", 16))))
    behind = registry.put(artifact(1, input_spec=flat, output_spec=flat, position="serial"))
    conv = registry.put(artifact(2, input_spec=image, output_spec=image))
    half = TensorSpec(("*", 8), "float16")
    halved = registry.put(artifact(3, size=9, input_spec=half, output_spec=half))

    def found(**criteria):
        return [entry.digest for entry in registry.search(**criteria)]

    assert found(kind="linear", in_features=8, out_features=16) == [widening]
    assert found(kind="linear", in_features=4, out_features=8) == [behind]
    assert found(kind="linear", in_features=8, out_features=8, dtype="float32") == [behind]
    assert found(kind="conv2d", in_features=8, out_features=8) == [conv]
    assert found(kind="block", out_features=8, num_axes=2) == [conv]
    assert found(dtype="float16", min_size_bytes=1) == [halved]
    assert found(max_size_bytes=1) == []


@pytest.mark.parametrize(
    "wrong", [{"kind": "lstm"}, {"in_features": "8"}, {"deprecated": 1}, {"out_features": 1 << 63}]
)
def test_a_criterion_has_a_value_of_its_type(registry, wrong):
    """What could never be met is a mistake, not an empty answer."""
    with pytest.raises(ValueError, match=f"the criterion {next(iter(wrong))}"):
        registry.search(**wrong)


def test_a_search_comes_in_pages(registry):
    """Pages hold everything once, in either order, whatever is withdrawn meanwhile."""
    digests = [registry.put(artifact(number)) for number in range(5)]

    def pages(order, limit):
        after = None
        while page := registry.search(limit=limit, after=after, order=order):
            assert len(page) <= limit
            after = page[-1].number
            yield from (entry.digest for entry in page)

    assert list(pages("oldest", 2)) == digests
    assert list(pages("newest", 3)) == digests[::-1]
    first = registry.search(limit=2)
    registry.delete(first[-1].digest)
    assert [e.digest for e in registry.search(after=first[-1].number)] == digests[2:]


def test_a_page_is_asked_for_properly(registry):
    """A page has room, and an order that there is."""
    for wrong in ({"limit": 0}, {"order": "best"}):
        with pytest.raises(ValueError, match=r"at least 1|one of oldest, newest"):
            registry.search(**wrong)


def test_names_and_tags_are_listed(registry):
    """Every name that has a tag, in pages, and where each of its tags points."""
    first, second = registry.put(artifact(1)), registry.put(artifact(2))
    for name, tag, digest in (("b", "x", first), ("a", "y", second), ("a", "x-1", first)):
        registry.tag(name, tag, digest)

    assert registry.names() == ["a", "b"]
    assert registry.names(limit=1) == ["a"]
    assert registry.names(limit=1, after="a") == ["b"]
    assert registry.tags("a") == {"x-1": first, "y": second}
    assert registry.tags("c") == {}


def test_of_two_promotions_one_is_told_that_it_lost(registry):
    """A tag moves only from where its mover has seen it, and is left alone otherwise."""
    digests = [registry.put(artifact(number)) for number in range(3)]
    registry.tag("mlp", "prod", digests[0], expected=None, actor="ann")
    registry.tag("mlp", "prod", digests[1], expected=digests[0], actor="ben")

    with pytest.raises(TagMovedError) as raised:
        registry.tag("mlp", "prod", digests[2], expected=digests[0])
    assert raised.value.found == digests[1]
    with pytest.raises(TagMovedError):
        registry.tag("mlp", "prod", digests[2], expected=None)
    with pytest.raises(TagMovedError):
        registry.untag("mlp", "prod", expected=digests[0])
    assert registry.resolve("mlp:prod") == digests[1]
    assert len(registry.history("mlp", "prod")) == 2


def test_control_without_a_guard_a_promotion_is_lost(registry):
    """Two who read and then write without saying what they read: the first one's move is gone."""
    digests = [registry.put(artifact(number)) for number in range(2)]
    for digest in digests:
        registry.tag("mlp", "prod", digest)

    assert registry.resolve("mlp:prod") == digests[1]


def test_an_artifact_is_read_in_parts(registry):
    """Parts from any byte on make up the whole, and none goes past its end."""
    data = artifact(1, size=100)
    digest = registry.put(data)

    assert registry.stat(digest) == len(data)
    assert registry.read(digest, 0, 10) + registry.read(digest, 10, len(data)) == data
    assert registry.read(digest, len(data) - 1, 1_000) == data[-1:]
    assert registry.read(digest, len(data), 1) == b""
    with pytest.raises(ValueError, match="at least 0"):
        registry.read(digest, -1, 1)
    for operation in (registry.stat, lambda digest: registry.read(digest, 0, 1)):
        with pytest.raises(KernelNotFoundError):
            operation(NOBODY)


def test_a_deprecated_artifact_says_why_and_can_be_had(registry, wall):
    """A deprecation is seen in every entry and searched by, stops nobody, and can be taken back."""
    first, second = registry.put(artifact(1)), registry.put(artifact(2))

    registry.deprecate(first, reason="diverges in float16", successor=second)

    (entry,) = registry.search(deprecated=True)
    assert (entry.digest, entry.deprecation.reason) == (first, "diverges in float16")
    assert entry.deprecation.successor == second
    assert entry.deprecation.deprecated_at_s == pytest.approx(wall(), abs=0.001)
    assert [e.digest for e in registry.search(deprecated=False)] == [second]
    assert registry.get(first) == artifact(1)
    registry.reinstate(first)
    assert registry.search(deprecated=True) == []
    with pytest.raises(ValueError, match="says why"):
        registry.deprecate(first, reason=" ")
    with pytest.raises(KernelNotFoundError):
        registry.deprecate(NOBODY, reason="unknown")


def field_report(artifact_id, **fields):
    """Return a report of one graft."""
    values = {
        "artifact_id": artifact_id,
        "blueprint_digest": NOBODY,
        "run_id": "run-1",
        "graft_id": "g-1",
        "site_kind": "linear",
        "in_features": 8,
        "out_features": 8,
        "metric": "loss",
        "unit": "relative",
        "contribution": 0.02,
        "standard_error": 0.005,
        "num_looks": 12,
        "verdict": "fossilized",
    }
    return FieldReport(**{**values, **fields})


def test_a_graft_is_reported_once(registry):
    """A report that is sent again, as an outbox does, is the same report."""
    digest = registry.put(artifact(1))
    report = field_report(digest)
    for sent in (report, field_report(digest, graft_id="g-2"), report):
        registry.report_outcome(sent)

    assert registry.outcomes(digest) == [report, field_report(digest, graft_id="g-2")]
    with pytest.raises(KernelNotFoundError):
        registry.report_outcome(field_report(NOBODY))


def signature_of(artifact_id, number=0):
    """Return a signature that nobody made."""
    return KernelSignature(
        artifact_id=artifact_id, key_id=NOBODY, signed_at_s=number, signature="0" * 128
    )


def test_signatures_are_kept_beside_what_they_sign(registry):
    """Each is there once, oldest first, however often it is sent, up to a hundred."""
    digest, other = registry.put(artifact(1)), registry.put(artifact(2))
    for number in (2, 1, 2):
        registry.attach_signature(signature_of(digest, number))

    assert registry.signatures(digest) == [signature_of(digest, 2), signature_of(digest, 1)]
    assert registry.signatures(other) == []
    for number in range(3, 101):
        registry.attach_signature(signature_of(digest, number))
    registry.attach_signature(signature_of(digest, 1))
    with pytest.raises(ValueError, match="100 signatures"):
        registry.attach_signature(signature_of(digest, 101))
    with pytest.raises(KernelNotFoundError):
        registry.attach_signature(signature_of(NOBODY))


def test_one_entry_is_what_a_search_says_of_it(registry):
    """An artifact is looked up by its digest, and what is not published is not found."""
    digest = registry.put(artifact(1))
    registry.put(artifact(2))
    registry.tag("mlp", "latest", digest)

    assert registry.entry(digest) == registry.search(limit=1)[0]
    with pytest.raises(KernelNotFoundError):
        registry.entry(NOBODY)


LUCKY, STEADY, UNKNOWN, USELESS = range(4)


def with_reports(registry):
    """Publish four kernels, and report of three: one lucky run, many good ones, many bad ones."""
    digests = [registry.put(artifact(number)) for number in range(4)]
    for number, contributions in {
        LUCKY: [0.20],
        STEADY: [0.05, 0.07, 0.06, 0.05, 0.07, 0.06],
        USELESS: [-0.02, -0.03, -0.02],
    }.items():
        for i, contribution in enumerate(contributions):
            error = 0.08 if number == LUCKY else 0.01
            told = {"contribution": contribution, "standard_error": error}
            registry.report_outcome(field_report(digests[number], run_id=f"{number}-{i}", **told))
    return digests


def test_what_has_worked_comes_first(registry):
    """By the lower bound of the pooled effect; by the mean, one lucky report would lead."""
    digests = with_reports(registry)
    found = registry.search(order="proven")

    assert [e.digest for e in found] == [digests[i] for i in (STEADY, LUCKY, UNKNOWN, USELESS)]
    steady, lucky, unknown, useless = (entry.standing for entry in found)
    assert steady.lower > 0 > lucky.lower
    assert (steady.num_runs, lucky.num_runs, useless.num_runs) == (6, 1, 3)
    assert unknown is None
    assert useless.effect < 0 < steady.standard_error < lucky.standard_error

    by_mean = sorted(
        (digests[LUCKY], digests[STEADY]),
        key=lambda d: -statistics.fmean(r.contribution for r in registry.outcomes(d)),
    )
    assert by_mean[0] == digests[LUCKY], "the control orders by luck"


def test_where_nobody_has_reported_what_has_worked_is_everything(registry):
    """A run that asks for what has worked finds what there is, of which nothing is known."""
    digests = {registry.put(artifact(number)) for number in range(3)}
    found = registry.search(order="proven")
    assert ({e.digest for e in found}, {e.standing for e in found}) == (digests, {None})


def test_what_has_worked_comes_in_pages(registry):
    """Everything once, in the order of one page that has room for all."""
    with_reports(registry)
    whole, after, pages = registry.search(order="proven"), None, []
    while page := registry.search(order="proven", limit=1, after=after):
        pages += page
        after = page[-1].number
    assert pages == whole


def test_a_standing_is_of_the_kind_of_site_that_is_asked_for(registry):
    """What has worked at linear layers is not known to work at a norm."""
    digest = registry.put(artifact(1))
    registry.report_outcome(field_report(digest, contribution=0.1))
    (at_linear,) = registry.search(kind="linear", order="proven")
    (at_norm,) = registry.search(kind="norm", order="proven")
    assert at_linear.standing.num_runs == 1
    assert at_norm.standing is None


def test_a_report_is_about_the_blueprint_of_its_artifact(registry):
    """What a report says of a blueprint that its artifact is not made of moves nothing."""
    mine, other = registry.put(artifact(1)), registry.put(artifact(2))
    registry.report_outcome(field_report(mine, blueprint_digest=f"{2:064x}", contribution=-0.5))
    found = {entry.digest: entry.standing for entry in registry.search()}
    assert found[other] is None
    assert found[mine].effect < 0


def test_validations_are_kept(registry):
    """Every validation of an artifact is there, oldest first."""
    digest = registry.put(artifact(1))
    reports = [
        ValidationReport(
            artifact_id=digest,
            toolchain=toolchain,
            passed=not reason,
            reason=reason,
            findings={"latency_us": 3.5},
        )
        for toolchain, reason in (("torch 2.12", "gradients: not finite"), ("torch 2.13", ""))
    ]
    for report in reports:
        registry.report_validation(report)

    assert registry.validations(digest) == reports


def test_verify_goes_on_where_it_stopped(registry):
    """Looks at two artifacts each see all of them, and say where the next begins."""
    for number in range(5):
        registry.put(artifact(number))
    withdrawn = registry.put(artifact(5))
    registry.delete(withdrawn)

    looks, after = [], ""
    while after is not None:
        looks.append(registry.verify(after=after, limit=2))
        after = looks[-1].after

    assert [look.intact for look in looks] == [2, 2, 2]
    assert [d for look in looks for d in look.unreferenced] == [withdrawn]


def test_a_tag_moves_and_remembers(registry, wall):
    """A tag points to the latest digest, and its history to all of them with their times."""
    first, second = registry.put(artifact(1)), registry.put(artifact(2))
    for now_s, digest in ((10.0, first), (20.0, second), (25.0, second)):
        wall.now_s = now_s
        registry.tag("mlp", "latest", digest, actor="ann")
    assert registry.resolve("mlp:latest") == second

    wall.now_s = 30.0
    registry.untag("mlp", "latest", actor="ann")

    with pytest.raises(KernelNotFoundError, match="mlp:latest"):
        registry.resolve("mlp:latest")
    assert registry.history("mlp", "latest") == [
        TagMove(digest=first, moved_at_s=10.0, actor="ann"),
        TagMove(digest=second, moved_at_s=20.0, actor="ann"),
        TagMove(digest=None, moved_at_s=30.0, actor="ann"),
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


@pytest.mark.parametrize("registry", [in_memory, in_a_directory], indirect=True)
def test_a_pickled_registry_still_has_its_artifacts(registry):
    """A registry can travel to another process with what refers to it."""
    digest = registry.put(artifact(1))

    copy = pickle.loads(pickle.dumps(registry))

    assert copy.get(digest) == artifact(1)
    copy.close()

"""Kernels in a repository of the Hub: one commit a change, and what the Hub may answer."""

import hashlib
import json

import fake_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from kernel_artifacts import artifact

from esper import registry as registries
from esper.contracts.errors import (
    KernelCorruptError,
    KernelSourceRefused,
    KernelSourceUnavailable,
    TagMovedError,
)
from esper.registry.hub_registry import HubRegistry

DIGEST = hashlib.sha256(artifact(1)).hexdigest()


@pytest.fixture
def hub():
    return fake_hub.FakeHub()


def registry_of(hub, **settings):
    return HubRegistry("hf://team/kernels", hub=hub, sleep=lambda _: None, **settings)


@pytest.mark.parametrize("address", ["hf://", "hf://team", "hf://a/b/c", "hf:a/b", "hf://a b/c"])
def test_an_address_is_an_owner_and_a_name(address):
    """Anything else is refused when it is opened."""
    with pytest.raises(ValueError, match="expected"):
        registries.open_registry(address)


def test_an_address_opens_a_registry_that_asks_nobody_yet():
    """The Hub's own client comes with it."""
    opened = registries.open_registry("hf://team/kernels", token="hf_x")

    assert opened.address == "hf://team/kernels"
    assert isinstance(opened._repository._hub, HfApi)


def test_a_repository_holds_artifacts_by_digest_and_one_index(hub):
    """Whoever looks at the files can see what is there."""
    registry = registry_of(hub)
    registry.tag("mlp", "prod", registry.put(artifact(1)), actor="ann")

    files = hub.commits[-1][1]
    assert sorted(files) == ["index.json", f"kernels/{DIGEST}"]
    assert files[f"kernels/{DIGEST}"] == artifact(1)
    index = json.loads(files["index.json"])
    assert index["format_version"] == "1.0"
    assert index["tags"]["mlp:prod"][0]["actor"] == "ann"
    assert len(hub.commits) == 3


def test_who_was_slower_changes_what_the_faster_one_left(hub):
    """Two publish at once: both are there, since a commit names the one that it was made on."""
    other = registry_of(hub)

    def be_faster():
        hub.before_commit = lambda: None
        other.put(artifact(2))

    hub.before_commit = be_faster
    registry = registry_of(hub)
    registry.put(artifact(1))

    assert len(registry.search()) == 2


def test_control_without_a_look_at_the_parent_the_faster_one_is_lost(hub):
    """A Hub that takes a commit on anything forgets what came between."""
    hub.is_heedless = True

    def be_faster():
        hub.before_commit = lambda: None
        registry_of(hub).put(artifact(2))

    hub.before_commit = be_faster
    registry = registry_of(hub)
    registry.put(artifact(1))

    assert len(registry.search()) == 1


def test_a_promotion_that_came_too_late_is_told_so(hub):
    """The guard holds even when the other one was faster by a moment."""
    registry, other = registry_of(hub), registry_of(hub)
    first, second = registry.put(artifact(1)), registry.put(artifact(2))
    registry.tag("mlp", "prod", first)

    def be_faster():
        hub.before_commit = lambda: None
        other.tag("mlp", "prod", second, expected=first)

    hub.before_commit = be_faster
    with pytest.raises(TagMovedError):
        registry.tag("mlp", "prod", second, expected=first)


def test_a_repository_that_changes_all_the_time_is_given_up(hub):
    """Twenty times too late is a failure that may pass."""

    def be_faster():
        hub.commits.append((f"{len(hub.commits):040}", hub.commits[-1][1]))

    hub.before_commit = be_faster
    with pytest.raises(KernelSourceUnavailable, match="all the time"):
        registry_of(hub).put(artifact(1))


def test_other_bytes_are_refused(hub):
    """What the repository has under a digest is compared with it; what is too long is not had."""
    registry = registry_of(hub)
    registry.put(artifact(1))
    hub.commits[-1][1][f"kernels/{DIGEST}"] = artifact(2)

    with pytest.raises(KernelCorruptError, match="other bytes"):
        registry.fetch(DIGEST)
    assert registry.verify().missing == (DIGEST,)
    with pytest.raises(KernelSourceRefused, match="are taken"):
        registry_of(hub, max_artifact_bytes=9).fetch(DIGEST)


@pytest.mark.parametrize(
    "index",
    [
        b"<",
        b"[]",
        b"{}",
        b'{"format_version": "1.0", "kernels": {"x": 7}, "tags": {}, "signatures": {}}',
        b'{"format_version": "2.0", "kernels": {}, "tags": {}, "signatures": {}}',
        b'{"format_version": "1.0", "kernels": {}, "tags": {"../x:y": []}, "signatures": {}}',
    ],
    ids=["no JSON", "a list", "nothing", "no entry", "newer", "no name"],
)
def test_an_index_that_cannot_be_read_is_no_answer(hub, index):
    """Whatever stands there, the registry did not answer."""
    hub.commits[-1][1]["index.json"] = index
    with pytest.raises(KernelSourceUnavailable, match=r"not to be read|newer"):
        registry_of(hub).names()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (fake_hub.answered(401), KernelSourceRefused),
        (fake_hub.answered(403), KernelSourceRefused),
        (fake_hub.answered(429), KernelSourceUnavailable),
        (fake_hub.answered(500), KernelSourceUnavailable),
        (LocalEntryNotFoundError("offline"), KernelSourceUnavailable),
        (ConnectionError("refused"), KernelSourceUnavailable),
    ],
    ids=["401", "403", "429", "500", "offline", "refused"],
)
def test_what_the_hub_answers_decides_the_error(hub, failure, expected):
    """Its client's errors are a registry's, by what they mean."""
    hub.failure = failure
    with pytest.raises(KernelSourceUnavailable) as raised:
        registry_of(hub).names()
    assert type(raised.value) is expected


def test_a_repository_that_is_not_there_is_refused_with_a_word():
    """It is made beforehand, by whoever decides who sees it."""
    with pytest.raises(KernelSourceRefused, match="make the repository first"):
        registry_of(fake_hub.FakeHub("team/other")).put(artifact(1))


def test_what_it_cannot_do_is_refused(hub):
    """Nothing is pretended: the refusal says what does it."""
    registry = registry_of(hub)
    for ask in (registry.collect, lambda: registry.report_outcome(None)):
        with pytest.raises(KernelSourceRefused, match="esper registry serve"):
            ask()

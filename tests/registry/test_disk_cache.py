"""The cache on disk: what it keeps, what it lets go, and whom it never fails."""

import hashlib
import multiprocessing
import os
import random
import signal

import pytest

from esper.registry import disk_cache
from esper.registry.disk_cache import DiskCache


def content(number, size=1_000):
    """Return bytes, and what they are called."""
    data = random.Random(number).randbytes(size)
    return hashlib.sha256(data).hexdigest(), data


def keep(cache, digest, data):
    """Bring an artifact into a cache, as a fetch does."""
    with cache.receive(digest) as part:
        part.append(data)
        part.is_whole = True


def size_of(cache):
    """Return the bytes of everything that counts."""
    files = [*(cache.folder / "artifacts").iterdir(), *(cache.folder / "partial").iterdir()]
    return sum(path.stat().st_size for path in files)


def test_what_was_kept_is_there_for_another(tmp_path):
    """An artifact outlives its process, and whoever opens the folder has it."""
    digest, data = content(1)
    cache = DiskCache(tmp_path)
    assert cache.get(digest) is None

    keep(cache, digest, data)

    assert DiskCache(tmp_path).get(digest) == data
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [digest, "lock"]


def test_the_least_recently_used_goes_first(tmp_path):
    """A look is a use, and the budget holds to the byte."""
    cache = DiskCache(tmp_path, 3_000)
    kept = [content(number) for number in range(3)]
    for age_s, (digest, data) in zip((30, 20, 10), kept, strict=True):
        keep(cache, digest, data)
        path = tmp_path / "artifacts" / digest
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    cache.get(kept[0][0])

    keep(cache, *content(3))

    assert [cache.get(digest) is not None for digest, _ in kept] == [True, False, True]
    assert size_of(cache) == 3_000


def test_what_is_larger_than_the_budget_evicts_nobody(tmp_path):
    """It was served; it is not kept, whole or in parts."""
    cache = DiskCache(tmp_path, 3_000)
    digest, data = content(1)
    keep(cache, digest, data)

    keep(cache, *content(2, size=3_001))

    assert cache.get(digest) == data
    assert size_of(cache) == 1_000


@pytest.mark.parametrize(
    "harm",
    [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""],
    ids=["torn", "altered", "emptied"],
)
def test_a_torn_or_altered_file_is_dropped(tmp_path, harm):
    """What is not what its name says is never served, and makes room for what is."""
    digest, data = content(1)
    cache = DiskCache(tmp_path)
    keep(cache, digest, data)
    (tmp_path / "artifacts" / digest).write_bytes(harm(data))

    assert cache.get(digest) is None
    assert not (tmp_path / "artifacts" / digest).exists()
    keep(cache, digest, data)
    assert cache.get(digest) == data


def test_control_without_a_look_an_altered_file_is_served(tmp_path, monkeypatch):
    """It is the comparison that finds it."""
    digest, data = content(1)
    cache = DiskCache(tmp_path)
    keep(cache, digest, data)
    (tmp_path / "artifacts" / digest).write_bytes(data[::-1])
    monkeypatch.setattr(disk_cache, "digest_of", lambda data: digest)

    assert cache.get(digest) == data[::-1]


def test_what_has_come_stays_for_the_next(tmp_path):
    """A part that an error cut off is what the next one begins with."""
    digest, data = content(1)
    cache = DiskCache(tmp_path)

    def cut_off():
        with cache.receive(digest) as part:
            part.append(data[:600])
            raise ConnectionError

    with pytest.raises(ConnectionError):
        cut_off()
    with DiskCache(tmp_path).receive(digest) as part:
        assert part.content() == data[:600]
        part.append(data[600:])
        part.is_whole = True

    assert cache.get(digest) == data


def test_two_at_once_do_not_write_to_one_file(tmp_path):
    """Who comes while another receives begins anew, and both succeed."""
    digest, data = content(1)
    cache = DiskCache(tmp_path)
    with cache.receive(digest) as first:
        first.append(data[:600])
        with cache.receive(digest) as second:
            assert second.content() == b""
            second.append(data)
            second.is_whole = True
        first.append(data[600:])
        first.is_whole = True

    assert cache.get(digest) == data
    assert size_of(cache) == len(data)


def test_a_reader_of_what_is_evicted_is_unharmed(tmp_path):
    """An artifact that goes is gone for who comes later."""
    digest, data = content(1)
    cache = DiskCache(tmp_path, 1_000)
    keep(cache, digest, data)
    with (tmp_path / "artifacts" / digest).open("rb") as reader:
        keep(cache, *content(2))
        assert cache.get(digest) is None
        assert reader.read() == data


@pytest.mark.parametrize("failing", ["replace", "mkdir", "stat"])
def test_a_disk_that_fails_keeps_nothing_and_fails_nobody(tmp_path, monkeypatch, failing, caplog):
    """The cache is a convenience: the log says what it could not do."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    cache = DiskCache(tmp_path, 1_500)
    with monkeypatch.context() as broken:
        broken.setattr(disk_cache.Path, failing, fail)
        keep(cache, *content(1))
    assert "keeps nothing for now" in caplog.text

    keep(cache, *content(1))
    assert cache.get(content(1)[0]) == content(1)[1]


def test_a_lock_that_is_never_given_back_is_not_waited_for(tmp_path, monkeypatch, caplog):
    """A process that was stopped while it made room holds up nobody."""
    import fcntl

    monkeypatch.setattr(disk_cache, "_BETWEEN_TRIES_S", 0.0)
    cache = DiskCache(tmp_path)
    with (tmp_path / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keep(cache, *content(1))
    assert cache.get(content(1)[0]) is None
    assert "keeps the cache's lock" in caplog.text


def test_a_tag_is_remembered_for_its_registry(tmp_path):
    """Where a tag pointed is known by registry, name and tag, until it is forgotten."""
    cache, digest = DiskCache(tmp_path), "a" * 64
    cache.remember("http://one", "mlp:prod", digest, 1_234.5)

    assert cache.recall("http://one", "mlp:prod") == (digest, 1_234)
    assert cache.recall("http://two", "mlp:prod") is None
    assert cache.recall("http://one", "mlp:dev") is None
    (path,) = (tmp_path / "tags").rglob("prod")
    path.write_text("../etc/passwd 1\n")
    assert cache.recall("http://one", "mlp:prod") is None
    cache.forget("http://one", "mlp:prod")
    assert not path.exists()


def test_a_budget_is_not_negative(tmp_path):
    """A cache without room is one that keeps nothing, and less there is not."""
    with pytest.raises(ValueError, match="at least 0"):
        DiskCache(tmp_path, -1)


def _use(folder, seed, num_rounds):
    """Keep and look up artifacts at random; every answer is right or none."""
    cache, draw = DiskCache(folder, 20_000), random.Random(seed)
    for _ in range(num_rounds):
        digest, data = content(draw.randrange(12), size=draw.randrange(12) * 500 + 500)
        if draw.random() < 0.5:
            assert cache.get(digest) in (None, data)
        else:
            keep(cache, digest, data)
    os._exit(0)


@pytest.mark.slow
def test_many_processes_share_one(tmp_path):
    """Four that keep, look up and evict at once, one killed in the middle: the budget holds."""
    forked = multiprocessing.get_context("spawn")
    users = [forked.Process(target=_use, args=(tmp_path, seed, 400)) for seed in range(4)]
    for user in users:
        user.start()
    os.kill(users[0].pid, signal.SIGKILL)
    for user in users:
        user.join()

    assert [user.exitcode for user in users[1:]] == [0, 0, 0]
    cache = DiskCache(tmp_path, 20_000)
    keep(cache, *content(99))
    assert size_of(cache) <= 20_000
    for path in (tmp_path / "artifacts").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name

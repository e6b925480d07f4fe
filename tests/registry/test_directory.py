"""What a directory registry does with damage, with leftovers and with company."""

import os
import shutil
import sqlite3

import pytest
from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceUnavailable,
)
from esper.registry.book import Book
from esper.registry.directory import DirectoryRegistry
from esper.registry.disk import Disk
from esper.registry.sqlite_database import SqliteFile

DATA = artifact(1, size=100)
DIGEST = artifact_format.digest_of(DATA)


@pytest.fixture
def store(tmp_path):
    made = DirectoryRegistry(tmp_path / "store")
    made.put(DATA)
    yield made
    made.close()


def blob(store):
    return store.root / "blobs" / DIGEST


def quarantined(store):
    return {path.name: path.read_bytes() for path in (store.root / "quarantine").iterdir()}


DAMAGES = {
    "bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "shorter": lambda data: data[:-1],
    "longer": lambda data: data + b"\x00",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_bytes_are_put_aside_and_never_served(store, damage):
    """Damage is found when it is read; the bytes are kept where nobody is served from."""
    damaged = damage(DATA)
    blob(store).write_bytes(damaged)

    for _ in range(2):
        with pytest.raises(KernelCorruptError, match="put the artifact again"):
            store.get(DIGEST)

    assert not store.exists(DIGEST)
    assert store.verify().missing == (DIGEST,)
    assert quarantined(store) == {f"{DIGEST}.0": damaged}


def test_opening_reads_no_artifact(store):
    """However much is stored, opening and listing cost no more; damage waits until it is read."""
    blob(store).write_bytes(b"damaged")

    class Unread(Disk):
        def read(self, path, limit_bytes, start=0):
            assert path.name != DIGEST, "an artifact was read"
            return super().read(path, limit_bytes, start)

    again = DirectoryRegistry(store.root, disk=Unread())

    assert [entry.digest for entry in again.search()] == [DIGEST]
    assert quarantined(store) == {}
    again.close()


def test_verify_reports_what_it_put_aside(store):
    """A look counts one whose bytes were wrong once; from the next one on they are missing."""
    blob(store).write_bytes(b"damaged")

    first, second = store.verify(), store.verify()
    assert (first.quarantined, first.missing) == ((DIGEST,), ())
    assert (second.quarantined, second.missing) == ((), (DIGEST,))


def begun_anew(store):
    """Close a registry, and put an index in the place of its own that is migrated and empty."""
    store.close()
    for path in store.root.glob("index.sqlite*"):
        path.unlink()
    book = Book(SqliteFile(store.root / "index.sqlite", Disk()))
    book.open()
    book.close()


def test_an_empty_index_is_not_put_over_the_artifacts_of_another(store):
    """It would have them collected; nothing of them is touched."""
    begun_anew(store)
    with pytest.raises(KernelSourceUnavailable, match="another book"):
        DirectoryRegistry(store.root)
    assert blob(store).read_bytes() == DATA


def test_control_an_empty_index_has_everything_collected(store, monkeypatch):
    """What is refused would lose all."""
    begun_anew(store)
    monkeypatch.setattr(DirectoryRegistry, "_check_owner", lambda self: None)
    again = DirectoryRegistry(store.root)
    again.collect(grace_s=0.0)
    assert again.collect(grace_s=0.0) == (DIGEST,)
    again.close()


def test_a_copy_of_a_registry_is_one(store, tmp_path):
    """Bytes and index travel together, and know each other there."""
    store.close()
    shutil.copytree(store.root, tmp_path / "copy")
    again = DirectoryRegistry(tmp_path / "copy")
    assert again.get(DIGEST) == DATA
    again.close()


def test_putting_again_repairs(store):
    """The right bytes take the place of damaged ones, and tags and record stay."""
    store.tag("mlp", "latest", DIGEST)
    blob(store).write_bytes(b"damaged")

    store.put(DATA)

    assert store.get(store.resolve("mlp:latest")) == DATA
    assert quarantined(store) == {f"{DIGEST}.0": b"damaged"}


def test_nothing_in_quarantine_is_written_over(store):
    """Damage that comes back is kept beside the earlier one."""
    for damage in (b"first", b"second"):
        blob(store).write_bytes(damage)
        store.put(DATA)

    assert quarantined(store) == {f"{DIGEST}.0": b"first", f"{DIGEST}.1": b"second"}


def test_a_file_that_went_missing_is_corruption_not_absence(store):
    """What was published and cannot be served is an alarm, never a plain not found."""
    blob(store).unlink()

    with pytest.raises(KernelCorruptError):
        store.get(DIGEST)
    assert not store.exists(DIGEST)


def test_opening_removes_what_an_interrupted_put_left(store):
    """Parts of a put that ended are removed, and nothing else is."""
    part = store.root / "blobs" / f".{DIGEST}.0.part"
    part.write_bytes(b"half")
    foreign = store.root / "blobs" / "notes.txt"
    foreign.write_text("mine")
    store.close()

    again = DirectoryRegistry(store.root)

    assert not part.exists()
    assert foreign.exists()
    assert again.get(DIGEST) == DATA
    again.close()


def test_parts_stay_while_somebody_else_may_be_writing_them(store):
    """A second opener takes nothing from a first that is still there."""
    part = store.root / "blobs" / f".{DIGEST}.0.part"
    part.write_bytes(b"half")

    DirectoryRegistry(store.root).close()

    assert part.exists()


def test_two_openers_see_the_same(store):
    """What one publishes, withdraws and collects, the other sees at once."""
    other = DirectoryRegistry(store.root)
    added = other.put(artifact(2))
    assert store.get(added) == artifact(2)

    store.delete(added)
    store.collect(grace_s=0.0)
    other.collect(grace_s=0.0)

    with pytest.raises(KernelNotFoundError):
        other.get(added)
    assert not (store.root / "blobs" / added).exists()
    other.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_may_go_on_using_a_registry(store):
    """A child opens its own connection and leaves the parent's alone."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if store.put(artifact(2)) and store.get(DIGEST) == DATA else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.get(artifact_format.digest_of(artifact(2))) == artifact(2)
    assert store.put(artifact(3)) == artifact_format.digest_of(artifact(3))


class Interrupted(Disk):
    """A disk on which something happens just after a blob was read, or just before."""

    def __init__(self, *, before=None, after=None):
        self.before, self.after = before, after

    def read(self, path, limit_bytes, start=0):
        before, self.before = self.before, None
        if before is not None:
            before()
        data = super().read(path, limit_bytes, start)
        after, self.after = self.after, None
        if after is not None:
            after()
        return data


def test_what_is_withdrawn_while_it_is_read_is_not_found(store):
    """A read that loses against a withdrawal and its collection is no alarm."""
    disk = Interrupted()
    reader = DirectoryRegistry(store.root, disk=disk)

    def withdraw():
        store.delete(DIGEST)
        store.collect(grace_s=0.0)
        store.collect(grace_s=0.0)

    disk.before = withdraw
    with pytest.raises(KernelNotFoundError):
        reader.get(DIGEST)
    reader.close()


def test_what_is_repaired_while_it_is_read_is_not_put_aside(store):
    """Damage is looked at again before it is moved, so that a repair is never thrown out."""
    disk = Interrupted()
    reader = DirectoryRegistry(store.root, disk=disk)
    blob(store).write_bytes(b"damaged")

    disk.after = lambda: store.put(DATA)

    assert reader.get(DIGEST) == DATA
    assert store.get(DIGEST) == DATA
    reader.close()


def test_a_store_of_a_newer_format_is_refused(store):
    """An index that this version does not know is left alone, with a clear word."""
    store.close()
    with sqlite3.connect(store.root / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 1000")
    index.close()

    with pytest.raises(ValueError, match="newer Esper"):
        DirectoryRegistry(store.root)


def test_the_index_waits_for_the_disk(store):
    """SQLite keeps a write-ahead log and waits for it at every commit."""
    assert store.book.database.rows("PRAGMA journal_mode") == [("wal",)]
    assert store.book.database.rows("PRAGMA synchronous") == [(2,)]


@pytest.mark.parametrize("left", [None, b""], ids=["gone", "empty"])
def test_a_lost_index_is_not_begun_anew_beside_artifacts(store, left):
    """An empty one would have a collection remove them; put back, everything is as it was."""
    store.close()
    index = store.root / "index.sqlite"
    kept = index.read_bytes()
    for path in store.root.glob("index.sqlite*"):
        path.unlink()
    if left is not None:
        index.write_bytes(left)
    with pytest.raises(KernelSourceUnavailable, match=r"artifacts lie in .* \(1\)"):
        DirectoryRegistry(store.root)
    assert blob(store).read_bytes() == DATA
    index.write_bytes(kept)
    again = DirectoryRegistry(store.root)
    assert again.get(DIGEST) == DATA
    again.close()


def test_a_directory_whose_artifacts_were_moved_away_begins_anew(store):
    """That is what the refusal says."""
    store.close()
    for path in store.root.glob("index.sqlite*"):
        path.unlink()
    (store.root / "blobs").rename(store.root / "elsewhere")
    again = DirectoryRegistry(store.root)
    assert again.search() == []
    again.close()

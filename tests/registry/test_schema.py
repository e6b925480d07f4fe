"""Databases of earlier versions become today's, and those of later ones are left alone."""

import sqlite3
from pathlib import Path

import pytest
from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.contracts.errors import KernelCorruptError
from esper.contracts.ports import TagMove
from esper.contracts.signature import KernelSignature
from esper.registry import schema
from esper.registry.book_artifacts import Artifacts
from esper.registry.directory import DirectoryRegistry
from esper.registry.disk import Disk
from esper.registry.sqlite_database import SqliteFile, SqliteMemory
from esper.registry.standings import EVERY_KIND

SCHEMAS = Path(__file__).parent / "schemas"
FIRST = artifact_format.digest_of(artifact(1))


@pytest.fixture
def older(tmp_path):
    """Return a directory as version 1 left it: two artifacts, one of them without its bytes."""
    return directory_of(1, tmp_path)


def directory_of(version, folder):
    """Make a directory of a version: two artifacts, one of them without its bytes."""
    root = folder / "store"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / FIRST).write_bytes(artifact(1))
    index = sqlite3.connect(root / "index.sqlite")
    index.executescript((SCHEMAS / f"{version}.sql").read_text(encoding="utf-8"))
    index.close()
    return root


def test_every_version_but_the_last_stays_in_the_tests():
    """Who changes the schema leaves a file of the one before."""
    kept = {int(path.stem) for path in SCHEMAS.iterdir()}
    assert kept == set(range(1, schema.VERSION))


def test_an_older_directory_is_migrated_when_it_is_opened(older):
    """What was published, tagged and moved is there, and found by columns that were not."""
    registry = DirectoryRegistry(older)

    first, second = registry.search()
    assert (first.digest, first.tags) == (FIRST, ("mlp:first",))
    assert first.record == {"toolchain": "torch 2.13.0"}
    assert first.published_at_s is None
    assert registry.search(kind="conv2d", in_features=8, out_features=16) == [second]
    assert registry.resolve("mlp:latest") == second.digest
    assert registry.history("mlp", "latest") == [
        TagMove(digest=FIRST, moved_at_s=1_000.0),
        TagMove(digest=second.digest, moved_at_s=1_000.0),
    ]
    assert registry.get(FIRST) == artifact(1)
    with pytest.raises(KernelCorruptError):
        registry.get(second.digest)
    registry.close()


@pytest.mark.parametrize("version", range(1, schema.VERSION))
def test_every_older_directory_takes_what_today_s_takes(version, tmp_path):
    """Whatever version a directory is of, it is searched, and signed in, as one of today."""
    registry = DirectoryRegistry(directory_of(version, tmp_path))
    signature = KernelSignature(
        artifact_id=FIRST, key_id="0" * 64, signed_at_s=1, signature="0" * 128
    )
    registry.attach_signature(signature)

    assert registry.signatures(FIRST) == [signature]
    assert [entry.digest for entry in registry.search(deprecated=True)] == (
        [registry.resolve("mlp:latest")] if version > 1 else []
    )
    assert registry.book.database.version() == schema.VERSION
    registry.close()


def test_outcomes_of_version_2_are_pooled_when_it_is_opened(tmp_path):
    """What was reported before search knew an order by it counts all the same."""
    index = sqlite3.connect(tmp_path / "index.sqlite")
    index.executescript((SCHEMAS.parent / "reported_2.sql").read_text(encoding="utf-8"))
    index.close()
    database = SqliteFile(tmp_path / "index.sqlite", Disk())

    assert schema.migrate(database) == 2
    for kind in ("linear", EVERY_KIND):
        found = Artifacts(database).search(
            {"kind": kind} if kind else {}, limit=None, after=None, order="proven"
        )
        assert [(e.digest == FIRST, e.standing.num_runs) for e in found[:1]] == [(True, 2)]
    database.close()


def test_jobs_of_version_3_are_claimed_in_turn(tmp_path):
    """One that was lost to its worker then comes behind those of the next half minute."""
    registry = DirectoryRegistry(directory_of(3, tmp_path))
    jobs = registry.book.jobs
    claimed = [jobs.claim("w", lease_s=30.0, toolchain="torch 2.13.0") for _ in range(4)]
    assert [job and job.submitted_at_s for job in claimed] == [1_010.0, 1_020.0, 1_000.0, None]
    registry.close()


def test_migrating_is_done_once(older):
    """Whoever comes second finds it done."""
    first = SqliteFile(older / "index.sqlite", Disk())
    second = SqliteFile(older / "index.sqlite", Disk())

    assert schema.migrate(first) == 1
    assert schema.migrate(second) == schema.VERSION
    first.close()
    second.close()


def test_a_migration_that_fails_leaves_everything(older, monkeypatch):
    """Half of a migration is none."""
    database = SqliteFile(older / "index.sqlite", Disk())
    steps = (*schema._STEPS[:-1], (*schema._STEPS[-1], "CREATE TABLE artifacts (x {text})"))
    with monkeypatch.context() as patched:
        patched.setattr(schema, "_STEPS", steps)
        with pytest.raises(OSError, match="already exists"):
            schema.migrate(database)

    assert database.version() == 1
    assert schema.migrate(database) == 1
    database.close()


def test_a_newer_database_is_refused():
    """A schema that is not known is left alone, with a clear word."""
    database = SqliteMemory()
    database.set_version(schema.VERSION + 1)

    with pytest.raises(ValueError, match="newer Esper"):
        schema.migrate(database)

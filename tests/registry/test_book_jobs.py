"""Jobs: one worker at a time, whoever is killed, stopped or woken up, on every database."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.registry import book_jobs, schema
from esper.registry.book import Book
from esper.registry.disk import Disk
from esper.registry.sqlite_database import SqliteFile, SqliteMemory


@pytest.fixture(
    params=["memory", "file", pytest.param("postgresql", marks=pytest.mark.slow)],
)
def book(request, tmp_path):
    if request.param == "postgresql":
        database = request.getfixturevalue("database")
    elif request.param == "file":
        database = SqliteFile(tmp_path / "book.sqlite", Disk())
    else:
        database = SqliteMemory()
    made = Book(database)
    made.open()
    yield made
    made.close()


def submit(book, number=1, **more):
    return book.jobs.submit(
        blueprint="{}",
        blueprint_digest=f"{number:064x}",
        toolchain="torch 2.13.0",
        options="{}",
        now_s=1.0,
        **more,
    )


def lapse(book):
    """Let every lease be over."""
    book.database.rows("UPDATE jobs SET leased_until_s = 0 WHERE leased_until_s IS NOT NULL")


def test_a_job_is_one_row_however_often_it_is_asked_for(book):
    """Equal blueprint, toolchain and options are the same job; an invalid one stays so."""
    job = submit(book)
    assert (job.status, job.attempts) == ("UNVALIDATED", 0)
    assert submit(book) == job
    claimed = book.jobs.claim("w", lease_s=30.0)
    assert book.jobs.finish(job.id, "w", claimed.attempts, artifact_id=None, report={"reason": "x"})

    assert submit(book).status == "INVALID"
    assert submit(book, again=True).status == "UNVALIDATED"
    assert submit(book, 2).id != job.id


def test_a_job_is_leased_to_one_worker(book):
    """What one has, no other gets; what it finishes is finished."""
    job = submit(book)
    claimed = book.jobs.claim("ann", lease_s=30.0)
    assert (claimed.id, claimed.status, claimed.attempts) == (job.id, "COMPILING", 1)
    assert book.jobs.claim("ben", lease_s=30.0) is None
    assert book.jobs.renew(job.id, "ann", 1, lease_s=30.0)

    assert book.jobs.finish(job.id, "ann", 1, artifact_id="0" * 64, report={"passed": True})

    done = book.jobs.find(job.id)
    assert (done.status, done.artifact_id) == ("VALIDATED", "0" * 64)
    assert done.report == {"passed": True}
    assert book.jobs.claim("ben", lease_s=30.0) is None


def wake_up_late(book):
    """Let a worker lose its lease and finish all the same; say whether that counted."""
    job = submit(book)
    first = book.jobs.claim("ann", lease_s=30.0)
    lapse(book)
    second = book.jobs.claim("ann", lease_s=30.0)  # its second life has the same name
    assert (second.id, second.attempts) == (job.id, 2)
    return book.jobs.finish(job.id, "ann", first.attempts, artifact_id="0" * 64, report={})


def test_a_worker_that_wakes_up_late_changes_nothing(book):
    """A lease that was lost is taken over, and its attempt is worth nothing."""
    assert not wake_up_late(book)
    (job,) = [book.jobs.find(submit(book).id)]
    assert (job.status, job.attempts) == ("COMPILING", 2)
    assert not book.jobs.renew(job.id, "ann", 1, lease_s=30.0)
    assert book.jobs.finish(job.id, "ann", 2, artifact_id="0" * 64, report={})


def test_control_without_its_attempt_a_late_worker_is_believed(book, monkeypatch):
    """The same worker overwrites what its successor does where the number is not compared."""
    forgetful = book_jobs._FINISH.replace("AND attempts = :attempt", "AND :attempt > 0")
    monkeypatch.setattr(book_jobs, "_FINISH", forgetful)
    assert wake_up_late(book)


def test_a_job_that_loses_three_workers_travels_no_further(book):
    """Whatever kills its workers is not handed to a fourth."""
    job = submit(book)
    for _ in range(book_jobs.MAX_LOSSES):
        assert book.jobs.claim("w", lease_s=30.0).id == job.id
        lapse(book)

    assert book.jobs.claim("w", lease_s=30.0) is None
    assert book.jobs.find(job.id).status == "INVALID"
    assert "3 times" in book.jobs.find(job.id).report["reason"]


def test_the_oldest_job_comes_first(book):
    """A job that was taken over does not wait behind those that were asked for later."""
    jobs = [submit(book, number) for number in range(3)]
    book.jobs.claim("w", lease_s=30.0)
    lapse(book)

    claimed = [book.jobs.claim("w", lease_s=30.0).id for _ in jobs]

    assert claimed == [job.id for job in jobs]


def test_workers_that_claim_at_once_get_different_jobs(book):
    """Forty jobs go to four workers, none twice."""
    for number in range(40):
        submit(book, number)

    def work(worker):
        found = []
        while (job := book.jobs.claim(f"w{worker}", lease_s=30.0)) is not None:
            found.append(job.id)
        return found

    with ThreadPoolExecutor(4) as workers:
        claimed = [job for jobs in workers.map(work, range(4)) for job in jobs]
    assert len(claimed) == len(set(claimed)) == 40


@pytest.mark.slow
def test_three_that_start_at_once_migrate_once(database, postgres):
    """One of them migrates, and the others find it done."""
    found = migrate_at_once(postgres)
    assert [error for error in found if isinstance(error, OSError)] == []
    assert sorted(found) == [0, schema.VERSION, schema.VERSION]


@pytest.mark.slow
def test_control_without_the_lock_some_of_three_fail(database, postgres, monkeypatch):
    """Where nobody waits for the others, they get in each other's way."""
    from esper.registry import postgres as module

    rows = module._rows

    def heedless(connection, statement, values):
        if "pg_advisory_xact_lock" in statement:
            return []
        found = rows(connection, statement, values)
        time.sleep(0.002)  # a machine that is slower, so that they do meet
        return found

    monkeypatch.setattr(module, "_rows", heedless)
    assert any(isinstance(found, OSError) for found in migrate_at_once(postgres))


def migrate_at_once(address):
    """Migrate an empty database three times at once; return what each found, or its error."""
    from esper.registry.postgres import PostgresDatabase

    def one(_):
        database = PostgresDatabase(address)
        try:
            return schema.migrate(database)
        except OSError as error:
            return error
        finally:
            database.close()

    with ThreadPoolExecutor(3) as threads:
        return list(threads.map(one, range(3)))

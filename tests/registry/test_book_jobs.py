"""Jobs: one worker at a time, whoever is killed, stopped or woken up, on every database."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kernel_blueprints import mlp_blueprint

from esper.contracts.compile_options import CompileOptions
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


def submit(book, number=1, now_s=1.0, **more):
    blueprint = mlp_blueprint(init_seed=number)
    return book.jobs.submit(blueprint, CompileOptions(), now_s=now_s, **more)


def claim(book, worker="w", toolchain="torch 2.13.0"):
    return book.jobs.claim(worker, lease_s=30.0, toolchain=toolchain)


def lapse(book):
    """Let every lease be over."""
    book.database.rows("UPDATE jobs SET leased_until_s = 0 WHERE leased_until_s IS NOT NULL")


def test_a_job_is_one_row_however_often_it_is_asked_for(book):
    """Equal blueprint, toolchain and options are the same job; an invalid one stays so."""
    job = submit(book)
    assert (job.status, job.attempts) == ("UNVALIDATED", 0)
    assert submit(book) == job
    claimed = claim(book)
    assert book.jobs.finish(job.id, "w", claimed.attempts, artifact_id=None, report={"reason": "x"})

    assert submit(book).status == "INVALID"
    assert submit(book, again=True).status == "UNVALIDATED"
    assert submit(book, 2).id != job.id
    assert submit(book, toolchain="torch 2.99.0").id != job.id
    other = book.jobs.submit(mlp_blueprint(init_seed=1), CompileOptions(batch=9), now_s=1.0)
    assert other.id != job.id
    assert len(book.jobs.list(limit=9)) == 4


def test_a_job_is_leased_to_one_worker(book):
    """What one has, no other gets; what it finishes is finished."""
    job = submit(book)
    claimed = claim(book, "ann")
    assert (claimed.id, claimed.status, claimed.attempts) == (job.id, "COMPILING", 1)
    assert claim(book, "ben") is None
    assert book.jobs.renew(job.id, "ann", 1, lease_s=30.0)

    assert book.jobs.finish(job.id, "ann", 1, artifact_id="0" * 64, report={"passed": True})

    done = book.jobs.find(job.id)
    assert (done.status, done.artifact_id) == ("VALIDATED", "0" * 64)
    assert done.report == {"passed": True}
    assert claim(book, "ben") is None


def wake_up_late(book):
    """Let a worker lose its lease and finish all the same; say whether that counted."""
    job = submit(book)
    first = claim(book, "ann")
    lapse(book)
    second = claim(book, "ann")  # its second life has the same name
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
        assert claim(book).id == job.id
        lapse(book)

    assert claim(book) is None
    assert book.jobs.find(job.id).status == "INVALID"
    assert "3 times" in book.jobs.find(job.id).report["reason"]


def test_control_without_a_cap_it_goes_to_a_fourth(book, monkeypatch):
    """Where losses are not counted, there is no end to it."""
    monkeypatch.setattr(book_jobs, "MAX_LOSSES", 1_000_000)
    submit(book)
    for _ in range(5):
        assert claim(book) is not None
        lapse(book)


def order_of_claims(book):
    """Claim a job and lose it; return the numbers of the jobs in the order of the next claims.

    Nine came before it and nine after it, ten seconds apart.
    """
    numbers = {submit(book, n, now_s=10.0 * n).id: n for n in range(10)}
    for _ in range(9):
        claim(book)
    assert numbers[claim(book).id] == 9
    lapse(book)
    book.database.rows("UPDATE jobs SET leased_until_s = 1e12 WHERE submitted_at_s < 90")
    numbers |= {submit(book, n, now_s=10.0 * n).id: n for n in range(10, 20)}
    return [numbers[claim(book).id] for _ in range(11)]


def test_a_job_that_was_lost_waits_a_little(book):
    """It comes behind those of the next half minute, and before a backlog that is younger."""
    assert order_of_claims(book) == [10, 11, 9, *range(12, 20)]


def test_control_ordered_by_losses_it_waits_behind_everything(book, monkeypatch):
    """Where age does not count, what was taken over is last, however long the backlog is."""
    by_losses = book_jobs._CLAIM.replace("30.0 *", "1e9 *")
    monkeypatch.setattr(book_jobs, "_CLAIM", by_losses)
    book = Book(book.database)
    assert order_of_claims(book)[-1] == 9


def num_sorted(book):
    """Return how often SQLite would sort to answer a claim."""
    plan = book.database.rows(
        f"EXPLAIN QUERY PLAN {book.jobs._claim}", worker="w", lease_s=30.0, toolchain="torch"
    )
    return sum("ORDER BY" in step for *_, step in plan)


def test_a_claim_does_not_sort_what_waits():
    """However much waits, the first in turn is found by an index."""
    book = Book(SqliteMemory())
    book.open()
    assert num_sorted(book) == 0


def test_control_without_its_index_a_claim_sorts_everything():
    """As soon as the index is gone, or is of other words, all that waits is sorted."""
    book = Book(SqliteMemory())
    book.open()
    book.database.rows("DROP INDEX jobs_in_turn")
    assert num_sorted(book) == 1


def test_a_job_that_was_given_back_is_nobodys_loss(book):
    """Others get it at once, as often as that happens."""
    job = submit(book)
    for attempt in range(1, 6):
        assert claim(book).attempts == attempt
        assert book.jobs.give_back(job.id, "w", attempt)
        assert not book.jobs.give_back(job.id, "w", attempt)


def test_a_job_for_one_toolchain_goes_to_no_other(book):
    """Who compiles with something else does not get it."""
    job = submit(book, toolchain="torch 2.99.0")
    assert claim(book) is None
    assert claim(book, toolchain="torch 2.99.0").id == job.id


def test_jobs_are_listed_in_pages(book):
    """Oldest first, without their blueprints, by where they stand."""
    jobs = [submit(book, number) for number in range(3)]
    claim(book)
    first, second = book.jobs.list(limit=2)
    assert [first.id, second.id] == [job.id for job in jobs[:2]]
    assert (first.status, first.blueprint) == ("COMPILING", None)
    assert [each.id for each in book.jobs.list(limit=9, after=second.number)] == [jobs[2].id]
    waiting = book.jobs.list(limit=9, status="UNVALIDATED")
    assert [each.id for each in waiting] == [job.id for job in jobs[1:]]


def asked_for_at_once(book, num_blueprints=1):
    """Ask for each blueprint from eight threads; return what is claimed until nothing is left."""
    ids = set()
    with ThreadPoolExecutor(8) as threads:
        for number in range(num_blueprints):
            ids |= set(threads.map(lambda _, number=number: submit(book, number).id, range(8)))
    found = []
    while (job := claim(book, f"w{len(found)}")) is not None:
        found.append(job.id)
    assert set(found) == ids
    return found


def test_what_is_asked_for_at_once_is_one_job(book):
    """Eight who ask for the same blueprint together are answered with one row, each time."""
    assert len(asked_for_at_once(book, 60)) == 60


def test_control_without_a_unique_key_it_is_compiled_many_times(monkeypatch):
    """Where the table allows it twice, one blueprint is eight jobs."""
    heedless = book_jobs._ENTER.partition(" ON CONFLICT")[0]
    monkeypatch.setattr(book_jobs, "_ENTER", heedless)
    book = Book(SqliteMemory())
    book.open()
    (made,) = book.database.rows("SELECT sql FROM sqlite_master WHERE name = 'jobs'")[0]
    book.database.rows("DROP TABLE jobs")
    book.database.rows(re.sub(r",\s*UNIQUE \([^)]*\)", "", made.replace(" NOT NULL UNIQUE", "")))
    assert len(asked_for_at_once(book)) == 8


def test_workers_that_claim_at_once_get_different_jobs(book):
    """Forty jobs go to four workers, none twice."""
    for number in range(40):
        submit(book, number)

    def work(worker):
        found = []
        while (job := claim(book, f"w{worker}")) is not None:
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

"""A registry of a team whose server, or whose database, is killed at each call of a publish."""

import functools
import os
import signal
from contextlib import contextmanager, suppress

import pytest
import real_servers
from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.contracts.errors import KernelSourceUnavailable
from esper.registry.book import Book
from esper.registry.directory_blobs import DirectoryBlobs
from esper.registry.disk import Disk
from esper.registry.shared import SharedRegistry

pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def cluster():
    """Return a PostgreSQL that may be killed."""
    pytest.importorskip("esper.registry.postgres", reason="needs the extra postgres")
    with real_servers.killable_postgres() as made:
        yield made


class Calls:
    """Counts calls to a database and to a store, and does something at one of them."""

    def __init__(self, at, do, *, after):
        self.num_calls, self._at, self._do, self._after = 0, at, do, after

    def around(self, call, *args, **values):
        self.num_calls += 1
        is_due = self.num_calls == self._at
        if is_due and not self._after:
            self._do()
        done = call(*args, **values)
        if is_due and self._after:
            self._do()
        return done


class Watched:
    """Stands before a database or a store, or a part that it gave."""

    def __init__(self, inner, calls):
        self._inner, self._calls = inner, calls

    def __getattr__(self, name):
        real = getattr(self._inner, name)
        if name == "receive":
            return lambda: Watched(self._calls.around(real), self._calls)
        if name == "put":
            return lambda digest, part: self._calls.around(real, digest, part._inner)
        if name == "transaction":
            return self.transaction
        if name in ("rows", "write", "seal"):
            return lambda *args, **values: self._calls.around(real, *args, **values)
        return real

    @contextmanager
    def transaction(self):
        """Count the end of a transaction, too: there it is committed."""
        running = self._inner.transaction()
        running.__enter__()
        try:
            yield
        except BaseException as error:
            running.__exit__(type(error), error, error.__traceback__)
            raise
        self._calls.around(running.__exit__, None, None, None)


def opened(cluster, root, calls=None):
    from esper.registry.postgres import PostgresDatabase

    database, blobs = PostgresDatabase(cluster.url), DirectoryBlobs(root, Disk())
    blobs.make()
    if calls is None:
        return SharedRegistry(Book(database), blobs)
    return SharedRegistry(Book(Watched(database, calls)), Watched(blobs, calls))


def published(cluster, root, number, make_calls):
    """Publish in a process of its own, which may be killed; return whether that was answered.

    Opening is not counted. Whatever is counted beyond the last call is never done.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no test may go on here, whatever happens
        try:
            calls = make_calls()
            registry = opened(cluster, root, calls)
            calls.num_calls = 0
            with suppress(KernelSourceUnavailable):
                registry.put(artifact(number))
                os.write(writing, b"put")
            os.write(writing, b" %d" % calls.num_calls)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        words = said.read()
    os.waitpid(child, 0)
    return words


def judge(cluster, root, number, words):
    """Return what is wrong with the registry; then publish again, which has to do."""
    registry = opened(cluster, root)
    digest = artifact_format.digest_of(artifact(number))
    wrong = [f"{missing} is dangling" for missing in registry.verify().missing]
    if words.startswith(b"put") and not registry.exists(digest):
        wrong.append(f"{digest} was answered and lost")
    if wrong == []:
        registry.put(artifact(number))
        if registry.get(digest) != artifact(number):
            wrong.append(f"{digest} cannot be published again")
    registry.close()
    return wrong


def kill_server():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(cluster, root, points, *, kills):
    """Kill at each of the points, before and after the call; return all that was wrong."""
    wrong = []
    for number, (point, after) in enumerate(points):
        do = kill_server if kills == "server" else cluster.kill_all
        words = published(cluster, root, number, functools.partial(Calls, point, do, after=after))
        if kills == "database":
            cluster.await_end()
            cluster.start()
        wrong += [f"{point} {after}: {found}" for found in judge(cluster, root, number, words)]
    return wrong


@pytest.fixture
def root(cluster, tmp_path):
    """Return a folder of bytes; the book is empty."""
    from esper.registry.postgres import PostgresDatabase

    database = PostgresDatabase(cluster.url)
    database.rows("DROP SCHEMA public CASCADE")
    database.rows("CREATE SCHEMA public")
    database.close()
    opened(cluster, tmp_path / "store").close()
    return tmp_path / "store"


def all_points(cluster, root):
    """Return every call of a publish, before and after it, the last one included."""
    words = published(cluster, root, 1_000, functools.partial(Calls, 0, kill_server, after=False))
    num_calls = int(words.split()[1])
    assert words.startswith(b"put")
    assert num_calls > 6
    return [(point, after) for point in range(1, num_calls + 1) for after in (False, True)]


def test_a_server_killed_at_any_call_loses_nothing(cluster, root):
    """Whichever call of a publish is a server's last, nothing answered is lost or dangling."""
    assert killed_at(cluster, root, all_points(cluster, root), kills="server") == []


def test_a_database_killed_at_its_last_calls_loses_nothing(cluster, root):
    """Neither does a database that is killed around the row and its commit."""
    points = all_points(cluster, root)[-4:]
    assert killed_at(cluster, root, points, kills="database") == []


def row_first(registry, screened, part, actor):
    """Enter the row before the bytes have their name, each by itself."""
    with registry.book.transaction():
        registry.book.artifacts.publish(screened, 0.0)
    registry._blobs.put(screened.digest, part)


def test_control_the_row_before_the_bytes_is_caught(cluster, root, monkeypatch):
    """The same kills of a server find a dangling row where the order is turned round."""
    monkeypatch.setattr(SharedRegistry, "enter", row_first)
    wrong = killed_at(cluster, root, all_points(cluster, root), kills="server")
    assert any("dangling" in found for found in wrong)


def test_control_a_commit_that_is_not_waited_for_is_caught(cluster, root, monkeypatch):
    """The same kill of a database loses what was answered where a commit may be late."""
    from esper.registry import postgres

    late = postgres._SESSION.replace("synchronous_commit=on", "synchronous_commit=off")
    monkeypatch.setattr(postgres, "_SESSION", late)
    last = all_points(cluster, root)[-1:]
    wrong = killed_at(cluster, root, last * 3, kills="database")
    assert any("answered and lost" in found for found in wrong)


@pytest.mark.torture
@pytest.mark.timeout(7_200)
def test_a_database_killed_at_any_call_loses_nothing_ten_times(cluster, root):
    """Every call of a publish, before and after it, in ten rounds."""
    points = all_points(cluster, root) * 10
    assert killed_at(cluster, root, points, kills="database") == []

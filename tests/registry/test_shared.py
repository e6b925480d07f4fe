"""A registry of several parts keeps what it answered, whichever call of which part fails."""

import functools
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.contracts.errors import KernelSourceUnavailable
from esper.registry import schema
from esper.registry.book import Book
from esper.registry.memory_blobs import MemoryBlobs
from esper.registry.shared import SharedRegistry
from esper.registry.sqlite_database import SqliteMemory
from esper.services.registry_server import first_token, open_storage
from esper.services.settings import hidden_from_libraries, read_environment

KEPT, WITHDRAWN, ADDED = (artifact(number) for number in range(3))
KEPT_ID, WITHDRAWN_ID, ADDED_ID = map(artifact_format.digest_of, (KEPT, WITHDRAWN, ADDED))


class Faulty:
    """Stands before a database or a store, and fails the chosen call of all that stand so."""

    calls = fail_at = 0
    after = False

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        real = getattr(self._inner, name)
        if not callable(real) or name == "transaction":
            return real

        def call(*args, **values):
            Faulty.calls += 1
            is_due = Faulty.calls == Faulty.fail_at
            if is_due and not Faulty.after:
                raise OSError("it failed")
            done = real(*args, **values)
            if is_due:
                raise OSError("it failed, after it was done")
            return done

        return call


@pytest.fixture
def made():
    """Return a function that makes a registry with one artifact kept and one condemned."""

    def make():
        database, blobs = SqliteMemory(), MemoryBlobs()
        Faulty.calls = Faulty.fail_at = 0
        registry = SharedRegistry(Book(Faulty(database)), Faulty(blobs))
        registry.put(KEPT)
        registry.tag("mlp", "latest", KEPT_ID)
        registry.put(WITHDRAWN)
        registry.delete(WITHDRAWN_ID)
        registry.collect(grace_s=0.0)
        return registry, SharedRegistry(Book(database), blobs)

    return make


def judge(registry, acknowledged=()):
    """Return what is wrong with a registry."""
    wrong = [f"{digest} is dangling" for digest in registry.verify().missing]
    for data in {KEPT, *acknowledged}:
        digest = artifact_format.digest_of(data)
        if not registry.exists(digest) or registry.get(digest) != data:
            wrong.append(f"{digest} was lost")
    return wrong


OPERATIONS = {
    "put": lambda registry: registry.put(ADDED),
    "put again": lambda registry: registry.put(WITHDRAWN),
    "tag": lambda registry: registry.tag("mlp", "other", KEPT_ID),
    "collect": lambda registry: registry.collect(grace_s=0.0),
    "ready": lambda registry: registry.check_ready(),
}


def fail_every_call(made, operation, *, after):
    """Fail each call of an operation once; return every wrong that was found, and how many."""
    wrong, point = [], 0
    while True:
        point += 1
        registry, seen = made()
        Faulty.calls, Faulty.fail_at, Faulty.after = 0, point, after
        acknowledged = ()
        with suppress(KernelSourceUnavailable):
            acknowledged = (ADDED,) if operation(registry) == ADDED_ID else ()
        is_over = Faulty.calls < point
        Faulty.fail_at = 0
        wrong += judge(seen, acknowledged)
        operation(registry)  # it may be repeated
        wrong += judge(seen)
        if is_over:
            return wrong, point


@pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failed_call_loses_nothing(made, name, after):
    """Whichever call of database or store fails, nothing answered is lost or dangling."""
    wrong, num_calls = fail_every_call(made, OPERATIONS[name], after=after)

    assert wrong == []
    assert num_calls > 2


def test_control_the_row_before_the_bytes_is_caught(made, monkeypatch):
    """The judge finds a row without bytes where the order of a put is turned round."""

    def row_first(registry, screened, part, actor):
        registry.book.artifacts.publish(screened, 0.0)
        registry._blobs.put(screened.digest, part)

    monkeypatch.setattr(SharedRegistry, "enter", row_first)
    wrong, _ = fail_every_call(made, OPERATIONS["put"], after=False)
    assert any("dangling" in found for found in wrong)


def test_control_a_collection_that_removes_nothing_is_seen(made, monkeypatch):
    """What was withdrawn is really gone after its collection, and is still there without one."""
    registry, seen = made()
    registry.collect(grace_s=0.0)
    assert len(list(seen._blobs.list())) == 1

    monkeypatch.setattr(MemoryBlobs, "remove", lambda self, digest: None)
    registry, seen = made()
    registry.collect(grace_s=0.0)
    assert len(list(seen._blobs.list())) == 2


class LyingS3(ThreadingHTTPServer):
    """A bucket that answers 200 to every put, and keeps nothing of every seventh."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), LyingHandler)
        self.kept, self.num_puts, self.hosts = {}, 0, set()


class LyingHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_puts += 1
        self.server.hosts.add(self.headers["Authorization"])
        if self.server.num_puts % 7:
            self.server.kept[self.path] = data
        self._answer(200, b"", ETag='"1"')

    def do_GET(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        data = self.server.kept.get(self.path)
        if data is None:
            self._answer(404, b"")
        elif found:
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            span = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], Content_Range=span, ETag='"1"')
        else:
            self._answer(200, data, ETag='"1"')

    do_HEAD = do_GET

    def log_message(self, *_):
        """Print nothing."""

    def _answer(self, status, body, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def lying_bucket():
    """Run one; yields the server and a blob store over it."""
    objects = pytest.importorskip("esper.registry.object_blobs", reason="needs the extra s3")
    with LyingS3() as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        try:
            endpoint = f"http://127.0.0.1:{server.server_port}"
            access = objects.BucketAccess(endpoint=endpoint, access_key="a", secret_key="b")
            with hidden_from_libraries():
                bucket = objects.open_bucket("s3://kernels", access)
            yield server, objects.ObjectBlobs(bucket, "s3://kernels")
        finally:
            server.shutdown()
            thread.join()


def acknowledged_and_lost(blobs):
    """Publish 42 artifacts; return how many were answered, and which of them are not there."""
    registry = SharedRegistry(Book(SqliteMemory()), blobs)
    answered = []
    for number in range(42):
        with suppress(KernelSourceUnavailable):
            answered.append(registry.put(artifact(number)))
    return len(answered), [digest for digest in answered if not registry.exists(digest)]


@pytest.mark.network
@pytest.mark.slow
def test_what_a_lying_bucket_acknowledged_is_looked_at():
    """A bucket that drops bytes and says 200 makes publishes fail, never vanish."""
    with lying_bucket() as (_, blobs):
        assert acknowledged_and_lost(blobs) == (36, [])


@pytest.mark.network
@pytest.mark.slow
def test_control_without_the_look_acknowledged_artifacts_are_lost(monkeypatch):
    """The same bucket, believed, loses six of 42."""
    from esper.registry.object_blobs import ObjectBlobs

    monkeypatch.setattr(ObjectBlobs, "put", lambda self, digest, part: None)
    with lying_bucket() as (_, blobs):
        num_answered, lost = acknowledged_and_lost(blobs)
    assert (num_answered, len(lost)) == (42, 6)


def test_a_lost_book_is_not_begun_anew_over_artifacts():
    """An empty one would have a collection remove them; with the book all is as it was."""
    blobs, book = MemoryBlobs(), Book(SqliteMemory())
    SharedRegistry(book, blobs).put(KEPT)
    lost = SqliteMemory()
    with pytest.raises(KernelSourceUnavailable, match=r"is gone or empty.*\(1\).*backup"):
        SharedRegistry(Book(lost), blobs)
    assert lost.version() == 0
    assert SharedRegistry(book, blobs).get(KEPT_ID) == KEPT


def empty_book():
    """Return a book that was migrated, and has nothing in it."""
    book = Book(SqliteMemory())
    book.open()
    return book


def test_an_empty_book_is_not_put_over_the_artifacts_of_another():
    """A lost one that was migrated before anybody looked is known from the one that was lost."""
    blobs, book = MemoryBlobs(), Book(SqliteMemory())
    SharedRegistry(book, blobs).put(KEPT)
    with pytest.raises(KernelSourceUnavailable, match=r"of another book than .*backup"):
        SharedRegistry(empty_book(), blobs)
    assert SharedRegistry(book, blobs).get(KEPT_ID) == KEPT


def test_a_book_that_is_emptied_under_a_running_registry_has_nothing_collected():
    """Every collection looks whose the bytes are."""
    blobs = MemoryBlobs()
    registry = SharedRegistry(Book(SqliteMemory()), blobs)
    registry.put(KEPT)
    registry.book = empty_book()
    for collect in (registry.collect, registry.condemned):
        with pytest.raises(KernelSourceUnavailable, match="another book"):
            collect(grace_s=0.0)
    assert list(blobs.list()) == [KEPT_ID]


def test_control_an_empty_book_has_everything_collected(monkeypatch):
    """What is refused would lose all."""
    blobs = MemoryBlobs()
    SharedRegistry(Book(SqliteMemory()), blobs).put(KEPT)
    monkeypatch.setattr(SharedRegistry, "_check_owner", lambda self: None)
    registry = SharedRegistry(empty_book(), blobs)
    registry.collect(grace_s=0.0)
    assert registry.collect(grace_s=0.0) == (KEPT_ID,)


def test_of_two_books_over_one_store_the_first_to_publish_has_it():
    """The other publishes nothing there, which either would collect."""
    blobs = MemoryBlobs()
    first, second = (SharedRegistry(Book(SqliteMemory()), blobs) for _ in range(2))
    first.put(KEPT)
    with pytest.raises(KernelSourceUnavailable, match="another book"):
        second.put(ADDED)
    assert list(blobs.list()) == [KEPT_ID]


class Unclaimed(MemoryBlobs):
    """Bytes as an earlier Esper left them."""

    def forget(self):
        self._owner = None


def test_what_an_earlier_version_published_becomes_the_book_s_that_lists_it():
    """An empty book is refused before and after; the one that published goes on."""
    blobs, book = Unclaimed(), Book(SqliteMemory())
    SharedRegistry(book, blobs).put(KEPT)
    blobs.forget()
    with pytest.raises(KernelSourceUnavailable, match="is gone or empty"):
        SharedRegistry(empty_book(), blobs)
    assert SharedRegistry(book, blobs).get(KEPT_ID) == KEPT
    assert blobs.owner() == book.identity()
    with pytest.raises(KernelSourceUnavailable, match="another book"):
        SharedRegistry(empty_book(), blobs)


def test_a_first_publish_that_was_cut_off_leaves_a_registry_that_opens(monkeypatch):
    """Its bytes have this book's name although it says nothing of them, and are collected."""
    blobs, book = MemoryBlobs(), Book(SqliteMemory())
    registry = SharedRegistry(book, blobs)
    monkeypatch.setattr(registry.book.artifacts, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.put(KEPT)
    monkeypatch.undo()
    assert list(blobs.list()) == [KEPT_ID]
    registry = SharedRegistry(book, blobs)
    registry.collect(grace_s=0.0)
    assert registry.collect(grace_s=0.0) == (KEPT_ID,)


def interrupted(*_):
    raise KeyboardInterrupt


class BegunMeanwhile(MemoryBlobs):
    """Bytes of a registry that another process begins while this one looks at them."""

    def __init__(self, book):
        super().__init__()
        self._book = book

    def list(self):
        found = super().list()
        if self._book.database.version() == 0:
            self._book.open()
            self.claim(self._book.identity())
            part = self.receive()
            part.write(KEPT)
            part.seal(KEPT_ID)
            self.put(KEPT_ID, part)
            found = super().list()
        return found


def test_a_book_that_another_process_begins_meanwhile_is_not_lost():
    """Servers that start at once are all good, whichever publishes first."""
    book = Book(SqliteMemory())
    assert SharedRegistry(book, BegunMeanwhile(book)).search() == []


def test_a_store_that_was_only_looked_at_is_begun_anew():
    """What `/ready` writes is nobody's artifact."""
    blobs = MemoryBlobs()
    SharedRegistry(Book(SqliteMemory()), blobs).check_ready()
    assert SharedRegistry(Book(SqliteMemory()), blobs).search() == []


@pytest.mark.slow
def test_a_postgresql_that_was_lost_is_not_begun_anew_over_its_bucket(database, objects):
    """The real ones are looked at as any others are."""
    registry = SharedRegistry(Book(database), objects)
    registry.put(KEPT)
    database.rows("DROP SCHEMA public CASCADE")
    database.rows("CREATE SCHEMA public")
    with pytest.raises(KernelSourceUnavailable, match="is gone or empty"):
        SharedRegistry(Book(database), objects)

    Book(database).open()
    for _ in range(2):
        with pytest.raises(KernelSourceUnavailable, match="another book"):
            SharedRegistry(Book(database), objects)
    assert set(objects.list()) == {KEPT_ID}


HOSTILE = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SESSION_TOKEN": "else",
    "AWS_SKIP_SIGNATURE": "true",
    "AWS_CONDITIONAL_PUT": "disabled",
    "AWS_DEFAULT_REGION": "nowhere",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
}


@pytest.mark.network
@pytest.mark.slow
def test_the_environment_changes_nothing(monkeypatch):
    """Proxies, endpoints and keys that lie about do not reach the requests to a bucket."""
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    with lying_bucket() as (server, blobs):
        registry = SharedRegistry(Book(SqliteMemory()), blobs)
        assert registry.get(registry.put(KEPT)) == KEPT

    assert server.hosts
    for signed in server.hosts:
        assert signed.startswith("AWS4-HMAC-SHA256 Credential=a/")
        assert "us-east-1" in signed


@pytest.mark.network
@pytest.mark.slow
def test_a_bucket_that_does_not_answer_is_given_up():
    """Nobody waits minutes for a port at which nobody listens."""
    objects = pytest.importorskip("esper.registry.object_blobs", reason="needs the extra s3")
    access = objects.BucketAccess(endpoint="http://127.0.0.1:1", access_key="a", secret_key="b")
    with hidden_from_libraries():
        blobs = objects.ObjectBlobs(objects.open_bucket("s3://kernels", access), "s3://kernels")
    book = Book(SqliteMemory())
    book.open()
    registry = SharedRegistry(book, blobs)
    with pytest.raises(KernelSourceUnavailable):
        registry.put(KEPT)


@pytest.mark.slow
def test_two_addresses_open_a_registry_of_a_team(postgres, database, bucket):
    """What the two name is opened, with what the environment says of the bucket."""
    url, access = bucket
    variables = {
        "AWS_ENDPOINT_URL": access.endpoint,
        "AWS_ACCESS_KEY_ID": access.access_key,
        "AWS_SECRET_ACCESS_KEY": access.secret_key,
        "ESPER_REGISTRY_DATABASE": postgres,
        "ESPER_REGISTRY_BLOBS": f"{url}/team",
    }
    said = read_environment(variables)
    registry = open_storage(
        data=None, database=said.registry_database, blobs=said.registry_blobs, environment=said
    )
    token = first_token(registry, None)

    assert registry.get(registry.put(KEPT)) == KEPT
    assert registry.book.tokens.find(token).name == "owner"
    assert first_token(registry, None) is None
    assert registry.book.database.version() == schema.VERSION
    registry.close()

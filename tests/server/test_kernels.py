"""Artifacts over HTTP: many at once, in parts, and no more in memory than a chunk."""

import base64
import hashlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_artifacts import artifact

pytest.importorskip("fastapi", reason="needs the extra server")

from starlette.requests import Request

from esper.registry import book_artifacts
from esper.server import kernels

pytestmark = [pytest.mark.network, pytest.mark.slow]

DATA = artifact(1, size=50_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


def publish(client, data=DATA, **headers):
    return client.post("/kernels", content=data, headers=headers)


def test_what_is_published_comes_back_with_its_digest_as_tag(ask):
    """The answer names the artifact, its address answers, and a reader who has it is told so."""
    published = publish(ask)
    assert (published.status_code, published.json()) == (201, {"id": DIGEST})
    assert published.headers["Location"] == f"/api/v1/kernels/{DIGEST}"

    entry = ask.get(f"/kernels/{DIGEST}").json()
    assert entry["kernel_binary_ref"] == f"/api/v1/kernels/{DIGEST}/binary"
    answer = ask.get(f"/kernels/{DIGEST}/binary")
    assert answer.content == DATA
    assert answer.headers["ETag"] == f'"{DIGEST}"'
    again = ask.get(f"/kernels/{DIGEST}/binary", headers={"If-None-Match": f'"{DIGEST}"'})
    assert (again.status_code, again.content) == (304, b"")
    head = ask.head(f"/kernels/{DIGEST}/binary")
    assert (head.headers["Content-Length"], head.content) == (str(len(DATA)), b"")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("0-9", 0, 9), ("100-", 100, len(DATA) - 1), ("-5", len(DATA) - 5, len(DATA) - 1)],
)
def test_a_part_is_what_was_asked_for(ask, asked, first, last):
    """Ranges of the three forms give their bytes and say which."""
    publish(ask)
    answer = ask.get(f"/kernels/{DIGEST}/binary", headers={"Range": f"bytes={asked}"})

    assert answer.status_code == 206
    assert answer.content == DATA[first : last + 1]
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(DATA)}"


def test_parts_that_there_are_not(ask):
    """Past the end is refused; what is no range, or of another thing, gives all."""
    publish(ask)
    address = f"/kernels/{DIGEST}/binary"
    past = ask.get(address, headers={"Range": f"bytes={len(DATA)}-"})
    assert (past.status_code, past.headers["Content-Range"]) == (416, f"bytes */{len(DATA)}")
    for headers in (
        {"Range": "bytes=9-1"},
        {"Range": "lines=1-2"},
        {"Range": "bytes=0-1,4-5"},
        {"Range": "bytes=5-", "If-Range": '"another"'},
    ):
        assert ask.get(address, headers=headers).content == DATA


def test_a_body_is_compared_with_its_digest_before_it_is_stored(ask, kept):
    """What arrives as something else is refused, and so is what is no artifact."""
    said = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    for answer in (
        publish(ask, **{"Content-Digest": f"sha-256=:{said}:"}),
        publish(ask, **{"Content-Digest": "md5=:x:"}),
        publish(ask, DATA[:-1]),
        publish(ask, b""),
        publish(ask, **{"Esper-Record": "[]"}),
    ):
        assert answer.status_code == 400
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert kept.search() == []
    assert list((kept.root / "blobs").iterdir()) == []


def publish_at_once(client, count=16):
    """Publish the same bytes from many threads, each with a record of its own."""
    start = threading.Barrier(count)

    def one(number):
        start.wait()
        return publish(client, **{"Esper-Record": f'{{"number": {number}}}'}).status_code

    with ThreadPoolExecutor(count) as threads:
        return set(threads.map(one, range(count)))


def test_sixteen_publishes_of_the_same_bytes_all_succeed(ask, kept):
    """There is one row, one file and nothing left over, and the first record stays."""
    assert publish_at_once(ask) == {201}

    (entry,) = kept.search()
    assert {path.name for path in (kept.root / "blobs").iterdir()} == {DIGEST, "book"}
    publish(ask, **{"Esper-Record": '{"number": 99}'})
    assert kept.search() == [entry]


def test_control_a_put_that_overwrites_is_caught(ask, kept, monkeypatch):
    """Where a later row takes the place of an earlier one, the record does not stay."""
    monkeypatch.setattr(kept.book.artifacts.__class__, "size", lambda self, digest: None)
    overwriting = book_artifacts._PUBLISH.replace(
        "DO NOTHING", "DO UPDATE SET record = excluded.record"
    )
    monkeypatch.setattr(book_artifacts, "_PUBLISH", overwriting)
    publish(ask, **{"Esper-Record": '{"number": 1}'})
    publish(ask, **{"Esper-Record": '{"number": 99}'})

    assert kept.search()[0].record == {"number": 99}


def peak_of_uploads(client, data, num_uploads=4):
    """Upload several times at once; return by how many bytes the process has grown meanwhile."""

    def parts():
        for start in range(0, len(data), 1 << 16):
            yield data[start : start + (1 << 16)]

    publish(client)  # what the first request imports is not the upload's
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])
    with ThreadPoolExecutor(num_uploads) as threads:
        answers = threads.map(lambda _: publish(client, parts()).status_code, range(num_uploads))
        assert set(answers) <= {201, 400}
    return (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before) << 10


def test_uploads_pass_through(ask):
    """Four uploads of 32 MB at once take the memory of their chunks, not their own."""
    assert peak_of_uploads(ask, artifact(2, size=8 << 20)) < 32 << 20


def test_control_uploads_that_are_collected_first_are_caught(ask, monkeypatch):
    """The same uploads, read as whole bodies, take their own size."""

    async def write_all(request: Request, upload):
        upload.write(await request.body())

    monkeypatch.setattr(kernels, "_write_all", write_all)
    assert peak_of_uploads(ask, artifact(2, size=8 << 20)) > 64 << 20

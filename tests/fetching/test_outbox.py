"""What is compiled in a run reaches its registry, and the run never waits for it."""

import threading

import pytest

from esper.contracts.errors import (
    KernelCorruptError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.contracts.kernel_reports import FieldReport
from esper.fetching.outbox import KernelParcel, Outbox, ReportParcel
from esper.resilience.retry import RetryPolicy

AT_ONCE = RetryPolicy(base_delay_s=0.0, max_delay_s=0.0)
NEVER = RetryPolicy(base_delay_s=1e6, max_delay_s=1e6)
DOWN = KernelSourceUnavailable("it did not answer")


class Answers:
    """A registry that answers one put after the other with what it was told to; then it takes."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.taken, self.threads, self.reports = [], [], []

    def put(self, data, *, digest, record):
        self.threads.append(threading.current_thread())
        if self.errors:
            raise self.errors.pop(0)
        self.taken.append((digest, data, record))
        return digest

    def report_outcome(self, report):
        if self.errors:
            raise self.errors.pop(0)
        self.reports.append((len(self.taken), report))


class Held(Answers):
    """One that answers nothing before it is let go."""

    def __init__(self):
        super().__init__()
        self.go, self.entered = threading.Event(), threading.Event()

    def put(self, data, *, digest, record):
        self.entered.set()
        self.go.wait()
        return super().put(data, digest=digest, record=record)


def parcel(number):
    return KernelParcel(digest=f"{number:064x}", data=bytes([number]), record={"number": number})


def field_report(graft):
    return ReportParcel(
        report=FieldReport(
            artifact_id=parcel(1).digest,
            blueprint_digest="1" * 64,
            run_id="run",
            graft_id=str(graft),
            site_kind="linear",
            in_features=4,
            out_features=4,
            metric="gate loss",
            unit="relative",
            contribution=0.1,
            standard_error=0.01,
            num_looks=9,
            verdict="fossilized",
        )
    )


def test_parcels_arrive_in_their_order_on_another_thread():
    """Everything that was sent has arrived when the box is closed, and no thread is left."""
    registry = Answers()
    box = Outbox(registry)
    for number in range(5):
        box.send(parcel(number))

    assert box.close() == []
    assert registry.taken == [(p.digest, p.data, p.record) for p in map(parcel, range(5))]
    assert threading.current_thread() not in registry.threads
    assert not [t for t in threading.enumerate() if t.name == "esper outbox"]


def test_the_same_artifact_is_sent_once():
    """A kernel that is tried again is there already, or on its way."""
    registry = Answers()
    box = Outbox(registry)
    for _ in range(3):
        box.send(parcel(1))

    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(1).digest]


def test_sending_does_not_wait_and_closing_gives_up():
    """A registry that hangs holds up nobody; what has not arrived is named."""
    registry = Held()
    box = Outbox(registry)
    box.send(parcel(1))
    box.send(parcel(2))
    assert registry.entered.wait(10)

    assert box.close(timeout_s=0.01) == [parcel(1), parcel(2)]
    registry.go.set()


def test_what_a_breaker_held_back_is_no_try():
    """It waits already: the box does not wait longer and longer on top of that."""
    waits = []

    class Noting:
        def longest_delay_s(self, retry):
            waits.append(retry)
            return 0.0

    rests = KernelSourceSuspended("it is not asked now")
    registry = Answers(DOWN, rests, rests, DOWN)
    box = Outbox(registry, policy=Noting())
    box.send(parcel(1))
    while not registry.taken:
        threading.Event().wait(0.001)
    assert box.close() == []
    assert waits == [0, 1, 1, 1]
    assert [hitch.error for hitch in box.hitches()] == [DOWN]


def test_a_registry_that_is_down_is_asked_again():
    """Nothing is lost, and it is said once for each parcel."""
    registry = Answers(DOWN, DOWN, DOWN)
    box = Outbox(registry, policy=AT_ONCE)
    box.send(parcel(1))
    while not registry.taken:
        threading.Event().wait(0.001)

    assert box.close() == []
    (hitch,) = box.hitches()
    assert (hitch.digest, hitch.error, hitch.is_final) == (parcel(1).digest, DOWN, False)
    assert box.hitches() == []


@pytest.mark.parametrize(
    "error", [KernelSourceRefused("no right"), KernelCorruptError("damaged"), ValueError("long")]
)
def test_what_is_refused_is_sent_once(error):
    """A refusal is an answer: the parcel goes, the next one arrives."""
    registry = Answers(error)
    box = Outbox(registry, policy=NEVER)
    box.send(parcel(1))
    box.send(parcel(2))

    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(2).digest]
    assert [(h.error, h.is_final) for h in box.hitches()] == [(error, True)]


def test_closing_asks_once_more():
    """Who waits for the next try is woken; a registry that is back by then gets everything."""
    registry = Answers(DOWN)
    box = Outbox(registry, policy=NEVER)
    box.send(parcel(1))
    while not registry.threads:
        threading.Event().wait(0.001)

    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(1).digest]


def test_what_has_not_arrived_is_in_the_folder(tmp_path):
    """Under its digest, byte for byte; what has arrived is not there, nor is an empty folder."""
    folder = tmp_path / "outbox"
    box = Outbox(Answers(), folder=folder)
    box.send(parcel(1))
    assert box.close() == []
    assert not folder.exists()

    box = Outbox(Answers(DOWN, DOWN, DOWN), folder=folder, policy=NEVER)
    for number in (2, 3):
        box.send(parcel(number))
    assert box.close() == [parcel(2), parcel(3)]
    for number in (2, 3):
        assert (folder / parcel(number).digest).read_bytes() == parcel(number).data


def test_a_folder_that_cannot_be_written_costs_nothing_else(tmp_path):
    """The parcel arrives all the same."""
    (tmp_path / "file").write_bytes(b"")
    registry = Answers()
    box = Outbox(registry, folder=tmp_path / "file" / "outbox")
    box.send(parcel(1))
    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(1).digest]


def test_a_report_is_sent_once_and_behind_its_kernel():
    """Equal run and graft is the same report, whatever else it says."""
    registry = Answers()
    box = Outbox(registry)
    for each in (parcel(1), field_report(1), field_report(1), field_report(2)):
        box.send(each)

    assert box.close() == []
    assert registry.reports == [(1, field_report(1).report), (1, field_report(2).report)]


def test_what_a_killed_run_left_is_sent_by_the_next(tmp_path):
    """Kernels before reports, whatever their names; what arrived is there no more."""
    folder = tmp_path / "outbox"
    left = Outbox(Answers(DOWN, DOWN), folder=folder, address="here", policy=NEVER)
    for each in (field_report(1), parcel(1)):
        left.send(each)
    assert len(left.close()) == 2
    (folder / "torn.report.json").write_text("{")

    registry = Answers()
    assert Outbox(registry, address="there").adopt(folder) == 0, "it is for another registry"
    box = Outbox(registry, address="here")
    assert box.adopt(folder) == 2
    assert box.adopt(tmp_path / "nowhere") == 0
    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(1).digest]
    assert registry.reports == [(1, field_report(1).report)]
    assert sorted(path.name for path in folder.iterdir()) == ["address", "torn.report.json"]


def test_a_thread_stays_for_the_next_parcel():
    """Who starts one waits until it runs, which a step must not do for each parcel."""
    registry = Answers()
    box = Outbox(registry)
    for number in range(3):
        box.send(parcel(number))
        while len(registry.taken) <= number:
            threading.Event().wait(0.001)

    assert box.close() == []
    assert len(set(registry.threads)) == 1


def test_where_no_thread_starts_the_next_parcel_tries(monkeypatch):
    """A machine that has no room for one more costs no step, and no parcel."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    registry = Answers()
    box = Outbox(registry)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        box.send(parcel(1))
    box.send(parcel(2))
    assert box.close() == []
    assert [digest for digest, _, _ in registry.taken] == [parcel(1).digest, parcel(2).digest]

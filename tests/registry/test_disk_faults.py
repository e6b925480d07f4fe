"""What a directory registry keeps when any one call to the machine fails.

Every call of every operation is failed in turn, in five ways; then every call is followed by a
power failure. One judge says whether anything was lost, torn or left dangling, and the controls,
which store in a wrong order, must be found guilty by it.
"""

import functools
import itertools
import random

import pytest
from faulty_disk import Crash, FaultyDisk, ForgetfulDisk
from kernel_artifacts import artifact

from esper.contracts import artifact_format
from esper.contracts.errors import KernelNotFoundError, KernelSourceUnavailable
from esper.registry.directory import DirectoryRegistry
from esper.resilience.durable_file import write_synced

KEPT, WITHDRAWN, ADDED = (artifact(number, size=400) for number in range(3))
KEPT_ID, WITHDRAWN_ID, ADDED_ID = map(artifact_format.digest_of, (KEPT, WITHDRAWN, ADDED))

OPERATIONS = {
    "put": lambda registry: registry.put(ADDED),
    "put again": lambda registry: registry.put(WITHDRAWN),
    "get": lambda registry: registry.get(KEPT_ID),
    "tag": lambda registry: registry.tag("mlp", "other", KEPT_ID),
    "search": lambda registry: registry.search(),
    "collect": lambda registry: registry.collect(grace_s=0.0),
    "verify": lambda registry: registry.verify(),
}
WAYS = ["before", "after", "torn", "crash", "torn crash"]


@pytest.fixture
def prepare(tmp_path):
    """Return a function that makes a store with one artifact kept and one condemned."""

    def prepared(name):
        root = tmp_path / name
        disk = FaultyDisk()
        registry = DirectoryRegistry(root, disk=disk)
        registry.put(KEPT)
        registry.tag("mlp", "latest", KEPT_ID)
        registry.put(WITHDRAWN)
        registry.delete(WITHDRAWN_ID)
        registry.collect(grace_s=0.0)
        return registry, disk, root

    return prepared


def judge(root, *, acknowledged=()):
    """Open what is left and return what is wrong with it; an empty list where nothing is."""
    registry = DirectoryRegistry(root)
    wrong = [f"{name} is left" for name in (root / "blobs").iterdir() if name.suffix == ".part"]
    wrong += [f"{name} was torn" for name in (root / "quarantine").iterdir()]
    wrong += [f"{digest} is dangling" for digest in registry.verify().missing]
    for data in {KEPT, *acknowledged}:
        if not registry.exists(artifact_format.digest_of(data)):
            wrong.append(f"{artifact_format.digest_of(data)} was lost")
    for entry in registry.search():
        data = (KEPT, WITHDRAWN, ADDED)[int(entry.metadata.blueprint_digest, 16)]
        if registry.exists(entry.digest) and registry.get(entry.digest) != data:
            wrong.append(f"{entry.digest} has other bytes")
    if registry.resolve("mlp:latest") != KEPT_ID:
        wrong.append("mlp:latest moved")
    registry.close()
    return wrong


def in_folder(prepare, operation, name):
    """Prepare a store of an operation's own."""
    return prepare(f"{operation} {name}")


def num_calls(prepare, operation):
    registry, disk, _ = prepare("counted")
    disk.arm()
    operation(registry)
    count = disk.num_calls
    registry.close()
    return count


def fail_every_call(prepare, operation, way):
    """Fail each call of an operation once; return every wrong that was found, and the calls."""
    wrong, failed = [], set()
    for point in range(num_calls(prepare, operation)):
        registry, disk, root = prepare(f"{way}-{point}")
        acknowledged = ()
        disk.arm(point, way)
        try:
            done = operation(registry)
            acknowledged = (ADDED,) if done == ADDED_ID else ()
        except (KernelSourceUnavailable, Crash):
            pass
        failed.add(disk.failed_call)
        disk.disarm()
        if "crash" in way:
            disk.die()
        else:
            operation(registry)  # it may be repeated, on the same object
            registry.close()
        wrong += [f"{way} at {point}: {found}" for found in judge(root, acknowledged=acknowledged)]
    return wrong, failed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failed_call_loses_nothing(prepare, name, way):
    """Whichever call fails, nothing published is lost, torn or dangling, and a repeat succeeds."""
    wrong, failed = fail_every_call(prepare, OPERATIONS[name], way)

    assert wrong == []
    assert failed - {None}


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_a_failed_call_loses_nothing_of_any_size(prepare, monkeypatch, seed):
    """The same at every point for artifacts of other sizes, from a few bytes to some chunks."""
    sizes = random.Random(seed)
    for number, name in enumerate(("KEPT", "WITHDRAWN", "ADDED")):
        data = artifact(number, size=sizes.choice([1, 7, 1_000, 20_000, 300_000]))
        monkeypatch.setitem(globals(), name, data)
        monkeypatch.setitem(globals(), f"{name}_ID", artifact_format.digest_of(data))
    for name, way in itertools.product(OPERATIONS, WAYS):
        wrong, failed = fail_every_call(
            functools.partial(in_folder, prepare, name), OPERATIONS[name], way
        )
        assert wrong == []
        assert failed - {None}


@pytest.mark.parametrize("way", ["before", "after", "crash"])
def test_a_failed_call_while_opening_loses_nothing(prepare, way):
    """Whichever call of opening a store fails, the next opening finds everything."""
    counted = FaultyDisk()
    registry, _, root = prepare("store")
    registry.close()
    DirectoryRegistry(root, disk=counted).close()
    for point in range(counted.num_calls - 1):  # the last call is the lock's closing
        disk = FaultyDisk()
        disk.arm(point, way)
        with pytest.raises((KernelSourceUnavailable, Crash)):
            DirectoryRegistry(root, disk=disk)
        disk.disarm()
        disk.die()
        assert judge(root) == []


def test_a_put_that_failed_is_absent_until_it_is_repeated(prepare):
    """An unanswered publish whose row was not committed is as if it had never been tried."""
    registry, disk, _ = prepare("store")
    disk.arm(0, "before")
    with pytest.raises(KernelSourceUnavailable, match="try again"):
        registry.put(ADDED)
    disk.disarm()

    with pytest.raises(KernelNotFoundError):
        registry.get(ADDED_ID)
    assert registry.put(ADDED) == ADDED_ID
    assert registry.get(ADDED_ID) == ADDED
    registry.close()


def power_failures(tmp_path):
    """Publish and collect; cut the power after every call; return every wrong that was found."""
    root = tmp_path / "store"
    memory = ForgetfulDisk(root)
    wrong, acknowledged = [], []

    def cut():
        for names_kept in (False, True):
            memory.leave(tmp_path / "left", names_kept=names_kept)
            wrong.extend(judge(tmp_path / "left", acknowledged=acknowledged))

    def watch(operation):
        operation()
        cut()

    disk = FaultyDisk(memory)
    registry = DirectoryRegistry(root, disk=disk)
    registry.put(KEPT)
    registry.tag("mlp", "latest", KEPT_ID)
    disk._after_call = cut
    for data in (WITHDRAWN, ADDED):
        registry.put(data)
        acknowledged.append(data)
        cut()
    acknowledged.remove(WITHDRAWN)
    for operation in (functools.partial(registry.delete, WITHDRAWN_ID), registry.collect):
        watch(operation)
    watch(functools.partial(registry.collect, grace_s=0.0))
    disk._after_call = lambda: None
    registry.close()
    return wrong


def test_what_was_answered_survives_a_power_failure(tmp_path):
    """Cut the power after any call: what was published is there, the rest wholly or not at all."""
    assert power_failures(tmp_path) == []


def row_first(registry, screened, part, actor):
    """A control: publish the row, then write under the final name."""
    registry.book.artifacts.publish(screened, 0.0)
    blobs = registry._blobs._blobs
    data = part.path.read_bytes()
    part.discard()
    write_synced(registry._disk, blobs / screened.digest, [data])
    registry._disk.sync_directory(blobs)


def test_control_publishing_the_row_first_is_caught(prepare, monkeypatch):
    """The judge finds a row without bytes where the order of a put is turned round."""
    monkeypatch.setattr(DirectoryRegistry, "enter", row_first)
    wrong, _ = fail_every_call(prepare, OPERATIONS["put"], "crash")
    assert any("dangling" in found for found in wrong)


def test_control_writing_under_the_final_name_is_caught(prepare, monkeypatch):
    """The judge finds torn bytes where a put does without its temporary file."""
    monkeypatch.setattr(DirectoryRegistry, "enter", row_first)
    wrong, _ = fail_every_call(prepare, OPERATIONS["put"], "torn crash")
    assert any("torn" in found for found in wrong)


@pytest.mark.parametrize("forgotten", ["sync", "sync_directory"])
def test_control_a_forgotten_sync_is_caught(tmp_path, monkeypatch, forgotten):
    """The power failure finds a loss where a file's or a directory's sync is left out."""
    monkeypatch.setattr(ForgetfulDisk, forgotten, lambda self, what: None)
    assert power_failures(tmp_path) != []

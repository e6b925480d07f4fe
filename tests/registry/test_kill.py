"""A registry whose publisher is killed, again and again, at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_artifacts import artifact
from publisher import SIZE

from esper.registry.directory import DirectoryRegistry

PUBLISHER = Path(__file__).parents[1] / "support" / "publisher.py"
MOST_WORDS = 24
LONGEST_DELAY_S = 0.004


def publish_and_kill(root, first, num_words, delay_s, *mode):
    """Run a publisher, kill it ``delay_s`` after ``num_words`` words, and return all it said."""
    command = [sys.executable, "-S", str(PUBLISHER), str(root), str(first), *mode]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        said = b"".join(process.stdout.readline() for _ in range(num_words))
        end = time.perf_counter() + delay_s
        while time.perf_counter() < end:
            pass  # shorter than a sleep can be
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read()
    assert process.returncode == -signal.SIGKILL, "the publisher ended by itself"
    words = [line.split() for line in said.decode().splitlines()]
    return [(word, int(number)) for word, number in words]


class Ledger:
    """What the publishers were answered, and so what must be there and what must not."""

    def __init__(self):
        self.there, self.gone, self.open = set(), set(), set()
        self.next_number = 0

    def enter(self, words):
        for word, number in words:
            self.open.discard(number)
            {"try": self.open, "put": self.there, "deleting": self.open, "deleted": self.gone}[
                word
            ].add(number)
            if word == "deleting":
                self.there.discard(number)
            if word == "put":  # what was only tried is tried again
                self.next_number = number + 1

    def audit(self, root):
        """Open what the killed publisher left, and return everything that is wrong with it."""
        registry = DirectoryRegistry(root)
        numbers = {
            entry.digest: int(entry.metadata.blueprint_digest, 16) for entry in registry.search()
        }
        wrong = [f"{digest} is dangling" for digest in registry.verify().missing]
        wrong += [f"{path.name} was torn" for path in (root / "quarantine").iterdir()]
        wrong += [f"{path.name} is left" for path in (root / "blobs").iterdir() if path.suffix]
        found = set(numbers.values())
        wrong += [f"{number} was answered and lost" for number in self.there - found]
        wrong += [f"{number} was withdrawn and is there" for number in self.gone & found]
        wrong += [f"{number} was never published" for number in found - self.there - self.open]
        for digest, number in numbers.items():
            if registry.exists(digest) and registry.get(digest) != artifact(number, size=SIZE):
                wrong.append(f"{number} has other bytes")
        registry.close()
        return wrong


def kill_again_and_again(root, cycles, *mode, until_wrong=False):
    """Return what was wrong after ``cycles`` publishers were killed, and how many were answered."""
    chance = random.Random(20_260_101)
    ledger, wrong = Ledger(), []
    for cycle in range(cycles):
        moment = chance.randint(1, MOST_WORDS), chance.uniform(0.0, LONGEST_DELAY_S)
        ledger.enter(publish_and_kill(root, ledger.next_number, *moment, *mode))
        wrong += [f"cycle {cycle}: {found}" for found in ledger.audit(root)]
        if wrong and until_wrong:
            break
    return wrong, len(ledger.there) + len(ledger.gone)


@pytest.mark.slow
def test_nothing_answered_is_lost_when_publishers_are_killed(tmp_path):
    """After 50 kills nothing acknowledged is lost and nothing is torn, dangling or left over."""
    wrong, answered = kill_again_and_again(tmp_path / "store", 50)

    assert wrong == []
    assert answered > 50


@pytest.mark.slow
def test_control_storing_in_a_wrong_order_is_caught_by_killing(tmp_path):
    """The same kills find a row without its bytes where the row is published first."""
    wrong, _ = kill_again_and_again(tmp_path / "store", 50, "row-first", until_wrong=True)

    assert wrong != []


@pytest.mark.torture
@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_nothing_answered_is_lost_in_five_thousand_kills(tmp_path):
    """The same over 100 stores of 50 kills each."""
    for store in range(100):
        wrong, _ = kill_again_and_again(tmp_path / str(store), 50)
        assert wrong == []

"""A run that is killed, whatever it is doing, and started again: it ends as if nobody had."""

from __future__ import annotations

import random
import shutil

import killed_runs
import pytest
import torch
from fork_server import ForkServer
from killed_runs import NEVER, RECORDED, RUNS, START, TRIED, end_of, saved_at


class Lives:
    """Starts processes that live through a run, or a part of it.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder):
        self._server, self._folder = ForkServer(killed_runs.__file__), folder
        self._num_runs, self._wholes = 0, {}
        self.took_s, self.num_killed = 0.0, 0
        self.close = self._server.close

    def place(self, like=None):
        """Return the folder of another run, with the checkpoint of one where it is given."""
        self._num_runs += 1
        folder = self._folder / str(self._num_runs)
        if like is None:
            folder.mkdir()
        else:
            shutil.copytree(like, folder)
        return folder

    def live(self, kind, folder, *, start=START, kill=None, killed_after_s=None, without=""):
        """Let a process begin a run or go on with it; return whether it was killed."""
        request = (kind, str(folder), start, kill, without)
        was_killed, self.took_s = self._server.run(*request, killed_after_s=killed_after_s)
        self.num_killed += was_killed
        return was_killed

    def whole(self, kind, start=START):
        """Return how a run ends that was not killed and decides to grow after ``start``."""
        if (kind, start) not in self._wholes:
            folder = self.place()
            assert not self.live(kind, folder, start=start)
            self._wholes[kind, start] = end_of(folder)
        return self._wholes[kind, start]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """One server for all tests of this file."""
    made = Lives(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


class Expected:
    """What a run comes to that went on from checkpoints, by the rule of what begins again.

    A recording and a trial begin again where the run was saved, the latter once: another that is
    cut off is beyond the tries.
    """

    def __init__(self, kind):
        self.kind, self.start, self.num_cut = kind, START, 0

    def go_on_from(self, update):
        """Learn that the run went on from a checkpoint."""
        since = update - self.start
        if self.kind == "depth" or not 0 <= since < RECORDED + TRIED:
            return
        self.num_cut += since >= RECORDED
        self.start = update if self.num_cut < 2 else NEVER

    def check(self, lives, found):
        """Hold how the run ended against one that was not killed."""
        expected = lives.whole(self.kind, self.start)
        assert differing(found, expected) <= ({"report"} if self.num_cut else set())
        if self.num_cut == 1:  # the report tells of what was cut off too
            kept = [[t["effect"] for t in each["report"]["trials"]] for each in (found, expected)]
            assert kept[0][-len(kept[1]) :] == kept[1]


def differing(one, other):
    """Return the parts in which two ends differ."""
    return {part for part in one.keys() | other.keys() if not same(one.get(part), other.get(part))}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


CHAINS = {
    "while it records and is taken over": ("twin", [7, None, 700], [20, "take_over", 900]),
    "while it is held": (
        "twin",
        [20, None, 2000],
        [22, "write_durably", 60],
        [26, "fossilize", 200],
    ),
    "while blocks wake": ("depth", [14, None, 500], [20, "write_durably", 200]),
}
"""Kinds of runs, and when each is killed: in an update, at a call since a function is called."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(lives, name):
    """Weights, moments, averages, rates, scale, draws, and the report with its figures of work."""
    kind, *kills = CHAINS[name]
    folder, expected = lives.place(), Expected(kind)
    for kill in kills:
        assert lives.live(kind, folder, kill=kill), f"the run did not come to {kill}"
        expected.go_on_from(saved_at(folder))
    assert not lives.live(kind, folder)
    expected.check(lives, end_of(folder))


@pytest.mark.slow
def test_control_a_run_that_lacks_first_steps_or_draws_ends_elsewhere(lives):
    """So that the comparison would notice what a checkpoint left out."""
    folder = lives.place()
    assert lives.live("twin", folder, kill=[21, None, 0])
    for without in ("warm-up", "draws"):
        lacking = lives.place(like=folder)
        assert not lives.live("twin", lacking, without=without)
        assert "model" in differing(end_of(lacking), lives.whole("twin"))


@pytest.mark.torture
@pytest.mark.parametrize("kind", RUNS)
def test_killed_at_any_moment(lives, kind):
    """A third of a thousand times, up to three times a run, the loading included."""
    chance, before = random.Random(kind), lives.num_killed
    lives.whole(kind)
    whole_s = lives.took_s
    while lives.num_killed - before < 334:
        folder, expected = lives.place(), Expected(kind)
        for _ in range(chance.randint(1, 3)):
            if not lives.live(kind, folder, killed_after_s=chance.uniform(0.01, whole_s)):
                break
            expected.go_on_from(saved_at(folder))
        else:
            assert not lives.live(kind, folder)
        expected.check(lives, end_of(folder))
        shutil.rmtree(folder)

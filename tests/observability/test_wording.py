"""Sentences and figures of reports."""

from dataclasses import replace

import pytest

from esper.contracts.intervals import Interval
from esper.contracts.progress import ProgressRow, metric_text
from esper.observability.wording import (
    bytes_text,
    interval_text,
    not_beaten,
    wins_text,
)


def test_the_good_and_the_bad_are_one_sentence(make_demo):
    """Arms that were beaten come first, then those whose interval reaches 0."""
    bends = {"host": 4.0, "grown": 4.0, "random": 2.0, "scratch": 3.9}
    sentence = not_beaten(make_demo(bends=bends))
    good, bad = sentence.split(", but not ")
    assert good.startswith("Growth beat a random choice of kernels")
    assert bad.startswith("the host trained on")
    assert " or a network of the grown shape" in bad


def test_the_first_sentence_says_at_what_work(make_demo):
    """All work over training's, and the whole beside the host's and that from scratch."""
    demo = make_demo()
    grown = replace(demo.arms["grown"], work=1.784, train_flops=25.2e9)
    sentence = not_beaten(replace(demo, arms={**demo.arms, "grown": grown}))
    assert sentence.endswith(
        ", and took 1.78 times the FLOPs of its own training, 12 times the host's and 4.0 times "
        "those from scratch."
    )
    assert sentence.count(". ") == 0


def test_wins_are_counted_beside_the_interval(make_demo):
    """Random seed by random seed, a tie being none."""
    assert "better at 10 of 10 random seeds" in not_beaten(make_demo())
    bends = {"host": 4.0, "grown": 4.0, "random": 2.0, "scratch": 3.0}
    demo = make_demo(bends=bends)
    assert wins_text(demo.wins["host"]) == "0 won, 0 lost, 10 tied"
    assert "better at 0 of 10 random seeds" in not_beaten(demo)


def test_worse_is_called_worse(make_demo):
    """An interval wholly below 0 is said to be worse."""
    bends = {"host": 0.0, "grown": 4.0, "random": 2.0, "scratch": 9.0}
    assert "(worse: -5.15 points" in not_beaten(make_demo(bends=bends))


def test_beating_everything_is_said_with_its_limits(make_demo):
    """Where every arm was beaten, the sentence says that there was no other comparison."""
    bends = {"host": 0.0, "grown": 9.0, "random": 2.0, "scratch": 3.0}
    sentence = not_beaten(make_demo(bends=bends))
    assert sentence.startswith("There is nothing in this demo that growth did not beat")
    assert "compared with no more than" in sentence


def test_one_random_seed_shows_nothing(make_demo):
    """With a single random seed no arm counts as beaten, however large the difference."""
    sentence = not_beaten(make_demo((0,)))
    assert sentence.startswith("Growth did not beat the host")
    assert sentence.count("in one run, which shows nothing") == 3


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(mean=2.0, low=-1.0, high=5.0), "+2.00 (-1.00 to +5.00)"),
        (Interval(mean=2.0, low=None, high=None), "+2.00 (one run, no interval)"),
        (Interval(mean=None, low=None, high=None), "\u2013"),
    ],
    ids=["known", "one run", "nothing"],
)
def test_intervals_are_written_with_what_is_known(interval, expected):
    """What is not known is not made up."""
    assert interval_text(interval, sign=True) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, "\u2013"), (12, "12 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB")],
)
def test_bytes_have_a_prefix(size, expected):
    """Memory is written with three digits and a binary prefix."""
    assert bytes_text(size) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("accuracy", 0.9325, "93.2 %"),
        ("perplexity", 12.5, "12.5"),
        ("bleu", 31.41592, "31.42"),
        ("perplexity", 1.086e13, "1.086e+13"),
    ],
)
def test_a_metric_is_shown_by_its_name(name, value, expected):
    """A share is shown in percent, everything else by four digits."""
    assert metric_text(name, value) == expected


def test_what_was_measured_begins_with_the_losses():
    """Then come the owner's metrics, in their order; before an evaluation there is nothing."""
    row = ProgressRow(
        name="run",
        update=3,
        gate_loss=0.5,
        train_loss=0.25,
        metrics={"b": 1.0, "accuracy": 0.25},
    )
    assert list(row.measured().items()) == [
        ("gate loss", "0.5"),
        ("training loss", "0.25"),
        ("b", "1"),
        ("accuracy", "25.0 %"),
    ]
    assert ProgressRow(name="run", update=3).measured() == {}

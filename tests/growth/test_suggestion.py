"""What ``suggest`` returns: a list that prints as the table of ``esper suggest``."""

from __future__ import annotations

from dataclasses import replace

from growing import growing, train, wrapped

from esper.growth.suggestion import Suggestion, Suggestions

SCORED = Suggestion(
    site="head",
    blueprint="mlp-8",
    gain=129.0123,
    stderr=42.4,
    parameters=1234,
    flops=2400.0,
    latency_us=12.3,
    reason="",
)
NOT_SCORED = Suggestion(
    site="head",
    blueprint="noise",
    gain=None,
    stderr=None,
    parameters=0,
    flops=None,
    latency_us=3.0,
    reason="nothing to train",
)


def lines_of(rows):
    return [" ".join(line.split()) for line in str(rows).splitlines()]


def test_suggestions_are_printed_in_their_order():
    """Each row has what the kernel scores and costs, or why there is no score."""
    assert lines_of(Suggestions([SCORED, NOT_SCORED]))[1:] == [
        "site kernel score std. error parameters FLOPs us remark",
        "head mlp-8 129 42 1,234 2.4 kFLOP 12",
        "head noise \u2013 \u2013 0 \u2013 3 nothing to train",
        (
            "To put one in: esper.layers(model)[site].graft(0, kernel, example=...), then "
            "esper.sync_optimizer(model, optimizer), so that it is trained"
        ),
    ]
    assert lines_of(Suggestions())[0].endswith(": none")


def test_columns_are_aligned():
    """Numbers to the right, words to the left."""
    head, first, second = str(Suggestions([SCORED, NOT_SCORED])).splitlines()[1:4]
    assert head.index("kernel") == first.index("mlp-8") == second.index("noise")
    assert head.index("score") + len("score") == first.index("129") + len("129")


def test_a_score_is_not_told_as_a_fall_of_the_loss():
    """It can be above the loss itself, which no fall can."""
    (title, *_) = lines_of(Suggestions([SCORED]))
    assert "no fall of the loss to expect" in title
    assert "gain" not in str(Suggestions([SCORED]))


def test_going_on_is_told_beside_the_table():
    """What the same FLOPs of training would bring, in the unit of the held-out loss."""
    rows = Suggestions([replace(SCORED, going_on=0.12345, going_on_stderr=0.01)])
    (line,) = [line for line in lines_of(rows) if line.startswith("Going on")]
    assert "lower by 0.123 \u00b1 0.01" in line


def test_a_run_suggests_a_list_that_prints_as_its_table():
    """A slice of it too; each row is a suggestion."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer)
    train(model, optimizer, 12, grower)
    rows = grower.suggest()
    grower.close()
    assert isinstance(rows, list)
    assert all(isinstance(row, Suggestion) for row in rows)
    for some in (rows, rows[:2]):
        assert str(some) == repr(some)
        assert len([line for line in lines_of(some) if "mlp-4x" in line]) >= 2
        assert "Suggestion(" not in str(some)
    assert len(lines_of(rows[:2])) < len(lines_of(rows))

"""Charts as SVG."""

import itertools
import xml.etree.ElementTree as ET

import pytest

from esper.observability.charts import (
    LARGE,
    PLACES,
    Bar,
    Chart,
    Effect,
    EffectGroup,
    Lane,
    Mark,
    Series,
    draw_effects,
    draw_lanes,
    draw_lines,
    thinned,
    ticks,
)


def a_chart(*series, **other):
    values = {
        "name": "c",
        "title": "A title",
        "description": "What it says.",
        "x_label": "updates",
        "y_label": "accuracy, %",
        "x_range": (0.0, 100.0),
    }
    return Chart(series=series, **(values | other))


def by_class(drawing, style):
    return [
        node for node in ET.fromstring(drawing).iter() if style in node.get("class", "").split()
    ]


def coordinates(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1200, [0, 500, 1000]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (87.3, 91.2, [88, 89, 90, 91]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    """Ticks are multiples of 1, 2 or 5 times a power of ten, within the range."""
    assert ticks(low, high) == pytest.approx(expected)


def test_a_long_line_has_no_more_points_than_a_screen_shows():
    """Its peaks and its ends stay; of a short one every point does."""
    short = tuple((float(x), 1.0) for x in range(4 * PLACES))
    assert thinned(short) == list(short)
    tall = [(float(x), 5.0 if x == 31_415 else 0.1 * (x % 3)) for x in range(100_000)]
    few = thinned(tall)
    assert len(few) <= 4 * (PLACES + 1)
    assert few == sorted(set(few))
    assert {few[0], few[-1], (31_415.0, 5.0)} <= set(few)
    assert {tall[0], tall[-1]} <= set(few)


def test_a_line_goes_where_its_values_say():
    """The first point is at the left edge, the last at the right, and higher values are higher."""
    line = Series(style="grown", points=((0.0, 10.0), (100.0, 20.0)), label="grown")
    (drawn,) = by_class(draw_lines(a_chart(line, y_range=(10.0, 20.0))), "line")
    assert coordinates(drawn) == [
        (LARGE.left, LARGE.area_bottom),
        (LARGE.area_right, LARGE.top),
    ]


def test_a_line_of_one_point_can_be_seen():
    """As every line of a run that has been measured once: a dash about its place."""
    line = Series(style="grown", points=((50.0, 1.0),), label="grown")
    (drawn,) = by_class(draw_lines(a_chart(line)), "line")
    (left, y), (right, same) = coordinates(drawn)
    assert left < right
    assert y == same


def test_steps_hold_their_value():
    """A line of steps moves across first and then up."""
    line = Series(style="grown", points=((0.0, 0.0), (100.0, 1.0)), label="grown", steps=True)
    (drawn,) = by_class(draw_lines(a_chart(line)), "line")
    start, corner, end = coordinates(drawn)
    assert (corner[0], corner[1]) == (end[0], start[1])


def test_only_lines_with_a_label_are_bold():
    """A line without a label is faint, and has no name at its end."""
    bold = Series(style="grown", points=((0.0, 0.0), (1.0, 1.0)), label="grown")
    faint = Series(style="host", points=((0.0, 0.0), (1.0, 1.0)))
    drawing = draw_lines(a_chart(bold, faint))
    assert len(by_class(drawing, "faint")) == 1
    assert [node.text for node in by_class(drawing, "name")] == ["grown"]


def test_labels_do_not_overlap():
    """Lines that end at one point have labels a line's height apart."""
    lines = [
        Series(style=name, points=((0.0, 0.0), (100.0, 5.0)), label=name)
        for name in ("host", "grown", "random")
    ]
    heights = [float(node.get("y")) for node in by_class(draw_lines(a_chart(*lines)), "name")]
    assert all(b - a >= 16 for a, b in itertools.pairwise(heights))


def test_labels_fit_beside_and_above_the_axis():
    """Long names get room at the right, many names stay above the lower edge."""
    names = [f"a rather long name of line {i}" for i in range(12)]
    lines = [Series(style="grown", points=((0.0, 0.0), (100.0, 0.0)), label=n) for n in names]
    drawing = draw_lines(a_chart(*lines))
    labels = by_class(drawing, "name")
    assert all(float(n.get("x")) + 7 * len(n.text) <= LARGE.width for n in labels)
    heights = [float(n.get("y")) for n in labels]
    assert max(heights) <= LARGE.area_bottom + 5
    assert all(b - a >= 16 for a, b in itertools.pairwise(heights))


def test_a_line_that_leaves_the_range_has_its_label_at_the_edge():
    """A label is never written outside of the drawing."""
    line = Series(style="grown", points=((0.0, 1.0), (100.0, 900.0)), label="grown")
    (label,) = by_class(draw_lines(a_chart(line, y_range=(0.0, 2.0))), "name")
    assert float(label.get("y")) == LARGE.top + 4


def test_numbers_of_the_axis_fit():
    """Long numbers get room at the left."""
    line = Series(style="grown", points=((0.0, 0.000123451), (9.0, 0.000123459)), label="grown")
    ticks_shown = by_class(draw_lines(a_chart(line)), "end")
    assert all(float(n.get("x")) - 7 * len(n.text) >= 20 for n in ticks_shown)


def test_a_lane_has_its_label_first_and_whole():
    """At the left edge, above its bars; of a name that is too long both ends can be read."""
    bars = (Bar(stage="audition", start=10, end=20, text="a"),)
    lanes = [Lane(label=f"{n}. {'site.' * 8 * n}end", bars=bars) for n in (1, 9)]
    short, long = by_class(draw_lanes("l", "t", "d", lanes, 100.0), "tick")[-2:]
    assert short.text == lanes[0].label
    shown = "".join(long.itertext()).removeprefix(lanes[1].label)
    assert shown.startswith("9. site.")
    assert shown.endswith("site.end")
    assert {short.get("x"), long.get("x")} == {"16"}
    assert float(short.get("x")) + 7 * len(shown) < LARGE.width


def test_marks_outside_the_range_are_left_out():
    """A mark that the axis does not reach is not drawn over the margin."""
    line = Series(style="grown", points=((0.0, 0.0), (100.0, 100.0)), label="grown")
    marks = tuple(
        Mark(kind="culled", x=x, y=x, text=f"removed at {x:g}") for x in (10.0, 60.0, 90.0)
    )
    drawing = draw_lines(a_chart(line, marks=marks, y_range=(50.0, 100.0)))
    tips = [node[0].text for node in by_class(drawing, "mark")]
    assert tips == ["removed at 60", "removed at 90"]


def test_a_drawing_has_a_title_and_a_description():
    """What a drawing says is there in words, and the drawing names them as its label."""
    line = Series(style="grown", points=((0.0, 0.0), (1.0, 1.0)), label="grown")
    root = ET.fromstring(draw_lines(a_chart(line)))
    words = {node.get("id"): node.text for node in root if node.tag in {"title", "desc"}}
    assert [words[name] for name in root.get("aria-labelledby").split()] == [
        "A title",
        "What it says.",
    ]
    assert root.get("role") == "img"


def test_nothing_to_draw_is_a_sentence():
    """Without a point or a graft there is a sentence instead of an empty frame."""
    assert draw_lines(a_chart()).startswith("<p")
    assert draw_lanes("l", "Lives", "None.", [], 100.0).startswith("<p")


def test_a_lane_shows_stages_by_shape_and_how_it_ended():
    """Bars grow with the stage, and only a fossil lives on to the end of the run."""
    bars = (
        Bar(stage="audition", start=10, end=20, text="a"),
        Bar(stage="blending", start=20, end=30, text="b"),
        Bar(stage="holding", start=30, end=40, text="h"),
    )
    kept = draw_lanes("l", "t", "d", [Lane(label="1", bars=bars, verdict="fossilized")], 100.0)
    removed = draw_lanes("l", "t", "d", [Lane(label="1", bars=bars, verdict="culled")], 100.0)
    heights = [float(node.get("height")) for node in by_class(kept, "stage")]
    assert heights == sorted(set(heights))
    assert len(by_class(kept, "fossil-life")) == 1
    assert by_class(removed, "fossil-life") == []
    assert len(by_class(removed, "culled")) == 1


def an_effect(value, stderr=0.0, label="candidate"):
    return Effect(
        label=label, kind="disc", style="grown", value=value, stderr=stderr, text=f"{value}"
    )


def effects_drawn(*effects):
    return draw_effects(
        name="e",
        title="Effects",
        description="What they say.",
        groups=[EffectGroup(label="package 1", effects=effects)],
        x_label="loss saved",
        zero_label="live run",
    )


def place(mark):
    return float(mark.get("transform").removeprefix("translate(").split()[0])


def test_an_effect_stands_where_its_value_says():
    """Right of the line at 0 where it is positive, left of it where it is not, on its own row."""
    drawing = effects_drawn(an_effect(0.5), an_effect(-0.5), an_effect(0.0))
    zero = float(by_class(drawing, "base")[0].get("x1"))
    better, worse, equal = map(place, by_class(drawing, "mark"))
    assert worse < equal < better
    assert equal == pytest.approx(zero, abs=0.1)
    rows = [node.get("y") for node in by_class(drawing, "tick") if node.text == "candidate"]
    assert len(set(rows)) == 3


def test_a_bar_is_one_standard_error_on_either_side():
    """Its ends are as far from the mark as effects of that size would be."""
    (bar, _, _) = by_class(
        effects_drawn(an_effect(0.5, 0.25), an_effect(0.25), an_effect(0.75)), "whisker"
    )
    marks = by_class(effects_drawn(an_effect(0.5, 0.25), an_effect(0.25), an_effect(0.75)), "mark")
    _, low, high = map(place, marks)
    assert float(bar.get("x1")) == pytest.approx(low, abs=0.1)
    assert float(bar.get("x2")) == pytest.approx(high, abs=0.1)


def test_without_an_effect_there_is_a_sentence():
    """And no empty drawing."""
    assert effects_drawn() == '<p class="empty">Effects: nothing was measured.</p>'

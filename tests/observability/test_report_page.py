"""The pages of the demo and of a single run."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from esper.contracts.intervals import Interval
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    ControlsReport,
    Evaluation,
    StageArm,
    demo_report_from_json,
    run_report_from_json,
)
from esper.contracts.report_text import WORDS
from esper.contracts.run_report import headline
from esper.observability.demo_page import demo_page
from esper.observability.report_page import run_page

LOOKS = range(0, 1201, 10)
HOSTILE = "<script>alert(1)</script><img src=x onerror=y>"
VOID = {"meta", "br", "hr"}


class Reader(HTMLParser):
    """Reads a page: its elements, its texts by element, and whether it is well nested."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag):
        return [text for inside, text in self.texts if inside == tag]


def drawing(page, title):
    """Return the drawing of a page whose title has this id."""
    (found,) = [d for d in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if title in d]
    return found


@pytest.fixture(params=["demo", "run", "twin"])
def page(request, make_demo, make_run, make_twin, stage_of_depth):
    """All pages, one after the other."""
    made = {
        "demo": lambda: demo_page(make_demo()),
        "run": lambda: run_page(make_run()),
        "twin": lambda: run_page(make_twin(stages=(stage_of_depth,))),
    }
    return made[request.param]()


def test_the_page_is_well_formed(page):
    """Every element is closed in its order, and every id is there once."""
    reader = Reader(page)
    ids = [value for _, name, value in reader.attributes if name == "id"]
    assert reader.open == []
    assert len(ids) == len(set(ids))


def test_the_page_needs_no_network_and_no_script(page):
    """No script, no image, no address but its own parts, and no style sheet that loads."""
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert not {name for _, name, _ in reader.attributes} & {"src", "srcset"}
    links = [value for _, name, value in reader.attributes if name == "href"]
    assert all(link.startswith("#part-") for link in links)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", page.removeprefix("<!DOCTYPE html>"))


def test_the_page_has_a_dark_form(page):
    """Every colour of the light form has a dark one, and colours are named nowhere else."""
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--[\w-]+):", light))
    assert names
    assert names == set(re.findall(r"(--[\w-]+):", dark))
    assert "#" not in re.sub(r"--[\w-]+: #\w{6};", "", style)


def test_drawings_have_words(page):
    """Every drawing has a title and a description that are not empty."""
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert drawings
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.find("title").text
        assert root.find("desc").text


def test_the_contents_lead_to_every_part(page):
    """Every heading of the second order has a link, in order, and every link a target."""
    reader = Reader(page)
    links = [value for tag, name, value in reader.attributes if (tag, name) == ("a", "href")]
    ids = {value for _, name, value in reader.attributes if name == "id"}
    assert reader.of("a") == reader.of("h2")
    assert {link.removeprefix("#") for link in links} <= ids


def test_captions_stand_outside_of_what_scrolls(page):
    """A narrow screen that scrolls a table or a drawing sideways keeps its caption in sight."""
    assert "<caption" not in page
    for box in re.findall(r'<div class="wide".*?</div>', page, flags=re.DOTALL):
        assert "figcaption" not in box
    boxes, captions = page.count('class="wide"'), page.count("<figcaption")
    assert captions == boxes


def test_the_first_sentence_says_what_growth_beat_and_what_not(demo_report):
    """The first paragraph names the arms that were beaten and the one that was not."""
    first = Reader(demo_page(demo_report)).of("p")[0]
    good, bad = first.split(", but not ")
    assert good.startswith("Growth beat the host trained on without growing (+")
    assert bad.startswith("a network of the grown shape trained from scratch")
    interval = demo_report.grown_minus_scratch
    assert f"{interval.low:+.2f} to {interval.high:+.2f}" in bad


@pytest.mark.parametrize("maker", ["make_run", "make_twin"])
def test_a_run_opens_with_the_words_of_the_terminal(maker, request):
    """The first paragraphs are the headline that ``print(report)`` begins with, word for word."""
    report = request.getfixturevalue(maker)()
    first, rest = Reader(run_page(report)).of("p")[:2]
    assert f"{first} {rest}" == headline(report)
    assert str(report).startswith(headline(report))


def test_a_control_is_in_the_first_words_the_figures_and_the_chart(make_run):
    """Whether it helped has a number, next to the run's own."""
    control = make_run(
        grafts=(), evaluations=tuple(Evaluation(update=u, gate_loss=0.9) for u in LOOKS[::2])
    )
    page = run_page(make_run(control=control))
    assert "with growth and 0.9 without" in Reader(page).of("p")[0]
    assert "Gate loss without growth" in Reader(page).of("dt")
    assert "gate loss, control" in Reader(page).of("text")


def cells(page, caption):
    """Return the rows of the table with this caption, as texts."""
    (found,) = [
        part
        for part in re.findall(r'<figure class="table">.*?</figure>', page, flags=re.DOTALL)
        if caption in part
    ]
    rows = re.findall(r"<tr>(.*?)</tr>", found.partition("<tbody>")[2], flags=re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows]


def test_trials_have_their_evidence_in_a_table(make_twin):
    """Live run, null, capacity and going on, each with its standard error."""
    kept, refused = cells(run_page(make_twin()), "read once, on weights averaged")
    assert kept == [
        "1",
        "kept",
        "+0.0412 \u00b1 0.01",
        "+0.0128 \u00b1 0.0094",
        "+0.0284 \u00b1 0.0099, shown",
        "+0.0061 \u00b1 0.002",
    ]
    assert refused[4].endswith(", not shown")


def test_what_was_not_measured_in_a_trial_is_a_dash(make_twin):
    """Without a null there is neither treatment nor capacity."""
    (trial, _) = make_twin().trials
    alone = replace(
        trial,
        attribution="none",
        null_effect=None,
        capacity=None,
        capacity_shown=None,
        going_on=None,
    )
    (row,) = cells(run_page(make_twin(trials=(alone,))), "read once, on weights averaged")
    assert row[3:] == ["\u2013"] * 3


def test_what_was_taken_over_has_its_switch_its_watch_and_its_passengers(make_twin):
    """One row for each package, with what became of it."""
    kept, refused = cells(run_page(make_twin()), "takes a twin")
    assert kept[3:] == ["candidate", "0.5123", "0.4689", "it stayed", "2 at 3"]
    assert refused[3:] == ["nothing", "\u2013", "\u2013", "\u2013", "\u2013"]


def test_what_going_back_cost_stands_with_the_watch(make_twin):
    """A package that was rolled back names the updates that are lost."""
    (trial, _) = make_twin().trials
    back = replace(trial, verdict="rolled back", updates_lost=40)
    (row,) = cells(run_page(make_twin(trials=(back,))), "takes a twin")
    assert row[6] == "rolled back, 40 updates lost"


def test_the_chart_of_trials_has_three_marks_a_package(make_twin):
    """Candidate, null and going on, right of the live run where they saved loss."""
    chart = drawing(run_page(make_twin()), "effects-title")
    for kind in ("disc", "square", "admitted"):
        assert chart.count(f'class="mark {kind} ') == 2
    assert Reader(chart).of("text").count("live run") == 1


def test_words_of_trials_are_explained_where_they_are_shown(make_twin, make_run):
    """As a list for everybody, and as tips for those who have a pointer."""
    reader = Reader(run_page(make_twin()))
    assert set(WORDS) <= set(reader.of("dt"))
    assert WORDS["null"] in reader.of("dd")
    tips = {value for tag, name, value in reader.attributes if (tag, name) == ("th", "title")}
    assert {WORDS["capacity"], WORDS["treatment"], WORDS["watch"], WORDS["passenger"]} <= tips
    assert "twin" not in Reader(run_page(make_run(grafts=()))).of("dt")


def test_packages_are_marked_on_the_loss(make_twin, stage_of_depth):
    """Taken over, kept, refused, by package; and where a stage of depth begins."""
    chart = drawing(run_page(make_twin(stages=(stage_of_depth,))), "loss-title")
    for kind, count in {"admitted": 1, "fossilized": 1, "culled": 1, "woken": 1}.items():
        assert chart.count(f'class="mark {kind}') == count
    assert {"P1", "P2", "depth 4"} <= set(Reader(chart).of("text"))


def test_a_trial_has_a_bar_in_its_lane(make_twin):
    """Thin, as what is no part of the model; what was taken over has a tall one after it."""
    lanes = drawing(run_page(make_twin()), "lanes-title")
    assert lanes.count('class="stage trial"') == 4
    assert lanes.count('class="stage holding"') == 2
    assert "alphas-title" not in run_page(make_twin())


def test_stages_of_depth_have_losses_and_flops(make_twin, stage_of_depth):
    """Before and after, with what the depth cost and what it was not compared with."""
    (row,) = cells(run_page(make_twin(stages=(stage_of_depth,))), "Stages of depth are planned")
    assert row == [
        "body.h: 1, 3",
        "2 to 4",
        "900 to 960",
        "fresh, ramp 60",
        "0.4125",
        "0.3875",
        "6 GFLOP",
        "awake",
    ]


def test_work_is_told_with_its_limit_and_its_time(make_twin):
    """FLOPs spent, allowed and by category, beside wall time; the share is of training's."""
    page = run_page(make_twin())
    values = Reader(page).of("dd")
    assert {"8.85 GFLOP", "9.9 GFLOP", "89.4%", "8.0 s of 14.2 s"} <= set(values)
    rows = {row[0]: row[1:] for row in cells(page, "FLOPs of what was executed")}
    assert rows["trial"] == ["8.2 GFLOP", "82.8%", "6.60"]


def test_what_is_spent_whatever_the_limit_is_told_where_it_shows(make_twin):
    """In the words of the terminal; within the limit nobody asks."""
    words = "Whatever the limit, the first pass, update of a twin and reading are made"
    assert words in run_page(make_twin(overhead_limit=0.0))
    assert words not in run_page(make_twin())


def test_work_of_format_1_is_told_in_passes(make_run):
    """A report of then counted forwards of one sample."""
    rows = cells(run_page(make_run()), "A forward of one sample counts 1")
    assert rows[0] == ["training", "115,200", "59.6%"]


@pytest.mark.parametrize("name", ["run-1.json", "demo-1.json"])
def test_a_report_of_format_1_has_a_page(name):
    """With all that it measured, contributions against twins among it."""
    files = Path(__file__).parents[1] / "contracts" / "files"
    text = (files / name).read_text(encoding="utf-8")
    if name.startswith("run"):
        page = run_page(run_report_from_json(text))
        assert "contri\u00adbution" in Reader(page).of("th")
    else:
        page = demo_page(demo_report_from_json(text))
    assert Reader(page).open == []


def test_the_demo_shows_the_packages_of_its_grown_arm(make_demo, make_twin):
    """Named by random seed and number, as grafts are."""
    demo = make_demo((3,))
    runs = tuple(replace(r, report=make_twin()) if r.report else r for r in demo.runs)
    page = demo_page(replace(demo, runs=runs)).partition("Packages of the random arm")[0]
    names = [row[0] for row in cells(page, "read once, on weights averaged")]
    assert names == ["3 \u00b7 1", "3 \u00b7 2"]


def test_the_demo_marks_packages_on_its_curves(make_demo, make_twin):
    """Once each, however many kernels there are in one."""
    demo = make_demo((3,))
    runs = tuple(replace(r, report=make_twin()) if r.report else r for r in demo.runs)
    chart = drawing(demo_page(replace(demo, runs=runs)), "accuracy-title")
    counts = [chart.count(f'class="mark {k}"') for k in ("admitted", "fossilized", "culled")]
    assert counts == [1, 1, 1]
    assert "random seed 3, package 1: kept" in chart


def test_the_dip_stands_beside_the_hosts_own(make_demo):
    """A fall after a switch says little where the host falls as far by itself."""
    demo = make_demo()
    host = replace(demo.arms["host"], worst_dip_points=3.25)
    page = demo_page(replace(demo, arms={**demo.arms, "host": host}))
    assert "0.60 (the host's own 3.25)" in "".join(Reader(page).of("dd"))


def test_a_language_model_has_a_part_where_there_is_one(make_demo):
    """What was run before says so; without one there is no such part."""
    saved = Interval(mean=41.0, low=38.5, high=43.5)
    stages = (
        StageArm(name="2 to 6 blocks", loss=1.43, flops=3e12),
        StageArm(name="2 to 6 blocks, long", saved_at_equal_loss=saved, recorded=True),
    )
    live, recorded = cells(demo_page(make_demo(stages=stages)), "deepened late")
    assert live == ["2 to 6 blocks", "1.430", "3 TFLOP", "\u2013", "this demo"]
    assert recorded[-2:] == ["41.00 (38.50 to 43.50)", "recorded"]
    assert "A language model by stages" not in Reader(demo_page(make_demo())).of("h2")


def test_the_loss_axis_shows_what_grafts_did(make_run):
    """The first losses, many times as large, are cut off, and the caption says so."""
    losses = [(u, 100.0 / (1 + u) + (0.3 if u < 600 else 0.2)) for u in LOOKS]
    page = run_page(
        make_run(evaluations=tuple(Evaluation(update=u, gate_loss=loss) for u, loss in losses))
    )
    axis = drawing(page, "loss-title")
    shown = [float(t) for t in re.findall(r'class="tick end"[^>]*>([^<]*)<', axis)]
    assert max(shown) < 1.0
    assert "the gate loss began at 100" in page


def test_a_run_that_just_began_has_a_whole_axis(make_run):
    """With hardly a reading there is nothing to cut."""
    run = make_run(updates=20, grafts=(), evaluations=(Evaluation(update=1, gate_loss=5.0),))
    assert "The axis is cut" not in run_page(run)


def test_each_graft_of_a_run_has_a_colour_of_its_own(make_run):
    """In lanes, alphas and marks alike; the style sheet has every colour that is used."""
    page = run_page(make_run())
    for title in ("lanes-title", "alphas-title", "loss-title"):
        assert set(re.findall(r"graft-\d", drawing(page, title))) == {"graft-1", "graft-2"}
    for number in range(1, 9):
        assert page.count(f"--graft-{number}: #") == 2


def test_a_narrow_screen_names_the_lines_above_their_chart(page):
    """The names at the ends of the lines are out of sight there; a key says them in colour."""
    for figure in re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL):
        names = re.findall(r'<text class="name ([\w-]+)"[^>]*>([^<]*)<', figure)
        key = re.findall(r'<li class="([\w-]+)">([^<]*)</li>', figure)
        assert sorted(key) == sorted(names) or "seed-" in figure


def test_a_small_host_is_told_with_its_budget(make_run):
    """The settings have the budget, limit by limit, and say that shares do not hold."""
    budget = {"parameters": 0.1, "small_host": 100_000, "small_graft": 10_000}
    page = run_page(make_run(settings={"budget": budget, "goal": "min"}))
    assert {"budget: parameters", "budget: small_graft", "goal"} <= set(Reader(page).of("th"))
    assert "This host is small: 358 parameters, fewer than the 100,000" in page
    large = run_page(make_run(settings={"budget": budget}, parameters_before=100_000))
    assert "This host is small" not in large


def test_the_demo_page_has_every_part(demo_report):
    """All arms, the controls with the naive gate, and one row per graft are there."""
    reader = Reader(demo_page(demo_report))
    rows = reader.of("th")
    assert {"host only", "grown", "random choice", "from scratch"} <= set(rows)
    assert {"no-op", "noise", "frozen random features"} <= set(rows)
    assert {"capacity claimed", "a naive on/off gate would keep"} <= set(rows)
    for seed, graft in demo_report.grafts("grown"):
        assert f"{seed} \u00b7 {graft.graft}" in rows
    assert len(re.findall("<svg", demo_page(demo_report))) == 4 + len(demo_report.random_seeds)


def test_the_lifecycle_is_marked_on_the_curves(demo_report):
    """On the accuracy chart there are two admissions, one fossil and one cull per random seed."""
    page = demo_page(demo_report)
    chart = drawing(page, "accuracy-title")
    counts = {
        kind: chart.count(f'class="mark {kind}"') for kind in ("admitted", "fossilized", "culled")
    }
    assert counts == {"admitted": 20, "fossilized": 10, "culled": 10}


def test_all_text_of_trials_and_stages_is_escaped(make_twin, stage_of_depth):
    """Names and reasons of packages and of blocks that look like elements stay text."""
    report = make_twin()
    trials = tuple(
        replace(
            t,
            sites=(HOSTILE,) * 2,
            blueprints=(HOSTILE,) * 2,
            reason=HOSTILE,
            null_adds=(HOSTILE,),
        )
        for t in report.trials
    )
    stage = replace(stage_of_depth, path=HOSTILE, blocks=(HOSTILE,), init=HOSTILE, reason=HOSTILE)
    page = run_page(replace(report, trials=trials, stages=(stage,), seconds={HOSTILE: 1.0}))
    assert not {"script", "img"} & set(Reader(page).tags)
    assert HOSTILE in "".join(text for _, text in Reader(page).texts)


def test_all_text_is_escaped(make_run, make_demo):
    """Names, reasons, notes and settings that look like elements stay text, on both pages."""
    report = make_run()
    hostile = tuple(
        replace(g, site=HOSTILE, blueprint=HOSTILE, verdict=HOSTILE, reason=HOSTILE)
        for g in report.grafts
    )
    report = replace(
        report,
        grafts=hostile,
        settings={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        work={HOSTILE: 1.0},
        test_metrics={HOSTILE: 0.1},
        timeline=tuple(replace(e, site=HOSTILE, reason=HOSTILE) for e in report.timeline),
    )
    demo = make_demo((0,), notes=(HOSTILE,), environment={HOSTILE: HOSTILE})
    demo = replace(demo, runs=tuple(replace(r, report=report) for r in demo.runs))
    for page in (run_page(report), demo_page(demo)):
        assert not {"script", "img"} & set(Reader(page).tags)
        assert HOSTILE in "".join(text for _, text in Reader(page).texts)


def test_a_demo_stopped_before_its_first_seed_has_a_page(make_demo):
    """Without a completed random seed the page is readable and says what happened."""
    page = demo_page(make_demo((), runs=(), controls=ControlsReport(), interrupted=True))
    texts = Reader(page).of("p")
    assert texts[0] == ("Growth did not beat anything here, since no random seed was completed.")
    assert any(text.startswith("The run was stopped before its end") for text in texts)


def test_a_run_that_never_grew_has_a_page(make_run):
    """Without grafts and evaluations every part is a sentence instead of a table."""
    page = run_page(
        make_run(grafts=(), timeline=(), alphas=(), evaluations=(), work={}, settings={}, notes=())
    )
    texts = Reader(page).of("p")
    assert "No graft was tried." in texts
    assert "Loss over the updates: nothing was recorded." in texts


def test_a_run_without_a_test_split_says_optimistic(make_run):
    """The page heads its figures as optimistic exactly where there is no test split."""
    assert "used for growing: optimistic" in run_page(make_run())
    assert "optimistic" not in run_page(make_run(test_metrics={"accuracy": 0.93}))


def test_a_run_shows_every_metric_of_its_last_evaluation(make_run):
    """The page has what the terminal had in its last row, and the test split beside it."""
    run = make_run(
        evaluations=(
            Evaluation(update=5, gate_loss=0.5, metrics={"perplexity": 9.0}),
            Evaluation(update=9, gate_loss=0.25, metrics={"perplexity": 7.5, "accuracy": 0.5}),
        ),
        test_metrics={"loss": 0.75, "accuracy": 0.4},
    )
    shown = " ".join(text for _, text in Reader(run_page(run)).texts)
    for words in ("Gate loss 0.25", "Gate perplexity 7.5", "Gate accuracy 50.0 %"):
        assert words in shown
    for words in ("Test loss 0.75", "Test accuracy 40.0 %"):
        assert words in shown


def test_a_graft_that_is_under_way_is_no_verdict(make_run):
    """A graft without a verdict has neither diamond nor cross."""
    report = make_run()
    first = replace(
        report.grafts[0], stage=GraftStage.HOLDING, verdict="undecided", decided_at=None
    )
    page = run_page(replace(report, grafts=(first,)))
    assert 'class="mark fossilized' not in page
    assert 'class="mark culled' not in page
    assert 'class="mark admitted' in page


def test_a_run_of_depth_alone_says_what_growing_took(make_run, stage_of_depth):
    """Training is told by its stages there, and no share of it is made up."""
    page = run_page(
        make_run(
            grafts=(),
            timeline=(),
            alphas=(),
            stages=(stage_of_depth,),
            work={"training": 0.0, "evaluation": 5e9},
            work_unit="flops",
        )
    )
    assert "<dt>Work spent on growing</dt><dd>5 GFLOP</dd>" in page
    assert "Growing took 5 GFLOP beside the training, whose FLOPs are told stage by stage." in page
    assert "Share of training" not in page

"""Reports in a notebook."""

import html
import re
import subprocess
import sys

import pytest

from esper.contracts.report import RunReport
from esper.observability.notebook import SHAPES
from esper.observability.report_page import run_page


@pytest.fixture
def axes():
    """Axes of a figure that no screen and no global state knows."""
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra plot")
    return figure.Figure().subplots()


def test_a_report_shows_its_page_in_a_frame(make_twin):
    """It brings all that it needs, runs nothing, and its styles stay inside."""
    report = make_twin()
    shown = report._repr_html_()
    (inside,) = re.fullmatch(r'<iframe srcdoc="([^"]*)" [^<>]*></iframe>', shown).groups()
    page = html.unescape(inside)
    assert page.replace('<base href="about:srcdoc">', "") == run_page(report)
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)


def test_losses_are_drawn_with_what_grew(make_twin, stage_of_depth, axes):
    """A line for each loss, and a mark of its own shape for each thing that happened."""
    report = make_twin(stages=(stage_of_depth,))
    assert report.plot(axes) is axes
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert list(lines) == ["training loss", "gate loss"]
    assert [tuple(point) for point in lines["gate loss"]] == [
        (e.update, e.gate_loss) for e in report.evaluations
    ]
    assert [text.get_text() for text in axes.texts] == ["P1", "P1", "P2", "depth 4"]
    assert [tuple(o[0]) for mark in axes.collections for o in [mark.get_offsets()]] == [
        pytest.approx((x, _height(report, x)), rel=1e-3) for x in (400, 500, 800, 900)
    ]
    assert len(SHAPES) == len(axes.collections)


def _height(report, update):
    return next(e.gate_loss for e in report.evaluations if e.update == update)


def test_a_run_without_readings_is_drawn_empty(axes):
    """There is nothing to mark, and nothing fails."""
    RunReport(settings={}, updates=3, work={}).plot(axes)
    assert (len(axes.get_lines()), len(axes.collections)) == (0, 0)


def test_without_axes_a_figure_is_made(make_twin):
    """As a notebook shows it behind the cell."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs the extra plot")
    pyplot.switch_backend("agg")
    axes = make_twin().plot()
    assert pyplot.fignum_exists(axes.figure.number)
    pyplot.close(axes.figure)


def test_what_brings_matplotlib_is_said(make_twin, monkeypatch):
    """Where it cannot be imported, the error names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'esper-morph\[plot\]'"):
        make_twin().plot()


@pytest.mark.parametrize(
    ("imported", "expected"),
    [
        ("from esper import RunReport", "True False"),
        ("from esper.contracts.report import RunReport", "False False"),
    ],
    ids=["by its public name", "as a contract"],
)
def test_matplotlib_is_imported_by_who_draws(imported, expected):
    """Neither the public name nor a contract brings it; the public name brings what draws."""
    code = (
        f"import sys\n{imported}\nprint(RunReport.drawer is not None, 'matplotlib' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework",
    [
        "accelerate",
        *(pytest.param(name, marks=pytest.mark.torture) for name in ("lightning", "transformers")),
    ],
)
def test_a_run_in_a_framework_draws_its_report(framework):
    """An adapter brings what draws, though its owner never names anything of ``esper`` itself."""
    pytest.importorskip({"lightning": "pytorch_lightning"}.get(framework, framework))
    code = (
        f"import esper.integrations.{framework}\n"
        "from esper.contracts.report import RunReport\n"
        "assert RunReport(settings={}, updates=0)._repr_html_()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr


def test_a_contract_alone_says_what_draws_it():
    """A report whose drawer was never imported names the module that brings it."""
    code = (
        "from esper.contracts.report import RunReport\n"
        "report = RunReport(settings={}, updates=0)\n"
        "assert report._repr_html_() is None\n"
        "report.plot()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert "EsperError" in found.stderr
    assert "import esper.observability.notebook" in found.stderr

"""The drawing of a model, with its seeds by layer."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import IncidentRecord, SiteRecord
from esper.observability.model_parts import MOST_ROWS, model_figure, sites_of

SITES = (
    SiteRecord(site="9", what="Linear, 4 to 8", seeds=4),
    SiteRecord(site="3", what="Conv2d, 8", seeds=2),
    SiteRecord(site="0", what="Linear, 8 to 1", seeds=1),
)


def drawn(report):
    """Return the drawing of a report, and its texts."""
    markup = str(model_figure(report))
    root = ET.fromstring(re.search(r"<svg.*?</svg>", markup, flags=re.DOTALL)[0])
    return markup, [one.text for one in root.iter("text")]


def test_layers_stand_in_the_models_order_with_what_they_are(make_twin):
    """Not in that of their names."""
    _, texts = drawn(make_twin(sites=SITES))
    names = [text for text in texts if text in ("9", "3", "0")]
    assert names == ["9", "3", "0"]
    assert {"Linear, 4 to 8", "Conv2d, 8", "Linear, 8 to 1", "input", "output"} <= set(texts)


def test_every_seed_has_a_sign_for_its_state(make_twin):
    """By shape, with its words; what was refused or removed is counted and leaves its seed."""
    report = make_twin(sites=SITES)
    first, passenger, third, refused = report.grafts
    held = replace(first, stage=GraftStage.HOLDING)
    tried = replace(third, stage=GraftStage.TRIAL, seed_idx=1)
    markup, texts = drawn(replace(report, grafts=(held, passenger, tried, refused)))
    assert markup.count('class="ring"') == 4 + 2
    assert 'class="mark disc graft-1"' in markup
    assert 'class="ring dashed graft-2"' in markup
    assert "seed 0: mlp-8, holding, package 1" in texts
    assert "seed 1: mlp-8, trial, package 2" in texts
    assert "2 refused or removed" in texts


def test_what_is_wrong_with_a_layer_stands_at_it(make_twin):
    """How often, with its words as a tip."""
    fault = IncidentRecord(
        kind="seed_faulted", site="9", seed_idx=0, since=3, last=9, times=4, text="it raised <b>"
    )
    markup, texts = drawn(make_twin(sites=SITES, incidents=(fault,)))
    assert "faults and health: 4" in texts
    assert "it raised &lt;b&gt;" in markup


def test_of_a_large_model_layers_that_sleep_are_drawn_as_one(make_twin):
    """So that a drawing shows where something happens, and every layer is named in its words."""
    sites = tuple(SiteRecord(site=f"h.{n}.mlp", what="Linear, 8", seeds=4) for n in range(60))
    report = make_twin(sites=(*sites[:30], *SITES, *sites[30:]))
    markup, texts = drawn(report)
    assert {"31 layers, dormant", "30 layers, dormant"} <= set(texts)
    assert len([text for text in texts if "layers, dormant" in text]) == 2
    assert len(sites) > MOST_ROWS
    assert all(site.site in markup for site in sites)


def test_a_log_that_does_not_tell_its_layers_shows_those_that_grew(make_twin, make_run):
    """In the natural order of their names, and none where nothing did."""
    assert [site.site for site in sites_of(make_twin())] == ["0", "3"]
    assert sites_of(make_run(grafts=())) == ()

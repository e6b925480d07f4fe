"""The live page and the file that a run leaves, in Chromium: looks, keyboard, time, errors."""

import os
import re
import shutil
import time
from contextlib import ExitStack

import pytest
from live_pages import Writing, on_loopback

from esper.observability.report_files import write_report

pytest.importorskip("fastapi", reason="needs the extra server")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

pytestmark = [pytest.mark.network, pytest.mark.slow]

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LEAST_CONTRAST = 4.5
"""Of text, as WCAG 2 asks for at level AA."""

CONTRASTS = """() => {
  const light = (c) => c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const c = parsed(getComputedStyle(one).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !one.getClientRects().length) continue;
    if (one.closest('script, title, desc, style')) continue;
    const style = getComputedStyle(one);
    const inDrawing = one instanceof SVGElement;
    const mine = inDrawing ? style.fill : style.color;
    const onMark = one.matches('.warn'); // a sign on a symbol that is drawn before it
    const other = onMark ? parsed(getComputedStyle(one.previousElementSibling).fill) : behind(one);
    const [a, b] = [luminance(parsed(mine)), luminance(other)].sort((x, y) => y - x);
    const key = `${one.tagName}.${one.getAttribute('class')} ${mine} on ${other}`;
    found[key] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    """The machine's own Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs the program chromium: it looks at pages")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has ended, with the file that it leaves."""
    made = Writing(tmp_path_factory.mktemp("runs") / "run").write()
    write_report(made.report(), made.folder)
    return made


class Page:
    """A page in a tab of its own, with everything that it complained about or asked others for."""

    def __init__(self, browser, address, **options):
        self._context = browser.new_context(**({"viewport": DESKTOP} | options))
        self.tab = self._context.new_page()
        self.complaints, self.asked = [], []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(address)
        sync_api.expect(self.tab.locator("#time")).to_be_visible()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._context.close()

    def reads(self, words, where="main"):
        """Wait until some words are there."""
        sync_api.expect(self.tab.locator(where)).to_contain_text(words, timeout=15_000)

    def sections(self):
        """Return the ids of what it shows."""
        return self.tab.eval_on_selector_all(
            "main header, main section", "all => all.map(o => o.id)"
        )


LOOKS = {
    "desktop": {"color_scheme": "light"},
    "phone": {"viewport": PHONE, "color_scheme": "light", "has_touch": True, "is_mobile": True},
    "dark": {"color_scheme": "dark"},
    "dark phone": {"viewport": PHONE, "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_is_quiet_fits_its_screen_and_can_be_read(browser, run, tmp_path, look):
    """No complaint, no request to others, nothing wider than the screen, contrast of 4.5."""
    under_way = Writing(tmp_path / "other").write(14)
    with (
        on_loopback(run.folder, under_way.folder) as address,
        Page(browser, address, **LOOKS[look]) as page,
    ):
        page.reads("Of the 2 packages")
        assert page.complaints == []
        assert {re.match(r"\w+://[^/]*|data:", url)[0] for url in page.asked} <= {address, "data:"}
        wide, screen = page.tab.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= screen
        contrasts = page.tab.evaluate(CONTRASTS)
        assert len(contrasts) > 15
        assert {key: ratio for key, ratio in contrasts.items() if ratio < LEAST_CONTRAST} == {}


@pytest.mark.parametrize(("hours", "is_silent"), [(0, False), (2, True)])
def test_a_run_that_was_silent_for_long_is_said_to_have_been_ended(
    browser, tmp_path, hours, is_silent
):
    """Nothing else tells a run that was killed from one that goes on."""
    under_way = Writing(tmp_path / "run").write(14)
    then = time.time() - 3600 * hours
    os.utime(under_way.folder / "events.jsonl", (then, then))
    with on_loopback(under_way.folder) as address, Page(browser, address) as page:
        page.reads("last event", "#heard")
        assert ("it has probably been ended" in page.tab.inner_text("#heard")) == is_silent


def test_the_measure_of_contrast_finds_a_text_that_cannot_be_read(browser, run):
    """The control: grey on white."""
    with Page(browser, (run.folder / "report.html").as_uri(), color_scheme="light") as page:
        page.tab.evaluate("document.querySelector('.lead').style.setProperty('color', '#999')")
        assert min(page.tab.evaluate(CONTRASTS).values()) < LEAST_CONTRAST


@pytest.mark.parametrize("kind", ["served", "a file"])
def test_a_page_can_ask_nobody_else(browser, run, kind):
    """The control of what is asked and complained of: both notice, and nothing leaves."""
    with on_loopback(run.folder) as served, on_loopback(run.folder) as other:
        address = served if kind == "served" else (run.folder / "report.html").as_uri()
        with Page(browser, address) as page:
            asks = f"fetch('{other}/').then(() => 'answered', () => 'refused')"
            assert page.tab.evaluate(asks) == "refused"
            page.tab.evaluate(
                f"document.body.append(Object.assign(new Image, {{src: '{other}/'}}))"
            )
            page.tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<p onclick=1>x')")
            page.tab.wait_for_timeout(100)
            assert len(page.complaints) >= 3
            assert all("Content Security Policy" in text for text in page.complaints)


def test_a_page_changes_while_the_run_goes_on(browser, tmp_path):
    """Sections come and go, what has not changed stays, and its reader is not thrown about."""
    run = Writing(tmp_path / "run")
    with on_loopback(run.folder) as address, Page(browser, address) as page:
        page.reads("Waiting", ".time")
        page.reads("Nothing has happened yet")
        run.write(12)
        page.reads("mlp-4x4")
        page.reads("Live", ".time")
        page.tab.evaluate("document.getElementById('part-settings').marked = true")
        page.tab.focus("#part-loss .wide")
        run.write()
        page.reads("Of the 2 packages")
        page.reads("Ended", ".time")
        assert page.tab.evaluate("document.getElementById('part-settings').marked")
        assert page.tab.evaluate("document.activeElement.closest('section')?.id") == "part-loss"
        assert "part-faults-and-health" in page.sections()
        assert page.complaints == []


def test_who_loses_the_server_is_told_and_goes_on_with_the_next_one(browser, tmp_path):
    """What happened in between is there, without loading the page again."""
    run = Writing(tmp_path / "run").write(4)
    with ExitStack() as first:
        address = first.enter_context(on_loopback(run.folder))
        with Page(browser, address) as page:
            page.reads("Live", ".time")
            page.tab.evaluate("window.loaded = 'once'")
            first.close()
            page.reads("Offline", ".time")
            run.write()
            with on_loopback(run.folder, port=int(address.rpartition(":")[2])):
                page.reads("Of the 2 packages")
                assert page.tab.evaluate("window.loaded") == "once"


HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
IS_ANSWERED = """wait_ms => fetch("/", { cache: "no-store", signal: AbortSignal.timeout(wait_ms) })
  .then(answer => answer.ok, error => false)"""
MOST_STREAMS = 6
"""Connections that Chromium has to one address."""


def test_a_tab_that_is_hidden_leaves_its_connection_to_others(browser, tmp_path):
    """And knows what it missed when it is looked at again; the control: nobody hides."""
    run = Writing(tmp_path / "run").write(4)
    with on_loopback(run.folder) as address, Page(browser, address) as page:
        page.reads("Live", ".time")
        for _ in range(MOST_STREAMS - 1):
            other = page.tab.context.new_page()
            other.goto(address)
            sync_api.expect(other.locator(".time")).to_contain_text("Live")
        assert other.evaluate(IS_ANSWERED, 1_000) is False
        page.tab.evaluate(HIDE, True)
        assert other.evaluate(IS_ANSWERED, 15_000) is True
        late = page.tab.context.new_page()
        late.goto(address)
        sync_api.expect(late.locator(".time")).to_contain_text("Live")
        late.close()
        run.write()
        sync_api.expect(other.locator("main")).to_contain_text("Of the 2 packages")
        assert "Of the 2 packages" not in page.tab.inner_text("main")
        page.tab.evaluate(HIDE, False)
        page.reads("Of the 2 packages")
        assert page.complaints == []


@pytest.mark.parametrize("kind", ["served", "a file"])
def test_a_page_is_moved_in_time_by_keyboard_alone(browser, run, kind):
    """The bar comes first in the order of tabs, arrows move it, and its end is what it was."""
    with on_loopback(run.folder) as served:
        address = served if kind == "served" else (run.folder / "report.html").as_uri()
        with Page(browser, address) as page:
            at_the_end = page.tab.inner_html("main")
            order = []
            for _ in range(5):
                page.tab.keyboard.press("Tab")
                order.append(page.tab.evaluate("document.activeElement.id"))
            assert order[:4] == ["back", "play", "forth", "moment"]
            page.tab.focus("#moment")
            for _ in range(23):
                page.tab.keyboard.press("ArrowLeft")
            page.reads(
                "Under way, at update 12 of 35." if kind == "served" else "at update 10 of 35."
            )
            page.reads("12 of 35", ".time")
            page.reads("Replay", ".time")
            assert "part-faults-and-health" not in page.sections()
            said = page.tab.get_attribute("#moment", "aria-valuetext")
            assert said.startswith("update 12 of 35. Update 10: trial of package 1")
            page.tab.focus("#forth")
            page.tab.keyboard.press("Enter")
            page.reads("15 of 35", ".time")
            page.tab.keyboard.press("Enter")
            page.reads("20 of 35", ".time")
            page.reads("Faults and health")
            page.tab.focus("#moment")
            page.tab.keyboard.press("End")
            page.reads("Ended", ".time")
            page.reads("Of the 2 packages")
            assert page.tab.inner_html("main") == at_the_end
            assert page.complaints == []
            assert kind == "served" or len(page.asked) == 1


def test_a_page_plays_a_run_from_its_start(browser, run):
    """Until its end, or until somebody says stop."""
    with Page(browser, (run.folder / "report.html").as_uri()) as page:
        page.tab.click("#play")
        page.reads("Under way")
        page.reads("Pause", ".time")
        page.reads("Ended", ".time")
        page.reads("Play", ".time")
        page.reads("Of the 2 packages")
        assert page.complaints == []


def test_a_run_on_a_bus_is_seen_where_its_folder_is_not(browser):
    """What is told to the bus comes to a page that is open; and who comes late has the past."""
    pytest.importorskip("redis", reason="needs the extra redis")
    from redis_servers import redis_server
    from told_runs import told_run

    from esper.bus.redis_streams import RedisSink
    from esper.bus.redis_tail import RunTail

    events = list(told_run(2))
    with redis_server() as server, RedisSink(server.url) as sink:
        tail = RunTail(server.url, events[0].run_id)
        with on_loopback(tail) as address, Page(browser, address) as page:
            page.reads("Nothing has happened yet")
            for event in events:
                sink.publish(event)
            page.reads("Of the 2 packages")
            with Page(browser, address, **LOOKS["dark phone"]) as late:
                late.reads("Of the 2 packages")
                assert late.complaints == []
            assert page.complaints == []

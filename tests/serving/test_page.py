"""The page in headless Chromium: write, stop, inspect, score, errors, runs; by keyboard, on a phone, in the dark."""

import importlib.resources
import json
import os
import re
import shutil

import pytest

import flashlm_numba as fl
from flashlm_numba.serving.limits import Limits
from flashlm_numba.serving.page_files import PATHS

CHROMIUM = shutil.which("chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="needs chromium: apt-get install chromium"
)
PHONE = {"width": 360, "height": 740}
TEXT = "the people of this nation have seen peace and war, ünïcode 🙂"
# long before the model ends it
ENDLESS = {"prompt": "the", "max_tokens": 4000, "temperature": 1, "top_k": "", "seed": 1}
LONG_NAME = "tree-" + "20261130" * 9

# the pairs of text and background on the page whose contrast is below WCAG's level AA
POOR_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(e).backgroundColor);
      if (a === 1) return [r, g, b];
      if (a !== 0) throw new Error("a background that shines through");
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  };
  const poor = [], seen = new Set();
  const check = (element, colour, back, what) => {
    const [a, b] = [light(channels(colour)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen.add(what);
    if (ratio < 4.5) poor.push(`${what} ${element.outerHTML.slice(0, 80)}: ${colour} on ${back}, ${ratio.toFixed(2)}`);
  };
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element), back = background(element);
    if (element.closest("svg")) {
      if (element.tagName === "text") check(element, style.fill, back, "svg");
      continue;
    }
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (own || ["INPUT", "TEXTAREA"].includes(element.tagName)) check(element, style.color, back, element.tagName);
    if (element.placeholder) check(element, getComputedStyle(element, "::placeholder").color, back, "placeholder");
    const before = getComputedStyle(element, "::before");
    if (!["none", "normal"].includes(before.content)) check(element, before.color, back, "mark");
  }
  return [poor, [...seen]];
}"""


@pytest.fixture(scope="module")
def browser():
    if "CI" in os.environ:
        from playwright import sync_api
    else:
        sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as playwright:  # of this module only: it occupies the thread's event loop
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Opens pages. At the end, none had an error of its own, or asked anyone but its server for anything."""
    contexts, wrong, servers = [], [], set()

    def opened(server, path="", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        servers.add(server.url)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Security Policy" in line.text else None)
        page.on("request", lambda request: wrong.append(request.url) if asks_others(request.url) else None)
        page.goto(server.url + path)
        return page

    def asks_others(url):
        return not any(url.startswith(f"{server}/") for server in servers)

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def text_of(page, element):
    return page.locator(element).evaluate("element => element.textContent")


def wait_for(page, element, text):
    page.locator(element, has_text=re.compile(text)).wait_for()


def write(page, **values):
    for name, value in values.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.click("#start")
    wait_for(page, "#write-status", "with seed")


def score(page, text=TEXT):
    page.click("#tab-score")
    page.fill("#given", text)
    page.click("#score-start")
    wait_for(page, "#score-status", "bits per byte")


# --- the files ---


def test_the_files(server, served, start):
    for path in PATHS:
        status, headers, text = server.ask("GET", path)
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-cache"
        kind = {"/": "text/html; charset=utf-8", "/page.js": "text/javascript; charset=utf-8"}
        assert headers["Content-Type"] == kind.get(path, headers["Content-Type"])
        again, headers, nothing = server.ask("GET", path, headers={"If-None-Match": f'"other", W/{headers["ETag"]}'})
        assert (again, nothing) == (304, "")
        assert server.ask("GET", path, headers={"If-None-Match": '"other"'})[2] == text
        assert server.ask("HEAD", path)[0] == 200
        assert server.ask("POST", path, {})[0] == 405
        assert server.ask("GET", path, headers={"Host": "evil.example"})[0] == 403
    guarded = start(served, Limits(), api_key="key")
    assert [guarded.ask("GET", path)[0] for path in PATHS] == [200] * len(PATHS)


def test_the_page_has_no_script_or_style_of_its_own_and_names_no_other_host():
    folder = importlib.resources.files("flashlm_numba.serving") / "page"
    html = (folder / "index.html").read_text("utf-8")
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?! src=)", html)
    for file in folder.iterdir():
        others = set(re.findall(r"https?://[^\"' )]+", file.read_text("utf-8")))
        assert others <= {"http://www.w3.org/2000/svg"}, file
    for name in re.findall(r'for="([\w-]+)"|aria-controls="([\w-]+)"|labelledby="([\w-]+)"', html):
        assert f'id="{"".join(name)}"' in html


# --- writing ---


@needs_chromium
def test_a_text_is_written(visit, server):
    page = visit(server)
    page.locator("#tab-write").wait_for()
    assert page.title() == "tiny – flashlm-numba"
    for prompt in (TEXT, "the ", "<b>war</b>\n\n&amp;", ""):
        write(page, prompt=prompt, max_tokens=12, seed=3, temperature=0.9, top_k=50, top_p=0.95)
        values = {"prompt": prompt, "max_tokens": 12, "seed": 3, "temperature": 0.9, "top_k": 50, "top_p": 0.95}
        wanted = server.complete(**values, echo=True, logprobs=0)["choices"][0]
        assert text_of(page, "#written") == wanted["text"]
        tokens = page.locator("#written > span")
        assert tokens.count() == len(wanted["logprobs"]["tokens"])
        assert f"{tokens.count() - page.locator('#written > .prompt').count()} token" in text_of(page, "#write-status")
        assert text_of(page, "#error") == ""
    write(page, prompt="the people", max_tokens=12, seed="", stop_text="e")
    assert text_of(page, "#written").count("e") == "the people".count("e")
    seeds = set()
    for _ in range(2):  # a new seed each time, which is told
        write(page, prompt="the people", max_tokens=12, stop_text="")
        seeds.add(text_of(page, "#write-status").partition("seed ")[2])
    assert len(seeds) == 2


@needs_chromium
def test_writing_streams_and_stops(visit, slow, start):
    server = start(slow, Limits())
    page = visit(server)
    for name, value in ENDLESS.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.press("#prompt", "Control+Enter")
    page.locator("#written > span").nth(20).wait_for()
    wait_for(page, "#rate", r"^\d+ tokens/s$")
    assert page.locator("#start").is_disabled()
    assert server.service.engine.running == 1
    assert text_of(page, "#write-status") == "Writing …"
    page.click("#stop")
    wait_for(page, "#write-status", r"^Stopped: \d+ tokens with seed \d+")
    server.wait(lambda engine: engine.running == 0)
    assert text_of(page, "#error") == ""
    assert page.evaluate("document.activeElement.id") == "start"
    page.fill("#max-tokens", "5")  # and again
    page.focus("#start")
    page.keyboard.press("Enter")
    wait_for(page, "#write-status", "^Written: 5 tokens")
    assert page.evaluate("document.activeElement.id") == "start"


# --- a token ---


@needs_chromium
def test_a_token_is_inspected(visit, server, served):
    page = visit(server)
    write(page, prompt=TEXT, max_tokens=5, seed=3)
    page.locator("#written > span").nth(4).click()
    page.locator("#product").wait_for()
    names = page.locator("#written > span").evaluate_all("all => all.slice(0, 5).map((e) => e.textContent)")
    found = server.ask("POST", "/inspect", {"tokens": names})[2]
    assert text_of(page, "#token-name") == "Token " + found["token"]["name"].replace(" ", "␣")
    listed = page.locator("#token-body > ol.bars > li code").all_text_contents()
    assert listed[:10] == [other["name"].replace(" ", "␣") for other in found["likeliest"]]
    assert page.locator("#token-body > ol.bars > li.chosen").count() == 1
    path = found["path"]
    assert page.locator("ol.path > li").count() == len(path) == len(served.model.head.tree.path(found["token"]["id"]))
    assert page.locator("#tree .chosen").count() == len(path)
    assert page.locator("#tree .opens").count() == len(path) - 1
    widths = page.locator("#tree .chosen").evaluate_all("all => all.map((e) => e.getAttribute('width') / 400)")
    for width, node in zip(widths, path, strict=True):
        assert width == pytest.approx(max(0.005, node["probability"]), abs=1e-6)
    assert page.locator("table:has-text('copies') tbody tr").count() == 2
    page.locator("#written > span").nth(0).click()  # the first token follows the beginning of a text
    wait_for(page, "#token-name", "the")
    page.click("#start")  # another text has no token chosen
    page.locator("#token-hint").wait_for()


@needs_chromium
def test_tokens_by_keyboard(visit, server):
    page = visit(server, viewport={"width": 500, "height": 800})
    score(page, TEXT + "\n" + TEXT)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "the"
    style = page.evaluate("[getComputedStyle(document.activeElement)].map((s) => s.outlineStyle + s.outlineWidth)")
    assert style == ["solid3px"]

    def at():
        return page.evaluate("[...document.activeElement.parentElement.children].indexOf(document.activeElement)")

    def top():
        return page.evaluate("document.activeElement.getBoundingClientRect().top")

    first = top()
    for key, wanted in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0), ("ArrowLeft", 0)]:
        page.keyboard.press(key)
        assert at() == wanted
    page.keyboard.press("ArrowDown")
    assert top() > first
    page.keyboard.press("ArrowUp")
    assert top() == first
    page.keyboard.press("End")
    assert at() == page.locator("#scored > span").count() - 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    wait_for(page, "#token-name", "␣people")
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    wait_for(page, "#token-name", "␣of")
    assert page.locator("#scored [aria-selected=true]").count() == 1
    assert page.locator("#scored [tabindex='0']").count() == 1


# --- scoring ---


@needs_chromium
def test_a_text_is_scored(visit, server, serving_run):
    page = visit(server)
    wanted = fl.load(serving_run, progress=fl.Progress()).score(TEXT)
    score(page)
    size, count = len(TEXT.encode()), len(wanted.tokens)
    assert text_of(page, "#score-status") == (
        f"{wanted.bits_per_byte:.3f} bits per byte: {wanted.nll:.3f} nats per token, {count} tokens, {size} bytes."
    )
    assert text_of(page, "#scored") == TEXT
    bits = wanted.token_nll / 0.6931471805599453
    levels = [f"s{sum(b >= least for least in (1, 2, 4, 8, 12))}" for b in bits.tolist()]
    classes = page.locator("#scored > span").evaluate_all("all => all.map((e) => e.classList[0])")
    assert classes == levels
    assert page.locator("#legend").is_visible()
    page.fill("#given", "")
    page.click("#score-start")
    wait_for(page, "#score-status", "Paste a text")
    assert text_of(page, "#scored") == ""


# --- errors ---


@needs_chromium
def test_errors_of_the_server_are_sentences(visit, served, start):
    server = start(served, Limits(prompt_tokens=50))
    page = visit(server)
    write(page, temperature=5)
    assert text_of(page, "#error") == "temperature must be between 0 and 2, got 5."
    assert page.locator("#error").get_attribute("role") == "alert"
    write(page, temperature=1, max_tokens=2)
    assert text_of(page, "#error") == ""
    page.click("#tab-score")
    page.fill("#given", "war " * 100)
    page.click("#score-start")
    wait_for(page, "#error", "A prompt may have at most 50 tokens, got ")
    page.click("#tab-write")
    server.loop.call_soon_threadsafe(server.server.stop)
    server.thread.join(30)
    write(page)
    assert text_of(page, "#error") == "The server does not answer. Is it still running?"


@needs_chromium
def test_a_stream_that_ends_early_is_told_of(visit, slow, start):
    page = visit(start(slow, Limits(seconds=0.5)))
    write(page, **ENDLESS)
    assert text_of(page, "#error") == "The texts were not complete within 0.5 seconds; ask for fewer tokens."
    assert text_of(page, "#write-status").startswith("Not complete: ")
    assert page.locator("#written > span").count() > 5


@needs_chromium
def test_the_page_asks_for_the_key(visit, served, start):
    server = start(served, Limits(), api_key="schlüssel")
    page = visit(server)
    page.locator("#key-dialog").wait_for()
    page.fill("#key", "wrong")
    page.click("#key-dialog button.main")
    page.locator("#key-dialog").wait_for()
    page.click("#key-cancel")
    wait_for(page, "#error", "The API key is missing or wrong")
    page.reload()
    page.locator("#key-dialog").wait_for()
    page.fill("#key", "schlüssel")
    page.keyboard.press("Enter")
    page.locator("#tab-write").wait_for()
    write(page, max_tokens=3)
    assert text_of(page, "#error") == ""
    page.reload()  # the tab keeps the key
    page.locator("#tab-write").wait_for()


# --- runs ---


def log(folder, *lines):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def line(step, **more):
    return {"step": step, "seconds": 2.0 * step, "loss": 8 - step / 10, "nll": 8 - step / 10, **more}


@needs_chromium
def test_runs_are_drawn_while_they_train(visit, start, tmp_path):
    log(tmp_path / "one", *map(line, range(1, 31)), line(31, val_nll=4.5))
    log(tmp_path / "<img src=x onerror=alert(1)>", "torn\n", *map(line, range(1, 4)), '{"step": 4')
    server = start(None, Limits(), runs=tmp_path)
    page = visit(server)
    page.locator("#chart path.curve").nth(1).wait_for()
    assert page.locator("[role=tab]:visible").all_text_contents() == ["Runs"]
    assert page.locator("#chart circle").count() == 1
    rows = page.locator("#runs-table tbody tr")
    row = rows.filter(has_text="one").filter(has_not_text="img")
    assert row.locator("td").all_text_contents()[1:4] == ["31", "4.900", "4.500"]
    assert rows.filter(has_text="<img src=x").count() == 1
    curve = page.locator("#chart path.curve").nth(1).get_attribute("d")
    page.check("input[value=minutes]")
    wait_for(page, "#chart", "minutes of training")
    assert page.locator("#chart").get_attribute("aria-label").startswith("NLL against minutes: ")
    page.check("input[value=step]")
    log(tmp_path / "one", line(32), line(33, val_nll=4.25))
    row.filter(has_text="33").wait_for()
    page.locator("#chart circle").nth(1).wait_for()
    assert page.locator("#chart path.curve").count() == 2
    assert {path.get_attribute("d") for path in page.locator("#chart path.curve").all()} != {curve}
    row.locator("input").uncheck()
    page.locator("#chart circle").nth(0).wait_for(state="detached")
    row.locator("input").check()
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(tmp_path / "<img src=x onerror=alert(1)>")
    wait_for(page, "#runs-status", "The folder holds no run yet")
    assert rows.count() == 0
    tmp_path.rmdir()
    wait_for(page, "#error", "The folder of runs cannot be read")
    tmp_path.mkdir()
    log(tmp_path / "new", line(1))
    rows.filter(has_text="new").wait_for()
    assert text_of(page, "#error") == ""


@needs_chromium
def test_many_runs_have_few_curves(visit, start, served, tmp_path):
    for i in range(9):
        log(tmp_path / f"run {i}", line(1), line(2))
    page = visit(start(served, Limits(), runs=tmp_path))
    page.click("#tab-runs")
    page.locator("#chart path.curve").nth(3).wait_for()
    assert page.locator("#runs-table input:checked").count() == 4
    unchecked = page.locator("#runs-table tr:has(input:not(:checked)) td:first-child").all_text_contents()
    for name in unchecked[:2]:
        page.get_by_label(name.strip()).check()
    page.locator("#chart path.curve").nth(5).wait_for()
    assert page.locator("#runs-table input:disabled").count() == 3
    colours = page.locator("#chart path.curve").evaluate_all("all => all.map((e) => e.classList[1])")
    assert len(set(colours)) == 6


# --- for everyone ---


def every_view(page):
    """Show each view of the page in turn, full of content."""
    write(page, prompt=TEXT + "\n\n" + "x" * 200, max_tokens=8, seed=3)
    page.locator("#written > span").nth(3).click()
    page.locator("#product").wait_for()
    yield "write"
    write(page, temperature=9)
    yield "error"
    score(page, (TEXT + "\n") * 3)
    page.locator("#scored > span").nth(2).click()
    page.locator("#product").wait_for()
    yield "score"
    page.click("#tab-runs")
    page.locator("#chart path.curve").wait_for()
    yield "runs"


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, start, served, tmp_path, scheme):
    log(tmp_path / "one", line(1), line(2))
    page = visit(start(served, Limits(), runs=tmp_path), color_scheme=scheme)
    kinds = set()
    for view in every_view(page):
        poor, found = page.evaluate(POOR_CONTRAST)
        assert poor == [], view
        kinds |= {*found}
    assert {"svg", "placeholder", "mark", "TEXTAREA", "BUTTON", "SPAN", "CODE", "TD", "P"} <= kinds
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")
    classes = [f"s{i}" for i in range(6)]  # all colours of surprise, with their text
    page.click("#tab-score")
    page.locator("#scored > span").evaluate_all(
        "(all, classes) => classes.forEach((c, i) => (all[i].className = c))", classes
    )
    assert page.evaluate(POOR_CONTRAST)[0] == []


@needs_chromium
def test_a_phone_needs_no_horizontal_scrolling(visit, start, served, tmp_path):
    log(tmp_path / LONG_NAME, line(5, val_nll=7.25), line(123_456, nll=3.25))
    page = visit(start(served, Limits(), runs=tmp_path), viewport=PHONE, has_touch=True, is_mobile=True)
    for view in every_view(page):
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], view
        assert page.evaluate("innerWidth") == PHONE["width"], view


@needs_chromium
def test_a_touch_shows_a_token_on_a_phone(visit, server):
    page = visit(server, viewport=PHONE, has_touch=True, is_mobile=True, reduced_motion="reduce")
    write(page, prompt=TEXT * 5, max_tokens=8, seed=3)
    page.locator("#written > span").nth(3).tap()
    page.locator("#product").wait_for()
    assert page.locator("#token-name").evaluate("e => e.getBoundingClientRect().top") < PHONE["height"] / 2
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


@needs_chromium
def test_everything_is_named_and_reached_by_keyboard(visit, start, served, tmp_path):
    log(tmp_path / "one", line(1), line(2))
    page = visit(start(served, Limits(), runs=tmp_path))
    page.locator("#tab-write").wait_for()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" or reached[-1] == "", reached
    knobs = ["max-tokens", "temperature", "top-k", "top-p", "seed", "stop-text"]
    assert reached[:9] == ["tab-write", "prompt", *knobs, "start"]
    for role, name in [
        *(("textbox", "Prompt"), ("spinbutton", "Tokens"), ("spinbutton", "Temperature"), ("spinbutton", "Top-k")),
        *(("spinbutton", "Top-p"), ("spinbutton", "Seed"), ("textbox", "Stop text"), ("button", "Write")),
        *(("button", "Stop"), ("tab", "Write"), ("tabpanel", "Write"), ("complementary", "Token")),
    ]:
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name
    page.focus("#tab-write")
    for key, tab in [("ArrowRight", "score"), ("ArrowRight", "runs"), ("ArrowRight", "write"), ("End", "runs")]:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.locator("[role=tabpanel]:visible").get_attribute("id") == tab
    assert page.get_by_role("img", name="NLL against steps: one.").count() == 1
    assert page.get_by_role("checkbox", name="one").count() == 1

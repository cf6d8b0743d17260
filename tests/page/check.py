#!/usr/bin/env python3
"""Checks the live view (src/view/page.html) in Chromium: that it shows what the server says and changes with it, that
nothing of a model's names runs, keys and refusals, keyboard, names for screen readers, contrast, 360 pixels of width.

usage: tests/page/check.py [--server LLAMA_SERVER | --url URL [--key KEY]] [--screenshots DIR]

Without arguments the server is tests/page/mock.py. --server starts a llama-server on the shipped model, with a key;
--url takes one that runs and whose slots are in use. Screenshots need pngquant; they wait for some history.
"""

import argparse
import base64
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

import browser
import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
WINDOWS = {"light": (1100, False), "dark": (1100, True), "phone": (360, False)}
MAX_PNG = 150_000
HISTORY_SECONDS = 75

# The colours of text and of what stands behind it; WCAG 2 asks for 4.5 to 1, and 3 to 1 for the edge of a field.
CONTRAST = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = parse(getComputedStyle(node).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  let seen = 0;
  for (const node of document.querySelectorAll('body *')) {
    const field = node.matches('input, select');
    const text = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!(text || field) || !node.checkVisibility() || node.matches(':disabled')) continue;
    if (node.closest('.unseen, datalist')) continue;
    seen += 1;
    const style = getComputedStyle(node);
    const found = ratio(parse(style.color), behind(node));
    if (found < 4.5) low.push(`${node.tagName} '${node.textContent.trim().slice(0, 20)}' ${found.toFixed(2)}`);
    if (field && ratio(parse(style.borderTopColor), behind(node.parentElement)) < 3) low.push(`edge of ${node.id}`);
  }
  return { seen, low };
})()
"""

CONTROLS = "'a[href], button, input, select, textarea, [tabindex=\"0\"]'"
VISIBLE_CONTROLS = f"""[...document.querySelectorAll({CONTROLS})]
  .filter((n) => n.checkVisibility() && !n.matches(':disabled')).map((n) => n.id || n.textContent)"""

# What is drawn of each cell of the map: its colour, and whether it is underlined. And the answer that this shows.
CELLS = """
(() => {
  paintMap();
  const canvas = document.getElementById('map');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const at = (x, y) => data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3).join();
  const ink = getComputedStyle(document.body).color.match(/\\d+/g).join();
  const below = (y) => [...Array(map.line - 5).keys()].map((i) => y + 5 + i);
  return { model: last.models[chosen()], cells: map.layers.map((layer, row) => [...layer.heat.keys()].map((e) => {
    const [x, y] = place(row, e);
    return [at(x + 1, y + 2), below(y).some((v) => at(x + 1, v) === ink)];
  })) };
})()
"""

# How many colours a canvas has, up to 64.
COLOURS = """
((canvas) => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let i = 0; i < data.length && seen.size < 64; i += 4) seen.add(`${data.slice(i, i + 4)}`);
  return seen.size;
})(document.getElementById('%s'))
"""


class Checks:
    def __init__(self):
        self.passed, self.failed = 0, 0

    def that(self, name, ok, found=""):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
        print(f"{'ok  ' if ok else 'FAIL'} {name}{'' if ok else f': {found}'}", flush=True)

    def run(self, name, part, *args):
        try:
            part(self, name, *args)
        except Exception:  # any way to break is a failure of this part, and the others still run
            self.that(name, False, traceback.format_exc())


def opened(chromium, url, window="light"):
    width, dark = WINDOWS[window]
    return browser.Page(chromium, url + "/moe-hot/", width, dark=dark)


def view(page):
    page.wait("document.getElementById('view')?.checkVisibility()")


def give_key(page, key):
    page.wait("document.getElementById('key')?.checkVisibility()")
    page.type("#key-value", key)
    page.press("Enter", 13)


def no_problems(checks, name, page, expected=()):
    found = [p for p in page.problems() if p[0] not in expected]
    checks.that(f"{name}: the browser reports no error", not found, found)


# ---------------------------------------------------------------------------------------------------------------
# With any server whose slots are in use
# ---------------------------------------------------------------------------------------------------------------


def look(checks, name, chromium, url, window, key=None, screenshot=None):
    page = opened(chromium, url, window)
    if key:
        give_key(page, key)
    view(page)
    for what in ("figures", "hit-text", "rate-text"):
        before = page.text(f"#{what}")
        page.wait(f"document.getElementById('{what}').textContent.trim() !== {json.dumps(before)}", 20)
    checks.that(f"{name}: figures and charts change from poll to poll", True)
    figures = page.text("#figures")
    checks.that(f"{name}: figures are numbers", not re.search("NaN|undefined|Infinity|null", figures), figures)
    for canvas, least in (("hit", 4), ("rate", 4), ("ramp", 64)):
        colours = page.js(COLOURS % canvas)
        checks.that(f"{name}: {canvas} is painted", colours >= least, f"{colours} colours")

    heat_map(checks, name, page)
    overflow = page.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    beyond = page.js("""[...document.querySelectorAll('body *')].filter((n) => n.checkVisibility()
      && !n.closest('.unseen') && n.getBoundingClientRect().right > innerWidth + 0.5).map((n) => n.id || n.tagName)""")
    checks.that(f"{name}: no scrolling to the side", overflow <= 0 and not beyond, (overflow, beyond))

    contrast = page.js(CONTRAST)
    checks.that(f"{name}: contrast", contrast["seen"] > 40 and not contrast["low"], contrast)
    keyboard(checks, name, page)
    names(checks, name, page)
    no_problems(checks, name, page, ["network"] if key else [])
    if screenshot:
        time.sleep(HISTORY_SECONDS)
        for key, code in [("ArrowLeft", 37)] * 20 + [("ArrowDown", 40)]:
            page.press(key, code)
        page.screenshot(screenshot)
        subprocess.run(["pngquant", "--force", "--ext", ".png", "128", screenshot], check=True)
        size = screenshot.stat().st_size
        checks.that(f"{name}: {screenshot.name} is small", size < MAX_PNG, f"{size} bytes")
    page.close()


def heat_map(checks, name, page):
    drawn = page.js(CELLS)
    colours, wrong = {}, []
    for layer, cells in zip(drawn["model"]["layers"], drawn["cells"], strict=True):
        heat, resident = base64.b64decode(layer["heat"]), base64.b64decode(layer["resident"])
        for e, (colour, underlined) in enumerate(cells):
            colours.setdefault(heat[e], set()).add(colour)
            if underlined != bool(resident[e // 8] >> e % 8 & 1):
                wrong.append((layer["il"], e))
    checks.that(f"{name}: exactly the experts with a slot are underlined", not wrong, wrong[:8])
    clear = all(len(same) == 1 for same in colours.values())
    differ = len(set.union(*colours.values()))
    checks.that(f"{name}: colours of the map follow the heat", clear and differ >= min(8, len(colours)) > 2,
                f"{differ} colours for {len(colours)} values")


def keyboard(checks, name, page):
    wanted = set(page.js(VISIBLE_CONTROLS))
    parts = {"map", "scroll"} | ({"set-k", "set-policy", "Apply", "freeze"} if page.js("last.writable") else set())
    reached, unmarked = set(), set()
    page.js("document.activeElement.blur()")
    for _ in range(2 * len(wanted) + 4):
        page.press("Tab", 9)
        at, marked = page.js("""((n) => [n.id || n.textContent, getComputedStyle(n).outlineStyle !== 'none'
          && parseFloat(getComputedStyle(n).outlineWidth) >= 2])(document.activeElement)""")
        if at in wanted:
            reached.add(at)
            if not marked:
                unmarked.add(at)
    checks.that(f"{name}: Tab reaches every control", reached == wanted and parts <= reached, (wanted | parts) - reached)
    checks.that(f"{name}: the focus is seen", not unmarked, unmarked)

    page.js("document.getElementById('map').focus()")
    page.press("Home", 36)
    place = re.compile(r"Layer (\d+), expert (\d+): heat \d+%, (has a slot|no slot)")
    at = [place.fullmatch(page.text("#cell"))]
    for key, code in (("ArrowRight", 39), ("ArrowDown", 40), ("ArrowUp", 38), ("ArrowLeft", 37)):
        page.press(key, code)
        at.append(place.fullmatch(page.text("#cell")))
    found = [m and (int(m[1]), int(m[2])) for m in at]
    layers = page.js("map.layers.map((l) => l.il)")
    (a, b), expected = layers[:2], [(0, 0), (0, 1), (1, 1), (0, 1), (0, 0)]
    checks.that(f"{name}: arrow keys move through the map", found == [((a, b)[r], e) for r, e in expected], found)
    checks.that(f"{name}: the cell is spoken", place.match(page.text("#spoken")), page.text("#spoken"))
    checks.that(f"{name}: the cell has a tooltip", page.shown("#tip"))
    page.press("Escape", 27)
    checks.that(f"{name}: Escape closes the tooltip", not page.shown("#tip"))
    # what is said of a cell is what is known of it
    page.press("End", 35)
    said = place.fullmatch(page.text("#cell"))
    slot = page.js("hasSlot(map.layers[cursor.row], cursor.expert) === 1")
    checks.that(f"{name}: the map says who has a slot", said and (said[3] == "has a slot") == slot, said)


def names(checks, name, page):
    """Everything that a screen reader stops at has a name."""
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in nodes if not n["ignored"]]
    needed = ("button", "textbox", "combobox", "spinbutton", "checkbox", "image", "img", "application", "region",
              "table")
    unnamed = [role for role, text in nodes if role in needed and not text]
    checks.that(f"{name}: all controls, images and tables have names", not unnamed, unnamed)
    have = {role for role, _ in nodes}
    missing = {"button", "textbox", "combobox", "application", "table", "heading", "main", "image"} - have
    checks.that(f"{name}: the accessibility tree has the page's parts", not missing, (missing, have))


def refusal(checks, name, page, field, value, expected):
    page.type(f"#set-{field}", value)
    page.press("Enter", 13)
    page.wait("document.getElementById('refused').textContent !== ''")
    said = page.text("#refused")
    checks.that(f"{name}: {field} = {value or 'nothing'} is refused with the reason", expected in said, said)


def settings(checks, name, chromium, url, key=None):
    page = opened(chromium, url)
    if key:
        give_key(page, key)
    view(page)
    if page.js("last.writable"):
        refusal(checks, name, page, "k", "0", "k: '0' is not allowed, expected a number of slots per layer from 1 to ")
        refusal(checks, name, page, "k", "many", "many")
        page.type("#set-k", "3")
        page.press("Enter", 13)
        page.wait("document.getElementById('taken').textContent === 'Accepted.'")
        page.wait("document.getElementById('facts').textContent.includes('K 3:')", 20)
        checks.that(f"{name}: K is changed, and the old error is gone", page.text("#refused") == "")
        checks.that(f"{name}: the field is no longer marked", not page.js("document.querySelector('.edited')"))
        page.click("#freeze")
        page.wait("document.getElementById('word').textContent === 'Frozen'")
        page.click("#freeze")
        page.wait("document.getElementById('word').textContent !== 'Frozen'")
        checks.that(f"{name}: swaps are frozen and resumed", True)
    else:
        locked = page.js("document.getElementById('settings').disabled") and page.shown("#locked")
        checks.that(f"{name}: settings are disabled, and it says why", locked)
    no_problems(checks, name, page, ["network"])
    page.close()


# ---------------------------------------------------------------------------------------------------------------
# With the mock, which can do what a server seldom does
# ---------------------------------------------------------------------------------------------------------------


def key_form(checks, name, chromium):
    server = mock.Mock([mock.small()], key="secret")
    page = opened(chromium, server.url)
    give_key(page, "wrong")
    page.wait("document.getElementById('key-refused').textContent !== ''")
    checks.that(f"{name}: a wrong key is refused", not page.shown("#view") and server.gets == 0)
    checks.that(f"{name}: and not kept", page.js("sessionStorage.length + localStorage.length") == 0)
    give_key(page, "secret")
    view(page)
    kept = page.js("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    checks.that(f"{name}: the right one is kept for the session alone", kept == [["secret"], 0, ""], kept)
    page.call("Page.reload")
    time.sleep(0.5)
    view(page)
    checks.that(f"{name}: a reload does not ask again", not page.shown("#key"))
    server.key = "another"
    page.wait("document.getElementById('key').checkVisibility()")
    checks.that(f"{name}: it asks again when the key has changed", not page.shown("#view"))
    no_problems(checks, name, page, ["network"])
    page.close()
    server.close()


def hostile(checks, name, chromium):
    server = mock.Mock([mock.small(mock.HOSTILE), mock.small("</script><script>document.title='executed'</script>")])
    for model in server.models:
        model.skipped = [{"layers": mock.HOSTILE, "reason": mock.HOSTILE}]
        model.policy = mock.HOSTILE
    page = opened(chromium, server.url)
    view(page)
    time.sleep(1.5)
    said = [page.text("#status-title"), page.text("#skipped"), page.text("#model")]
    checks.that(f"{name}: names are text", all(mock.HOSTILE in text for text in said), said)
    page.js("document.getElementById('model').selectedIndex = 1")
    page.js("document.getElementById('model').dispatchEvent(new Event('change'))")
    refusal(checks, name, page, "policy", mock.HOSTILE + "x", mock.HOSTILE)
    page.wait("document.getElementById('status-title').textContent.startsWith('</script>')")
    ran = page.js("[document.title, document.querySelectorAll('img').length, document.scripts.length]")
    checks.that(f"{name}: nothing of them runs", ran == ["moe-hot", 0, 1], ran)
    no_problems(checks, name, page, ["network"])
    page.close()
    server.close()


def several(checks, name, chromium):
    server = mock.Mock([mock.small("first"), mock.small("second")])
    page = opened(chromium, server.url)
    view(page)
    checks.that(f"{name}: there is a choice", page.shown("#model") and page.text("#status-title") == "first")
    page.js("document.getElementById('model').selectedIndex = 1")
    page.js("document.getElementById('model').dispatchEvent(new Event('change'))")
    page.wait("document.getElementById('status-title').textContent === 'second'")
    time.sleep(1.5)
    checks.that(f"{name}: it stays chosen", page.text("#status-title") == "second")
    page.type("#set-interval", "9")
    page.press("Enter", 13)
    page.wait("document.getElementById('taken').textContent === 'Accepted.'")
    intervals = [m.interval for m in server.models]
    checks.that(f"{name}: the chosen one is changed", intervals == [4, 9], intervals)
    server.models = []
    page.wait("document.getElementById('none').checkVisibility()")
    checks.that(f"{name}: without slots it says so", not page.shown("#view"))
    no_problems(checks, name, page)
    page.close()
    server.close()


def read_only(checks, name, chromium):
    server = mock.Mock([mock.small()], writable=False)
    settings(checks, name, chromium, server.url)
    server.close()


def lost(checks, name, chromium):
    server = mock.Mock([mock.small()])
    page = opened(chromium, server.url)
    view(page)
    server.broken = "silent"
    page.wait("document.getElementById('lost').checkVisibility()")
    said = page.text("#why")
    checks.that(f"{name}: it says so", said.startswith("Connection lost: no answer. Shown is the state of "), said)
    page.wait("wait === 8000", 10)
    checks.that(f"{name}: the wait doubles", page.text("#retry") == "Next try in 8 s.", page.text("#retry"))
    page.js("wait = 12000")
    page.js("poll()")
    page.wait("wait === 15000")
    checks.that(f"{name}: up to 15 s", True)
    server.broken = 503
    page.js("poll()")
    page.wait("document.getElementById('why').textContent.includes('the server answered 503: Loading model')")
    server.broken = None
    page.js("poll()")
    page.wait("!document.getElementById('lost').checkVisibility()")
    checks.that(f"{name}: it recovers", page.js("wait") == 1000 and page.text("#link").startswith("Live"))
    no_problems(checks, name, page, ["network"])
    page.close()
    server.close()


def hidden(checks, name, chromium):
    server = mock.Mock([mock.small()])
    page = opened(chromium, server.url)
    view(page)
    turn = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); " \
        "document.dispatchEvent(new Event('visibilitychange'))"
    page.js(turn % "true")
    time.sleep(0.5)  # for what was asked before
    before = server.gets
    time.sleep(3)
    checks.that(f"{name}: it does not ask", server.gets == before, server.gets - before)
    page.js(turn % "false")
    time.sleep(2.5)
    checks.that(f"{name}: it asks again when seen", 2 <= server.gets - before <= 4, server.gets - before)
    no_problems(checks, name, page)
    page.close()
    server.close()


# ---------------------------------------------------------------------------------------------------------------
# A llama-server
# ---------------------------------------------------------------------------------------------------------------


class Server:
    """A llama-server on the shipped model, with slots, a key, and changes allowed."""

    key = "secret"

    def __init__(self, program):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.TemporaryFile()
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
        # threads that wait give way to the browser
        env |= {"LLAMA_ARG_MOE_HOT_K": "16", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            [program, "-m", ROOT / "models/moe-e64-Q4_0.gguf", "--host", "127.0.0.1", "--port", str(port), "-c", "2048",
             "-t", "1", "--no-repack", "--props", "--api-key", self.key],
            env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        end = time.monotonic() + 60
        while not self.is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.log.seek(0)
                log = self.log.read()[-1000:].decode(errors="replace")
                sys.exit(f"check.py: error: {program} does not start: {log}")
            time.sleep(0.1)

    def is_up(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def close(self):
        self.process.terminate()
        self.process.wait(20)


class Traffic:
    """Asks for text, one answer after the other, until stopped."""

    def __init__(self, url, key):
        self.ended, self.answers, self.why = False, 0, "no answer yet"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        prompts = "The train left the station", "fn main() {", "The results of the experiment show that", "She said"
        bodies = [json.dumps({"prompt": p, "n_predict": 200, "ignore_eos": True}).encode() for p in prompts]
        self.requests = [urllib.request.Request(f"{url}/completion", body, headers) for body in bodies]
        self.thread = threading.Thread(target=self.ask)
        self.thread.start()

    def ask(self):
        while not self.ended:
            try:
                with urllib.request.urlopen(self.requests[self.answers % len(self.requests)], timeout=60) as answer:
                    answer.read()
                self.answers += 1
            except OSError as e:
                self.why = str(e)
                time.sleep(0.5)

    def close(self):
        self.ended = True
        self.thread.join()


def with_server(checks, chromium, url, key, screenshot):
    traffic = Traffic(url, key)
    try:
        for window in WINDOWS:
            checks.run(f"server, {window}", look, chromium, url, window, key, screenshot(window))
        checks.run("server, settings", settings, chromium, url, key)
    finally:
        traffic.close()
    checks.that("server: it answers meanwhile", traffic.answers > 0, traffic.why)


def with_mock(checks, chromium, screenshot):
    server = mock.Mock([mock.large()])
    for window in WINDOWS:
        checks.run(window, look, chromium, server.url, window, None, screenshot(window))
    checks.run("settings", settings, chromium, server.url)
    server.close()
    for part in (read_only, key_form, hostile, several, lost, hidden):
        checks.run(part.__name__.replace("_", " "), part, chromium)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--server", help=argparse.SUPPRESS)
    server.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    parser.add_argument("--screenshots", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = browser.find()
    if not path:
        sys.exit(f"check.py: error: no browser: expected one of {', '.join(browser.NAMES)} on the PATH")
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)

    def screenshot(window):
        return args.screenshots and args.screenshots / f"view-{window}.png"

    checks = Checks()
    chromium = browser.Browser(path)
    try:
        if args.url:
            with_server(checks, chromium, args.url.rstrip("/"), args.key, screenshot)
        elif args.server:
            started = Server(args.server)
            try:
                with_server(checks, chromium, started.url, started.key, screenshot)
            finally:
                started.close()
        else:
            with_mock(checks, chromium, screenshot)
    finally:
        chromium.close()
    print(f"{checks.passed} passed, {checks.failed} failed")
    sys.exit(checks.failed > 0)


if __name__ == "__main__":
    main()

"""Drives Chromium without a window over the pipe of its DevTools protocol: needs nothing but Python."""

import base64
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def find():
    """Where Chromium is, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Timeout(Exception):
    """What was waited for did not come."""


class Browser:
    def __init__(self, path):
        self.profile = tempfile.TemporaryDirectory(prefix="moe-hot-page-", ignore_cleanup_errors=True)
        # above 4, since Chromium's ends are 3 and 4
        ours = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for fd in pair]
        their_in, self.out, self.input, their_out = ours[0], ours[1], ours[2], ours[3]
        command = [path, "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
                   "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
                   f"--user-data-dir={self.profile.name}", "about:blank"]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # which Chromium does not have for root
        self.log = pathlib.Path(self.profile.name) / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False,
                preexec_fn=lambda: (os.dup2(their_in, 3), os.dup2(their_out, 4)))
        os.close(their_in)
        os.close(their_out)
        self.arrived = threading.Condition()
        self.answers, self.events, self.last, self.ended = {}, [], 0, False
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        rest = b""
        while chunk := os.read(self.input, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            with self.arrived:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.arrived.notify_all()
        with self.arrived:
            self.ended = True
            self.arrived.notify_all()

    def call(self, method, session=None, **params):
        """Asks Chromium for something and returns its result."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.last in self.answers or self.ended, 60):
                raise Timeout(f"Chromium does not answer {method}")
            if self.last not in self.answers:
                raise Timeout(f"Chromium has ended: {self.log.read_text(errors='replace')[-500:]}")
            answer = self.answers.pop(self.last)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def close(self):
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (Timeout, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()


class Page:
    """A tab."""

    def __init__(self, browser, url, width=1280, height=900, dark=False):
        self.browser = browser
        # its own context: no key in its storage
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=url)

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def close(self):
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def js(self, expression):
        """The value of an expression, which may be a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait(self, expression, seconds=10):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            if time.monotonic() > end:
                raise Timeout(f"not within {seconds} s: {expression}")
            time.sleep(0.05)

    def press(self, name, code=0):
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def text(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)}).textContent.trim()")

    def shown(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def click(self, selector):
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector, text):
        """Replaces a field's text as a person does."""
        self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        """Writes the whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def problems(self):
        """What went wrong in the page so far, in the browser's words: exceptions, and errors and warnings of its
        console. The browser tells of each answer that is an error, too: those are (`network`, text)."""
        found = []
        with self.browser.arrived:
            events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        for event in events:
            p = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = p["exceptionDetails"]
                found.append(("exception", details.get("exception", {}).get("description") or details["text"]))
            elif event["method"] == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
                found.append(("console", " ".join(str(a.get("value", a.get("description"))) for a in p["args"])))
            elif event["method"] == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
                found.append((p["entry"]["source"], p["entry"]["text"]))
        return found

"""A headless Chromium, driven through the DevTools protocol over two pipes (--remote-debugging-pipe)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-background-networking"
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


class Page:
    """A tab. problems: console errors, exceptions and policy violations; requests: addresses that it asked for."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.number, self.rest = 0, b""
        self.session = None
        self.problems, self.requests = [], []
        target = next(one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Calls a method and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        """The next message; of an event, what the tests ask for is kept."""
        while b"\0" not in self.rest:
            more = os.read(self.reader.fileno(), 1 << 20)
            assert more, "Chromium has ended"
            self.rest += more
        first, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(first)
        what, about = message.get("method"), message.get("params", {})
        if what == "Runtime.exceptionThrown":
            self.problems.append(about["exceptionDetails"].get("exception", {}).get("description", str(about)))
        elif what == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(str(about["args"]))
        elif what == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])
        elif what == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return message

    def open(self, address, width=1280, height=900, scheme="light"):
        """Opens a page and waits until it has loaded."""
        self.size(width, height)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requests.clear()
        self.send("Page.navigate", url=str(address))
        while self.receive().get("method") != "Page.loadEventFired":
            pass
        return self

    def size(self, width, height):
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def until(self, script, seconds=20):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def click(self, selector, x=0.5, y=0.5):
        """A click of the mouse on the first element that a selector finds, at a share of its width and height."""
        place = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        box = self.run(
            f"(() => {{ {place} const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] }})()"
        )
        at = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def press(self, key):
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key])

    def screenshot(self, path, whole=True):
        """Writes a PNG, of the whole page or of the window."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"] if not whole else None
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            picture = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(picture))


@contextmanager
def browser(folder):
    """A `Page` of a Chromium whose profile is in `folder`."""
    to_read, to_write = os.pipe(), os.pipe()  # Chromium reads commands from 3 and writes answers to 4

    def hand_over():
        first, second = os.dup(to_read[0]), os.dup(to_write[1])
        first, second = (os.dup(one) if one in (3, 4) else one for one in (first, second))
        os.dup2(first, 3)
        os.dup2(second, 4)

    command = [CHROMIUM, *QUIET.split(), "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read[0])
    os.close(to_write[1])
    try:
        with open(to_write[0], "rb") as reader, open(to_read[1], "wb") as writer:
            yield Page(reader, writer)
    finally:
        process.kill()
        process.wait()

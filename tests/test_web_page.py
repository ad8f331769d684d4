"""The page in a browser: what is typed is spoken, drawn and described; a picture of it all. Needs Chromium."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
from matplotlib.image import imread
from test_speech_server import Running, checkpoint, engine  # noqa: F401  fixtures

from speech_server import collected_voices

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


class Browser:
    """Chromium without a window, asked by the DevTools protocol over a pair of pipes (messages end with a 0 byte)."""

    def __init__(self, profile, url: str):
        self.said, self.last = [], 0
        asked, ask = os.pipe()
        answer, answered = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        flags += ["--window-size=800,700", "--autoplay-policy=no-user-gesture-required", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{asked} 4>&{answered}', BROWSER, *flags],
            pass_fds=(asked, answered), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asked)
        os.close(answered)
        self.ask_pipe, self.answer_pipe = os.fdopen(ask, "wb", buffering=0), os.fdopen(answer, "rb", buffering=0)
        self.left, self.session = b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Page.navigate", url=url)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.session = None
            self.ask("Browser.close")
        self.process.wait(20)
        self.ask_pipe.close()
        self.answer_pipe.close()

    def ask(self, method: str, **parameters) -> dict:
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        self.ask_pipe.write(
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while True:
            found = self.read()
            if found.get("id") == self.last:
                assert "error" not in found, found
                return found["result"]
            self.said.append(found)

    def read(self) -> dict:
        while b"\0" not in self.left:
            more = self.answer_pipe.read(1 << 16)
            if not more:
                raise OSError("the browser has gone")
            self.left += more
        message, self.left = self.left.split(b"\0", 1)
        return json.loads(message)

    def value(self, expression: str):
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0):
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, (
                f"{expression} never came; the page says: {self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def complaints(self) -> list[dict]:
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [each for each in self.said if each.get("method") in kinds and "error" in json.dumps(each)]


@pytest.fixture
def page(engine, shared_data, tmp_path):  # noqa: F811
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.closing(Running(engine, collected_voices(engine, shared_data))))
        browser = Browser(tmp_path / "profile", f"http://127.0.0.1:{server.port}/")
        yield stack.enter_context(contextlib.closing(browser))


def say(page: Browser, text: str) -> None:
    page.value(f"document.getElementById('text').value = {json.dumps(text)}")
    page.value("document.getElementById('form').requestSubmit()")


def test_what_is_typed_is_spoken_drawn_and_described(page, tmp_path):
    page.until("document.querySelectorAll('#voice option').length > 0")
    say(page, "Good morning, everybody.")
    note = page.until("document.querySelector('.turn small')?.textContent.includes('first audio') && "
                      "document.querySelector('.turn small').textContent")  # fmt: skip
    assert note.startswith("speaker 0, 0.") and "first audio" in note
    page.until("!document.getElementById('reply').hidden && !document.getElementById('reply').disabled")
    page.value("document.getElementById('reply').click()")
    page.until("document.querySelectorAll('.turn').length === 2 && !document.getElementById('say').disabled")
    assert not page.value("document.querySelectorAll('.error').length")
    drawn = "[...document.querySelectorAll('canvas')].map((c) => " \
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0))"  # fmt: skip
    assert page.value(drawn) == [True, True]
    picture = tmp_path / "page.png"
    picture.write_bytes(base64.b64decode(page.ask("Page.captureScreenshot")["data"]))
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert page.complaints() == []


def test_what_is_refused_is_shown_and_the_page_goes_on(page):
    page.until("document.querySelectorAll('#voice option').length > 0")
    say(page, "<b>" + "x" * 5000)  # more than the server takes; markup is text
    page.until("document.querySelector('.turn.error small')?.textContent.length > 0")
    assert not page.value("document.querySelectorAll('#turns b').length")
    say(page, "Hello.")
    page.until("[...document.querySelectorAll('.turn small')].some((n) => n.textContent.includes('first audio'))")


def answer(page: Browser, seconds: float, words: str = "Hi.") -> None:
    """From now on the page is not told by the server but by this: sound of that duration, at once, and these words."""
    page.value(
        f"window.asked = []; window.fetch = async (path, options) => {{ asked.push([path, options?.body]); "
        f"return new Response(options?.method === 'POST' && path.endsWith('/say') ? new Uint8Array({seconds} * 48000) "
        f": JSON.stringify({{ text: 'Oh?', turns: [{{ text: {json.dumps(words)} }}] }})); }}; 0"
    )


IDLE = "document.getElementById('stop').hidden && !document.getElementById('say').disabled"
NOTED = "[...document.querySelectorAll('.turn small')].at(-1)?.textContent.includes('first audio')"


def test_a_reply_may_be_stopped_while_it_plays_and_nothing_is_said_over_it(page):
    page.until("document.querySelectorAll('#voice option').length > 0")
    answer(page, 1)
    say(page, "One second.")
    page.until(NOTED)
    assert not page.value(IDLE)
    say(page, "Over it.")
    assert page.value("asked.length") == 1 and page.value("document.getElementById('text').value") == "Over it."
    page.until(IDLE)
    assert page.value("context.currentTime") >= 1
    answer(page, 3600)
    say(page, "An hour.")
    page.until(NOTED)
    page.value("document.getElementById('stop').click()")
    page.until(IDLE, 5)
    assert not page.value("document.querySelectorAll('.error').length")


def test_a_lost_connection_is_shown_and_the_page_goes_on(page):
    page.until("document.querySelectorAll('#voice option').length > 0")
    count = "document.querySelectorAll('.turn.error').length"
    page.value("window.asked = []; window.fetch = async (path, options) => { asked.push(options?.body); "
               "throw new TypeError('it has gone'); }; 0")  # fmt: skip
    page.value("context = new AudioContext({ sampleRate: RATE }); navigator.mediaDevices.getUserMedia = "
               "async () => context.createMediaStreamDestination().stream; 0")  # fmt: skip
    for number, button in enumerate(("reply", "reset", "record"), start=1):
        page.value(f"document.getElementById('{button}').click()")
        if button == "record":
            page.until("recording !== null")
            page.value("document.getElementById('record').click()")
        page.until(f"{count} === {number} && {IDLE}", 10)
    say(page, "Again.")
    page.until(f"{count} === 4 && {IDLE}", 10)
    assert "it has gone" in page.value("document.querySelector('.turn.error:last-child small').textContent")
    assert "voice" in json.loads(page.value("asked.at(-1)"))
    answer(page, 0.1)
    for _ in range(2):
        say(page, "Again.")
        page.until(f"{NOTED} && {IDLE}", 10)
    said = [json.loads(body) for _, body in page.value("asked")]
    assert all("voice" in each for each in said), "a server that was started anew knows of no voice"


def test_words_that_do_not_come_leave_the_sound_and_the_page(page):
    page.until("document.querySelectorAll('#voice option').length > 0")
    answer(page, 0.2)
    page.value("const whole = window.fetch; window.fetch = async (path, options) => { "
               "if (!options) throw new TypeError('it has gone'); return whole(path, options); }; 0")  # fmt: skip
    page.until("!document.getElementById('reply').hidden")
    page.value("document.getElementById('reply').click()")
    page.until(f"document.querySelectorAll('.turn.error').length === 1 && {IDLE}", 10)

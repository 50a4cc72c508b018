"""Reports in a real browser: quiet, self-contained, and within the width of a phone."""

import itertools
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from patience import HANGS

from rkl import plots
from rkl.report import Generations, Section, Settings, figure_block, render, write
from rkl.tables import Table

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
STUDENTS = ["kl()", "reverse-kl()", "akl(mu=0.5)", "jensen-shannon(beta=0.5)"]
HOSTILE = '<script>console.error("escaped?")</script><img src="http://127.0.0.1:9/x.png">'

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome is installed"),
]


class Browser:
    """A headless Chromium spoken to over its debugging pipe; every event is kept."""

    def __init__(self, folder):
        read, self._commands = os.pipe()
        self._replies, written = os.pipe()
        self._process = subprocess.Popen(  # Chromium reads descriptor 3 and writes 4
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{written}', "bash", CHROMIUM, *OPTIONS]
            + [f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(read, written),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(written)
        self._buffer, self._ids, self._session, self.events = b"", itertools.count(1), {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self):
        while b"\0" not in self._buffer:
            received = os.read(self._replies, 1 << 16)
            assert received, "the browser has ended"
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def show(self, path, *, width, scheme):
        """Load a file at a width in CSS pixels, in the reader's light or dark scheme."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"]["value"]

    def said(self):
        """What the page wrote to the console, threw, or was refused."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event["method"] in methods]

    def requested(self):
        requests = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in requests]

    def close(self):
        self.call("Browser.close")
        self._process.wait(timeout=HANGS)
        os.close(self._commands)
        os.close(self._replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def figures():
    """One of each figure, of believable shapes and sizes."""
    rng = np.random.default_rng(0)
    steps, ranks = np.arange(1, 201), np.arange(1, 4097)
    p = ranks**-1.1 / (ranks**-1.1).sum()
    slope = np.geomspace(0.01, 100, 60)

    def student(bend):
        q = ranks ** -(1.1 + bend) * np.exp(0.2 * rng.normal(size=len(ranks)))
        return q / q.sum()

    def curve(q):
        alpha = np.minimum(slope[:, None] * p, q).sum(1)
        return alpha, alpha / slope

    curves = {
        name: (steps, (0.5 + i / 10) * np.exp(-steps / 80) + 0.3 + 0.05 * rng.normal(size=200))
        for i, name in enumerate(STUDENTS)
    }
    edges = np.unique(np.geomspace(1, 4097, 9).round().astype(int)) - 1
    by_rank = {name: rng.gamma(2, 0.04, len(edges) - 1) for name in STUDENTS}
    errors = {name: np.full(len(edges) - 1, 0.01) for name in STUDENTS}
    panels = {
        name: {step: student(0.5 * (1 - i / 2) * np.exp(-step / 60)) for step in (0, 50, 200)}
        for i, name in enumerate(STUDENTS[:3])
    }
    gaps = {
        name: (np.exp(-steps / (20 + 30 * i)), 0.5 * np.exp(-steps / (60 - 25 * i)))
        for i, name in enumerate(STUDENTS[:2])
    }
    students = {name: student((i - 1) / 8) for i, name in enumerate(STUDENTS)}
    perplexity = dict(zip(STUDENTS, (14.2, 15.9, 14.6, np.inf), strict=True))
    return [
        figure_block(
            "Training curves",
            plots.training_curves(curves, window=10),
            "Each run minimises its own divergence: the levels differ because the yardsticks do.",
        ),
        figure_block(
            "Divergence by teacher rank",
            plots.divergence_by_rank(edges, by_rank, errors=errors),
            "How much of the forward KL comes from likely tokens, and how much from rare ones.",
        ),
        figure_block(
            "Precision and recall",
            plots.precision_recall(
                {name: curve(q) for name, q in students.items()},
                bands={
                    name: (curve(q)[0] * 0.97, np.minimum(1, curve(q)[0] * 1.03))
                    for name, q in list(students.items())[:1]
                },
            ),
            "Up is precise, right is diverse; a student equal to its teacher reaches the corner.",
        ),
        figure_block(
            "Perplexity",
            plots.bars(
                perplexity,
                errors=dict.fromkeys(STUDENTS, 0.4),
                label="perplexity of held-out text",
                reference=("teacher", 12.1),
            ),
            "Lower is better; the dashed line is the teacher.",
        ),
        figure_block(
            "Head and tail",
            plots.head_tail(p, panels, head=12),
            "Forward KL fits the head first, reverse KL the tail; the dotted line divides them.",
        ),
        figure_block(
            "Gap by step",
            plots.head_tail_by_step(steps, gaps),
            "The same in one number each: the gap over the head and over the tail.",
        ),
    ]


def everything():
    """A report of every block and every figure, with text that would do harm unescaped."""
    rows = [
        [name, 0.4 + i / 9, (0.31 + i / 50, 0.004), 151_936] for i, name in enumerate(STUDENTS)
    ]
    columns = [
        "student",
        "cross-entropy (nats per token)",
        "forward KL (nats per token)",
        "tokens",
    ]
    text = "The with statement is used to wrap the execution of a block. " * 6
    answers = {name: [text[9 * i :], HOSTILE] for i, name in enumerate(["teacher", *STUDENTS])}
    settings = {"divergence": STUDENTS, "versions": {"torch": "2.13.0"}, "digest": "5e" * 32}
    table = Table("Held-out text", columns, rows, "Means with their standard errors.")
    generations = Generations("Generations", ["The with statement", HOSTILE], answers)
    return render(
        "What the divergence did",
        [
            Section("Results", "One teacher, four students.", [table]),
            Section("Figures", blocks=figures()),
            Section("Generations", blocks=[generations]),
            Section("Settings", blocks=[Settings(settings)]),
        ],
        lead="Four students, equal steps from one checkpoint.",
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path, everything())
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_is_silent_fetches_nothing_and_does_not_overflow(browser, report, width, scheme):
    browser.show(report, width=width, scheme=scheme)
    assert browser.said() == []
    assert {url for url in browser.requested() if not url.startswith("data:")} == {report.as_uri()}
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.querySelectorAll('svg').length") == 6


def test_the_figures_stay_readable_on_a_phone(browser, report):
    """The smallest text of a figure is 10 units; at 0.9 px each that is 9 px."""
    browser.show(report, width=390, scheme="light")
    smallest = """Math.min(...Array.from(document.querySelectorAll("svg.figure"), svg =>
        10 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))"""
    assert browser.evaluate(smallest) >= 8.99


def test_text_in_figures_takes_the_colour_of_the_page(browser, report):
    colours = set()
    for scheme in ("light", "dark"):
        browser.show(report, width=1280, scheme=scheme)
        ink = browser.evaluate("getComputedStyle(document.body).color")
        assert browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == ink
        colours |= {ink, browser.evaluate("getComputedStyle(document.body).backgroundColor")}
    assert len(colours) == 4


def test_an_error_and_a_request_would_be_noticed(browser, tmp_path):
    """The page of hostile text itself, unescaped and without our policy."""
    page = tmp_path / "hostile.html"
    page.write_text(f"<!doctype html>{HOSTILE}", encoding="utf-8")
    browser.show(page, width=390, scheme="light")
    assert any("escaped?" in str(event) for event in browser.said())
    assert "http://127.0.0.1:9/x.png" in browser.requested()

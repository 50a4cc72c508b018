"""The site that make docs built, in a real browser: quiet, self-contained, as wide as a phone."""

from pathlib import Path

import pytest
from test_browser import browser, pytestmark  # noqa: F401

SITE = Path(__file__).parents[1] / "build" / "site" / "html"
PAGES = [
    *("index", "docs/distill", "gallery/figures", "gallery/divergence", "reference/commands"),
    *("reference/divergences", "reference/errors", "reference/mathematics", "api/rkl"),
    *("api/rkl/exact", "api/rkl.sample/XY", "CHANGELOG"),
]


@pytest.fixture(autouse=True)
def built():
    if not (SITE / "index.html").exists():
        pytest.skip("make docs has not built the site")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_page_is_silent_fetches_nothing_and_fits(browser, page, width, scheme):  # noqa: F811
    browser.show(SITE / f"{page}.html", width=width, scheme=scheme)
    assert browser.said() == []
    assert [url for url in browser.requested() if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.querySelectorAll('article h1').length") >= 1


def test_search_finds_a_name_without_a_server(browser):  # noqa: F811
    browser.show(SITE / "search.html", width=1280, scheme="light")
    browser.evaluate("location.search = '?q=bayes_act'")
    found = """new Promise(resolve => {
        const look = () => {
            const links = [...document.querySelectorAll("#search-results li a")];
            const hit = links.find(link => link.href.includes("api/rkl.bayes/bayes_act.html"));
            if (hit) resolve(hit.textContent); else setTimeout(look, 100);
        };
        look();
    })"""
    while browser.evaluate("location.search") != "?q=bayes_act":
        pass
    shown = browser.call(
        "Runtime.evaluate", expression=found, returnByValue=True, awaitPromise=True
    )
    assert shown["result"]["value"] == "bayes_act"
    assert browser.said() == []

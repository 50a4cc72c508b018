"""The site holds every public name, and its pages come from the code."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from test_public_names import PUBLIC

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"


def module(name):
    """A module of docs/site, whose neighbours it can import."""
    sys.path.insert(0, str(SITE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SITE))


public_names, api_pages, make_site = map(module, ("public_names", "api_pages", "make_site"))


def test_every_public_package_has_its_page():
    assert set(public_names.GROUPS) == {*PUBLIC, "rkl.plots"}
    assert set(api_pages.LEADS) == set(public_names.GROUPS)


@pytest.mark.parametrize("package", public_names.GROUPS)
def test_every_public_name_is_in_one_group(package):
    assert all(public_names.groups(package).values())


@pytest.mark.parametrize("change", ["exact", "exact exact", "exact per_token no_such_name"])
def test_a_name_in_no_group_and_one_that_does_not_exist_are_refused(change, monkeypatch):
    written = public_names.GROUPS["rkl"] | {"Compute it": change}
    monkeypatch.setitem(public_names.GROUPS, "rkl", written)
    with pytest.raises(ValueError, match=r"must hold every public name of rkl once.*monte_carlo"):
        public_names.groups("rkl")


def test_the_pages_that_are_staged_keep_their_places_and_links(tmp_path):
    make_site.stage(tmp_path)
    for page in ("README.md", "docs/choose.md", "docs/studies/akl.md", "benchmarks/README.md"):
        assert (tmp_path / page).exists()
    readme = (tmp_path / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", readme):
        if not target.startswith("http") and not target.startswith("reference/"):
            assert (tmp_path / target).is_file(), target


def test_a_page_that_has_not_changed_is_not_written_again(tmp_path):
    page = tmp_path / "page.md"
    make_site.write(page, "text")
    before = page.stat().st_mtime_ns
    make_site.write(page, "text")
    assert page.stat().st_mtime_ns == before
    make_site.write(page, "other")
    assert page.read_text("utf-8") == "other"

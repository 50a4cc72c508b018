"""The site holds every public name, and its pages come from the code."""

import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
from test_public_names import PUBLIC

import rkl
from rkl import cli, plots
from rkl.bayes.families import families
from rkl.flows.architectures import catalogue as architectures
from rkl.sample.targets.parse import catalogue as targets

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "site"


def module(name):
    """A module of docs/site, whose neighbours it can import."""
    sys.path.insert(0, str(SITE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SITE))


public_names, api_pages, make_site, reference_pages, gallery, run_pages = map(
    module, ("public_names", "api_pages", "make_site", "reference_pages", "gallery", "run_pages")
)


def test_every_public_package_has_its_page():
    assert set(public_names.GROUPS) == PUBLIC
    assert set(api_pages.LEADS) == set(public_names.GROUPS)


@pytest.mark.parametrize("package", public_names.GROUPS)
def test_every_public_name_is_in_one_group(package):
    listed = [name for names in public_names.groups(package).values() for name in names]
    assert sorted(listed) == sorted(importlib.import_module(package).__all__)


def test_a_name_in_no_group_is_shown_last(monkeypatch):
    written = public_names.GROUPS["rkl"] | {"Compute it": "exact"}
    monkeypatch.setitem(public_names.GROUPS, "rkl", written)
    title, names = list(public_names.groups("rkl").items())[-1]
    assert title == "More"
    assert "per_token" in names


@pytest.mark.parametrize(("change", "fault"), [("exact exact", "exact"), ("tv exact", "tv")])
def test_a_name_in_two_groups_and_one_that_does_not_exist_are_refused(change, fault, monkeypatch):
    written = public_names.GROUPS["rkl"] | {"Compute it": change}
    monkeypatch.setitem(public_names.GROUPS, "rkl", written)
    with pytest.raises(ValueError, match=rf"must hold public names of rkl.*look at {fault}\."):
        public_names.groups("rkl")


def test_the_pages_that_are_staged_keep_their_places_and_links(tmp_path):
    make_site.stage(tmp_path)
    for page in ("README.md", "docs/choose.md", "docs/studies/akl.md", "benchmarks/README.md"):
        assert (tmp_path / page).exists()
    readme = (tmp_path / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", readme):
        if not target.startswith(("http", "reference/", "examples/first_hour/first-hour-")):
            assert (tmp_path / target).is_file(), target


def test_every_page_of_docs_is_in_the_index(tmp_path):
    make_site.stage(tmp_path)
    lists = re.findall(
        r"```\{toctree\}\n(.*?)```", (tmp_path / "index.md").read_text("utf-8"), re.S
    )
    named = re.findall(r"(?:^|<)((?:docs|benchmarks)/[\w/-]+)>?$", "".join(lists), re.M)
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "studies").glob("*.md")]
    staged = {str(path.relative_to(ROOT).with_suffix("")) for path in pages}
    assert sorted(named) == sorted(staged | {"benchmarks/README"})
    index = "docs/choose\n<docs/fit>\nOTHER PAGES\n"
    assert "docs/distill\n" in make_site.with_other_pages(index)
    assert "docs/fit\n" not in make_site.with_other_pages(index)


def test_a_page_that_has_not_changed_is_not_written_again(tmp_path):
    page = tmp_path / "page.md"
    make_site.write(page, "text")
    before = page.stat().st_mtime_ns
    make_site.write(page, "text")
    assert page.stat().st_mtime_ns == before
    make_site.write(page, "other")
    assert page.read_text("utf-8") == "other"


def test_content_of_another_host_and_outer_links_are_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="picture.png"><a href="https://example.org/a#b">a</a>', "utf-8")
    assert make_site.foreign_content(tmp_path) == []
    assert make_site.outer_links(tmp_path) == ["https://example.org/a"]
    page.write_text('<script src="https://example.org/a.js"></script>', "utf-8")
    (tmp_path / "style.css").write_text("a { background: url(http://example.org/b.png) }", "utf-8")
    assert make_site.foreign_content(tmp_path) == [
        'page.html would load src="https://example.org/a.js',
        "style.css would load url(http://example.org/b.png",
    ]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The generated pages of reference by name."""
    folder = tmp_path_factory.mktemp("reference")
    reference_pages.write_reference(folder, make_site.write)
    return {path.stem: path.read_text("utf-8") for path in folder.glob("*.md")}


@pytest.mark.parametrize(
    ("page", "catalogue"),
    [("divergences", rkl.catalogue), ("targets", targets), ("architectures", architectures)],
)
def test_every_entry_of_a_catalogue_has_its_row(tables, page, catalogue):
    ours = {name for name, cls in catalogue().items() if cls.__module__.startswith("rkl.")}
    rows = re.findall(r"^\| \[?`([^`]+)`", tables[page].partition("## What")[0], re.M)
    assert sorted(rows) == sorted(ours)


def test_every_family_of_a_closed_form_has_its_row(tables):
    ours = {law.__name__ for law, kind in families().items() if kind.__module__[:4] == "rkl."}
    closed = tables["families"].partition("## Found numerically")[0]
    assert set(re.findall(r"^\| \[?`([^`]+)`", closed, re.M)) == ours


@pytest.mark.parametrize("command", cli.available())
def test_every_flag_that_a_command_helps_with_is_in_its_table(tables, command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = set(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]+)", capsys.readouterr().out, re.M))
    section = tables["commands"].partition(f"## rkl {command}\n")[2].partition("\n## ")[0]
    assert shown - {"--help"} <= set(re.findall(r"--[a-z][a-z-]+", section))
    assert len(shown) > 3


def test_messages_are_found_with_their_exceptions(tables):
    row = "| rows\\[…] must hold …; got … cells. | `ValueError` |"
    assert row in tables["errors"].partition("### rkl.tables")[2].partition("###")[0]
    assert "rkl.sample.NotCoveredError" in tables["errors"]


def test_every_figure_function_is_in_the_gallery():
    drawing = set()
    for found in pkgutil.iter_modules(plots.__path__, "rkl.plots."):
        functions = inspect.getmembers(importlib.import_module(found.name), inspect.isfunction)
        drawing |= {name for name, it in functions if returns_figure(it, found.name)}
    drawing |= {
        name for name in plots.__all__ if returns_figure(getattr(plots, name), "rkl.plots")
    }
    assert drawing - {"blank"} == {name for names in gallery.FIGURES.values() for name in names}


def returns_figure(function, home):
    """Whether a public function of this module returns a figure."""
    written = inspect.unwrap(function)
    kind = written.__annotations__.get("return")
    public = written.__module__ == home and not written.__name__.startswith("_")
    return public and getattr(kind, "__name__", kind) == "Figure"


@pytest.mark.slow
def test_every_figure_of_the_gallery_is_drawn(tmp_path):
    gallery.write_gallery(tmp_path, make_site.write)
    page = (tmp_path / "figures.md").read_text("utf-8")
    assert page.count("<svg ") == sum(map(len, gallery.FIGURES.values()))
    assert page.count("{dropdown} Code") == page.count("<svg ")


@pytest.mark.slow
def test_the_files_of_a_run_of_each_kind_are_listed(tmp_path):
    run_pages.write_runs(tmp_path, make_site.write)
    sections = (tmp_path / "runs.md").read_text("utf-8").split("\n## ")[1:]
    assert [it.partition("\n")[0] for it in sections] == list(run_pages.KINDS)
    for section in sections:
        assert re.search(r"`run\.json` \| `format`, `kind`, `status`, `settings`", section)
        assert re.search(r"`(model|flow)\.safetensors` \| \d+ tensors|`estimate\.json`", section)
    assert "`checkpoints/` | in each: " in sections[0]

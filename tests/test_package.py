"""What the package says of itself, and what the check of its archives notices."""

import io
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import dist
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
BIBTEX = (ROOT / "docs" / "references.bib").read_text("utf-8")


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert CITATION["version"] == project["version"]
    assert CITATION["license"] == project["license"]
    assert f"version = {{{project['version']}}}" in BIBTEX


def test_citation_and_bibtex_name_the_same_papers():
    cited = {it["url"].rpartition("/")[2]: it for it in CITATION["references"]}
    assert set(cited) == {"2404.02657", "2401.15948", "2302.00628", "1707.06366"}
    seen = set()
    for entry in BIBTEX.split("@misc")[1:]:
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\},$", entry, re.M))
        paper = cited[fields["eprint"]]
        names = [f"{it['family-names']}, {it['given-names']}" for it in paper["authors"]]
        assert fields["author"].split(" and ") == names
        assert re.sub(r"[{}]", "", fields["title"]) == paper["title"]
        assert int(fields["year"]) == paper["year"]
        seen.add(fields["eprint"])
    assert seen == set(cited)


@pytest.mark.parametrize("page", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_issue_templates_ask_for_what_a_report_needs(page):
    form = yaml.safe_load(page.read_text("utf-8"))
    assert set(form) == {"name", "description", "labels", "body"}
    fields = {it["id"]: it for it in form["body"]}
    assert len(fields) == len(form["body"])
    assert any(it.get("validations", {}).get("required") for it in fields.values())


def test_what_an_archive_lacks_and_holds_too_much_of_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "sources", lambda: ["rkl/py.typed", "rkl/report.html"])
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as archive:
        for name in ("rkl/py.typed", "rkl-0.2.0.dist-info/METADATA", "tests/test_docs.py"):
            archive.writestr(name, "")
    inside = [*dist.IN_SDIST, "src/rkl/py.typed", "src/rkl/report.html"]
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
        for name in inside[1:]:
            archive.addfile(tarfile.TarInfo(f"rkl-0.2.0/{name}"), io.BytesIO())
    assert dist.check(tmp_path / "wheel.whl", tmp_path / "sdist.tar.gz") == [
        "the wheel lacks rkl/report.html",
        "the wheel holds tests/test_docs.py, which is not of the package",
        f"the sdist lacks {inside[0]}",
    ]


def test_what_the_wheel_must_hold_is_what_git_follows():
    followed = dist.sources()
    assert {"rkl/py.typed", "rkl/report.html", "rkl/__init__.pyi"} <= set(followed)

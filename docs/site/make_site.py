"""Build the documentation site from the pages of the repository and the code itself.

    python docs/site/make_site.py [FOLDER]

The pages are copied into FOLDER/source at the places that they have in the repository, so that
their links stay true; pages made from the code are added, and Sphinx builds FOLDER/html, with
warnings as errors. FOLDER is build/site by default. No network is used, unless DOCS_ONLINE=1 asks
for links to the documentation of torch, transformers, xarray and zuko.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from api_pages import write_api
from gallery import write_gallery
from notebooks import notebooks, title_of, write_notebooks
from reference_pages import write_reference
from run_pages import write_runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"),
    "conda/recipe.yaml",
    *("docs/*.md", "docs/studies/*.md", "docs/images/*.png", "docs/figures/*.csv", "docs/*.bib"),
    *("benchmarks/*.md", "benchmarks/*.py", "benchmarks/figures/*"),
    *("examples/*.*", "examples/first_hour/*.*"),
    *("Makefile", "docs/images/*.py", "docs/site/public_names.py"),
]
# Links that lead to folders, where a forge lists what is in them.
FOLDERS = {"](docs)": "](index.md)", "](examples)": "](reference/examples.md)"}
# Links to a notebook lead to the page that is made of it.
NOTEBOOK = re.compile(r"(\]\([^)\s]*first_hour/)(\w+)\.py\)")


def write(path: Path, text: str) -> None:
    """Write a file unless it holds this text, so that Sphinx reads again only what has changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def stage(source: Path) -> None:
    """Copy the pages of the repository and what they link to."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            target = source / path.relative_to(ROOT)
            if path.suffix == ".md":
                text = path.read_text("utf-8")
                for link, instead in FOLDERS.items():
                    text = text.replace(link, instead)
                write(target, NOTEBOOK.sub(r"\1first-hour-\2.md)", text))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
    for path in HERE.glob("pages/*/**/*.md"):
        write(source / path.relative_to(HERE / "pages"), path.read_text("utf-8"))
    index = with_first_hours((HERE / "pages" / "index.md").read_text("utf-8"))
    write(source / "index.md", with_other_pages(index))
    shutil.copytree(HERE / "static", source / "_static", dirs_exist_ok=True)
    shutil.copy2(HERE / "conf.py", source)


def with_other_pages(index: str) -> str:
    """The index with the pages of docs that none of its lists names, under their own titles."""
    pages = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/studies/*.md")])
    names = (str(path.relative_to(ROOT).with_suffix("")) for path in pages)
    others = "".join(f"{name}\n" for name in names if f"<{name}>" not in index)
    return index.replace("OTHER PAGES\n", others)


def with_first_hours(index: str) -> str:
    """The index with the pages of the notebooks in its list."""
    pages = "".join(f"examples/first_hour/first-hour-{it.stem}\n" for it in notebooks())
    return index.replace("FIRST HOURS\n", pages)


def write_examples(source: Path) -> None:
    """One page that lists the first hours and shows every other example."""
    hours = "".join(
        f"- [{title_of(path)}](../examples/first_hour/first-hour-{path.stem}.md)\n"
        for path in notebooks()
    )
    parts = [
        f"# Examples\n\nFirst hours, notebooks with their output:\n\n{hours}\n"
        "The others are a page long each, and are run as tests.\n"
    ]
    for path in sorted((ROOT / "examples").glob("*.py")):
        summary = path.read_text("utf-8").split('"""')[1].strip().partition("\n")[0]
        parts.append(
            f"## {path.name}\n\n{summary}\n\n"
            f"```{{literalinclude}} ../examples/{path.name}\n:language: python\n```\n"
        )
    write(source / "reference" / "examples.md", "\n".join(parts))


def build(folder: Path) -> int:
    """Stage and build; returns the exit code of Sphinx."""
    source, html = folder / "source", folder / "html"
    stage(source)
    write_examples(source)
    write_api(source / "api", write)
    write_reference(source / "reference", write)
    write_runs(source / "reference", write)
    write_gallery(source / "gallery", write)
    write_notebooks(source, write)
    words = [
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        "auto",
        "-d",
        str(folder / "doctrees"),
    ]
    built = subprocess.run(
        [sys.executable, *words, str(source), str(html)],
        env={**os.environ, "RKL_SITE": str(HERE)},
        check=False,
    )
    if built.returncode:
        return built.returncode
    outer = outer_links(html)
    (folder / "outer-links.txt").write_text("\n".join(outer) + "\n", "utf-8")
    for fault in (faults := foreign_content(html)):
        print(fault, file=sys.stderr)
    print(
        f"The site is {html / 'index.html'}; {len(outer)} addresses that it links to, which were"
    )
    print(f"not visited, stand in {folder / 'outer-links.txt'}")
    return bool(faults)


def foreign_content(html: Path) -> list[str]:
    """Pages and style sheets that would load something from another host, with what."""
    loading = (
        r"""src=["']https?://[^"']+|<link[^>]+href=["']https?://[^"']+|url\(["']?https?:[^)]+"""
    )
    files = sorted(path for path in html.rglob("*") if path.suffix in (".html", ".css"))
    return [
        f"{path.relative_to(html)} would load {found}"
        for path in files
        for found in re.findall(loading, path.read_text("utf-8"))
    ]


def outer_links(html: Path) -> list[str]:
    """Addresses on other hosts that the pages link to, each once."""
    found: set[str] = set()
    for page in html.rglob("*.html"):
        found |= set(re.findall(r'href="(https?://[^"#]+)', page.read_text("utf-8")))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site")))

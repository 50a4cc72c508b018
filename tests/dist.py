"""Build the wheel and the sdist, and check what they hold and that the wheel runs.

    python tests/dist.py FOLDER

Both are built into FOLDER without a network; the wheel is then installed alone, by ``--no-deps``,
into an empty environment, where ``rkl --help`` and ``import rkl`` need nothing else.
"""

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = [
    *("Makefile", "constraints.txt", "CITATION.cff", "README.md", "docs/references.bib"),
    *("examples/distil.py", "benchmarks/README.md", "tests/test_docs.py", "docs/site/conf.py"),
    "conda/recipe.yaml",
]


def run(*words: object) -> str:
    """What a program prints, once it has ended well."""
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def missing(names: set[str], expected: list[str]) -> list[str]:
    """The expected files that are not among the names."""
    return sorted(set(expected) - names)


def sources() -> list[str]:
    """Everything that git follows of the package, as a wheel names it."""
    listed = run("git", "-C", ROOT, "ls-files", "src/rkl").splitlines()
    return [name.removeprefix("src/") for name in listed]


def check(wheel: Path, sdist: Path) -> list[str]:
    """What is wrong with the two, a sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    faults = [f"the wheel lacks {name}" for name in missing(inside, sources())]
    outside = {name for name in inside if not name.startswith(("rkl/", "rkl-"))}
    faults += [f"the wheel holds {name}, which is not of the package" for name in sorted(outside)]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    expected = [*IN_SDIST, *(f"src/{name}" for name in sources())]
    return faults + [f"the sdist lacks {name}" for name in missing(inside, expected)]


def check_installed(wheel: Path) -> list[str]:
    """What is wrong with the wheel once it is installed into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin", "python")
        run(
            *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
            *("--no-deps", "--no-index", wheel),
        )
        helped = run(Path(folder, "bin", "rkl"), "--help")
        code = "import rkl, sys; print('torch' in sys.modules, rkl.__version__)"
        imported = run(python, "-c", code).split()
        packages = next(Path(folder).glob("lib/python*/site-packages"))
        # Behind the wheel, what it asks for: the packages of this environment.
        (packages / "these.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
        run(python, "-m", "pip", "check")
        listed = run(Path(folder, "bin", "rkl"), "divergences")
    faults = [] if "akl" in listed else ["rkl divergences does not list them"]
    faults += [] if "rkl COMMAND --help" in helped else ["rkl --help does not show the commands"]
    version = wheel.name.split("-")[1]
    return faults + ([] if imported == ["False", version] else [f"import rkl gave {imported}"])


def main(folder: Path) -> int:
    """Build, check, and say what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("rkl-*.whl"), *folder.glob("rkl-*.tar.gz")]:
        old.unlink()
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(folder.resolve())]
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("rkl-*.whl"), folder.glob("rkl-*.tar.gz")
    faults = check(wheel, sdist) or check_installed(wheel)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{wheel} and {sdist} hold what they should; rkl --help runs from the wheel alone.")
    return bool(faults)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/dist.py FOLDER")
    sys.exit(main(Path(sys.argv[1])))

"""The recipe for conda and pyproject.toml describe one package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# What packages of PyPI are called on conda-forge, where they have another name.
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


@pytest.fixture
def recipe():
    return yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text("utf-8"))


@pytest.fixture
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def of_conda(requirement):
    """A requirement of pip as conda spells it: its name and its bounds, without extras.

    Raises:
        ValueError: It has a marker, or something else that a recipe for all platforms cannot say.
    """
    match = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?((?:[<>=!~]=?[\w.*]+,?)*)", requirement)
    if match is None:
        raise ValueError(f"requirement must be a name with bounds; got {requirement!r}.")
    name, bounds = match.groups()
    return f"{CONDA_NAMES.get(name, name)} {bounds}".strip()


def test_name_version_and_summary_are_those_of_the_project(recipe, pyproject):
    project = pyproject["project"]
    assert recipe["package"] == {"name": project["name"], "version": project["version"]}
    assert recipe["about"]["summary"] == project["description"]


def test_the_license_and_its_file_are_those_of_the_project(recipe, pyproject):
    project = pyproject["project"]
    assert recipe["about"]["license"] == project["license"]
    assert [recipe["about"]["license_file"]] == project["license-files"]
    assert (ROOT / recipe["about"]["license_file"]).exists()


def test_every_dependency_has_its_bounds(recipe, pyproject):
    project = pyproject["project"]
    python = f"python {project['requires-python']}"
    assert recipe["requirements"]["run"] == [python, *map(of_conda, project["dependencies"])]


def test_extras_bound_what_is_installed_beside(recipe, pyproject):
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    optional = {it for extra in extras for it in extra if not it.startswith("rkl[")}
    beside = {of_conda(it) for it in optional} - set(recipe["requirements"]["run"])
    assert sorted(recipe["requirements"]["run_constraints"]) == sorted(beside)


def test_it_is_built_by_the_backend_of_the_project(recipe, pyproject):
    host = recipe["requirements"]["host"]
    python = f"python {pyproject['project']['requires-python']}"
    assert host == [python, "pip", *map(of_conda, pyproject["build-system"]["requires"])]
    assert recipe["build"]["noarch"] == "python"
    assert (ROOT / "conda" / recipe["source"]["path"] / "pyproject.toml").exists()


def test_entry_points_are_those_of_the_project(recipe, pyproject):
    scripts = pyproject["project"]["scripts"]
    written = recipe["build"]["python"]["entry_points"]
    assert written == [f"{name} = {target}" for name, target in scripts.items()]


def test_it_imports_every_public_package_and_runs_the_command(recipe):
    folders = {path.parent.name for path in (ROOT / "src" / "rkl").glob("*/__init__.pyi")}
    public = {"rkl", "rkl.testing", *(f"rkl.{name}" for name in folders)}
    first, second = recipe["tests"]
    assert set(first["python"]["imports"]) == public
    assert second["script"] == ["rkl --help"]


@pytest.mark.parametrize(
    ("requirement", "spelt"),
    [
        ("torch>=2.13", "pytorch >=2.13"),
        ("tensordict>=0.8,<=0.10", "tensordict >=0.8,<=0.10"),
        ("dask[array]>=2026.8", "dask >=2026.8"),
        ("sphinx", "sphinx"),
    ],
)
def test_a_requirement_is_spelt_as_conda_does(requirement, spelt):
    assert of_conda(requirement) == spelt


def test_a_requirement_with_a_marker_is_refused():
    with pytest.raises(ValueError, match="must be a name with bounds; got .a; python_version"):
        of_conda("a; python_version < '3.12'")

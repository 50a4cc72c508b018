"""Whatever a public function cannot use it refuses, in one line that names the argument."""

import importlib.util
import inspect
import re
import shutil
import traceback
import zlib
from pathlib import Path

import chains_of_flows
import core
import distilling
import estimating
import evaluating_flows
import fitting
import folders
import measures
import nearness
import posteriors
import program
import pytest
import reading
import reporting
import targets
import torch
import world
from subjects import DELIBERATE, UsageError

import rkl.bayes
import rkl.distill
from rkl import cli
from rkl.metrics import clusters, frechet, neighbours
from rkl.runs.lock import LOCK
from rkl.stats import batch_means, chains, pareto

malformed = pytest.mark.malformed
PARTS = (
    core,
    measures,
    folders,
    reading,
    distilling,
    posteriors,
    estimating,
    reporting,
    program,
    nearness,
    chains_of_flows,
    fitting,
    evaluating_flows,
    targets,
)
SUBJECTS = [it for part in PARTS for it in part.SUBJECTS]
CASES = [(subject, fault) for subject in SUBJECTS for fault in subject.faults]
MADE_BY_FUNCTIONS = {  # or without arguments, or to derive from
    f"bayes.{name}"
    for name in (
        "Act",
        "Diagnostics",
        "Estimate",
        "Estimated",
        "ExponentialFamily",
        "Intrinsic",
        "PartitionAct",
        "Projection",
        "Region",
        "Table",
    )
}
OF_MEASURES = {
    "batch_means.Covariances",
    "batch_means.beside",
    "neighbours.Copies",
    "neighbours.PRDC",
    "neighbours.centre",  # which, like common_unit, takes a checked pair
    "neighbours.checked_pair",
    "neighbours.common_unit",
    "pareto.Tail",
}  # results, and what serves all
SOURCE = str(Path(rkl.__file__).parent)


def spelling(subject, fault):
    return f"{subject.function}: {fault.argument}, {fault.kind}"


def case(subject, fault):
    """A tenth of the cases, chosen by a hash of their names, is in the default suite."""
    name = spelling(subject, fault)
    marks = malformed if zlib.crc32(name.encode()) % 10 else ()
    return pytest.param(subject, fault, id=name, marks=marks)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder whose files the cases name; no case may change it."""
    return world.built(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(whole, monkeypatch):
    monkeypatch.chdir(whole)
    return whole


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of the folder, for calls that succeed and so may write."""
    monkeypatch.chdir(shutil.copytree(whole, tmp_path / "world"))


def contents(folder):
    """Every file and folder there is; of a file, its size and the moment it was last written.

    The lock of a run is none of its contents: whoever would write takes it before looking further.
    """
    stats = {path: path.stat() for path in folder.rglob("*") if path.name != LOCK}
    return {
        path: None if path.is_dir() else (it.st_size, it.st_mtime_ns) for path, it in stats.items()
    }


def names(fault, message):
    """Whether a message names the argument: as it is spelt, as a flag, or as the fault says."""
    if fault.named is not None:
        return fault.named in message
    spellings = {fault.argument, fault.argument.replace("_", "-").removeprefix("-")}
    return any(re.search(rf"(?<![\w.]){re.escape(it)}(?!\w)", message) for it in spellings)


@pytest.mark.parametrize(("subject", "fault"), [case(*it) for it in CASES])
def test_a_malformed_argument_is_refused_in_one_line_that_names_it(subject, fault, here):
    if fault.needs and importlib.util.find_spec(fault.needs) is None:
        pytest.skip(f"needs the package {fault.needs}")
    before = contents(here)
    with pytest.raises(DELIBERATE) as caught:
        subject.refuse(fault)
    message = str(caught.value)
    where = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert isinstance(caught.value, UsageError) or where.startswith(SOURCE), "not raised by rkl"
    assert "\n" not in message
    assert names(fault, message), f"{message!r} names no {fault.argument}"
    assert [word for word in fault.says if word not in message] == [], message
    assert contents(here) == before


@malformed
@pytest.mark.parametrize(
    "subject", [it for it in SUBJECTS if not it.costly], ids=lambda it: it.function
)
def test_the_arguments_that_were_not_spoilt_are_accepted(subject, copied):
    subject.accepted()


def test_every_case_is_another_one_and_there_are_many():
    triples = [(subject.function, fault.argument, fault.kind) for subject, fault in CASES]
    assert len(set(triples)) == len(triples)
    assert len(triples) >= 200


@malformed
def test_labels_that_switch_between_draws_are_warned_of_where_components_are_asked_for():
    x = torch.randn(4, 100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sorted_means = torch.tensor([-9.0, 9.0], dtype=torch.float64) + x
    switched = sorted_means.clone()
    switched[:, ::3] = switched[:, ::3].flip(-1)
    told = [
        rkl.bayes.bayes_act({"mu": mu}, "normal(loc=mu, scale=1)").diagnostics.warnings
        for mu in (sorted_means, switched)
    ]
    assert [any("change places" in text for text in texts) for texts in told] == [False, True]


def test_every_function_and_every_command_is_among_them():
    tested = {subject.function for subject in SUBJECTS}
    without_arguments = {"catalogue"}
    public = {
        name for module in (rkl, rkl.distill) for name in module.__all__ if name[0].islower()
    }
    assert public - without_arguments <= tested
    assert {f"rkl {name}" for name in cli.available()} <= tested
    assert {f"bayes.{name}" for name in dir(rkl.bayes)} - MADE_BY_FUNCTIONS <= tested
    measured = (batch_means, chains, clusters, frechet, neighbours, pareto)
    assert set().union(*map(functions_of, measured)) - OF_MEASURES <= tested


def functions_of(module):
    """The public functions and classes that a module defines."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for name, it in vars(module).items()
        if inspect.isfunction(it) or inspect.isclass(it)
        if it.__module__ == module.__name__ and not name.startswith("_")
    }

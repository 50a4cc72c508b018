"""Whatever a public function cannot use it refuses, in one line that names the argument."""

import re
import shutil
import traceback
from pathlib import Path

import core
import distilling
import folders
import measures
import program
import pytest
import reading
import world
from subjects import DELIBERATE, UsageError

import rkl.distill
from rkl import cli

pytestmark = pytest.mark.malformed
PARTS = core, measures, folders, reading, distilling, program
SUBJECTS = [it for part in PARTS for it in part.SUBJECTS]
CASES = [(subject, fault) for subject in SUBJECTS for fault in subject.faults]
SOURCE = str(Path(rkl.__file__).parent)


def spelt(subject, fault):
    return f"{subject.function}: {fault.argument}, {fault.kind}"


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
    """Every file and folder there is, with its size and the moment it was last written."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (it.st_size, it.st_mtime_ns) for path, it in stats.items()}


def names(fault, message):
    """Whether a message names the argument: as it is spelt, as a flag, or as the fault says."""
    if fault.named is not None:
        return fault.named in message
    spellings = {fault.argument, fault.argument.replace("_", "-").removeprefix("-")}
    return any(re.search(rf"(?<![\w.]){re.escape(it)}(?!\w)", message) for it in spellings)


@pytest.mark.parametrize(("subject", "fault"), CASES, ids=[spelt(*case) for case in CASES])
def test_a_malformed_argument_is_refused_in_one_line_that_names_it(subject, fault, here):
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


@pytest.mark.parametrize(
    "subject", [it for it in SUBJECTS if not it.costly], ids=lambda it: it.function
)
def test_the_arguments_that_were_not_spoilt_are_accepted(subject, copied):
    subject.accepted()


def test_every_case_is_another_one_and_there_are_many():
    triples = [(subject.function, fault.argument, fault.kind) for subject, fault in CASES]
    assert len(set(triples)) == len(triples)
    assert len(triples) >= 200


def test_every_function_and_every_command_is_among_them():
    tested = {subject.function for subject in SUBJECTS}
    without_arguments = {"catalogue"}
    public = {
        name for module in (rkl, rkl.distill) for name in module.__all__ if name[0].islower()
    }
    assert public - without_arguments <= tested
    assert {f"rkl {name}" for name in cli.available()} <= tested

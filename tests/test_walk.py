"""The script that counts rooms, climbs and returns, on a journey made up and on the real ones."""

import pytest
import walk

GRAPH = {"verb": {"solve", "model"}, "solve": {"model"}, "model": set()}


def journey(*entries):
    return walk.Walk(dict.fromkeys(entries))


def test_a_call_against_the_imports_is_a_climb_and_a_second_entry_a_return():
    there = (
        ("", "", "verb", "act"),
        ("verb", "act", "solve", "solve"),
        ("solve", "solve", "model", "f"),
    )
    back = ("model", "f", "solve", "step")
    assert journey(*there).rooms() == ["verb", "solve", "model"]
    assert (journey(*there).climbs(GRAPH), journey(*there).returns()) == ([], 0)
    assert journey(*there, back).climbs(GRAPH) == [("model", "solve")]
    assert journey(*there, back).returns() == 1


def test_what_imports_the_caller_through_others_is_above_it():
    assert journey(("model", "f", "verb", "act")).climbs(GRAPH) == [("model", "verb")]


def test_a_journey_enters_files_and_leaves_no_profiler_behind():
    result = walk.trace("proposal in independent metropolis")
    assert "sample.metropolis" in result.rooms()
    assert not any(room.startswith("bayes") for room in result.rooms())
    assert walk.sys.getprofile() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", walk.WALKS)
def test_every_journey_can_be_taken(name):
    assert len(walk.trace(name).rooms()) > 3

"""Progress of every verb: plain lines where there is no terminal, one display where there is."""

import contextlib
import io
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from rkl.runs import progress
from rkl.runs.progress import Progress, say, working


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


@contextlib.contextmanager
def a_terminal():
    """What is shown on a terminal meanwhile; nothing goes on after the last progress."""
    xterm = mock.patch.dict(os.environ, TERM="xterm")
    with xterm, contextlib.redirect_stderr(Terminal()) as shown:
        yield shown
    assert progress._displays == []


@pytest.fixture
def clocked(monkeypatch):
    """The time that has passed, to be set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def plain(text):
    """What a terminal shows, without its commands."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)


def test_elsewhere_a_line_comes_after_a_pause_with_the_time_still_to_go(clocked, capsys):
    with Progress("row", 100) as shown:
        clocked[0] = 5.0
        shown.update(10)
        clocked[0] = 20.0
        shown.update(20, words="loss 0.5")
        clocked[0] = 21.0
        shown.update(30)
    assert capsys.readouterr().err == "row 20/100  loss 0.5  0:01:20 to go\n"


def test_the_lines_of_hours_come_at_longer_pauses(clocked, capsys):
    with Progress("row", 1e6) as shown:
        for second in range(10_000):
            clocked[0] = float(second)
            shown.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert 50 < len(lines) < 150  # where a line every ten seconds would be a thousand


def test_what_is_due_is_said_at_once(capsys):
    with Progress("step", 4) as shown:
        shown.update(4, words="loss 2", due=True)
    assert capsys.readouterr().err == "step 4/4  loss 2\n"


def test_the_time_to_go_counts_from_where_a_resumed_run_begins(clocked, capsys):
    with Progress("step", 100) as shown:
        clocked[0] = 50.0
        shown.begin(90)
        clocked[0] = 55.0
        shown.update(95, due=True)
    assert capsys.readouterr().err == "step 95/100  0:00:05 to go\n"


def test_a_share_is_shown_as_a_percentage(capsys):
    with Progress("tokenizing", 8, share=True) as shown:
        shown.update(8, due=True)
    assert capsys.readouterr().err == "tokenizing 100%\n"


@pytest.mark.parametrize("how", [{"shown": False}, {"RANK": "1"}])
def test_nothing_is_shown_of_small_work_or_by_a_second_process(how, monkeypatch, capsys):
    if rank := how.pop("RANK", None):
        peers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        for name, value in (peers | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
            monkeypatch.setenv(name, value)
    with Progress("row", 2, **how) as shown:
        shown.update(2, due=True)
    assert shown.done == 2
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_wiped_or_its_last_state_is_kept():
    with a_terminal() as terminal, Progress("row", 3) as shown:
        shown.update(3)
        progress._displays[0].refresh()
    assert "row 3/3" in plain(terminal.getvalue())
    with a_terminal() as terminal, Progress("step", 3, kept=True) as shown:
        shown.update(3, words="loss 1")
    assert plain(terminal.getvalue()).endswith("step 3/3  loss 1\n")


def test_what_is_shown_at_one_time_shares_one_display():
    with a_terminal(), Progress("step", 5) as outer:
        with Progress("critic", 1, share=True) as inner:
            inner.update(0.5)
            outer.update(2)
            assert [len(it.tasks) for it in progress._displays] == [2]
        assert [len(it.tasks) for it in progress._displays] == [1]


def test_a_name_of_others_does_not_command_the_terminal():
    with a_terminal() as terminal, Progress("sha256 of \x1b]0;title\x07[bold]x", 1) as shown:
        shown.update(1)
        progress._displays[0].refresh()
    assert "\x1b]0;" not in terminal.getvalue()
    assert r"\x1b]0;title\x07[bold]x" in terminal.getvalue()


def test_a_failure_ends_the_display():
    with a_terminal(), pytest.raises(ValueError, match="stop"), Progress("row", 3):
        raise ValueError("stop")


def test_what_lasts_shows_that_it_works_and_for_how_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "MINUTE", 0.15)
    with working("the act under KL()"):
        time.sleep(0.5)
    assert re.match(r"rkl: the act under KL\(\), \d+ s so far\n", capsys.readouterr().err)
    monkeypatch.setattr(progress, "MINUTE", 60.0)
    with working("what is soon done"):
        pass
    assert capsys.readouterr().err == ""


def test_within_work_that_lasts_only_the_label_changes(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with a_terminal() as terminal, working("the outer"):
        with working("the inner"):
            time.sleep(0.5)
        assert progress._working.shown.label == "rkl: the outer"
    assert "rkl: the inner, 0 s so far" in plain(terminal.getvalue())


def test_work_of_two_threads_that_overlap_ends_without_an_error():
    first, second = threading.Event(), threading.Event()

    def begin_within():
        with working("the second"):
            second.set()
            first.wait(60)

    with ThreadPoolExecutor() as pool:
        with working("the first"):
            other = pool.submit(begin_within)
            assert second.wait(60)
            assert progress._working.shown.label == "rkl: the first"
        first.set()
        other.result(60)


def test_a_line_holds_no_command(capsys):
    say("\x1b[31mred")
    assert capsys.readouterr().err == "\\x1b[31mred\n"

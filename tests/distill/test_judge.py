"""Replies of two runs compared by a judge, which is a stub on loopback."""

import contextlib
import json
import math
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from serving import listening

from rkl import cli
from rkl.distill import JudgeSettings, ServerError, judge_cost, judge_runs
from rkl.distill.judge import Pair, Verdict, question, summary, verdict_in, wilson


@dataclass
class Judge:
    """A server whose verdict is a function of the two replies that it is shown."""

    prefers: Any
    status: Any = lambda number: 200
    asked: list = field(default_factory=list)
    refusal: Any = lambda body: None

    @contextlib.contextmanager
    def listening(self):
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(200, {"data": [{"id": "tiny", "owned_by": "somebody"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                judge.asked.append(body)
                status = judge.status(len(judge.asked))
                if (message := judge.refusal(body)) is not None:
                    self.send(400, {"error": {"message": message}})
                    return
                shown = body["messages"][-1]["content"]
                first, second = (
                    shown.partition(f"[Start of reply {name}]\n")[2].partition("\n[End")[0]
                    for name in "AB"
                )
                verdict = judge.prefers(first, second)
                content = None if verdict is None else f"because. {verdict}"
                self.send(status, {"choices": [{"message": {"content": content}}]})

            def send(self, status, answer):
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format, *args):
                pass

        with listening(Handler) as address:
            yield address


def longer(first: str, second: str) -> str:
    return (
        "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"
    )


@pytest.fixture
def replies(tmp_path):
    """Two files: of 8 prompts the first has the longer reply to 5, one is alike, 2 are shorter."""
    lengths = {"first": [5] * 5 + [3, 1, 1], "second": [2] * 5 + [3, 2, 2]}
    for name, numbers in lengths.items():
        rows = [
            {"prompt": f"p{place}", "seed": 0, "text": "x" * number}
            for place, number in enumerate(numbers)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path / "first.jsonl", tmp_path / "second.jsonl"


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)


def test_a_judge_is_asked_in_both_orders_and_its_verdicts_are_counted(
    replies: tuple[Path, Path], tmp_path
):
    stub = Judge(longer)
    with stub.listening() as url:
        judged = judge_runs(*replies, JudgeSettings(url), tmp_path / "out.jsonl")
    assert (judged.wins, judged.ties, judged.losses) == (5, 1, 2)
    assert judged.score[0] == pytest.approx((5 + 0.5) / 8)
    values = [1.0] * 5 + [0.5, 0.0, 0.0]
    spread = math.sqrt(sum((it - 5.5 / 8) ** 2 for it in values) / 7)
    assert judged.score[1] == pytest.approx(spread / math.sqrt(8))
    assert judged.position[0] == 0
    assert judged.consistent == 1
    assert judged.identical == 1
    assert len(stub.asked) == 14  # two orders of the seven pairs that differ
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 15


def test_a_judge_that_calls_the_limit_by_another_name_is_asked_so(
    replies: tuple[Path, Path], tmp_path
):
    """As the reasoning models of OpenAI, which refuse max_tokens."""
    refused = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    stub = Judge(longer, refusal=lambda body: refused if "max_tokens" in body else None)
    with stub.listening() as url:
        judged = judge_runs(*replies, JudgeSettings(url, max_tokens=9), tmp_path / "out.jsonl")
    assert (judged.wins, judged.ties, judged.losses) == (5, 1, 2)
    assert {body.get("max_completion_tokens") for body in stub.asked} == {None, 9}


def test_an_answer_that_was_cut_off_while_reasoning_counts_nowhere(
    replies: tuple[Path, Path], tmp_path
):
    """Servers give null as its content, and the reasoning beside it."""
    judge = Judge(lambda first, second: "[[A]]" if len(first) > len(second) else None)
    with judge.listening() as url, pytest.warns(UserWarning, match="7 of 14 answers hold no ver"):
        judged = judge_runs(*replies, JudgeSettings(url), tmp_path / "out.jsonl")
    assert judged.unreadable == 7
    assert (judged.wins, judged.ties, judged.losses) == (0, 1, 0)


def test_replies_in_files_of_one_name_are_told_apart(replies: tuple[Path, Path], tmp_path):
    first, other = replies[0], tmp_path / "other" / replies[0].name
    other.parent.mkdir()
    replies[1].rename(other)
    with Judge(longer).listening() as url:
        judged = judge_runs(first, other, JudgeSettings(url), tmp_path / "out.jsonl")
    assert judged.names == (str(first), str(other))
    assert judged.wins == 5


def test_a_judge_that_prefers_a_place_separates_nothing(replies: tuple[Path, Path], tmp_path):
    with Judge(lambda first, second: "[[A]]").listening() as url:
        judged = judge_runs(*replies, JudgeSettings(url), tmp_path / "out.jsonl")
    assert judged.score[0] == 0.5
    assert judged.position == (1.0, 0.0)
    assert judged.consistent == 0
    assert judged.interval[0] < 0.5 < judged.interval[1]
    assert "contains 1/2" in str(judged)


def test_a_pair_with_a_verdict_in_one_order_alone_counts_nowhere():
    """A judge that always prefers the first place, and is cut off in one order, says nothing."""
    pairs = [Pair(f"p{place}", 0, "a", "b") for place in range(8)]
    unswapped = [Verdict(place, False, 1.0) for place in range(8)]
    judged = summary(pairs, [*unswapped, *(Verdict(place, True, None) for place in range(8))])
    assert math.isnan(judged.score[0])
    assert judged.interval == (0.0, 1.0)
    assert (judged.wins, judged.prompts, judged.unreadable) == (0, 0, 8)
    assert math.isnan(judged.position[0])


def test_points_are_those_of_the_first_run_in_both_orders():
    pairs = [Pair("p", 0, "a", "b")]
    verdicts = [Verdict(0, False, 1.0), Verdict(0, True, 1.0)]
    judged = summary(pairs, verdicts)
    assert judged.score[0] == 1
    assert judged.position[0] == 0
    assert math.isnan(judged.score[1])


def test_seeds_of_one_prompt_count_as_one():
    """Eight replies to one prompt say no more of other prompts than one does."""
    pairs = [Pair("p", seed, "a", "b") for seed in range(8)] + [Pair("q", 0, "a", "b")]
    verdicts = [Verdict(place, swapped, 1.0) for place in range(8) for swapped in (False, True)]
    verdicts += [Verdict(8, False, 0.0), Verdict(8, True, 0.0)]
    judged = summary(pairs, verdicts)
    assert judged.score[0] == 0.5
    assert judged.prompts == 2
    assert judged.interval == wilson(0.5, 2)


def test_replies_to_a_prompt_that_occurs_several_times_are_paired_in_their_order(tmp_path):
    """Of p with seed 0 the first run has three replies, the second two; q is replied to once."""
    texts = {
        "first": [("p", 0, "xxx"), ("q", 0, "x"), ("p", 0, "x"), ("p", 1, "xx"), ("p", 0, "xxxx")],
        "second": [("p", 1, "x"), ("p", 0, "xx"), ("p", 0, "x"), ("q", 0, "xxxxx")],
    }
    for name, rows in texts.items():
        keys = "prompt", "seed", "text"
        lines = (json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    files = tmp_path / "first", tmp_path / "second"
    left_out = pytest.warns(UserWarning, match="1 of .*first and 0 of .*second are left out")
    with Judge(longer).listening() as url, left_out:
        judged = judge_runs(*files, JudgeSettings(url), tmp_path / "out.jsonl")
    # Letters of p: 3 against 2, 1 against 1 (the same text), 2 against 1; of q: 1 against 5.
    assert (judged.wins, judged.ties, judged.losses) == (2, 1, 1)
    assert judged.identical == 1
    assert judged.prompts == 2
    assert judged.score[0] == pytest.approx(((1 + 0.5 + 1) / 3 + 0) / 2)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_interval_holds_the_truth_as_often_as_it_says(share):
    """Of coins exactly, by summing the binomial: between 92 and 98 % at these numbers."""
    number = 60
    held = 0.0
    for wins in range(number + 1):
        low, high = wilson(wins / number, number)
        if low <= share <= high:
            held += math.comb(number, wins) * share**wins * (1 - share) ** (number - wins)
    assert 0.92 <= held <= 0.98


def test_an_interrupted_comparison_goes_on_and_asks_nothing_twice(
    replies: tuple[Path, Path], tmp_path, no_waiting
):
    out = tmp_path / "out.jsonl"
    with Judge(longer, status=lambda number: 200 if number <= 6 else 400).listening() as url:
        settings = JudgeSettings(url, concurrency=1)
        with pytest.raises(ServerError, match="400"):
            judge_runs(*replies, settings, out)
        assert len(out.read_text("utf-8").splitlines()) == 7
    with out.open("a", encoding="utf-8") as file:
        file.write('{"pair": 3, "sw')  # a line torn by a crash
    rest = Judge(longer)
    with rest.listening() as url:
        header, *lines = out.read_text("utf-8").splitlines()
        moved = json.dumps(json.loads(header) | {"judge": url})
        out.write_text("\n".join([moved, *lines]), encoding="utf-8")
        with pytest.raises(FileExistsError, match="exists"):
            judge_runs(*replies, JudgeSettings(url), out)
        judged = judge_runs(*replies, JudgeSettings(url), out, resume=True)
    assert len(rest.asked) == 8
    assert (judged.wins, judged.ties, judged.losses) == (5, 1, 2)


def test_a_file_of_another_comparison_is_refused(replies: tuple[Path, Path], tmp_path):
    out = tmp_path / "out.jsonl"
    with Judge(longer).listening() as url:
        judge_runs(*replies, JudgeSettings(url), out)
        with pytest.raises(ValueError, match="comparison of other replies"):
            judge_runs(replies[1], replies[0], JudgeSettings(url), out, resume=True)
        with pytest.raises(ValueError, match="no comparison"):
            judge_runs(*replies, JudgeSettings(url), replies[0], resume=True)


def test_answers_without_a_verdict_count_nowhere_and_are_said(
    replies: tuple[Path, Path], tmp_path
):
    def silent_on_ties(first, second):
        return longer(first, second) if len(first) + len(second) > 3 else "no idea"

    said = pytest.warns(UserWarning, match="4 of 14 answers hold no verdict")
    with Judge(silent_on_ties).listening() as url, said:
        judged = judge_runs(*replies, JudgeSettings(url), tmp_path / "out.jsonl")
    assert (judged.wins, judged.ties, judged.losses) == (5, 1, 0)
    assert judged.prompts == 6
    assert judged.unreadable == 4


def test_a_busy_judge_is_asked_again(replies: tuple[Path, Path], tmp_path, no_waiting):
    with Judge(longer, status=lambda number: 503 if number % 2 else 200).listening() as url:
        settings = JudgeSettings(url, concurrency=1)
        judged = judge_runs(*replies, settings, tmp_path / "out.jsonl")
    assert (judged.wins, judged.ties, judged.losses) == (5, 1, 2)


def test_the_cost_is_counted_without_asking(replies: tuple[Path, Path]):
    cost = judge_cost(*replies, JudgeSettings("http://127.0.0.1:9/v1", max_tokens=10))
    assert cost.requests == 14
    assert cost.tokens_written == 140
    assert cost.tokens_read >= 14 * len(question("p0", "x", "x")) // 4


def test_replies_that_have_no_prompt_in_common_are_refused(replies: tuple[Path, Path], tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "another", "text": "x"}\n', encoding="utf-8")
    settings = JudgeSettings("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="share no prompt"):
        judge_cost(replies[0], other, settings)
    other.write_text('{"prompt": "p0", "text": "x"}\n', encoding="utf-8")
    with pytest.warns(UserWarning, match="7 of .*first.jsonl and 0 of"):
        judge_cost(replies[0], other, settings)
    other.write_text('{"question": "p0"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1, must hold prompt and text"):
        judge_cost(replies[0], other, settings)
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="rkl generate"):
        judge_cost(tmp_path / "run", other, settings)


def test_instructions_that_ask_for_no_verdict_are_refused(replies: tuple[Path, Path], tmp_path):
    file = tmp_path / "instruction.txt"
    file.write_text("Say [[A]] or [[B]].", encoding="utf-8")
    settings = JudgeSettings("http://127.0.0.1:9/v1", instruction=file)
    with pytest.raises(ValueError, match=r"does not mention \[\[C\]\]"):
        judge_cost(*replies, settings)


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 0), ("concurrency", 0), ("timeout", 0), ("temperature", -1)]
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        JudgeSettings("http://127.0.0.1:9/v1", **{name: value})


def test_the_last_verdict_of_an_answer_counts():
    assert verdict_in("I would say [[A]] at first, but [[C]]") == "C"
    assert verdict_in("A is better") is None


def test_the_command_line_counts_judges_and_prints_json(
    replies: tuple[Path, Path], tmp_path, capsys
):
    out = tmp_path / "verdicts.jsonl"
    with Judge(longer).listening() as url:
        words = ["judge", *map(str, replies), "--judge", url, "--out", str(out)]
        assert cli.main([*words, "--dry-run"]) == 0
        assert "14 requests" in capsys.readouterr().out
        assert not out.exists()
        assert cli.main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["wins"] == 5
        assert cli.main(words) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert cli.main([*words, "--resume"]) == 0
        assert "pairs won by first.jsonl" in capsys.readouterr().out

"""A run that loses a server says how to go on, and then ends as one that never lost it."""

import dataclasses
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import material
import pytest
from serving import Stub
from test_writing_server import GREEDY, PROMPTS
from test_writing_server import Stub as Writing

from rkl.distill import ModelWriter, load_model, load_tokenizer
from rkl.distill.client import ATTEMPTS, Server, ServerError
from rkl.distill.run import distill
from rkl.distill.writing.server import ServerWriter
from rkl.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore:teacher gives the")
HOW = {"max_steps": 4, "gradient_accumulation": 2, "eval_every": 2, "save_every": 4}
LOGGED = "step", "loss", "eval_loss", "grad_norm", "tokens"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("rkl.distill.client.sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and text; the student has dropout, which draws random numbers."""
    path = tmp_path_factory.mktemp("lost")
    material.write(path)
    (path / "text.txt").write_text(material.TEXT[:3000], encoding="utf-8")
    return path


def left(out):
    """All that must not depend on whether a server was lost."""
    run = Run.open(out)
    rows = [{name: row.get(name) for name in LOGGED} for row in run.metrics]
    result = {name: run.record["result"][name] for name in ("steps", "best_step", "tokens")}
    return rows, result, (out / "model.safetensors").read_bytes()


class Away:
    """Refuses requests as a server that is away does, from one number on, until it is back."""

    def __init__(self):
        self.asked, self.since = 0, 10**9

    def __call__(self, *ignored):
        self.asked += 1
        return (503, "going down") if self.asked >= self.since else None


def lose_and_go_on(settings, out, away, since):
    """The run, which loses its server at a request, and goes on when the server is back."""
    away.asked, away.since = 0, since
    with pytest.raises(ServerError, match=r"rkl distill --out .* --resume|No step was done"):
        distill(settings, out)
    away.since = 10**9
    distill(settings, out, resume=(out / "run.json").exists())


def teacher_on(url, folder):
    settings = material.settings(folder, divergence="kl", **HOW)
    return dataclasses.replace(settings, teacher=url, loss_top_k=40)


def check_teacher(folder, tmp_path, chosen):
    """Lose the teacher's server at some of the requests of a run, each in a run of its own."""
    teacher, away = str(folder / "teacher"), Away()
    served = Stub(load_model(teacher).eval(), load_tokenizer(teacher), "vllm", refuse=away)
    with served.listening() as url:
        settings = teacher_on(url, folder)
        distill(settings, tmp_path / "whole")
        expected, total = left(tmp_path / "whole"), away.asked
        assert len([row for row in expected[0] if row["eval_loss"] is not None]) == 3
        for since in chosen(total):
            out = tmp_path / f"lost at {since}"
            lose_and_go_on(settings, out, away, since)
            assert left(out) == expected, f"lost at request {since} of {total}"


def test_a_run_that_loses_its_teacher_ends_in_the_same_bits(folder, tmp_path):
    """In the second batch of a step, and in the last evaluation."""
    check_teacher(folder, tmp_path, lambda total: (7, total))


@pytest.mark.slow
def test_a_run_that_loses_its_teacher_at_any_request_ends_in_the_same_bits(folder, tmp_path):
    check_teacher(folder, tmp_path, lambda total: range(2, total + 1))


class Fleeting(Writing):
    """A server that writes, and is away at times."""

    def __init__(self, folder):
        super().__init__("vllm", folder=folder)
        self.away = Away()

    def answer(self, path, headers, body):
        return (
            self.away() and (503, {"error": "going down"}) or super().answer(path, headers, body)
        )


def check_writer(folder, tmp_path, chosen, **how):
    """Lose the server that writes at some of the requests of a run."""
    stub = Fleeting(tmp_path / "weights")
    with stub.listening() as url:
        how = {"lmbda": 0.7, "max_completion_length": 6, "prompt_tokens": 4} | how
        how |= {"student_server": url, "student_server_weights": str(stub.folder)}
        settings = material.settings(folder, **HOW | how)
        distill(settings, tmp_path / "whole")
        expected, total = left(tmp_path / "whole"), stub.away.asked
        for since in chosen(total):
            out = tmp_path / f"lost at {since}"
            lose_and_go_on(settings, out, stub.away, since)
            assert left(out) == expected, f"lost at request {since} of {total}"


def test_a_run_that_loses_its_writer_ends_in_the_same_bits(folder, tmp_path):
    """Where the first batch of a step is written and the second is not."""
    check_writer(folder, tmp_path, lambda total: (total,))


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [2, 4])
def test_a_run_that_loses_its_writer_at_any_request_ends_in_the_same_bits(ahead, folder, tmp_path):
    check_writer(folder, tmp_path, lambda total: range(2, total + 1), steps_per_generation=ahead)


@pytest.mark.parametrize("chunked", [False, True])
def test_an_answer_that_ends_early_is_asked_for_again(chunked):
    """As of a server that is killed while it answers."""

    class Torn(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answers = 0

        def do_GET(self):
            Torn.answers += 1
            text, self.close_connection = b'{"data": []}', True
            self.send_response(200)
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
                text = b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
            else:
                self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:8] if Torn.answers == 1 else text)

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Torn) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        asked = Server(f"http://127.0.0.1:{server.server_address[1]}/v1", 5.0, 2)
        assert asked.ask("models") == {"data": []}
        server.shutdown()
    assert Torn.answers == 2


def test_a_long_wait_is_announced_and_a_wrong_address_is_not_waited_for(capsys):
    asked = Server("http://127.0.0.1:9/v1", 1.0, ATTEMPTS)
    with pytest.raises(ServerError, match=rf"{ATTEMPTS} times in a row"):
        asked.ask("completions", {})
    said = capsys.readouterr()
    assert f"it is asked up to {ATTEMPTS - 3} times more" in said.out + said.err
    with pytest.raises(ServerError, match="5 times in a row"):
        asked.served(None)


class Restarted(Writing):
    """A server that is restarted before it first writes, as the model that it began with."""

    def __init__(self, first, folder):
        super().__init__("vllm", first, folder)
        self.first, self.refusals = first, 2

    def answer(self, path, headers, body):
        if self.refusals and (path == "/v1/completions" or self.refusals == 1):
            self.refusals -= 1
            self.model = self.first
            return 503, {"error": "starting"}
        return super().answer(path, headers, body)


def test_a_server_that_was_restarted_gets_the_weights_again(tmp_path):
    first, student = (material.model(1, 8, seed=seed).eval() for seed in (1, 2))
    with Restarted(first, tmp_path / "weights").listening() as url:
        writer = ServerWriter(url, material.tokenizer(), GREEDY, [1], weights=tmp_path / "weights")
        writer.follow(student)
        replies = writer.write(PROMPTS, seed=0)
    assert replies == ModelWriter(student, GREEDY, [1]).write(PROMPTS, seed=0)
    assert replies != ModelWriter(first, GREEDY, [1]).write(PROMPTS, seed=0)

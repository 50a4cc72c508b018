"""A server writes as the student that it was given, and every fault is one clear error."""

import contextlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from serving import listening
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rkl.distill import ModelWriter, Sampling
from rkl.distill.client import ServerError
from rkl.distill.writing.server import KEY, ServerWriter

GREEDY = Sampling(6, temperature=0, top_k=3, min_p=0.1)
PROMPTS = [[5, 6, 7], [8]]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr("rkl.distill.client.sleep", waited.append)
    monkeypatch.delenv(KEY, raising=False)
    return waited


@pytest.fixture
def tokenizer():
    """Words of which none begins another, as special tokens are found inside words."""
    model = WordLevel({f"t{number}t": number for number in range(40)}, unk_token="t0t")
    made = Tokenizer(model)
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t1t", pad_token="t2t")


class Stub:
    """A server that writes with a model, which it reads anew where it is asked to."""

    as_text = plain = False  # whether it takes text alone, and OpenAI's settings alone
    added = 0  # tokens that it puts before a text

    def __init__(self, kind, model=None, folder=None, status=200):
        self.kind, self.status = kind, status
        self.model: Any = model
        self.folder: Any = folder
        self.asked = []

    def answer(self, path, headers, body):
        self.asked.append((path, headers, body))
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "owned_by": self.kind}]}
        if self.status != 200:
            return self.status, {"error": {"message": "no"}}
        if path == "/update_weights_from_disk":
            self.model = AutoModelForCausalLM.from_pretrained(body["model_path"])
            return 200, {"success": True}
        if path == "/collective_rpc":
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {}
        if path == "/completion":
            assert body["samplers"] == ["temperature", "top_k", "top_p", "min_p"]
            replies = ModelWriter(self.model, GREEDY, [1]).write(body["prompt"], seed=0)
            answers = [
                {
                    "index": number,
                    "tokens": reply.tokens[:-1] if reply.ended else reply.tokens,
                    "content": "",
                    "stop_type": "eos" if reply.ended else "limit",
                }
                for number, reply in enumerate(replies)
            ]
            return 200, answers[::-1] if len(answers) > 1 else answers[0]
        if self.as_text and not isinstance(body["prompt"], str):
            return 500, {"error": {"message": "2 validation errors: prompt must be a string"}}
        if self.plain and "top_k" in body:
            return 422, {"detail": "top_k is not known"}
        prompts = body["prompt"]
        if self.as_text:
            prompts = [[int(word.strip("t")) for word in prompts.split()]]
        replies = ModelWriter(self.model, GREEDY, [1]).write(prompts, seed=0)
        choices = []
        for number, reply in enumerate(replies):
            words = " ".join(f"t{it}t" for it in reply.tokens)
            choice = {"index": number, "text": words, "finish_reason": "stop"}
            if body.get("return_token_ids"):
                choice["token_ids"] = reply.tokens
            choices.append(choice if reply.ended else choice | {"finish_reason": "length"})
        usage = {"prompt_tokens": sum(map(len, prompts)) + self.added}
        return 200, {"choices": choices[::-1], "usage": usage}

    @contextlib.contextmanager
    def listening(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers, body = dict(self.headers), json.loads(data or b"null")
                status, answer = stub.answer(self.path, headers, body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *words):
                pass

        with listening(Handler) as address:
            yield address


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_writes_as_the_student_is(kind, tmp_path, tiny_model, tokenizer):
    folder, other, student = tmp_path / "weights", tiny_model(seed=1), tiny_model(seed=2)
    stub = Stub(kind, other, folder)
    with stub.listening() as url:
        writer = ServerWriter(url, tokenizer, GREEDY, [1], weights=folder)
        writer.follow(student)
        replies = writer.write(PROMPTS, seed=2**40)
    assert replies == ModelWriter(student, GREEDY, [1]).write(PROMPTS, seed=0)
    assert replies != ModelWriter(other, GREEDY, [1]).write(PROMPTS, seed=0)
    body = stub.asked[-1][2]
    assert body["prompt"] == PROMPTS
    assert (body["max_tokens"], body["temperature"], body["top_k"]) == (6, 0, 3)
    assert body["stop_token_ids"] == [1]
    assert 0 <= body["seed"] < 2**31


def test_a_training_takes_its_text_from_the_server(
    tmp_path, tiny_model, tiny_rows, tiny_trainer, tokenizer
):
    stub = Stub("sglang")
    with stub.listening() as url:
        how = {"lmbda": 1.0, "max_completion_length": 6, "student_server": url, "max_steps": 2}
        trainer = tiny_trainer(
            tiny_model(seed=2),
            tiny_model(seed=1),
            tiny_rows(4),
            settings={"processing_class": tokenizer},
            **how,
        )
        trainer.train()
    paths = [path for path, _, _ in stub.asked]
    assert paths == ["/v1/models", *["/update_weights_from_disk", "/v1/completions"] * 2]


def test_a_server_without_a_request_for_weights_is_told_of(tiny_model, tokenizer):
    stub = Stub("somebody", tiny_model(seed=1))
    with stub.listening() as url:
        with pytest.warns(UserWarning, match="has no request that gives it weights"):
            writer = ServerWriter(url, tokenizer, GREEDY, [1])
        replies = writer.write(PROMPTS, seed=0)
    assert replies == ModelWriter(stub.model, GREEDY, [1]).write(PROMPTS, seed=0)


@pytest.mark.filterwarnings("ignore:student_server")
@pytest.mark.parametrize("kind", ["llamacpp", "somebody"])
def test_a_server_of_one_model_writes_as_that_model(kind, tiny_model, tokenizer):
    stub = Stub(kind, tiny_model(seed=1))
    stub.as_text = kind == "somebody"
    with stub.listening() as url:
        replies = ServerWriter(url, tokenizer, GREEDY, [1]).write(PROMPTS, seed=0)
    assert replies == ModelWriter(stub.model, GREEDY, [1]).write(PROMPTS, seed=0)


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp", "somebody"])
@pytest.mark.filterwarnings("ignore:student_server")
def test_what_shapes_the_distribution_is_sent_and_equal_prompts_get_other_seeds(
    kind, tmp_path, tiny_model, tokenizer
):
    """Servers draw from the 40 likeliest tokens, or punish repetition, unless told otherwise."""
    stub = Stub(kind, tiny_model(seed=1), tmp_path)
    with stub.listening() as url:
        writer = ServerWriter(url, tokenizer, Sampling(6), [1], weights=tmp_path)
        replies = writer.write([*PROMPTS, PROMPTS[0], PROMPTS[0]], seed=7)
    assert replies[0] == replies[2] == replies[3]  # the stub takes the likeliest token
    bodies = [body for _, _, body in stub.asked[1:]]
    assert [body["prompt"] for body in bodies] == [PROMPTS, [PROMPTS[0]], [PROMPTS[0]]]
    assert [body["seed"] for body in bodies] == [7, 8, 9]
    none = -1 if kind in ("vllm", "sglang") else 0
    assert [(body["top_k"], body["min_p"], body["top_p"]) for body in bodies] == [(none, 0, 1)] * 3
    penalty = {"vllm": "repetition_penalty", "sglang": "repetition_penalty"}.get(kind)
    if kind == "llamacpp":
        assert "penalties" not in bodies[0]["samplers"]
    else:
        assert bodies[0][penalty or "repeat_penalty"] == 1


@pytest.mark.filterwarnings("ignore:student_server:UserWarning")
def test_a_server_of_openais_settings_alone_gets_those(tiny_model, tokenizer):
    stub = Stub("somebody", tiny_model(seed=1))
    stub.as_text = stub.plain = True
    with stub.listening() as url:
        writer = ServerWriter(url, tokenizer, Sampling(6, temperature=0), [1])
        with pytest.warns(UserWarning, match="takes no top_k, min_p and repetition penalty"):
            replies = writer.write(PROMPTS, seed=0)
        assert replies == ModelWriter(stub.model, GREEDY, [1]).write(PROMPTS, seed=0)
        with pytest.raises(ServerError, match="top_k is not known"):
            ServerWriter(url, tokenizer, GREEDY, [1]).write(PROMPTS, seed=0)


@pytest.mark.filterwarnings("ignore:student_server")
def test_a_server_that_counts_other_tokens_in_a_prompt_is_refused(tiny_model, tokenizer):
    stub = Stub("somebody", tiny_model(seed=1))
    stub.as_text, stub.added = True, 1
    with (
        stub.listening() as url,
        pytest.raises(ServerError, match="counts 4 tokens in a prompt of 3"),
    ):
        ServerWriter(url, tokenizer, GREEDY, [1]).write(PROMPTS, seed=0)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, f"wants a key .401.. It is read from the environment variable {KEY}"),
        (404, "has nothing at"),
        (500, "answered 500 .* 3 times in a row"),
    ],
)
def test_every_fault_is_one_error_without_the_key(
    status, message, tmp_path, tokenizer, monkeypatch, pauses
):
    monkeypatch.setenv(KEY, "sk-secret")
    stub = Stub("vllm", status=status)
    with stub.listening() as url:
        writer = ServerWriter(url, tokenizer, GREEDY, [1], weights=tmp_path, attempts=3)
        with pytest.raises(ServerError, match=message) as told:
            writer.write(PROMPTS, seed=0)
    assert "sk-secret" not in str(told.value)
    assert stub.asked[-1][1]["Authorization"] == "Bearer sk-secret"
    assert len(pauses) == (2 if status == 500 else 0)


def test_a_server_that_needs_weights_wants_a_folder(tokenizer):
    with (
        Stub("vllm").listening() as url,
        pytest.raises(ValueError, match="weights must be a folder"),
    ):
        ServerWriter(url, tokenizer, GREEDY, [1])

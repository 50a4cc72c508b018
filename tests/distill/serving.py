"""A stub of the servers that give log-probabilities, on loopback, answering from a small model."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@contextlib.contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on loopback that answers by a handler, while it lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Stub:
    """What the server answers from, and what it was asked.

    Attributes:
        model: Gives the logits.
        tokenizer: Splits text, and spells tokens.
        kind: "vllm", "sglang" or "completions".
        largest: Most log-probabilities that it gives at a place.
        key: What a request must carry, if anything.
        takes_numbers: Whether a prompt may be token numbers.
        begins_with: A token that it puts before every text.
        early: Whether a place of completions is that of the next token.
        change: Changes an answer before it is sent.
        refuse: Called with the number of the request: a status and a message, or nothing.
        asked: The requests, as path, headers and body.
    """

    model: Any
    tokenizer: Any
    kind: str
    largest: int = 10**9
    key: str | None = None
    takes_numbers: bool = True
    begins_with: int | None = None
    early: bool = False
    change: Callable[[Any], Any] = lambda answer: answer
    refuse: Callable[[int], tuple[int, str] | None] = lambda number: None
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """The address, while it lasts."""
        with listening(_handler(self)) as address:
            yield address

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and body, as the server of that kind gives them."""
        if path == "/v1/models":
            owner = "somebody" if self.kind == "completions" else self.kind
            return 200, {"data": [{"id": "tiny", "object": "model", "owned_by": owner}]}
        native = {"sglang": "/generate", "llamacpp": "/completion"}
        if path != native.get(self.kind, "/v1/completions"):
            return 404, {"detail": "Not Found"}
        return getattr(self, f"_{self.kind}")(body)

    def _vllm(self, body: Any) -> tuple[int, Any]:
        if (k := body["prompt_logprobs"]) > self.largest:
            told = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            return 400, {"error": {"message": f"{told}{self.largest}", "type": "BadRequestError"}}
        choices = [
            {"index": number, "text": "", "prompt_logprobs": self._by_number(tokens, k)}
            for number, tokens in enumerate(body["prompt"])
        ]
        return 200, {"object": "text_completion", "choices": choices[::-1]}

    def _by_number(self, tokens: list[int], k: int) -> list[Any]:
        places: list[Any] = [None]
        for logp, chosen in zip(self._logp(tokens), tokens[1:], strict=True):
            top = {int(it) for it in logp.topk(min(k, len(logp))).indices} | {chosen}
            places.append(
                {
                    str(token): {
                        "logprob": max(float(logp[token]), -9999.0),
                        "rank": int((logp > logp[token]).sum()) + 1,
                        "decoded_token": self.tokenizer.decode([token]),
                    }
                    for token in top
                }
            )
        return places

    def _sglang(self, body: Any) -> tuple[int, Any]:
        assert body["return_logprob"]
        assert body["logprob_start_len"] == 0
        k = min(body["top_logprobs_num"], self.largest)
        answers = []
        for tokens in body["input_ids"]:
            places: list[Any] = [None]
            for logp in self._logp(tokens):
                top = logp.topk(min(k, len(logp)))
                places.append(
                    [
                        [float(value), int(token), self.tokenizer.decode([int(token)])]
                        for value, token in zip(*top, strict=True)
                    ]
                )
            answers.append({"text": "", "meta_info": {"input_top_logprobs": places}})
        return 200, answers

    def _llamacpp(self, body: Any) -> tuple[int, Any]:
        assert not body["post_sampling_probs"]
        k, answers = min(body["n_probs"], self.largest), []
        for number, tokens in enumerate(body["prompt"]):
            logp = self._after(tokens)
            top = [
                {"id": int(token), "token": self.tokenizer.decode([token]), "logprob": float(it)}
                for it, token in zip(*logp.topk(min(k, len(logp))), strict=True)
            ]
            behind = {"id": 0, "token": "", "logprob": 0.0, "top_logprobs": top}
            answers.append({"index": number, "completion_probabilities": [behind]})
        return 200, answers[::-1] if len(answers) > 1 else answers[0]

    def _completions(self, body: Any) -> tuple[int, Any]:
        k, prompt = min(body["logprobs"], self.largest), body["prompt"]
        if not isinstance(prompt, str) and not self.takes_numbers:
            return 422, {"detail": "prompt must be a string"}
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if self.begins_with is not None:
            tokens = [self.begins_with, *tokens]
        rows = [*self._logp(tokens), self._after(tokens)]  # one token is written
        top: list[Any] = [None]
        for logp in rows:
            best = logp.topk(min(k, len(logp)))
            pairs = zip(*best, strict=True)
            top.append({self.tokenizer.decode([int(token)]): float(it) for it, token in pairs})
        if not body["echo"]:
            top, tokens = [top[-1]], []
        elif self.early:
            top = [None, *top[2:]]
        words = [*(self.tokenizer.decode([token]) for token in tokens), "w9"][: len(top)]
        found = {"tokens": words, "top_logprobs": top}
        return 200, {"choices": [{"text": "", "index": 0, "logprobs": found}]}

    def _after(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)

    def _logp(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        return logits.double().log_softmax(-1)


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._reply(None)

        def do_POST(self):
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body):
            stub.asked.append((self.path, dict(self.headers), body))
            refused = stub.refuse(len(stub.asked))
            if refused is not None:
                status, message = refused
                self._send(status, {"error": {"message": message}})
            elif stub.key and self.headers.get("Authorization") != f"Bearer {stub.key}":
                self._send(401, {"error": {"message": f"wrong key, not {stub.key}"}})
            else:
                status, answer = stub.answer(self.path, body)
                self._send(status, stub.change(answer) if status == 200 and body else answer)

        def _send(self, status, answer):
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            with contextlib.suppress(OSError):  # nobody waits any more
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    return Handler

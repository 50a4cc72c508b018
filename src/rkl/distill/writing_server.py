"""The student's text from a server of completions, which is given the student's weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn
from transformers import PreTrainedTokenizerBase

from rkl.checks import number, warn
from rkl.distill.encoding import encode
from rkl.distill.limits import check_count
from rkl.distill.rollouts import Reply, Writer, check_room
from rkl.distill.sampling import Sampling
from rkl.distill.server import ATTEMPTS, Ask, Server, ServerError
from rkl.runs import replacing_files

KEY = "RKL_STUDENT_API_KEY"  # environment variable; the one place that a key is read from
MAX_SEED = 2**31 - 1  # that servers take
KINDS = "vllm", "sglang", "completions"

Kind: TypeAlias = Literal["vllm", "sglang", "completions"]


class ServerWriter(Writer):
    """Replies of a server, which takes over the student's weights before each writing.

    The weights go through a folder that the server sees: they are saved there, and the server is
    asked to read them, vLLM by ``reload_weights`` (started on this folder, with
    VLLM_SERVER_DEV_MODE=1), SGLang by ``update_weights_from_disk``. A server of another kind has
    no such request: it writes as the model that it was started with, and a warning says so.

    Args:
        url: Address of the API, such as http://host:8000/v1.
        tokenizer: The student's.
        sampling: How tokens are drawn.
        ends: The tokens that end a reply.
        weights: The folder for the student's weights.
        model: The name of the model there; needed where there are several.
        kind: What the server is; None asks it.
        context: Most tokens of a prompt and its reply together.
        timeout: Seconds that an answer may take.
        attempts: Number of times that a request is sent while the server is busy or not reached.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        ends: Sequence[int],
        *,
        weights: str | os.PathLike | None = None,
        model: str | None = None,
        kind: Kind | None = None,
        context: float = float("inf"),
        timeout: float = 300.0,
        attempts: int = ATTEMPTS,
    ):
        check_count("attempts", attempts)
        number("timeout", timeout, above=0, at_most=86_400)
        if kind not in (None, *KINDS):
            raise ValueError(f"kind must be one of {', '.join(KINDS)} or None; got {kind!r}.")
        self.server = Server(url, timeout, attempts, "student_server", KEY)
        self.tokenizer, self.sampling, self.ends = tokenizer, sampling, list(ends)
        self.context, self._followed = context, False
        self.model_name, owner = self.server.served(model)
        self.kind = kind or next((it for it in KINDS if it in owner.lower()), "completions")
        self.weights = None if weights is None else Path(weights).resolve()
        if self.kind != "completions" and self.weights is None:
            raise ValueError(
                f"weights must be a folder that {self.server} sees, to give it the student's "
                "weights; got None."
            )
        if self.kind == "completions":
            warn(
                f"{self.server} has no request that gives it weights: it writes as the model that "
                "it was started with, which is on-policy only at the first step."
            )

    def follow(self, model: nn.Module) -> None:
        """Give the server the weights of the student as it is."""
        if self.kind == "completions" or self.weights is None:
            return
        student: Any = model
        with replacing_files(self.weights) as folder:
            student.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self._load(self.server.ask)
        self._followed = True

    def _load(self, ask: Ask) -> None:
        """Have the server read the weights in the folder."""
        if self.kind == "sglang":
            body = {"model_path": str(self.weights), "flush_cache": True}
            answer = ask("/update_weights_from_disk", body)
            if not (isinstance(answer, Mapping) and answer.get("success")):
                raise ServerError(f"{self.server} did not take the student's weights: {answer!r}.")
        else:
            ask("/collective_rpc", {"method": "reload_weights"})
            ask("/reset_prefix_cache", {})

    def write(self, prompts, *, seed):
        check_room(prompts, self.sampling, self.context, "max_completion_length")
        # A server that was restarted meanwhile writes as the model that it was started with.
        again = self._load if self._followed else None
        answer = self.server.ask("completions", self._body(prompts, seed), prepare=again)
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not isinstance(choices, list) or len(choices) != len(prompts):
            got = len(choices) if isinstance(choices, list) else "none"
            raise ServerError(f"{self.server} gave {got} replies to {len(prompts)} prompts.")
        ordered = sorted(choices, key=lambda it: it.get("index", 0))
        return [self._reply(choice) for choice in ordered]

    def _body(self, prompts: Sequence[Sequence[int]], seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model_name,
            "prompt": [[*prompt] for prompt in prompts],
            "max_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": seed % MAX_SEED,
        }
        if self.sampling.top_k:
            body["top_k"] = self.sampling.top_k
        if self.sampling.min_p is not None:
            body["min_p"] = self.sampling.min_p
        if self.kind != "completions":
            body |= {"stop_token_ids": self.ends, "skip_special_tokens": False}
        if self.kind == "vllm":
            body["return_token_ids"] = True
        return body

    def _reply(self, choice: Mapping[str, Any]) -> Reply:
        """The tokens of a reply, as the server names them, or else of its text."""
        tokens, text = choice.get("token_ids"), choice.get("text")
        if isinstance(tokens, list) and all(type(it) is int for it in tokens):
            ids = [*tokens]
        elif isinstance(text, str):
            (encoded,) = encode(self.tokenizer, [text], special=False)
            ids = [*encoded]
        else:
            raise ServerError(
                f"{self.server} gave a reply without text and tokens: {choice!r:.80}."
            )
        place = next((at for at, it in enumerate(ids) if it in self.ends), None)
        if place is not None:
            return Reply(ids[: place + 1], True)
        if choice.get("finish_reason") == "stop" and self.ends:
            return Reply([*ids, self.ends[0]], True)
        return Reply(ids, False)

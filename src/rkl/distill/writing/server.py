"""The student's text from a server of completions, which is given the student's weights."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn
from transformers import PreTrainedTokenizerBase

from rkl.checks import number, warn
from rkl.distill.client import ATTEMPTS, Ask, RefusedError, Server, ServerError
from rkl.distill.limits import check_count
from rkl.distill.text.encoding import encode
from rkl.distill.writing.rollouts import Reply, Writer, check_room
from rkl.distill.writing.sampling import Sampling
from rkl.runs import replacing_files

KEY = "RKL_STUDENT_API_KEY"  # environment variable; the one place that a key is read from
MAX_SEED = 2**31 - 1  # that servers take
KINDS = "vllm", "sglang", "llamacpp", "completions"
GIVEN_WEIGHTS = "vllm", "sglang"  # the kinds with a request that gives them weights

Kind: TypeAlias = Literal["vllm", "sglang", "llamacpp", "completions"]


class ServerWriter(Writer):
    """Replies of a server, which takes over the student's weights before each writing.

    The weights go through a folder that the server sees: they are saved there, and the server is
    asked to read them, vLLM by ``reload_weights`` (started on this folder, with
    VLLM_SERVER_DEV_MODE=1), SGLang by ``update_weights_from_disk``. A server of another kind has
    no such request: it writes as the model that it was started with, and a warning says so.

    Whatever shapes the distribution is sent, as servers have defaults of their own. Texts that
    have the same prompt get seeds of their own. A server that takes no numbers of tokens gets each
    prompt as text; one that takes no more than OpenAI's settings gets those, with a warning.

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
        self._as_text = self._plain = False  # of completions, what was found out by asking
        if self.kind in GIVEN_WEIGHTS and self.weights is None:
            raise ValueError(
                f"weights must be a folder that {self.server} sees, to give it the student's "
                "weights; got None."
            )
        if self.kind not in GIVEN_WEIGHTS:
            warn(
                f"{self.server} has no request that gives it weights: it writes as the model that "
                "it was started with, which is on-policy only at the first step."
            )

    def follow(self, model: nn.Module) -> None:
        """Give the server the weights of the student as it is."""
        if self.kind not in GIVEN_WEIGHTS or self.weights is None:
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
        replies: dict[int, Reply] = {}
        for again, places in enumerate(_rounds(prompts)):
            some = [[*prompts[place]] for place in places]
            found = self._write(some, (seed + again) % MAX_SEED)
            replies |= zip(places, found, strict=True)
        return [replies[place] for place in range(len(prompts))]

    def _write(self, prompts: list[list[int]], seed: int) -> list[Reply]:
        """Replies to prompts that are all different."""
        if self.kind == "llamacpp":
            answer = self.server.ask("/completion", self._native(prompts, seed))
            choices = answer if isinstance(answer, list) else [answer]
        elif self.kind == "completions":
            choices = self._completions(prompts, seed)
        else:
            body = self._body(seed) | {"prompt": prompts}
            # A server that was restarted meanwhile writes as the model that it was started with.
            again = self._load if self._followed else None
            choices = _choices(self.server.ask("completions", body, prepare=again))
        if not isinstance(choices, list) or len(choices) != len(prompts):
            got = len(choices) if isinstance(choices, list) else "none"
            raise ServerError(f"{self.server} gave {got} replies to {len(prompts)} prompts.")
        ordered = sorted(choices, key=lambda it: it.get("index", 0))
        return [self._reply(choice) for choice in ordered]

    def _completions(self, prompts: list[list[int]], seed: int) -> Any:
        """Choices of completions, from numbers of tokens or from texts one by one."""
        if not self._as_text:
            try:
                return _choices(
                    self.server.ask("completions", self._body(seed) | {"prompt": prompts})
                )
            except RefusedError:
                self._as_text = True
        return [self._of_text(prompt, seed) | {"index": at} for at, prompt in enumerate(prompts)]

    def _of_text(self, prompt: list[int], seed: int) -> dict[str, Any]:
        """The choice of a prompt that is sent as text.

        Raises:
            ServerError: The server counts other tokens in it.
        """
        text = self.tokenizer.decode(
            prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        try:
            answer = self.server.ask("completions", self._body(seed) | {"prompt": text})
        except RefusedError as error:
            if self._plain or self.sampling.top_k or self.sampling.min_p is not None:
                raise
            self._plain = True
            answer = self.server.ask("completions", self._body(seed) | {"prompt": text})
            warn(
                f"{self.server} takes no top_k, min_p and repetition penalty ({error.message}): "
                "its own hold, which may differ from 0, 0 and 1."
            )
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if counted is not None and counted != len(prompt):
            raise ServerError(
                f"{self.server} counts {counted} tokens in a prompt of {len(prompt)}. The server "
                "must have the student's tokenizer, and add no token of its own."
            )
        choices = _choices(answer)
        if not isinstance(choices, list) or len(choices) != 1:
            got = len(choices) if isinstance(choices, list) else "none"
            raise ServerError(f"{self.server} gave {got} replies to 1 prompts.")
        return dict(choices[0])

    def _body(self, seed: int) -> dict[str, Any]:
        """A request for completions, without its prompt."""
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model_name,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        if self._plain:
            return body
        none = -1 if self.kind in GIVEN_WEIGHTS else 0
        body |= {"top_k": sampling.top_k or none, "min_p": sampling.min_p or 0.0}
        body |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}
        if self.kind == "completions":
            return body | {"repeat_penalty": 1.0}  # as llama-cpp-python calls it
        body |= {"repetition_penalty": 1.0}
        body |= {"stop_token_ids": self.ends, "skip_special_tokens": False}
        return body | ({"return_token_ids": True} if self.kind == "vllm" else {})

    def _native(self, prompts: list[list[int]], seed: int) -> dict[str, Any]:
        """A request to llama.cpp's server; samplers in the order of transformers."""
        sampling = self.sampling
        return {
            "prompt": prompts,
            "n_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or 0.0,
            "samplers": ["temperature", "top_k", "top_p", "min_p"],
            "seed": seed,
            "cache_prompt": True,
            "return_tokens": True,
            "response_fields": ["index", "tokens", "content", "stop_type"],
        }

    def _reply(self, choice: Mapping[str, Any]) -> Reply:
        """The tokens of a reply, as the server names them, or else of its text."""
        names = ("tokens", "content") if self.kind == "llamacpp" else ("token_ids", "text")
        tokens, text = (choice.get(it) for it in names)
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
        stopped = choice.get("finish_reason") == "stop" or choice.get("stop_type") == "eos"
        if stopped and self.ends:
            return Reply([*ids, self.ends[0]], True)
        return Reply(ids, False)


def _choices(answer: Any) -> Any:
    return answer.get("choices") if isinstance(answer, Mapping) else None


def _rounds(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of prompts, in rounds of different ones: the same seed gives the same reply."""
    seen, rounds = Counter[tuple[int, ...]](), list[list[int]]()
    for place, prompt in enumerate(prompts):
        number = seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(place)
    return rounds

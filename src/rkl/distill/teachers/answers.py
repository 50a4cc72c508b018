"""Log-probabilities in the answers of servers, each kind of which has its own fields.

Four forms are read: vLLM's ``prompt_logprobs``, SGLang's ``input_top_logprobs``, llama.cpp's
``completion_probabilities``, and the ``logprobs`` of completions with ``echo``, as OpenAI defined
them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["vllm", "sglang", "llamacpp", "completions"]


class Atom(NamedTuple):
    """A token that a server names: its number or its text, and its log-probability."""

    token: int | None
    logp: float
    text: str | None


class Places(NamedTuple):
    """A server's answer to one text: likely tokens at each place, and the text in its tokens."""

    atoms: list[list[Atom] | None]
    echo: list[str] | None = None


class Form(NamedTuple):
    """Request and answer format of one kind of server."""

    path: str
    field: str
    body: Any
    read: Any


def _vllm_body(texts: list[list[int]], k: int, model: str) -> dict[str, Any]:
    return {"model": model, "prompt": texts, "max_tokens": 1, "prompt_logprobs": k}


def _vllm_read(answer: Any) -> list[Places]:
    choices = sorted(answer["choices"], key=lambda it: it["index"])
    return [Places([_vllm_place(place) for place in it["prompt_logprobs"]]) for it in choices]


def _vllm_place(place: Mapping[str, Any] | None) -> list[Atom] | None:
    if place is None:
        return None
    return [
        Atom(int(token), _float(it["logprob"]), it.get("decoded_token"))
        for token, it in place.items()
    ]


def _sglang_body(texts: list[list[int]], k: int, model: str) -> dict[str, Any]:
    return {
        "input_ids": texts,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": True,
    }


def _sglang_read(answer: Any) -> list[Places]:
    answers = answer if isinstance(answer, list) else [answer]
    return [
        Places([_sglang_place(it) for it in answer["meta_info"]["input_top_logprobs"]])
        for answer in answers
    ]


def _sglang_place(place: Sequence[Any] | None) -> list[Atom] | None:
    if place is None:
        return None
    return [Atom(int(token), _float(logp), text) for logp, token, text in place]


def _llamacpp_body(texts: list[list[int]], k: int, model: str) -> dict[str, Any]:
    return {
        "prompt": texts,
        "n_predict": 1,
        "n_probs": k,
        "cache_prompt": True,
        "post_sampling_probs": False,
        "response_fields": ["index", "completion_probabilities"],
    }


def _llamacpp_read(answer: Any) -> list[Places]:
    """One place of each text, the one behind it."""
    answers = answer if isinstance(answer, list) else [answer]
    places = []
    for it in sorted(answers, key=lambda it: it.get("index", 0)):
        (behind,) = it["completion_probabilities"]
        top = behind["top_logprobs"]
        atoms = [Atom(int(it["id"]), _float(it["logprob"]), it.get("token")) for it in top]
        places.append(Places([atoms]))
    return places


def _completions_body(texts: list[list[int]], k: int, model: str) -> dict[str, Any]:
    prompt = texts[0] if texts else ""
    return {"model": model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": k}


def _completions_read(answer: Any) -> list[Places]:
    (choice,) = answer["choices"]
    of_text = choice["logprobs"]
    atoms = [
        None if top is None else [Atom(None, _float(logp), text) for text, logp in top.items()]
        for top in of_text["top_logprobs"]
    ]
    return [Places(atoms, of_text["tokens"])]


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


FORMS: dict[str, Form] = {
    "vllm": Form("completions", "prompt_logprobs", _vllm_body, _vllm_read),
    "sglang": Form("/generate", "input_top_logprobs", _sglang_body, _sglang_read),
    "llamacpp": Form("/completion", "completion_probabilities", _llamacpp_body, _llamacpp_read),
    "completions": Form("completions", "logprobs", _completions_body, _completions_read),
}

"""A teacher on a server: the likeliest tokens at every place of a text, asked for over HTTP.

Four forms of answer are read, each by its own fields: vLLM's ``prompt_logprobs``, SGLang's
``input_top_logprobs``, llama.cpp's ``completion_probabilities``, and the ``logprobs`` of
completions with ``echo``, as OpenAI defined them.
"""

import http.client
import json
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from time import monotonic, sleep
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rkl.checks import number, warn
from rkl.distill.encoding import encode
from rkl.distill.known import Observed, logits_of
from rkl.distill.limits import check_count, is_address
from rkl.distill.teachers import Teacher
from rkl.estimators import TopK
from rkl.runs.progress import say

KEY = "RKL_TEACHER_API_KEY"  # environment variable; the one place that a key is read from
BUSY = 408, 425, 429, 500, 502, 503, 504  # answers after which the same request may succeed
NEVER_TAKEN = "validation error", "not supported"  # said with 500 of requests that are wrong
MAX_PAUSE = 30.0  # seconds between two attempts
ATTEMPTS = 15  # of a request: a server that is restarted may be away for five minutes
FIRST_ATTEMPTS = 5  # of the first request, as an address may be wrong
SILENT_ATTEMPTS = 3  # after which the wait is announced
MAX_DIFFERING = 0.05  # share of token strings in which two versions of a tokenizer may differ
MAX_MASS = 1.01  # of a place's probabilities, which rounding in half precision may exceed 1 by
CLAMPED = -9999.0  # what vLLM writes for a log-probability of -inf
LARGE_GAP = 0.05  # nats, in the mean, beyond rounding in half precision
MAX_PREFIXES = 64  # of a text in one request to llama.cpp, which says what follows each
SAME_CONTEXT = 1e-3  # nats by which log-probabilities may differ that have the same context
_CHUNK = 2**16  # bytes read between two looks at the clock

Kind: TypeAlias = Literal["vllm", "sglang", "llamacpp", "completions"]


class ServerError(ConnectionError):
    """A server gave no usable answer; the message says which, and what to do."""


class Atom(NamedTuple):
    """A token that a server names: its number or its text, and its log-probability."""

    token: int | None
    logp: float
    text: str | None


class Places(NamedTuple):
    """What a server says of one text: likely tokens at each place, and the text in its tokens."""

    atoms: list[list[Atom] | None]
    echo: list[str] | None = None


class Gap(NamedTuple):
    """How far log-probabilities of a server are from those of a model here, in nats."""

    largest: float
    mean: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"the server's log-probabilities differ from those of the model here by "
            f"{self.mean:.2g} nats in the mean and {self.largest:.2g} at most, over "
            f"{self.tokens:,} tokens"
        )


class ServerTeacher(Teacher):
    """A model on a server, known by the likeliest tokens at each place.

    A key, where the server wants one, is read from the environment variable
    ``RKL_TEACHER_API_KEY``, and is neither logged nor written anywhere.

    Args:
        url: Address of the server's API, such as http://host:8000/v1.
        tokenizer: The student's, which the server must share.
        top_k: Number of tokens asked for at each place.
        model: Name of the model on the server; by default the only one that it has.
        kind: Form of its answers; by default as the server describes itself, and completions
            with echo where it does not say.
        timeout: Seconds that an answer may take, from beginning to end.
        attempts: Number of times that a request is sent before a busy or unreachable server is
            given up, with pauses that double up to 30 seconds; 15 take five minutes. The first
            request is sent at most 5 times.
        reference: A teacher here, of the same weights, from which the answers' distance is
            measured on the first batch and said.

    Raises:
        ServerError: At once where the server is not there or refuses.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int = 64,
        model: str | None = None,
        kind: Kind | None = None,
        timeout: float = 120.0,
        attempts: int = ATTEMPTS,
        reference: Teacher | None = None,
    ):
        check_count("top_k", top_k)
        check_count("attempts", attempts)
        number("timeout", timeout, above=0, at_most=86_400)
        if kind not in (None, *_FORMS):
            raise ValueError(f"kind must be one of {', '.join(_FORMS)} or None; got {kind!r}.")
        self.server = Server(url, timeout, attempts)
        self.tokenizer, self.top_k, self.reference = tokenizer, top_k, reference
        self.vocab = max(tokenizer.get_vocab().values()) + 1
        self.model_name, owner = self.server.served(model)
        self.kind = kind or next((it for it in _FORMS if it in owner.lower()), "completions")
        self.gap: Gap | None = None
        self._as_text = False  # completions of servers that take no numbers
        self._early: dict[bool, bool] = {}  # completions, of texts with BOS and others
        self._compared = False

    def __str__(self) -> str:
        atoms = min(self.top_k, self.vocab)
        return f"{self.model_name} at {self.server.url}, {atoms} of {self.vocab:,} tokens a place"

    def observe(self, inputs, predicting, *, vocab=None) -> TopK:
        """The likeliest tokens of each predicted place; the texts of a packed row apart."""
        texts = list(_texts(inputs, predicting))
        answers = self._places(texts)
        rows: list[dict[int, float]] = []
        for (_, wanted), places in zip(texts, answers, strict=True):
            rows += [self._row(places, place) for place in wanted]
        p = self._stacked(rows, vocab or self.vocab, predicting.device)
        if self.reference is not None and self.gap is None and rows:
            self.gap = gap(p, self.reference.observe(inputs, predicting, vocab=vocab))
            say(f"{self.server}: {self.gap}.")
            if self.gap.mean > LARGE_GAP:
                warn(
                    f"teacher: {self.gap}, more than rounding explains: another model, another "
                    "precision (llama.cpp rounds activations to 8 bits where weights are "
                    "quantised), or a temperature on the server?"
                )
        return p

    def _places(self, texts: list[tuple[list[int], list[int]]]) -> list[Places]:
        """What the server says of some texts, each with the places that are predicted."""
        if not texts:
            return []
        form = _FORMS[self.kind]
        if self.kind == "completions":
            answers = [self._completion(*it) for it in texts]
        elif self.kind == "llamacpp":
            answers = [self._after_prefixes(*it) for it in texts]
        else:
            body = form.body([tokens for tokens, _ in texts], self.top_k, self.model_name)
            answers = self._read(form.path, body)
        self._check_number(answers, len(texts))
        for (tokens, _), places in zip(texts, answers, strict=True):
            if len(places.atoms) < len(tokens):
                raise ServerError(
                    f"{self.server} gave log-probabilities of {len(places.atoms)} places for "
                    f"{len(tokens)} tokens; expected one for each."
                )
        if not self._compared:
            self._compare_strings(answers)
            self._compared = True
        return answers

    def _check_number(self, answers: list[Places], texts: int) -> None:
        if len(answers) != texts:
            raise ServerError(
                f"{self.server} gave {len(answers)} answers to {texts} texts; expected one "
                "for each."
            )

    def _after_prefixes(self, tokens: list[int], wanted: list[int]) -> Places:
        """Of one text, from llama.cpp's server, which says what follows a text.

        It keeps the state of what it has read, so that a longer beginning costs it one token.
        """
        form = _FORMS["llamacpp"]
        atoms: list[list[Atom] | None] = [None] * len(tokens)
        for start in range(0, len(wanted), MAX_PREFIXES):
            some = wanted[start : start + MAX_PREFIXES]
            body = form.body([tokens[:place] for place in some], self.top_k, self.model_name)
            answers = self._read(form.path, body)
            self._check_number(answers, len(some))
            for place, answer in zip(some, answers, strict=True):
                (atoms[place],) = answer.atoms
        return Places(atoms)

    def _read(self, path: str, body: Mapping[str, Any]) -> list[Places]:
        try:
            answer = self.server.ask(path, body)
        except RefusedError as error:
            if "logits_all" in error.message:  # of llama-cpp-python
                raise ServerError(
                    f"{self.server} keeps no log-probabilities ({error.message.strip('. ')}). "
                    "Start it with --logits_all true."
                ) from None
            if "logprob" in error.message.lower() and "validation" not in error.message.lower():
                raise ServerError(self._too_few(error.message)) from None
            raise
        try:
            return _FORMS[self.kind].read(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self.server} gave an answer without {_FORMS[self.kind].field}, which "
                f"{self.kind} has ({type(error).__name__}: {error})."
            ) from None

    def _completion(self, tokens: list[int], wanted: list[int]) -> Places:
        """Of one text, from completions with echo.

        llama-cpp-python lists the distribution behind a token as that of the token itself, where
        a text does not begin with BOS, and nothing behind the first: that one is asked for apart.
        """
        places = self._echoed(tokens)
        if not self._is_early(tokens):
            return places
        atoms = [None, *places.atoms[: len(tokens) - 1]]
        if 1 in wanted and atoms[1] is None:
            atoms[1] = self._after_first(tokens[0])
        return Places(atoms)

    def _echoed(self, tokens: list[int]) -> Places:
        """What the server lists at each token, sent as numbers, or as text where it takes none."""
        form = _FORMS["completions"]
        if not self._as_text:
            try:
                (places,) = self._read(form.path, form.body([tokens], self.top_k, self.model_name))
                return self._at_tokens(tokens, places)
            except RefusedError:
                self._as_text = True
        body = form.body([], self.top_k, self.model_name) | {"prompt": self._decode(tokens)}
        (places,) = self._read(form.path, body)
        return self._at_tokens(tokens, places)

    def _at_tokens(self, tokens: Sequence[int], places: Places) -> Places:
        """Atoms at the tokens that were sent; a BOS that the echo leaves out has none.

        Raises:
            ServerError: The echo has other tokens.
        """
        listed = list(zip(places.echo or [], places.atoms, strict=True))
        atoms: list[list[Atom] | None] = []
        for place, token in enumerate(tokens):
            there = listed[0][0] if listed else "nothing"
            if listed and there in {*self._spellings(token), self._whole(token)}:
                atoms.append(listed.pop(0)[1])
            elif token == self.tokenizer.bos_token_id:
                atoms.append(None)
            else:
                raise ServerError(
                    f"{self.server} splits text into other tokens: {there!r} where the student's "
                    f"tokenizer has {self._decode([token])!r}, at token {place}. Teacher and "
                    "student must share a tokenizer, and the server must add no token of its own."
                )
        return Places(atoms)

    def _is_early(self, tokens: list[int]) -> bool:
        """True if a place depends on its own token, and so is that of the next.

        Two texts are sent that differ in their last token alone: what is said of that token must
        be the same. Where it differs by more than what is said of the token before, it is not.
        """
        begins = tokens[0] == self.tokenizer.bos_token_id
        if begins not in self._early:
            answers = [self._echoed([*tokens[:2], last]).atoms for last in self._two_ends(tokens)]
            before, at_end = (
                _distance(*(answer[place] or [] for answer in answers)) for place in (1, 2)
            )
            noise = 10 * before if math.isfinite(before) else 0.0  # a first place may be left out
            self._early[begins] = at_end > max(noise, SAME_CONTEXT)
        return self._early[begins]

    def _two_ends(self, tokens: list[int]) -> list[int]:
        """Two tokens behind the first two of a text that are split from them as they are."""
        start, found = tokens[:2], list[int]()
        for token in dict.fromkeys([*tokens[2:], *range(self.vocab)]):
            if token == self.tokenizer.bos_token_id:  # which an echo may leave out
                continue
            if not self._as_text or self._encode(self._decode([*start, token])) == [*start, token]:
                found.append(token)
            if len(found) == 2:
                return found
        raise ServerError(
            f"{self.server} takes text alone, and the beginning of {self._decode(tokens)[:60]!r} "
            "is split into other tokens where it stands alone."
        )

    def _after_first(self, token: int) -> list[Atom] | None:
        """What follows the first token of a text; None where it cannot be sent alone."""
        form = _FORMS["completions"]
        if self._encode(self._decode([token])) != [token]:
            return None
        sent = {"prompt": self._decode([token]) if self._as_text else [token], "echo": False}
        (places,) = self._read(form.path, form.body([], self.top_k, self.model_name) | sent)
        return places.atoms[0] if places.atoms else None

    def _encode(self, text: str) -> list[int]:
        return [*next(encode(self.tokenizer, [text], special=False))]

    def _spellings(self, token: int) -> set[str]:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return {self._decode([token]), str(piece), f"token_id:{token}"}

    def _whole(self, token: int) -> str:
        """The whole characters of a token, as servers spell it that leave out parts of others."""
        return self._decode([token]).replace("\N{REPLACEMENT CHARACTER}", "")

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _row(self, places: Places, place: int) -> dict[int, float]:
        """The likeliest tokens at a place, the most probable first."""
        atoms = places.atoms[place]
        if atoms is None:
            why = ", as vLLM does for what lies in its prefix cache: start it with "
            why += "--no-enable-prefix-caching"
            raise ServerError(
                f"{self.server} gave no log-probabilities at token {place}"
                f"{why if self.kind == 'vllm' else ''}."
            )
        if any(math.isnan(it.logp) for it in atoms):
            raise ServerError(
                f"{self.server} gave a log-probability that is NaN or none, at token {place}: are "
                "the weights there finite?"
            )
        short = len(atoms) < min(self.top_k, self.vocab)
        if short and not any(it.token is None and it.text in self._alike for it in atoms):
            raise ServerError(self._too_few(f"it gave {len(atoms)}"))
        row: dict[int, float] = {}
        for atom in sorted(atoms, key=lambda it: -it.logp):
            token = self._number(atom, joined=short) if atom.token is None else atom.token
            if token is not None and len(row) < self.top_k:
                row.setdefault(token, -math.inf if atom.logp <= CLAMPED else float(atom.logp))
        if (mass := sum(map(math.exp, row.values()))) > MAX_MASS:
            raise ServerError(
                f"{self.server} gave log-probabilities whose exponentials sum to {mass:.3g} at "
                f"token {place}; expected at most 1."
            )
        return row

    def _number(self, atom: Atom, *, joined: bool) -> int | None:
        """The number of a token by its text; None where several, or none, are spelt so.

        Args:
            atom: The token, and its log-probability.
            joined: Whether atoms with the same whole characters may have become one.
        """
        text = str(atom.text)
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        if joined and text in self._alike:
            return None
        return self._numbers.get(text)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of each token that is spelt as no other is."""
        spelt: dict[str, set[int]] = {}
        for token in range(self.vocab):
            for text in self._spellings(token):
                spelt.setdefault(text, set()).add(token)
        return {it: next(iter(found)) for it, found in spelt.items() if len(found) < 2}

    @cached_property
    def _alike(self) -> set[str]:
        """Whole characters of more than one token, some of which are parts of characters."""
        count = Counter(self._whole(token) for token in range(self.vocab))
        return {it for it, times in count.items() if times > 1}

    def _too_few(self, reason: str) -> str:
        flag = {
            "vllm": f"Start it with --max-logprobs {self.top_k}, or ask",
            **dict.fromkeys(("sglang", "llamacpp"), "Ask"),
            "completions": "Such servers often give no more than 5: ask",
        }[self.kind]
        return (
            f"{self.server} gives fewer log-probabilities than the {self.top_k} asked for "
            f"({reason.strip('. ')}). {flag} for fewer: --loss-top-k, or top_k=."
        )

    def _compare_strings(self, answers: list[Places]) -> None:
        """Refuse a server whose tokens of the same numbers are others."""
        known = {
            it.token: it.text
            for places in answers
            for place in places.atoms
            for it in place or ()
            if it.token is not None and it.text
        }
        if known and max(known) >= self.vocab:
            raise ServerError(
                f"{self.server} names token {max(known)}, but the student's tokenizer has "
                f"{self.vocab} tokens. Teacher and student must share a tokenizer."
            )
        ours = {token: self._decode([token]) for token in known}
        comparable = [
            token
            for token, text in known.items()
            if text is not None and text.strip() and "�" not in text + ours[token]
        ]
        other = [it for it in comparable if not self._is_spelt(it, str(known[it]), ours[it])]
        if len(other) > MAX_DIFFERING * len(comparable):
            raise ServerError(
                f"{self.server} has another tokenizer: of {len(comparable)} tokens compared, "
                f"{len(other)} are others, such as {other[0]}, {known[other[0]]!r} there and "
                f"{ours[other[0]]!r} here."
            )

    def _is_spelt(self, token: int, there: str, here: str) -> bool:
        pieces = {here.strip(), str(self.tokenizer.convert_ids_to_tokens(token))}
        return there.strip() in pieces or there in pieces

    def _stacked(self, rows: list[dict[int, float]], vocab: int, device: torch.device) -> TopK:
        """Rows of as many atoms each; short ones are filled up with atoms of no mass."""
        width = min(self.top_k, vocab)
        logp = torch.full((len(rows), width), -math.inf)
        index = torch.zeros(len(rows), width, dtype=torch.long)
        for number_of, row in enumerate(rows):
            if row and max(row) >= vocab:
                raise ServerError(
                    f"{self.server} names token {max(row)}, but teacher and student share "
                    f"{vocab} tokens."
                )
            spare = (it for it in range(vocab) if it not in row)
            tokens = [*row, *(next(spare) for _ in range(width - len(row)))]
            index[number_of] = torch.tensor(tokens)
            logp[number_of, : len(row)] = torch.tensor([*row.values()])
        return TopK(logp.to(device), index.to(device))


def gap(p: TopK, reference: Observed) -> Gap:
    """Distance of a top k from what a teacher here says of the same atoms."""
    logp = logits_of(reference).detach().log_softmax(-1).gather(-1, p.index)
    difference = (logp - p.logp.to(logp)).abs()
    difference = difference[p.logp.isfinite()]
    return Gap(float(difference.max()), float(difference.mean()), len(logp))


def _distance(some: Sequence[Atom], others: Sequence[Atom]) -> float:
    """Mean distance of the log-probabilities of atoms that both have; infinite without any."""
    there = {it.text: it.logp for it in others}
    gaps = [abs(it.logp - there[it.text]) for it in some if it.text in there]
    gaps = [it for it in gaps if math.isfinite(it)]
    return sum(gaps) / len(gaps) if gaps else math.inf


def _texts(inputs: Mapping[str, Any], predicting: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """The texts of a batch, each up to its last predicted token, and the places predicted."""
    tokens = inputs["input_ids"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for row in range(len(tokens)):
        wanted = {it + 1 for it in predicting[row].nonzero().flatten().tolist()}
        read = range(tokens.shape[1])
        if mask is not None:
            read = mask[row].nonzero().flatten().tolist()
        starts = [0]
        if positions is not None and mask is None:
            starts = [at for at, it in enumerate(read) if positions[row, it] == 0] or [0]
        for start, end in zip(starts, [*starts[1:], len(read)], strict=True):
            places = [at for at, it in enumerate(read[start:end]) if it in wanted]
            if places:
                yield tokens[row, read[start : start + places[-1] + 1]].tolist(), places


class RefusedError(ServerError):
    """A server refused a request as wrong."""

    def __init__(self, words: str, message: str):
        super().__init__(words)
        self.message = message


Ask: TypeAlias = Callable[[str, Mapping[str, Any]], Any]


class Server:
    """An address, asked with time limits and attempts; its key is in no message.

    Args:
        url: The address.
        timeout: Seconds that an answer may take.
        attempts: How often a request is sent, at most.
        name: What messages call the server.
        key: The environment variable that holds the key.
    """

    def __init__(
        self, url: str, timeout: float, attempts: int, name: str = "teacher", key: str = KEY
    ):
        self.name, self.variable = name, key
        parts = urllib.parse.urlsplit(url)
        if not is_address(url) or not parts.hostname:
            raise ValueError(f"url must be an address such as http://host:8000/v1; got {url!r}.")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                f"url must hold no key, no password and no ?; a key is read from {key}. "
                f"Expected {parts.scheme}://{parts.hostname}:{parts.port or 8000}/v1."
            )
        self.url, self.timeout, self.attempts = url.rstrip("/"), timeout, attempts
        self._opener = urllib.request.build_opener(_NoRedirect)
        alone = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if self._key() and parts.scheme == "http" and not alone:
            warn(f"{name}: the key in {key} is sent to {url} unencrypted; use https.")

    def __str__(self) -> str:
        return f"{self.name}: {self.url}"

    def _key(self) -> str:
        return os.environ.get(self.variable, "")

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        attempts: int | None = None,
        prepare: Callable[[Ask], None] | None = None,
    ) -> Any:
        """The answer to a request, sent again while the server is busy or not reached.

        Args:
            path: Behind the address; from the root of the server on where it begins with "/".
            body: Of a POST; None sends a GET.
            attempts: In place of the server's own.
            prepare: Called before the request is sent again, as the server may have been
                restarted, with what sends one request once.
        """
        pause, reason, attempts = 1.0, "", attempts or self.attempts
        for attempt in range(attempts):
            if attempt == SILENT_ATTEMPTS:
                say(f"{self} {reason}; it is asked up to {attempts - attempt} times more.")
            if attempt:
                sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
            try:
                if attempt and prepare is not None:
                    prepare(self._once)
                return self._once(path, body)
            except _BusyError as error:
                reason = str(error)
        raise ServerError(
            f"{self} {reason}, {attempts} times in a row. Is the server up, and is the "
            "address right?"
        )

    def _once(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        base = self.url.removesuffix("/v1") if path.startswith("/") else f"{self.url}/"
        url = base + path
        headers = {"Content-Type": "application/json", "User-Agent": "rkl"}
        if self._key():
            headers["Authorization"] = f"Bearer {self._key()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                text = self._all_of(answer)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, url) from None
        except TimeoutError:
            raise _BusyError(f"gave no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _BusyError(f"gave no answer within {self.timeout:g} s") from None
            raise _BusyError(f"cannot be reached ({self._scrubbed(str(reason))})") from None
        try:
            return json.loads(text)
        except ValueError:
            start = self._scrubbed(text[:60].decode(errors="replace"))
            raise ServerError(f"{self} gave no JSON at {url}, but {start!r}.") from None

    def _all_of(self, answer: Any) -> bytes:
        """The body, however slowly it comes, within the time limit."""
        end, parts = monotonic() + self.timeout, []
        while part := answer.read1(_CHUNK):
            parts.append(part)
            if monotonic() > end:
                raise TimeoutError
        if answer.length:  # bytes that were announced and did not come
            raise ConnectionError("its answer ended early")
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError, url: str) -> Exception:
        try:
            text = error.read(4096).decode(errors="replace")
        except OSError:
            text = ""
        message = self._scrubbed(_message(text))
        status, told = error.code, f": {message}" if message else ""
        wrong = status == 500 and any(it in message.lower() for it in NEVER_TAKEN)
        if status in BUSY and not wrong:
            return _BusyError(f"answered {status} {error.reason}{told}")
        if status in (401, 403):
            have = "the key in it is refused" if self._key() else "it is not set"
            return ServerError(
                f"{self} wants a key ({status}). It is read from the environment variable "
                f"{self.variable}; "
                f"{have}."
            )
        if status == 404:
            return ServerError(
                f"{self} has nothing at {url} (404{told}). Expected the address of an "
                "OpenAI-compatible API, such as http://host:8000/v1."
            )
        return RefusedError(f"{self} refused the request ({status}{told}).", message)

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key(), "***") if self._key() else text

    def served(self, model: str | None) -> tuple[str, str]:
        """The name of a model that is served, the only one if None is named, and who serves it."""
        answer = self.ask("models", attempts=min(self.attempts, FIRST_ATTEMPTS))
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        entries = [it for it in listed or () if isinstance(it, Mapping) and "id" in it]
        if not entries:
            raise ServerError(f"{self} lists no models at {self.url}/models.")
        names = [str(it["id"]) for it in entries]
        if model is None and len(names) > 1:
            raise ValueError(
                f"model must be one of {', '.join(names)}, which {self} has; got None."
            )
        if model is not None and model not in names:
            raise ValueError(
                f"model must be one that {self} has, {', '.join(names)}; got {model!r}."
            )
        entry = entries[0 if model is None else names.index(model)]
        return str(entry["id"]), str(entry.get("owned_by", ""))


class _BusyError(Exception):
    """A request failed in a way that may pass."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would hand the key to another address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _message(text: str) -> str:
    """What a server says of an error, in whichever field."""
    try:
        told = json.loads(text)
    except ValueError:
        return text.strip()[:300]
    for name in ("error", "message", "detail"):
        if isinstance(told, Mapping) and name in told:
            told = told[name]
    return str(told)[:300]


class _Form(NamedTuple):
    """How a kind of server is asked, and where its answer lies."""

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


_FORMS: dict[str, _Form] = {
    "vllm": _Form("completions", "prompt_logprobs", _vllm_body, _vllm_read),
    "sglang": _Form("/generate", "input_top_logprobs", _sglang_body, _sglang_read),
    "llamacpp": _Form("/completion", "completion_probabilities", _llamacpp_body, _llamacpp_read),
    "completions": _Form("completions", "logprobs", _completions_body, _completions_read),
}

"""A teacher on a server: the likeliest tokens at every place of a text, asked for over HTTP."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rkl.checks import number, warn
from rkl.distill.client import ATTEMPTS, RefusedError, Server, ServerError
from rkl.distill.known import Observed, log_softmax_of
from rkl.distill.limits import check_count
from rkl.distill.teachers.answers import FORMS, Atom, Kind, Places
from rkl.distill.teachers.teacher import Teacher
from rkl.distill.text.batches import texts_of
from rkl.distill.text.encoding import encode
from rkl.estimators import TopK
from rkl.runs.progress import say

MAX_DIFFERING = 0.05  # share of token strings in which two versions of a tokenizer may differ
MAX_MASS = 1.01  # of a place's probabilities, which rounding in half precision may exceed 1 by
CLAMPED = -9999.0  # what vLLM writes for a log-probability of -inf
LARGE_GAP = 0.05  # nats, in the mean, beyond rounding in half precision
MAX_PREFIXES = 64  # of a text in one request to llama.cpp, which says what follows each
SAME_CONTEXT = 1e-3  # nats by which log-probabilities may differ that have the same context


class Gap(NamedTuple):
    """Distance of a server's log-probabilities from those of a model here, in nats."""

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
        if kind not in (None, *FORMS):
            raise ValueError(f"kind must be one of {', '.join(FORMS)} or None; got {kind!r}.")
        self.server = Server(url, timeout, attempts)
        self.tokenizer, self.top_k, self.reference = tokenizer, top_k, reference
        self.vocab = max(tokenizer.get_vocab().values()) + 1
        self.model_name, owner = self.server.served(model)
        self.kind = kind or next((it for it in FORMS if it in owner.lower()), "completions")
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
        """The server's answers for texts, each given with its predicted places."""
        if not texts:
            return []
        form = FORMS[self.kind]
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
        form = FORMS["llamacpp"]
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
            return FORMS[self.kind].read(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{self.server} gave an answer without {FORMS[self.kind].field}, which "
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
        """The server's list at each token, sent as numbers, or as text where it takes none."""
        form = FORMS["completions"]
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
        """The atoms after the first token of a text; None where it cannot be sent alone."""
        form = FORMS["completions"]
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
    logp = log_softmax_of(reference).detach().gather(-1, p.index)
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
    tokens, predicted = inputs["input_ids"], predicting.tolist()
    for row, places in texts_of(inputs):
        wanted = [at for at, place in enumerate(places) if place and predicted[row][place - 1]]
        if wanted:
            yield tokens[row, places[: wanted[-1] + 1]].tolist(), wanted

"""Replies of two students compared by a judge: a chat model on an OpenAI-compatible server."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from rkl.checks import integer, number, warn
from rkl.distill.client import RefusedError, Server, ServerError
from rkl.distill.compare import names_of
from rkl.distill.limits import is_address
from rkl.runs import REPLIES, check_out_file
from rkl.runs.files import append_jsonl, read_jsonl
from rkl.runs.progress import say
from rkl.stats import mean
from rkl.tables import Table

KEY = "RKL_JUDGE_API_KEY"  # environment variable; the one place that a key is read from
Z95 = 1.959963984540054  # of a normal distribution, for an interval of 95 %
POINTS = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the reply shown first
LETTERS_PER_TOKEN = 4  # of English, about; for an estimate of what a judge reads
MAX_TOKENS = 2**20
ATTEMPTS = 5  # of a request to a server that is busy or not reached
INSTRUCTION = """\
Please act as an impartial judge and compare the two replies to the prompt below.
Consider how well each does what is asked: whether it is correct, relevant, clear and complete.
The order in which the replies are shown and their length must not influence you.
Give a short reason, then your verdict on a line of its own: [[A]] if reply A is better, [[B]] if
reply B is better, or [[C]] if neither is."""

Judgement = Literal["A", "B", "C"]


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of ``rkl judge``: the server, and its sampling.

    Args:
        judge: Address of an OpenAI-compatible server, such as http://localhost:8000/v1, whose
            key, if it wants one, is read from RKL_JUDGE_API_KEY.
        model: Name of the model there; by default the only one.
        instruction: A file with other instructions to the judge, which must ask for [[A]], [[B]]
            or [[C]]; by default those of MT-bench, shortened.
        max_tokens: Longest answer of the judge, in tokens; its verdict stands at the end.
        temperature: Sampling temperature of the judge; 0 takes the likeliest token.
        concurrency: Requests under way at once.
        timeout: Seconds that an answer may take.
        seed: Random seed, which is sent along.
    """

    judge: str
    model: str | None = None
    instruction: Path | None = field(default=None, metadata={"metavar": "FILE"})
    max_tokens: int = 512
    temperature: float = 0.0
    concurrency: int = 4
    timeout: float = 120.0
    seed: int = 0

    def __post_init__(self):
        if not is_address(self.judge):
            raise ValueError(
                f"judge must be an address such as http://host:8000/v1; got {self.judge!r}."
            )
        integer("max_tokens", self.max_tokens, at_least=1, at_most=MAX_TOKENS)
        integer("concurrency", self.concurrency, at_least=1, at_most=256)
        integer("seed", self.seed, at_least=0, at_most=2**31 - 1)
        number("temperature", self.temperature, at_least=0, at_most=10)
        number("timeout", self.timeout, above=0, at_most=86_400)

    def instructions(self) -> str:
        """The instructions to the judge.

        Raises:
            ValueError: They do not name all three verdicts.
        """
        if self.instruction is None:
            return INSTRUCTION
        if not self.instruction.is_file():
            raise FileNotFoundError(f"instruction: there is no file {self.instruction}.")
        text = self.instruction.read_text(encoding="utf-8")
        absent = [f"[[{it}]]" for it in POINTS if f"[[{it}]]" not in text]
        if absent:
            raise ValueError(
                f"instruction: {self.instruction} must ask for a verdict [[A]], [[B]] or [[C]]; "
                f"it does not mention {', '.join(absent)}."
            )
        return text


class Pair(NamedTuple):
    """A prompt and two replies to it, drawn with one seed."""

    prompt: str
    seed: int
    first: str
    second: str

    @property
    def identical(self) -> bool:
        return self.first.strip() == self.second.strip()


class Verdict(NamedTuple):
    """An answer of the judge to one pair in one order.

    Attributes:
        pair: Place of the pair, counted from 0.
        swapped: True where the second run's reply was shown first.
        points: Of the first run's reply: 1 if it was preferred, 0 if the other, 1/2 for a tie;
            None where no verdict could be read.
    """

    pair: int
    swapped: bool
    points: float | None


@dataclass(frozen=True)
class Cost:
    """Requests to a judge and the tokens that they take, before any is sent.

    Attributes:
        requests: Number of requests still to be sent.
        tokens_read: Tokens of all prompts, about, at four letters each.
        tokens_written: Largest number of tokens of all answers.
    """

    requests: int
    tokens_read: int
    tokens_written: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests: about {self.tokens_read:,} tokens read by the judge, "
            f"and at most {self.tokens_written:,} written"
        )


@dataclass(frozen=True)
class Judged:
    """Preferences of a judge; prints as a table.

    Attributes:
        names: The two runs.
        score: Mean points of the first run's replies, a tie being 1/2, with its standard error,
            prompts taken as independent.
        interval: 95 % interval of that score (Wilson, on prompts): conservative, as the variance
            of points between 0 and 1 is at most that of a coin of the same mean.
        wins, ties, losses: Pairs whose mean over the two orders is above, at or below 1/2.
        position: Share of the verdicts for the reply shown first less that for the one shown
            second, with its standard error: 0 for a judge without a position bias.
        consistent: Share of the pairs judged in which the verdicts of both orders agree.
        unreadable: Answers without a verdict; a pair that has one counts nowhere.
        identical: Pairs whose replies are the same text: ties, of which the judge was not asked.
        prompts: Number of prompts.
    """

    names: tuple[str, str]
    score: tuple[float, float]
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    position: tuple[float, float]
    consistent: float
    unreadable: int
    identical: int
    prompts: int

    def table(self) -> Table:
        """All of it as a table."""
        low, high = self.interval
        first, second = self.names
        rows: list[list[Any]] = [
            [f"score of {first}", self.score],
            ["95 % interval", f"{low:.3f} to {high:.3f}"],
            [f"pairs won by {first}", self.wins],
            ["ties", self.ties],
            [f"pairs won by {second}", self.losses],
            ["position bias", self.position],
            ["same verdict in both orders", self.consistent],
            ["answers without a verdict", self.unreadable],
            ["identical replies", self.identical],
            ["prompts", self.prompts],
        ]
        decided = "does not contain" if not low <= 0.5 <= high else "contains"
        notes = [
            f"The interval {decided} 1/2, which is the score of replies as good as the others.",
            "Each pair is judged in both orders; a tie counts 1/2.",
        ]
        return Table(f"{first} against {second}", ["", "value"], rows, notes)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it; what is unknown is None."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(it) for it in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def judge_runs(
    first: str | os.PathLike,
    second: str | os.PathLike,
    settings: JudgeSettings,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Judged:
    """Compare two students' replies to the same prompts, each pair in both orders.

    Every verdict is written to ``out`` as soon as it is there, so that a comparison that was
    interrupted goes on with ``resume=True`` and asks nothing twice.

    Source: Zheng et al. (2023), arXiv 2306.05685: verdicts [[A]], [[B]], [[C]], and both orders
    against a bias for a position.

    Args:
        first: A run whose student has replied (``rkl generate``), or a file of JSON lines with
            ``prompt`` and ``text``.
        second: The other; what both replied to, with the same seed, is compared. Several
            replies to one prompt with one seed are paired in their order.
        settings: Which judge, and how it is asked.
        out: The file of JSON lines to write.
        resume: Go on with the comparison in ``out``.
        overwrite: Replace a file that is there.

    Returns:
        Score, interval, position bias and counts.

    Raises:
        ValueError: There is no common prompt, or ``out`` holds another comparison.
        FileExistsError: ``out`` exists.
        ServerError: The server gave no usable answer; what was judged before is in ``out``.
    """
    pairs, header = _compared(first, second, settings)
    path = Path(out)
    done = _done(path, header) if resume and path.exists() else None
    if done is None:
        check_out_file(path, overwrite=overwrite, inputs={"first": first, "second": second})
    remaining = _remaining(pairs, done or [])
    say(f"{cost(pairs, remaining, settings)}.")
    server = Server(settings.judge, settings.timeout, ATTEMPTS, "judge", KEY)
    header["model"], _ = server.served(settings.model)
    if done is None:
        path.unlink(missing_ok=True)
        append_jsonl(path, header)
    elif (before := read_jsonl(path)[0]["model"]) != header["model"]:
        raise ValueError(f"model: {path} was judged by {before}; got {header['model']}.")
    ask = _asker(server, header["model"], settings, pairs)
    verdicts = list(done or [])
    try:
        for verdict, answer in _in_order(ask, remaining, settings.concurrency):
            append_jsonl(path, {**verdict._asdict(), "answer": answer})
            verdicts.append(verdict)
    except (ServerError, KeyboardInterrupt):
        say(f"{len(verdicts):,} verdicts are in {path}; go on with --resume.")
        raise
    ours, theirs = names_of((first, second))
    judged = summary(pairs, verdicts, (ours, theirs))
    if judged.unreadable:
        warn(
            f"judge: {judged.unreadable} of {len(verdicts)} answers hold no verdict [[A]], [[B]] "
            f"or [[C]]; their pairs count nowhere. Answers may have been cut off at max_tokens="
            f"{settings.max_tokens}."
        )
    return judged


def judge_cost(
    first: str | os.PathLike, second: str | os.PathLike, settings: JudgeSettings
) -> Cost:
    """Requests and tokens of a comparison; nothing is asked or written."""
    pairs, _ = _compared(first, second, settings)
    return cost(pairs, _remaining(pairs, []), settings)


def _compared(
    first: str | os.PathLike, second: str | os.PathLike, settings: JudgeSettings
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs, and what identifies a comparison of them by this judge."""
    ours, theirs = (_replies(name, path) for name, path in (("first", first), ("second", second)))
    pairs = [
        Pair(prompt, seed, text, theirs[prompt, seed, occurrence])
        for (prompt, seed, occurrence), text in ours.items()
        if (prompt, seed, occurrence) in theirs
    ]
    if not pairs:
        raise ValueError(
            f"first and second share no prompt with the same seed: {first} has "
            f"{len(ours):,} replies, {second} {len(theirs):,}. Generate both with the same "
            "--data, --seed and --seeds."
        )
    if len(pairs) < max(len(ours), len(theirs)):
        warn(
            f"judge: {len(pairs):,} replies are to prompts and seeds that both have; "
            f"{len(ours) - len(pairs):,} of {first} and {len(theirs) - len(pairs):,} of {second} "
            "are left out."
        )
    asked = [settings.instructions(), settings.max_tokens, settings.temperature, settings.seed]
    text = json.dumps([asked, pairs], ensure_ascii=False)
    return pairs, {"judge": settings.judge, "comparison": sha256(text.encode()).hexdigest()}


def _replies(argument: str, path: str | os.PathLike) -> dict[tuple[str, int, int], str]:
    """The replies of a run, or of a file, by prompt, seed and occurrence of these two.

    A prompt occurs as often as the data has references for it; ``rkl generate`` replies to each.
    """
    place = Path(path)
    file = place / REPLIES if place.is_dir() else place
    if place.is_dir() and not file.exists():
        raise FileNotFoundError(
            f"{argument}: {path} has no {REPLIES}. Make them with: rkl generate {path} --data D"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {file}.")
    replies: dict[tuple[str, int, int], str] = {}
    occurrences = Counter[tuple[str, int]]()
    for line, row in enumerate(read_jsonl(file), 1):
        prompt, text, seed = row.get("prompt"), row.get("text"), row.get("seed", 0)
        if not isinstance(prompt, str) or not isinstance(text, str) or type(seed) is not int:
            raise ValueError(
                f"{argument}: {file}, line {line}, must hold prompt and text, and seed if there "
                f"are several; got {', '.join(map(str, row))}."
            )
        replies[prompt, seed, occurrences[prompt, seed]] = text
        occurrences[prompt, seed] += 1
    if not replies:
        raise ValueError(f"{argument}: {file} holds no replies.")
    return replies


def _done(path: Path, header: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts in a file of this comparison."""
    if not path.is_file():
        raise ValueError(f"out must be a file; got {path}.")
    rows = read_jsonl(path)
    if not rows or "comparison" not in rows[0]:
        raise ValueError(f"out: {path} holds no comparison to go on with.")
    if rows[0]["comparison"] != header["comparison"]:
        raise ValueError(
            f"out: {path} is a comparison of other replies, or by other instructions; choose "
            "another file."
        )
    verdicts = (Verdict(row["pair"], row["swapped"], row["points"]) for row in rows[1:])
    return [*{(verdict.pair, verdict.swapped): verdict for verdict in verdicts}.values()]


def _remaining(pairs: Sequence[Pair], done: Sequence[Verdict]) -> list[tuple[int, bool]]:
    judged = {(verdict.pair, verdict.swapped) for verdict in done}
    asked = [
        (place, swapped)
        for place, pair in enumerate(pairs)
        for swapped in (False, True)
        if not pair.identical
    ]
    return [it for it in asked if it not in judged]


def cost(
    pairs: Sequence[Pair], remaining: Sequence[tuple[int, bool]], settings: JudgeSettings
) -> Cost:
    """Requests and tokens of what remains to be judged."""
    around = len(settings.instructions())
    letters = sum(
        around + sum(map(len, (pairs[place].prompt, pairs[place].first, pairs[place].second)))
        for place, _ in remaining
    )
    written = len(remaining) * settings.max_tokens
    return Cost(len(remaining), letters // LETTERS_PER_TOKEN, written)


def _asker(
    server: Server, model: str, settings: JudgeSettings, pairs: Sequence[Pair]
) -> Callable[[tuple[int, bool]], tuple[Verdict, str]]:
    instructions = settings.instructions()

    def ask(item: tuple[int, bool]) -> tuple[Verdict, str]:
        place, swapped = item
        pair = pairs[place]
        shown = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        messages = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": question(pair.prompt, *shown)},
        ]
        body = {
            "model": model,
            "messages": messages,
            "temperature": settings.temperature,
            "seed": settings.seed,
        }
        answer = _text_of(server, _asked(server, body, settings.max_tokens))
        letter = verdict_in(answer)
        points = None if letter is None else POINTS[letter]
        if points is not None and swapped:
            points = 1 - points
        return Verdict(place, swapped, points), answer

    return ask


def _asked(server: Server, body: Mapping[str, Any], limit: int) -> Any:
    """The answer to a chat; OpenAI's reasoning models call the limit max_completion_tokens."""
    try:
        return server.ask("chat/completions", {**body, "max_tokens": limit})
    except RefusedError as error:
        if "max_completion_tokens" not in error.message:
            raise
        return server.ask("chat/completions", {**body, "max_completion_tokens": limit})


def _text_of(server: Server, answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
        if text is None:  # cut off while it was still reasoning
            text = ""
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ServerError(
            f"{server} gave an answer without choices[0].message.content, which chat completions "
            "have."
        )
    return text


def question(prompt: str, first: str, second: str) -> str:
    """The prompt and two replies, as a judge reads them."""
    return (
        f"[Prompt]\n{prompt}\n\n[Start of reply A]\n{first}\n[End of reply A]\n\n"
        f"[Start of reply B]\n{second}\n[End of reply B]"
    )


def verdict_in(answer: str) -> Judgement | None:
    """The last [[A]], [[B]] or [[C]] in an answer of a judge; None without any.

    >>> verdict_in("Reply A names the [[A]] key, but B is right. [[B]]")
    'B'
    """
    verdicts = re.findall(r"\[\[([ABC])\]\]", answer)
    return cast(Judgement, verdicts[-1]) if verdicts else None


def _in_order(
    ask: Callable[[tuple[int, bool]], tuple[Verdict, str]],
    remaining: Sequence[tuple[int, bool]],
    concurrency: int,
) -> Iterator[tuple[Verdict, str]]:
    """Answers in the order of the requests, a few of which are under way at once."""
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            yield from pool.map(ask, remaining)
        finally:
            pool.shutdown(cancel_futures=True)


def summary(
    pairs: Sequence[Pair], verdicts: Sequence[Verdict], names: tuple[str, str] = ("A", "B")
) -> Judged:
    """Score, interval, position bias and counts of verdicts on pairs.

    Args:
        pairs: What was compared.
        verdicts: What the judge said; a pair without a readable verdict in each order counts
            nowhere, as one order alone has the bias for a position; an identical one is a tie.
        names: Of the two sides.
    """
    points: dict[int, list[float]] = {}
    preference: dict[str, list[float]] = {}  # 1 for the reply shown first, −1 for the second
    readable = {(it.pair, it.swapped): it.points for it in verdicts if it.points is not None}
    for (place, swapped), value in readable.items():
        if (place, not swapped) in readable:
            points.setdefault(place, []).append(value)
            shown_first = 1 - value if swapped else value
            preference.setdefault(pairs[place].prompt, []).append(2 * shown_first - 1)
    both = [*points.values()]
    identical = [place for place, pair in enumerate(pairs) if pair.identical]
    points |= {place: [0.5, 0.5] for place in identical}
    of_pair = {place: sum(it) / len(it) for place, it in points.items()}
    by_prompt: dict[str, list[float]] = {}
    for place, value in of_pair.items():
        by_prompt.setdefault(pairs[place].prompt, []).append(value)
    score = _mean_over(by_prompt)
    return Judged(
        names=names,
        score=score,
        interval=wilson(score[0], len(by_prompt)),
        wins=sum(value > 0.5 for value in of_pair.values()),
        ties=sum(value == 0.5 for value in of_pair.values()),
        losses=sum(value < 0.5 for value in of_pair.values()),
        position=_mean_over(preference),
        consistent=sum(it[0] == it[1] for it in both) / len(both) if both else math.nan,
        unreadable=sum(verdict.points is None for verdict in verdicts),
        identical=len(identical),
        prompts=len(by_prompt),
    )


def _mean_over(groups: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The mean of the groups' means, and its standard error."""
    if not groups:
        return math.nan, math.nan
    return mean(torch.tensor([sum(it) / len(it) for it in groups.values()])).pair()


def wilson(share: float, number_of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many.

    Source: Wilson (1927), Journal of the American Statistical Association 22, 209.

    >>> low, high = wilson(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)
    """
    if not number_of:
        return 0.0, 1.0
    square = Z95 * Z95 / number_of
    centre = (share + square / 2) / (1 + square)
    half = Z95 * math.sqrt(share * (1 - share) / number_of + square / (4 * number_of))
    half /= 1 + square
    return max(0.0, centre - half), min(1.0, centre + half)

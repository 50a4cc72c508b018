"""Chats in the words of a template: what the model reads, and which part of it is an answer.

Each turn of the assistant is trained on as the template renders it when it is said: as the last
message of the chat up to it. Where that rendering begins the rendering of a longer chat, the turn
has its place in the longer one, and one text holds several turns; where it does not (templates
that drop earlier thoughts, or end the last turn otherwise), the turn has a text of its own.
"""

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]  # of characters: where an answer begins, and where it ends

_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "qzprobeqz"  # a word that no template writes by itself
_THOUGHTS = "reasoning_content", "thinking", "reasoning"  # what templates call them
_TEXT_PARTS = "text", "input_text", "output_text"
_ROLES = {"system", "developer", "user", "tool", "function"}
_FEW = 4  # answers that are all located by rendering the chat up to each


class NothingToTrainOnError(Exception):
    """A row has no token to train on.

    Args:
        reason: Why.
        detail: What was found in its place, told once for all rows of this reason.
    """

    def __init__(self, reason: str, detail: tuple[str, ...] = ()):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rendered:
    """A text, and which parts of it are answers to train on."""

    text: str
    answers: list[Span]
    messages: list[Message]
    tools: list[Any] | None


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, and what it makes of a chat.

    Args:
        tokenizer: A tokenizer that has one.
        variables: What else the template is called with, such as ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)  # what chats hold and it does not write
    _known: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, which rows of messages need: name a file "
                "with --chat-template (rkl distill, rkl cache, and rkl evaluate of two models), "
                "set tokenizer.chat_template, or give rows with text or with prompt and "
                "completion."
            )
        self.takes_parts = not self._writes("text") and self._writes("parts")
        source = str(self.tokenizer.get_chat_template())
        self.marks = bool(_MARKS_TURNS.search(source)) and self.tokenizer.is_fast

    def render(
        self,
        messages: Sequence[Message],
        place: str,
        *,
        reply: bool = False,
        tools: list[Any] | None = None,
    ) -> str:
        """A chat as text, up to where a reply begins if wanted."""
        return self._call(
            list(messages), place, tools, add_generation_prompt=reply, tokenize=False
        )

    def encode_with_marks(self, chat: Rendered, place: str) -> Any:
        """The tokens of a chat, and which of them stand in generation blocks."""
        how = {"return_assistant_tokens_mask": True, "return_dict": True}
        return self._call(chat.messages, place, chat.tools, **how)

    def _call(self, messages: list[Message], place: str, tools: Any, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, **self.variables, **how
            )
        except Exception as error:  # whatever a template may do with a chat it was not made for
            message = str(error).rstrip(".")
            raise ValueError(f"{place}: the chat template refuses it: {message}.") from None

    def prepare(self, messages: Sequence[Message], place: str) -> list[Message]:
        """The messages as this template reads them: their content, their thoughts.

        Raises:
            NothingToTrainOnError: If it holds tool calls and the template writes none.
        """
        return [self._prepared(message, place) for message in messages]

    def _prepared(self, message: Message, place: str) -> Message:
        message = {key: value for key, value in message.items() if value is not None}
        content, calls = message.get("content"), message.pop("tool_calls", None)
        for key in set(_THOUGHTS) & message.keys():
            content = self._with_thought(message, key, content)
        message["content"] = self._content(content or "", place)
        if calls:
            if not self._writes("tool_calls"):
                raise NothingToTrainOnError("the chat template writes no tool calls")
            message["tool_calls"] = [self._call_as_read(call) for call in calls]
            if not content and self._writes("calls without content"):
                message["content"] = None
        return message

    def _with_thought(self, message: Message, key: str, content: Any) -> Any:
        """Put a thought where the template reads it, which may be the content."""
        thought = message.pop(key)
        if not thought:
            return content
        name = next((it for it in (key, *_THOUGHTS) if self._writes(it)), None)
        if name is not None:
            message[name] = thought
        elif self._opens_thoughts and isinstance(content, str | None):
            return f"<think>\n{thought}\n</think>\n\n{content or ''}"
        else:
            self.ignored.add(key)
        return content

    @functools.cached_property
    def _opens_thoughts(self) -> bool:
        """True if the prompt of a reply ends with the beginning of a thought."""
        try:
            prompt = self.render([{"role": "user", "content": "a"}], "", reply=True)
        except ValueError:
            return False
        return prompt.rstrip().endswith("<think>")

    def _call_as_read(self, call: Any) -> Any:
        """A tool call with its arguments as an object if the template reads one, else as JSON."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            return call
        arguments, read = function["arguments"], self._writes("arguments")
        if read and isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        elif not read and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    def _content(self, content: Any, place: str) -> Any:
        text = text_of(content, place)
        return [{"type": "text", "text": text}] if self.takes_parts else text

    def check_tools(self, tools: list[Any] | None) -> None:
        """Note that the template writes no tools, where there are some."""
        if tools and not self._writes("tools"):
            self.ignored.add("tools")

    def _writes(self, what: str) -> bool:
        """True if a word comes out where it is put in, or if the template cannot be asked so."""
        if what not in self._known:
            self._known[what] = any(self._comes_out(what, *chat) for chat in _probes(what))
        return self._known[what]

    def _comes_out(self, what: str, messages: list[Message], tools: list[Any] | None) -> bool:
        try:
            text = self.render(messages, "probe", tools=tools)
        except ValueError:
            return False
        if what == "calls without content" and "None" in text:
            return False
        return _PROBE in text and "'type'" not in text.partition(_PROBE)[0][-40:]

    @functools.cached_property
    def _behind_answers(self) -> str | None:
        """The text that the template writes behind the last answer; None if it cannot be found."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        try:
            return self.render(self.prepare([user, answer], ""), "").rpartition(_PROBE)[2]
        except ValueError:
            return None

    @property
    def ends_turns(self) -> bool:
        """False if the template writes nothing but space behind an answer."""
        return self._behind_answers is None or bool(self._behind_answers.strip())

    @property
    def turn_end(self) -> int | None:
        """The special token with which a turn of the assistant ends."""
        ids: Any = self.tokenizer(self._behind_answers or "", add_special_tokens=False)
        special = self.tokenizer.added_tokens_decoder
        return next((token for token in ids["input_ids"] if token in special), None)

    def answers(
        self,
        messages: Sequence[Message],
        place: str,
        *,
        tools: list[Any] | None = None,
        since: int = 0,
        last: bool = False,
    ) -> list[Rendered]:
        """The texts that hold what the assistant says in a chat, each turn once.

        Args:
            messages: The chat.
            place: What messages of errors call it.
            tools: What the assistant may call, for the template.
            since: The message from which on turns are trained on.
            last: Only the last turn.

        Turns whose message has ``weight`` 0 are not trained on.

        Raises:
            NothingToTrainOnError: If the assistant says nothing.
        """
        roles = [message["role"] for message in messages]
        turns = [turn for turn, role in enumerate(roles) if role == "assistant" and turn >= since]
        if not turns:
            found = tuple(dict.fromkeys(it for it in roles if it not in _ROLES)) or (*roles,)
            raise NothingToTrainOnError("no message has the role assistant", found)
        turns = [turn for turn in turns if _is_trained(messages[turn], place)]
        if not turns:
            raise NothingToTrainOnError("all messages of the assistant have weight 0")
        turns = turns[-1:] if last else turns
        if not turns[0] and not self.marks:
            raise ValueError(
                f"{place}: the chat begins with the assistant, and the chat template has no "
                "generation blocks to say where that turn starts."
            )
        self.check_tools(tools)
        chat = _Chat(self, self.prepare(messages, place), place, tools)
        return chat.texts(turns)


class _Chat:
    """One chat under a template; each rendering is made once."""

    def __init__(self, template: ChatTemplate, messages: list[Message], place: str, tools: Any):
        self.template, self.messages, self.place, self.tools = template, messages, place, tools
        self._made: dict[tuple[int, bool], str] = {}

    def until(self, count: int, *, reply: bool = False) -> str:
        """The rendering of the first messages."""
        if (count, reply) not in self._made:
            part, how = self.messages[:count], {"reply": reply, "tools": self.tools}
            self._made[count, reply] = self.template.render(part, self.place, **how)
        return self._made[count, reply]

    def texts(self, turns: list[int]) -> list[Rendered]:
        whole = self.until(len(self.messages))
        located = None if len(turns) <= _FEW else self._located(turns, whole)
        if located is not None:
            return [Rendered(whole, located, self.messages, self.tools)]
        row, rows = Rendered(whole, [], self.messages, self.tools), []
        for turn in reversed(turns):
            if (restored := self._with_dropped_thought(turn)) is not None:
                rows.append((turn, restored))
                continue
            said = self.until(turn + 1)
            if not row.text.startswith(said):
                row = Rendered(said, [], self.messages[: turn + 1], self.tools)
            if not row.answers:
                rows.append((turn, row))
            row.answers.insert(0, (self._start(turn), len(said)))
        return [text for _, text in sorted(rows, key=lambda it: it[0])]

    def _said(self, turn: int) -> str:
        return text_of(self.messages[turn]["content"], self.place)

    def _start(self, turn: int) -> int:
        """Start of the answer in the rendering of the chat up to it."""
        said = self.until(turn + 1)
        if not turn:
            return 0
        asked = self.until(turn, reply=True)
        start = len(asked) if said.startswith(asked) else self._start_of_content(turn)
        answer = self._said(turn).rpartition("</think>")[2].strip()[-16:]
        if answer not in said[start:] and not self.template.marks:
            reason = "the chat template does not write what the assistant says"
            raise NothingToTrainOnError(reason, (repr(answer),))
        return start

    def _with_dropped_thought(self, turn: int) -> Rendered | None:
        """The chat up to a turn with its thought, which the template opens and does not write.

        Such a template asks for a reply with the beginning of a thought, and leaves the thought
        out of what was replied; the reply itself is what follows that beginning.
        """
        opening, ends, answer = self._said(turn).rpartition("</think>")
        thought, answer = opening.partition("<think>")[2].strip(), answer.rstrip()
        if not (ends and thought) or self.template.marks or not turn:
            return None
        asked, said = self.until(turn, reply=True), self.until(turn + 1)
        at = said.rfind(answer.strip())
        if thought in said[_alike(asked, said) : at]:
            return None
        if not self.template._opens_thoughts or at < 0:
            self.template.ignored.add("thoughts between <think> and </think>")
            return None
        behind = said[at + len(answer.strip()) :]
        text = f"{asked}{thought}\n</think>{answer}{behind}"
        return Rendered(text, [(len(asked), len(text))], self.messages[: turn + 1], self.tools)

    def _start_of_content(self, turn: int) -> int:
        """First character of the rendering that depends on the content.

        Some templates end the prompt of a reply with the beginning of a thought, which the
        rendering of an answer without one lacks.
        """
        said, starts = self.until(turn + 1), []
        for word in "AB":
            message = {"role": "assistant", "content": self.template._content(word, self.place)}
            other = [*self.messages[:turn], message]
            starts.append(_alike(said, self.template.render(other, self.place, tools=self.tools)))
        return min(starts)

    def _located(self, turns: list[int], whole: str) -> list[Span] | None:
        """The answers in the rendering of a long chat, without rendering the chat up to each.

        The text between two contents is learnt from a chat of the same shape, whose contents are
        words that occur nowhere else. Answers are located by rendering the chat up to turns 1, 2,
        4, 8, ..., the last two, and one for each text between contents that was not met there;
        all others stand between the same texts. None where that does not hold.
        """
        places = self._places(whole)
        if places is None or any(turn not in places for turn in turns):
            return None
        before: dict[str, int] = {}
        after: dict[str, int] = {}
        spans = {}
        doubling = {2**power - 1 for power in range(len(turns).bit_length())}
        looked = {turns[it] for it in doubling if it < len(turns)} | {*turns[-2:]}
        for turn in sorted(turns, key=lambda turn: turn not in looked):
            start, stop, left, right = places[turn]
            if turn in looked or left not in before or right not in after:
                asked, said = self.until(turn, reply=True), self.until(turn + 1)
                if not (said.startswith(asked) and whole.startswith(said)):
                    return None
                found = start - len(asked), len(said) - stop
                if not (0 <= found[0] <= len(left) and 0 <= found[1] <= len(right)):
                    return None
                if before.setdefault(left, found[0]) != found[0]:
                    return None
                if after.setdefault(right, found[1]) != found[1]:
                    return None
            spans[turn] = start - before[left], stop + after[right]
        return [spans[turn] for turn in turns]

    def _places(self, whole: str) -> dict[int, tuple[int, int, str, str]] | None:
        """The place of each message's content, with the text before and after it."""
        words = {i: f"{_PROBE}{i}q" for i, it in enumerate(self.messages) if it.get("content")}
        if _PROBE in whole:
            return None
        replaced = [
            message | ({"content": self.template._content(words[i], "")} if i in words else {})
            for i, message in enumerate(self.messages)
        ]
        try:
            shape = self.template.render(replaced, self.place, tools=self.tools)
        except ValueError:
            return None
        gaps, rest = [], shape
        for word in words.values():
            gap, found, rest = rest.partition(word)
            if not found:
                return None
            gaps.append(gap)
        gaps.append(rest)
        places, at = {}, 0
        for (i, _), left, right in zip(words.items(), gaps[:-1], gaps[1:], strict=True):
            if not whole.startswith(left, at):
                return None
            start, text = at + len(left), self._said(i)
            fits = [
                it
                for it in (text, text.strip(), text.rstrip(), text.lstrip())
                if whole.startswith(it + right, start)
            ]
            if not fits:
                return None
            at = start + len(fits[0])
            places[i] = start, at, left, right
        return places if at + len(gaps[-1]) == len(whole) else None


def _probes(what: str) -> Iterator[tuple[list[Message], list[Any] | None]]:
    """Chats, and tools, that show if a template writes something."""
    user: Message = {"role": "user", "content": _PROBE if what == "text" else "a"}
    part = [{"type": "text", "text": "a"}]
    if what in ("text", "parts"):
        yield (
            [user | ({"content": [{"type": "text", "text": _PROBE}]} if what == "parts" else {})],
            None,
        )
        return
    contents = (None,) if what == "calls without content" else ("a", part, None, "")
    for asked, content in itertools.product(("a", part), contents):
        user, answer = (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": content},
        )
        if what == "tools":
            for empty in ({}, {"type": "object", "properties": {}}):
                told = {"name": _PROBE, "description": "a", "parameters": empty}
                yield [user], [{"type": "function", "function": told}]
        elif what == "arguments":
            yield [user, answer | {"tool_calls": [_called("a", {"a": _PROBE})]}], None
        elif what in ("tool_calls", "calls without content"):
            for arguments in ({}, "{}"):
                yield [user, answer | {"tool_calls": [_called(_PROBE, arguments)]}], None
        else:
            yield [user, answer | {what: _PROBE}], None


def _called(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "call00000", "type": "function", "function": function}


def read_template(path: str | os.PathLike) -> str:
    """The chat template in a file, once it is seen that it is one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"chat_template: there is no file {path}.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(
            text
        )
    except (UnicodeDecodeError, TemplateSyntaxError) as error:
        raise ValueError(f"chat_template: {path} is no Jinja template: {error}.") from None
    if not text.strip():
        raise ValueError(f"chat_template: {path} is empty.")
    return text


def choose_template(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    file: str | os.PathLike | None = None,
) -> str | None:
    """Give the student's tokenizer the chat template in a file, or the teacher's if it has none.

    Returns:
        A warning where teacher and student had different ones, and no file is given.
    """
    if file is not None:
        student.chat_template = read_template(file)
        return None
    if teacher.chat_template == student.chat_template or not teacher.chat_template:
        return None
    if not student.chat_template:
        student.chat_template = teacher.chat_template
        return "The student's tokenizer has no chat template; the teacher's is used."
    return (
        "Teacher and student have different chat templates; the student's is used, so that the "
        "teacher reads chats in words that are not its own. --chat-template names another file."
    )


class _Generation(Extension):
    """Reads generation blocks, which transformers knows and Jinja does not."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null, as deep as it goes."""
    if isinstance(value, Mapping):
        return {key: without_nulls(it) for key, it in value.items() if it is not None}
    return [without_nulls(it) for it in value] if isinstance(value, list | tuple) else value


def has_nulls(value: Any) -> bool:
    """True if a key has the value null, at any depth."""
    if isinstance(value, Mapping):
        return any(it is None or has_nulls(it) for it in value.values())
    return isinstance(value, list | tuple) and any(map(has_nulls, value))


def as_tools(value: Any, place: str) -> list[Any] | None:
    """The tools of a row, which may be JSON in a string; None without any."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{place}: tools are not JSON ({error}).") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(it, Mapping) for it in value):
        raise ValueError(f"{place}: tools must be a list of objects; got {value!r:.60}.")
    return [dict(tool) for tool in value]


def _is_trained(message: Message, place: str) -> bool:
    """False for a message of weight 0, by which OpenAI's format leaves out what is no example."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"{place}: weight of a message must be 0 or 1; got {weight!r}.")
    return weight != 0


def text_of(content: Any, place: str) -> str:
    """Content as one text, whether it is given in parts or not; parts must be text."""
    if content is None or isinstance(content, str):
        return content or ""
    other = sorted({str(part.get("type")) for part in content} - {*_TEXT_PARTS})
    if other:
        raise ValueError(
            f"{place}: content in parts must be text for a language model; got a part of "
            f"type {other[0]}."
        )
    return "".join(part.get("text") or "" for part in content)


def _alike(text: str, other: str) -> int:
    """The number of characters that two texts have in common before they part."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text.startswith(other[:middle]) else (low, middle - 1)
    return low

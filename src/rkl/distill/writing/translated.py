"""Replies of a writer that has other tokens than the student, in the student's tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rkl.distill.text.alignment import Translation
from rkl.distill.text.chats import ChatTemplate
from rkl.distill.text.encoding import end_of_text
from rkl.distill.writing.rollouts import Reply, Writer


class TranslatedWriter(Writer):
    """Has another writer read prompts in its own tokens, and gives its replies in the student's.

    The token that ends a reply becomes the student's. A prompt that ends within a character is
    read up to this character. A reply that comes to more tokens than ``longest`` is cut there, and
    has no end then.

    Args:
        writer: Writes in its own tokens; no token but the last of a reply may end it.
        to_writer: The student's tokens in the writer's.
        to_student: The writer's tokens in the student's.
        end: The student's token that ends a reply.
        longest: Most tokens of a reply.
    """

    def __init__(
        self,
        writer: Writer,
        to_writer: Translation,
        to_student: Translation,
        *,
        end: int,
        longest: int,
    ):
        self.writer, self.to_writer, self.to_student = writer, to_writer, to_student
        self.end, self.longest = end, longest

    def follow(self, model) -> None:
        self.writer.follow(model)

    def write(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Reply]:
        read = [it.tokens for it in self.to_writer.read(prompts)]
        return [self._translated(it) for it in self.writer.write(read, seed=seed)]

    def _translated(self, reply: Reply) -> Reply:
        body = reply.tokens[:-1] if reply.ended else reply.tokens
        tokens = self.to_student.continuation(body)
        if reply.ended:
            tokens = [*tokens, self.end]
        if len(tokens) > self.longest:
            return Reply(tokens[: self.longest], False)
        return Reply(tokens, reply.ended)


def end_of_reply(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a reply: of a chat template that of a turn, else the end of a text."""
    end = ChatTemplate(tokenizer).turn_end if tokenizer.chat_template else None
    return end_of_text(tokenizer) if end is None else end

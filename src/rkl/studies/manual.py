"""Text of demonstrations and studies: the interpreter's own manual, there without a network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rkl.distill.text.data import passages
from rkl.runs import fingerprint, write_atomic

TRAIN, HELD_OUT = "data/train.jsonl", "data/held-out.jsonl"
EVERY, FIRST = 6, 3  # of the groups of topics, from the largest to the smallest, is held out


@dataclass(frozen=True)
class Manual:
    """The manual, by topic, split into training text and held-out text.

    Attributes:
        train: Text of each training topic, by name.
        held_out: Text of each held-out topic, by name.
        digest: Digest of all topics, names and texts.
    """

    train: Mapping[str, str]
    held_out: Mapping[str, str]
    digest: str

    def beginnings(self, characters: int | None) -> "Manual":
        """The same with the first characters of each training topic; None is all of them."""
        if characters is None:
            return self
        return replace(self, train={name: it[:characters] for name, it in self.train.items()})

    def write(self, folder: Path) -> None:
        """Write both parts as JSON lines into a folder, a row for each topic."""
        for name, topics in ((TRAIN, self.train), (HELD_OUT, self.held_out)):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(json.dumps({"text": it}) + "\n" for it in topics.values()))

    def record(self) -> dict[str, Any]:
        """The entries of ``run.json``."""
        return {
            "source": "pydoc_data.topics",
            "digest": self.digest,
            "characters": sum(
                len(it) for part in (self.train, self.held_out) for it in part.values()
            ),
            "topics": len(self.train),
            "held_out_topics": list(self.held_out),
        }


def read_manual() -> Manual:
    """The manual of the running interpreter; no passage is both trained on and held out.

    Topics quote one another. Those that share a paragraph are one group; every sixth group, from
    the largest to the smallest, is held out.
    """
    from pydoc_data.topics import topics

    groups = sorted(
        _groups(topics), key=lambda names: (-sum(len(topics[it]) for it in names), names)
    )
    held_out = {name for names in groups[FIRST::EVERY] for name in names}
    names = sorted(topics)
    return Manual(
        {name: topics[name] for name in names if name not in held_out},
        {name: topics[name] for name in names if name in held_out},
        fingerprint([name, topics[name]] for name in names),
    )


def _groups(topics: Mapping[str, str]) -> Sequence[list[str]]:
    groups: list[tuple[list[str], set[Any]]] = []
    for name in sorted(topics):
        names, together = [name], set(passages([{"text": topics[name]}]))
        touching = [group for group in groups if group[1] & together]
        groups = [group for group in groups if not group[1] & together]
        for others, theirs in touching:
            names, together = [*others, *names], together | theirs
        groups.append((sorted(names), together))
    return [names for names, _ in groups]

"""The fits of the study in language models: one line for each, and how many there are."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

BOTH = "kl", "reverse-kl"
PARENTS = (*BOTH, "akl")
MIXTURES = 0.5, 1.0  # of own text; fits with none are those of the comparison
LAMS = 0.3, 1.0, 3.0

# Questions, as the csv names them.
FLAT = "until flat"
ORDER = "first steps"
EQUAL = "equal steps"
COST = "time of a step"
OWN = "own text"


@dataclass(frozen=True)
class Lesson:
    """One fit, or two whose students are compared step by step.

    Attributes:
        question: What it is for.
        student: Name of the student's size, or of where it begins.
        divergences: What is minimised; of two the second student is compared with the first, and
            for the time of a step all take turns.
        steps: Updates of the weights.
        seed: Of new weights, of the order of the text and of what is drawn.
        lmbda: Share of batches that the student writes.
        optimizer: "AdamW" or "SGD".
    """

    question: str
    student: str
    divergences: tuple[str, ...]
    steps: int
    seed: int
    lmbda: float = 0.0
    optimizer: str = "AdamW"


@dataclass(frozen=True)
class Plan:
    """Sizes of the study.

    Args:
        seeds: Number of seeds.
        block: Tokens in a block.
        packing: Whether short texts share a block, which those that are replied to do not.
        batch_size: Blocks in a step.
        learning_rate: AdamW's, at its peak.
        sgd_rate: That of SGD, for the first steps.
        flat: Numbers of steps to be flat after, each of its own fits, the last the longest.
        order: First steps that are looked at one by one; 0 for none.
        equal: Students of the comparison with their numbers of steps, each of its own fits.
        timed: Steps under each divergence that are timed in turns; 0 for none.
        own: Steps of fits with own text, as of one in the comparison; 0 for none.
        flat_students: Students that are trained until flat.
        order_students: Students whose first steps are looked at.
        own_student: The student that writes.
        divergences: What is compared.
        own_divergences: Those that are compared on own text.
        growth: Factor between the numbers of steps after which students are measured.
        held_out_blocks: Blocks to measure on, of each text that is held out.
        prompts: Prompts that are replied to.
        replies: Replies to each.
        prompt_tokens: Length of a prompt out of prose.
        reply_tokens: Longest reply.
        text: Digest of the text; none before it is known.
    """

    seeds: int
    block: int
    packing: bool
    batch_size: int
    learning_rate: float
    sgd_rate: float
    flat: Sequence[int]
    order: int
    equal: Sequence[tuple[str, int]]
    timed: int
    own: int
    flat_students: Sequence[str]
    order_students: Sequence[str]
    own_student: str
    divergences: Sequence[str]
    own_divergences: Sequence[str]
    growth: int
    held_out_blocks: int
    prompts: int
    replies: int
    prompt_tokens: int
    reply_tokens: int
    text: str = ""

    def lessons(self, seed: int) -> Iterator[Lesson]:
        """All fits, one seed after the other, so that the first has an answer to everything."""
        for each in range(seed, seed + self.seeds):
            for student, optimizer in itertools.product(self.order_students, ("AdamW", "SGD")):
                for name in PARENTS:
                    how = Lesson(ORDER, student, (name,), self.order, each, optimizer=optimizer)
                    yield how
            if self.timed:
                yield Lesson(COST, self.equal[0][0], tuple(self.divergences), self.timed, each)
            for name, (student, steps) in itertools.product(self.divergences, self.equal):
                yield Lesson(EQUAL, student, (name,), steps, each)
            for name, lmbda in itertools.product(self.own_divergences, MIXTURES):
                if self.own:
                    yield Lesson(OWN, self.own_student, (name,), self.own, each, lmbda)
            for student, steps in itertools.product(self.flat_students, self.flat):
                yield Lesson(FLAT, student, BOTH, steps, each)
                yield Lesson(FLAT, student, ("akl",), steps, each)


SMALL = Plan(
    seeds=3,
    block=64,
    packing=False,
    batch_size=16,
    learning_rate=2e-3,
    sgd_rate=0.5,
    flat=(),
    order=64,
    equal=(("small", 200), ("small", 400), ("schooled", 200)),
    timed=30,
    own=200,
    flat_students=(),
    order_students=("small", "schooled"),
    own_student="schooled",
    divergences=(
        *PARENTS,
        'akl(straddle="head")',
        "jeffreys",
        "js",
        "skew-kl(alpha=0.1)",
        "skew-reverse-kl(alpha=0.1)",
        "todi",
        "alpha-beta",
        *(f"{half}(lam={lam:g})" for half in ("precision-half", "recall-half") for lam in LAMS),
    ),
    own_divergences=(*PARENTS, "js"),
    growth=2,
    held_out_blocks=32,
    prompts=96,
    replies=2,
    prompt_tokens=16,
    reply_tokens=32,
)

# As many steps as it takes, in fits of their own.
LONG = replace(
    SMALL,
    flat=(1000, 4000),
    flat_students=("full", "small"),
    order_students=(),
    divergences=(),
    timed=0,
    own=0,
)

REAL = Plan(
    seeds=3,
    block=512,
    packing=True,
    batch_size=1,
    learning_rate=2e-4,
    sgd_rate=0.5,
    flat=(),
    order=0,
    equal=(("half", 100),),
    timed=5,
    own=0,
    flat_students=(),
    order_students=(),
    own_student="half",
    divergences=(*PARENTS, 'akl(straddle="head")', "js"),
    own_divergences=(),
    growth=4,
    held_out_blocks=4,
    prompts=48,
    replies=1,
    prompt_tokens=32,
    reply_tokens=48,
)

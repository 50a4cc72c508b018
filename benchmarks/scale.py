"""Cost of a step of distillation on many GPUs: memory, bytes moved, seconds.

A calculation, not a measurement: every coefficient has its source beside it, and docs/scale.md
says which were measured here. It prints the tables of that page; other sizes by flags:

    python benchmarks/scale.py
    python benchmarks/scale.py --gpus 8 --teacher qwen2.5-14b --student qwen3-1.7b --tokens 16384
    python benchmarks/scale.py --network 5e9 --memory 40e9
"""

import argparse
import json
import math
from dataclasses import dataclass

import quick

BF16, FLOAT32, INT32 = 2, 4, 4  # bytes
CHUNK = 2**30 + 2**28  # bytes of both sides' logits that exist at one time, and of the gradient
TEMPORARY = 350 * 2**20  # bytes beside them and dW, at most (bound of benchmarks/linear_head.py)
ACTIVATIONS = (
    34  # bytes per token and unit of width inside a layer (arXiv 2205.05198, section 4.1)
)
LOSS = 1.25  # of the four products; 1.10 to 1.39 on a CPU (benchmarks/README.md), goal on a GPU
TOP_K, DRAWS = 64, 50


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer; sizes as its config.json has them."""

    parameters: float
    layers: int
    width: int
    vocab: int
    kv_heads: int
    head: int = 128
    tied: bool = False

    @property
    def body(self) -> float:
        """Parameters of the layers: without the output head and the embedding."""
        return self.parameters - (1 if self.tied else 2) * self.vocab * self.width

    @property
    def kv_bytes(self) -> float:
        """Of the cache of one token, in bfloat16."""
        return 2 * BF16 * self.layers * self.kv_heads * self.head


MODELS = {  # config.json of each model on the Hub
    "qwen2.5-72b": Model(72.7e9, 80, 8192, 152_064, 8),
    "qwen2.5-14b": Model(14.8e9, 48, 5120, 152_064, 8),
    "qwen3-8b": Model(8.2e9, 36, 4096, 151_936, 8),
    "qwen3-1.7b": Model(2.0e9, 28, 2048, 151_936, 8, tied=True),
    "smollm2-135m": Model(0.135e9, 30, 576, 49_152, 3, 64, tied=True),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, by default H100 SXM.

    Args:
        gpus: Number of them.
        node: GPUs of a node, joined by NVLink.
        memory: Of a GPU, in bytes.
        peak: Dense bfloat16, in FLOP/s (H100 data sheet).
        utilisation: Share of the peak that training reaches (0.38 to 0.43: arXiv 2407.21783).
        within: Bytes per second and GPU within a node, one direction (H100 data sheet).
        network: Bytes per second and GPU between nodes (400 Gb/s).
        hbm: Bytes per second of a GPU's memory (H100 data sheet).
        reading: Share of hbm that decoding reaches; an assumption.
    """

    gpus: int = 64
    node: int = 8
    memory: float = 80e9
    peak: float = 989e12
    utilisation: float = 0.40
    within: float = 450e9
    network: float = 50e9
    hbm: float = 3.35e12
    reading: float = 0.6

    def seconds(self, flops: float) -> float:
        return flops / (self.peak * self.utilisation)

    def gathering(self, size: float, shards: int) -> float:
        """Seconds to gather, or to reduce and scatter, a tensor of so many bytes."""
        speed = self.within if shards <= self.node else self.network
        return size * (shards - 1) / shards / speed


@dataclass(frozen=True)
class Step:
    """One micro-step of one GPU.

    Attributes:
        memory: In bytes, by part.
        seconds: By part; those of a pair (computing, moving) overlap.
        moved: Bytes of knowledge of p that reach the GPU, per token.
    """

    memory: dict[str, float]
    seconds: dict[str, tuple[float, float]]
    moved: float

    @property
    def whole(self) -> float:
        """Seconds, if moving hides behind computing where it is shorter."""
        return sum(max(pair) for pair in self.seconds.values())


def known_bytes(teacher: Model, way: str) -> float:
    """Bytes per token that say what is known of p."""
    if way == "cache of hidden states":
        return teacher.width * BF16
    if way == "cache of the top 64":
        return TOP_K * (FLOAT32 + INT32)
    if way == "cache of 50 draws":
        return DRAWS * (FLOAT32 + INT32)
    if way == "server, top 64":  # vLLM's prompt_logprobs, as JSON
        atom = {"logprob": -12.345678, "rank": 12, "decoded_token": " token"}
        return len(json.dumps({str(100_000 + it): atom for it in range(TOP_K)}))
    return 0.0


def step(teacher: Model, student: Model, cluster: Cluster, tokens: int, way: str) -> Step:
    """Memory and time of one micro-step on ``tokens`` tokens of each GPU.

    The student is sharded over all GPUs, layer activations are computed twice; a teacher that is
    here is sharded over a node.
    """
    shards, live = cluster.gpus, way.startswith("live")
    whole_vocab = live or "hidden" in way
    weights = student.parameters * BF16
    layer = student.body / student.layers * BF16
    memory = {
        "student": 16 * student.parameters / shards,  # weight, gradient and Adam's two in float32
        "gathered": 2 * layer
        + student.vocab * student.width * (BF16 + FLOAT32),  # head and its dW
        "activations": tokens * student.width * (student.layers * BF16 + ACTIVATIONS),
        "logits": CHUNK + TEMPORARY,
    }
    if live:
        memory["teacher"] = teacher.parameters * BF16 / min(shards, cluster.node)
        memory["teacher"] += 2 * teacher.body / teacher.layers * BF16
    if whole_vocab:
        memory["teacher's head"] = teacher.vocab * teacher.width * BF16
        memory["known of p"] = tokens * teacher.width * BF16
    # Forward, backward and the second forward; gathered twice, gradients scattered once.
    moving = 3 * cluster.gathering(weights, shards)
    seconds = {"student": (cluster.seconds(8 * student.body * tokens), moving)}
    if live:
        moving = cluster.gathering(teacher.parameters * BF16, min(shards, cluster.node))
        seconds["teacher"] = (cluster.seconds(2 * teacher.body * tokens), moving)
    products = 3 * student.width + (teacher.width if whole_vocab else 0)
    flops = 2 * tokens * student.vocab * products * LOSS
    moved = known_bytes(teacher, way)
    seconds["loss"] = (cluster.seconds(flops), moved * tokens / cluster.network)
    return Step(memory, seconds, moved)


def writing(
    student: Model, cluster: Cluster, sequences: int, prompt: int, reply: int
) -> tuple[float, float]:
    """Seconds of a token of each sequence, and bytes of the cache: decoding is bound by memory."""
    cache = sequences * (prompt + reply / 2) * student.kv_bytes
    read = student.parameters * BF16 + cache
    return read / (cluster.hbm * cluster.reading), sequences * (prompt + reply) * student.kv_bytes


def size(value: float) -> str:
    """Bytes in words.

    >>> size(16_384), size(2.5e9)
    ('16.4 kB', '2.5 GB')
    """
    if value < 1000:
        return f"{value:.0f} B"
    power = min(int(math.log10(value) / 3), 5)
    return f"{value / 1000**power:.3g} {'kMGTP'[power - 1]}B"


def ways_table(teacher: Model, student: Model, cluster: Cluster, tokens: int) -> list[str]:
    """Live teacher, caches and a server side by side."""
    lines = [
        "| what is known of p | memory of a GPU | bytes of p a token | student | teacher | loss | "
        "step | tokens/s of all | GPUs of a server |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ways = [
        *("live teacher", "cache of hidden states", "cache of the top 64"),
        *("cache of 50 draws", "server, top 64"),
    ]
    for way in ways:
        made = step(teacher, student, cluster, tokens, way)
        speed = cluster.gpus * tokens / made.whole
        server = (
            2
            * (teacher.body + teacher.vocab * teacher.width)
            * speed
            / (cluster.peak * cluster.utilisation)
        )
        fits = "" if sum(made.memory.values()) < 0.9 * cluster.memory else ", does not fit"
        parts = [_part(made.seconds.get(name)) for name in ("student", "teacher", "loss")]
        lines.append(
            f"| {way} | {size(sum(made.memory.values()))}{fits} | "
            f"{size(made.moved) if made.moved else '–'} | {' | '.join(parts)} | "
            f"{made.whole:.2f} s | {speed / 1000:,.0f} k | "
            f"{math.ceil(server) if way.startswith('server') else '–'} |"
        )
    return lines


def _part(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    computing, moving = pair
    return f"{computing:.2f} s" + (f", moving {moving:.2f} s" if moving > 0.005 else "")


def memory_table(teacher: Model, student: Model, cluster: Cluster, tokens: int) -> list[str]:
    """Where the memory of a GPU goes, with a live teacher."""
    made = step(teacher, student, cluster, tokens, "live teacher")
    lines = ["| part | memory of a GPU |", "|---|---|"]
    return lines + [f"| {name} | {size(value)} |" for name, value in made.memory.items()]


def moving_table(teacher: Model, student: Model, cluster: Cluster, tokens: int) -> list[str]:
    """Bytes that reach a GPU for each token, by reason, and bytes on the disk."""
    weights = 3 * student.parameters * BF16 * (cluster.gpus - 1) / cluster.gpus
    node = min(cluster.gpus, cluster.node)
    rows = {
        "sharding the student over all GPUs": weights / tokens,
        "sharding the teacher over a node": teacher.parameters * BF16 * (node - 1) / node / tokens,
    }
    lines = ["| reason | bytes a token | of 10⁹ tokens, on a disk |", "|---|---|---|"]
    lines += [f"| {name} | {size(value)} | – |" for name, value in rows.items()]
    for way in ("cache of hidden states", "cache of the top 64", "cache of 50 draws"):
        value = known_bytes(teacher, way)
        lines.append(f"| {way} | {size(value)} | {size(1e9 * value)} |")
    return [*lines, f"| server, top 64 | {size(known_bytes(teacher, 'server, top 64'))} | – |"]


def own_text_table(
    teacher: Model, student: Model, cluster: Cluster, tokens: int, prompt: int, reply: int
) -> list[str]:
    """Time of writing beside that of learning, for some numbers of sequences a GPU."""
    made = step(teacher, student, cluster, tokens, "live teacher")
    lines = [
        "| sequences a GPU | cache of keys and values | writing, tokens/s of a GPU | share of "
        "writing in a step |",
        "|---|---|---|---|",
    ]
    for sequences in (16, 64, 256):
        seconds, cache = writing(student, cluster, sequences, prompt, reply)
        speed = sequences / seconds
        fits = "" if cache + sum(made.memory.values()) < 0.9 * cluster.memory else ", does not fit"
        written = tokens * reply / (prompt + reply) / speed
        lines.append(
            f"| {sequences} | {size(cache)}{fits} | {speed:,.0f} | "
            f"{written / (written + made.whole):.2f} |"
        )
    return lines


def main() -> None:
    """Print the tables."""
    cluster = Cluster()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", choices=MODELS, default="qwen2.5-72b")
    parser.add_argument("--student", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a GPU in a micro-step")
    parser.add_argument("--prompt", type=int, default=512, help="tokens, of own text")
    parser.add_argument("--reply", type=int, default=1536, help="tokens, of own text")
    parser.add_argument("--gpus", type=int, default=cluster.gpus)
    parser.add_argument("--memory", type=float, default=cluster.memory, help="bytes of a GPU")
    parser.add_argument("--network", type=float, default=cluster.network, help="bytes/s of a GPU")
    asked = quick.parse(parser)
    cluster = Cluster(gpus=asked.gpus, memory=asked.memory, network=asked.network)
    models = MODELS[asked.teacher], MODELS[asked.student]
    print("\n".join(ways_table(*models, cluster, asked.tokens)), end="\n\n")
    print("\n".join(memory_table(*models, cluster, asked.tokens)), end="\n\n")
    print("\n".join(moving_table(*models, cluster, asked.tokens)), end="\n\n")
    sizes = asked.tokens, asked.prompt, asked.reply
    print("\n".join(own_text_table(*models, cluster, *sizes)))


if __name__ == "__main__":
    main()

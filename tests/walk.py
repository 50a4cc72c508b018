"""Trace the calls between files of rkl on five journeys, and count rooms, climbs and returns.

    python tests/walk.py [WALK ...]
    PYTHONPATH=../earlier/src python tests/walk.py

The second line walks through the source of an earlier commit.

A *room* is a file that is entered. An *entry* is a pair of functions in different files, one of
which calls the other; a pair is counted once, however often it is called. A *return* is an entry
into a room that was entered before. A *climb* is an entry into a file that itself imports the
file of its caller, directly or through others: a call against the direction of the imports.
"""

import ast
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import house
import torch

import rkl

SOURCE = Path(rkl.__file__).parent
IGNORED = {"lazy", "checks", "importing", "__init__"}  # passages, in which nothing is worked out


def room_of(code: CodeType) -> str | None:
    """The module of rkl that a function is written in; None outside, and while it is imported."""
    path = Path(code.co_filename)
    if code.co_name == "<module>" or not path.is_relative_to(SOURCE):
        return None
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    return None if name in IGNORED else name


@dataclass
class Walk:
    """The entries of one journey, in their order.

    Attributes:
        entries: Room and function of the caller, room and function that are entered.
    """

    entries: dict[tuple[str, str, str, str], None] = field(default_factory=dict)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Follow all calls of this thread within the block."""
        rooms: dict[CodeType, str | None] = {}

        def look(code: CodeType) -> str | None:
            if code not in rooms:
                rooms[code] = room_of(code)
            return rooms[code]

        def profile(frame: FrameType, event: str, _argument: Any) -> None:
            if event != "call" or (room := look(frame.f_code)) is None:
                return
            above = frame.f_back
            while above is not None and look(above.f_code) is None:
                above = above.f_back
            caller = ("", "") if above is None else (look(above.f_code) or "", name_of(above))
            if caller[0] != room:
                self.entries.setdefault((*caller, room, name_of(frame)))

        previous = sys.getprofile()
        sys.setprofile(profile)
        threading.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(previous)
            threading.setprofile(None)

    def rooms(self) -> list[str]:
        """The files entered, in the order in which they are entered first."""
        return list(dict.fromkeys(room for _, _, room, _ in self.entries))

    def returns(self) -> int:
        """Entries into a room that was entered before."""
        return len(self.entries) - len(self.rooms())

    def climbs(self, graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
        """Pairs of files, the second of which is entered from the first and imports it."""
        reach = {name: reachable(name, graph) for name in graph}
        return [
            (caller, room)
            for caller, _, room, _ in self.entries
            if caller and caller in reach.get(room, set())
        ]


def name_of(frame: FrameType) -> str:
    """The function of a frame; what is within it, such as a comprehension, counts as it does."""
    return frame.f_code.co_qualname.partition(".<locals>")[0]


def reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    """The modules that one imports, directly or through others."""
    reached: set[str] = set()
    left = list(graph[start])
    while left:
        module = left.pop()
        if module not in reached:
            reached.add(module)
            left.extend(graph[module])
    return reached


def import_graph() -> dict[str, set[str]]:
    """What every module of rkl imports of the others, without the prefix "rkl."."""
    files = sorted(SOURCE.rglob("*.py"))
    trees = {path: ast.parse(path.read_text("utf-8")) for path in files}
    graph = house.graph_of(house.modules_in(files, SOURCE), trees)
    return {short(name): {short(other) for other in them} for name, them in graph.items()}


def short(module: str) -> str:
    """The name of a module within rkl."""
    return module.removeprefix("rkl").removeprefix(".")


def batch_in_compute_loss(folder: Path) -> Callable[[], Any]:
    """One batch of a distillation under AKL."""
    from distill.material import model
    from transformers import default_data_collator

    from rkl.distill import DistillConfig, DistillTrainer

    rows = [{"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]} for _ in range(4)]
    settings = {"use_cpu": True, "disable_tqdm": True, "log_level": "error", "max_steps": 1}
    args = DistillConfig(str(folder / "out"), compiled=False, **settings)
    student, teacher = model(1, 8, seed=2), model(2, 16, seed=1)
    trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=rows)
    batch = default_data_collator(rows)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return lambda: trainer.compute_loss(trainer.model, batch).backward()


def target_in_fit_to_target(_folder: Path) -> Callable[[], Any]:
    """A flow fitted to eight Gaussians for two steps."""
    sample, flows = packages()
    architecture = flows.NSF(transforms=1, hidden=(8,))
    target = sample.parse_target("mog8()")
    return lambda: sample.fit_to_target(
        architecture.build(target.event_shape, len(target.conditions)), target, steps=2
    )


def posterior_in_bayes_act(_folder: Path) -> Callable[[], Any]:
    """The Bayes act of a normal distribution under reverse KL, from draws of its parameters."""
    from rkl.bayes import bayes_act

    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    scale = (0.1 * torch.randn(4, 200, generator=generator, dtype=torch.float64)).exp()
    return lambda: bayes_act({"mu": loc, "sigma": scale}, family="normal(loc=mu, scale=sigma)")


def proposal_in_independent_metropolis(_folder: Path) -> Callable[[], Any]:
    """Chains on eight Gaussians with proposals of a normal distribution."""
    sample, _flows = packages()
    target = sample.parse_target("mog8()")
    normal = torch.distributions.Normal(torch.zeros(1, 2), 3.0)
    proposal = torch.distributions.Independent(normal, 1)
    condition = torch.tensor([[0.5]])
    return lambda: sample.independent_metropolis(target, proposal, condition, draws=20, chains=2)


def settings_in_distill(folder: Path) -> Callable[[], Any]:
    """A whole small run of ``rkl distill``, from its settings."""
    from distill import material

    from rkl.distill.run import distill

    material.write(folder)
    return lambda: distill(material.settings(folder, max_steps=1), folder / "run")


def packages() -> tuple[Any, Any]:
    """The packages of targets and of architectures, which were one before."""
    from rkl import flows

    try:
        from rkl import sample
    except ImportError:
        return flows, flows
    return sample, flows


WALKS = {
    walk.__name__.replace("_", " "): walk
    for walk in (
        batch_in_compute_loss,
        target_in_fit_to_target,
        posterior_in_bayes_act,
        proposal_in_independent_metropolis,
        settings_in_distill,
    )
}


def trace(name: str) -> Walk:
    """Take one of the walks."""
    walk = Walk()
    with tempfile.TemporaryDirectory() as folder:
        journey = WALKS[name](Path(folder))
        with walk.record():
            journey()
    return walk


def main(names: list[str]) -> None:
    """Print the walks with these names, or all of them."""
    graph = import_graph()
    print(f"{'walk':40}{'rooms':>7}{'climbs':>8}{'returns':>9}")
    walks = {name: trace(name) for name in names or WALKS}
    for name, walk in walks.items():
        climbs = walk.climbs(graph)
        print(f"{name:40}{len(walk.rooms()):7}{len(climbs):8}{walk.returns():9}")
    for name, walk in walks.items():
        print(f"\n{name}: {', '.join(walk.rooms())}")
        for caller, room in dict.fromkeys(walk.climbs(graph)):
            print(f"  climbs from {caller} to {room}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""One thin function per command: it declares its flags and returns what runs them.

What can be chosen is a dataclass of settings, of the wing or of this file; ``--out`` and its like
say where a run is. The first line of a command's docstring is its summary in ``rkl --help``, the
rest its examples. A wing is imported only here, inside the command that needs it.
"""

import importlib
import json
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl import demos, runs, studies
from rkl.cli import settings
from rkl.cli.documentation import documentation, without_markup
from rkl.cli.settings import path
from rkl.cli.terminal import in_words, root_cause
from rkl.text import printable

if TYPE_CHECKING:
    from rkl.divergences import Divergence

Runner = Callable[[Namespace], None]
Command = Callable[[ArgumentParser, Sequence[str]], Runner]
HERE = Path(__file__).parents[1]
WORD = {"positional": True}
MADE_BY = {  # the command that makes the runs of each wing
    "distill": "rkl distill",
    "fit": "rkl fit --data",
    "sample": "rkl fit --target",
    "bayes": "rkl estimate",
}

# Flags that say where a run is and what becomes of the one that is there.
FLAGS: Mapping[str, dict[str, Any]] = {
    "out": {"type": path, "metavar": "RUN", "help": "the folder to write"},
    "overwrite": {"action": "store_true", "help": "replace the run there"},
    "resume": {"action": "store_true", "help": "continue the run there"},
    "verify": {
        "action": "store_true",
        "help": "read all files that rkl wrote into the run, compare their sha256, and print "
        "their number",
    },
    "dry_run": {
        "action": "store_true",
        "help": "print size, time and memory, and write nothing",
    },
}


@dataclass(frozen=True)
class DivergencesSettings:
    """The divergence that ``rkl divergences`` explains.

    Args:
        name: A divergence; all of them if left out.
    """

    name: str | None = field(default=None, metadata=WORD)


@dataclass(frozen=True)
class DemoSettings:
    """The demonstration that ``rkl demo`` runs.

    Args:
        name: Name of the demonstration.
        steps: Steps of each distillation; by default as many as fit a few minutes.
        seed: Random seed.
        device: Device, such as cpu or cuda; by default a GPU if there is one and it is useful.
    """

    name: str = field(default="distill", metadata=WORD | {"choices": demos.DEMOS})
    steps: int | None = None
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class StudySettings:
    """The paper and the claim that ``rkl study`` tests.

    Args:
        name: The paper.
        part: One of its claims; by default the first.
        data: What a part reads that is no part of rkl: the file of images of precision-recall, or
            the file or folder of instructions of akl, in the format of self-instruct.
        seed: Random seed.
        device: Device to compute on.
    """

    name: str = field(metadata=WORD | {"choices": studies.papers()})
    part: str | None = None
    data: Path | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class MetricsSettings:
    """The samples that ``rkl metrics`` compares, and its settings.

    Args:
        real: Samples of the target, [samples, features].
        fake: Samples of the model, [samples, features].
        k: Neighbour at the radius of a ball.
        inclusive: Closed balls, not open ones.
        standardise: Divide each column by its spread among the real samples.
        train: Training rows of the model, other than --real: samples that are copies of them
            are counted.
        json: Print JSON instead of a table.
        seed: Random seed.
    """

    real: Path = field(metadata={"metavar": "FILE"})
    fake: Path = field(metadata={"metavar": "FILE"})
    k: int = 5
    inclusive: bool = False
    standardise: bool = False
    train: Path | None = field(default=None, metadata={"metavar": "FILE"})
    json: bool = False
    seed: int = 0


@dataclass(frozen=True)
class EvidenceSettings:
    """The target of ``rkl evidence``, and the settings of its particles.

    Args:
        target: Unnormalised density: "xy(side=8)", or "module:function(event_shape=(2,))".
        condition: Conditions: "T=0.9" or "T=0.5:1.5"; by default the whole range of the target.
        values: Values of the first condition.
        particles: Particles of an island.
        islands: Independent populations.
        seed: Random seed.
        device: Always cpu: targets are computed there.
    """

    target: str
    condition: str | None = field(default=None, metadata={"metavar": "RANGES"})
    values: int = field(default=8, metadata={"metavar": "N"})
    particles: int = field(default=512, metadata={"metavar": "N"})
    islands: int = field(default=8, metadata={"metavar": "N"})
    seed: int = 0
    device: str = "cpu"


def divergences(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """List the divergences, or explain one.

    Examples:
      rkl divergences
      rkl divergences "akl(mu=0.3)"
      rkl divergences "0.5*kl + 0.5*my_package.losses:Mine"
    """

    def show(chosen: DivergencesSettings, _parsed: Namespace) -> None:
        _explain(chosen.name) if chosen.name else _list()

    return _command(parser, DivergencesSettings, show)


def distill(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Train a student to imitate a teacher under a divergence.

    Examples:
      rkl distill --teacher T --student S --data train.jsonl --divergence "akl(mu=0.5)" --out RUN
      rkl distill --config settings.yaml --out RUN --dry-run
      rkl distill --out RUN --resume
      rkl distill --config RUN --divergence reverse-kl --out RUN2
    """
    from rkl import distill as wing

    def dry_run(chosen: Any) -> Any:
        return wing.dry_run(chosen)

    def make(chosen: Any, out: Path, **how: Any) -> Any:
        return wing.distill(chosen, out, **how)

    return _run_command(parser, wing.DistillSettings, dry_run, make)  # help waits for no model


def cache(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Store a teacher's outputs on some text, for any number of runs.

    Examples:
      rkl cache --teacher T --data train.jsonl --out CACHE
      rkl cache --teacher T --data train.jsonl --keep top-k=64 --out CACHE --dry-run
      rkl distill --teacher CACHE --student S --data train.jsonl --out RUN
    """
    from rkl.distill import cache_run

    settings.add_flags(parser, cache_run.CacheSettings)
    group = parser.add_argument_group("the cache")
    group.add_argument("--out", type=path, required=True, metavar="CACHE", help="its folder")
    group.add_argument("--overwrite", action="store_true", help="replace the cache that is there")
    group.add_argument("--resume", action="store_true", help="go on with the cache that is there")
    group.add_argument(
        "--dry-run", action="store_true", help="say what it takes, and when it pays"
    )

    def cached(parsed: Namespace) -> None:
        chosen = settings.gather(cache_run.CacheSettings, parsed)
        if parsed.dry_run:
            _show(cache_run.dry_run_cache(chosen))
        else:
            how = {"resume": parsed.resume, "overwrite": parsed.overwrite}
            _show(cache_run.told(cache_run.write_cache(chosen, parsed.out, **how)))

    return cached


def demo(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Run a small problem from start to end, with a report.

    Examples:
      rkl demo
      rkl demo distill --out runs/demo
      rkl demo real --out runs/demo-real --steps 60
      rkl demo neyman-scott --out runs/neyman-scott
      rkl demo precision-recall --out runs/precision-recall
      rkl demo xy --out runs/xy
      rkl demo --resume
    """

    def show(chosen: DemoSettings, parsed: Namespace) -> str:
        how = {"overwrite": parsed.overwrite, "resume": parsed.resume}
        return demos.run(out=parsed.out, **vars(chosen), **how)

    run = _command(parser, DemoSettings, show)
    _add_flags(parser, "out", "overwrite", "resume", default=Path("runs/demo"))
    return run


def study(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Test the claims of a paper, and write the figures.

    Examples:
      rkl study akl --part toy --out runs/akl
      rkl study akl --part language --data INSTRUCTIONS.jsonl
      rkl study neyman-scott
      rkl study neyman-scott --part errors-in-variables
      rkl study advnf --part xy
      rkl study precision-recall --part mnist --data t10k-images-idx3-ubyte.gz
    """

    def test(chosen: StudySettings, parsed: Namespace) -> Path:
        parsed.out = parsed.out or studies.default_folder(chosen.name, chosen.part)
        how = {"overwrite": parsed.overwrite, "resume": parsed.resume}
        how |= {name: getattr(chosen, name) for name in ("data", "seed", "device")}
        return studies.run(chosen.name, chosen.part, parsed.out, **how)

    run = _command(parser, StudySettings, test)
    _add_flags(parser, "out", "overwrite", "resume")
    return run


def _as_json(result: Any) -> str:
    """A result as JSON, null where a number is not finite."""
    return json.dumps(runs.finite_or_null(result.to_dict()), indent=2, allow_nan=False)


def estimate(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Find the single value of a posterior to report, with its error.

    Examples:
      rkl estimate posterior.nc --family "normal(loc=mu, scale=sigma)"
      rkl estimate posterior.nc --family "poisson(rate=lam)" --divergence js --log-posterior lp
      rkl estimate draws.zarr --family "normal(loc=theta, scale=10)" --prob 0.9 --out RUN
      rkl estimate chain_*.csv --family "normal(loc=mu, scale=sigma)"
    """
    from rkl.bayes import run as wing

    def report_value(chosen: wing.EstimateSettings, parsed: Namespace) -> Any:
        estimate = wing.estimate(chosen, parsed.out, overwrite=parsed.overwrite)
        return _as_json(estimate) if parsed.json else estimate

    def with_chains(parsed: Namespace) -> None:
        if parsed.chains:
            parsed.further = [*getattr(parsed, "further", ()), *parsed.chains]
        run(parsed)

    run = _command(parser, wing.EstimateSettings, report_value)
    more = {"type": path, "nargs": "*", "default": [], "metavar": "FILE"}
    parser.add_argument("chains", help="more chains of CmdStan", **more)  # as a shell lists them
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_flags(parser, "out", "overwrite")
    return with_chains


def metrics(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Measure samples against real ones: precision, recall and more, with errors.

    Examples:
      rkl metrics --real real.npy --fake samples.npy
      rkl metrics --real real.npy --fake samples.npy --k 3 --inclusive --json
      rkl metrics --real held-out.csv --fake samples.csv --train train.csv --standardise
    """

    def measure(chosen: MetricsSettings, _parsed: Namespace) -> Any:
        from rkl.metrics import samples

        arrays, notes = samples.read_both(chosen.real, chosen.fake, chosen.train)
        how = {name: getattr(chosen, name) for name in ("k", "inclusive", "standardise", "seed")}
        scores = samples.measure(**arrays, **how)
        scores = replace(scores, notes=[*scores.notes, *notes])
        return _as_json(scores) if chosen.json else scores

    return _command(parser, MetricsSettings, measure)


def fit(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Fit a normalizing flow to data, or to an unnormalised density.

    Examples:
      rkl fit --data data.npy --out RUN
      rkl fit --target "xy(side=8)" --out RUN
      rkl fit --target "mine:log_prob(event_shape=(2,))" --divergence reverse-kl --out RUN
      rkl fit --data data.npy --divergence "precision-recall(lam=10)" --minutes 5 --out RUN
      rkl fit --data images/ --flow "multi-scale(scales=2)" --critic --out RUN
      rkl fit --start-from RUN --distil-budget 4 --steps 500 --out RUN2
      rkl fit --out RUN --resume
    """
    if settings.is_set("target", words):
        from rkl.sample import run as wing

        return _run_command(parser, wing.TargetSettings, wing.dry_run, wing.fit_target)
    from rkl.fit import run as wing

    if {"-h", "--help"} & set(words):
        from rkl.sample import run as other

        parser.description = f"{parser.description}\n\n{TWO_WAYS}"
        flags = _help_of(parser, other.TargetSettings, "settings, with --target")
        parser.epilog = f"{flags}\n\n{parser.epilog}"
    title = "settings, with --data"
    return _run_command(parser, wing.FitSettings, wing.dry_run, wing.fit, title, _start)


TWO_WAYS = """two ways in:
  --data DATA                 fit to rows of a file or to a folder of images
  --target TARGET             fit to an unnormalised density, without data"""


def _start(parsed: Namespace) -> Path | None:
    """The run to distil from, whose settings are the defaults."""
    if not hasattr(parsed, "distil_budget"):
        return None
    for name in ("budget", "target_precision", "critic"):
        if hasattr(parsed, name):
            raise ValueError(
                f"{name} does not go with distil_budget: what is distilled rejects none."
            )
    return getattr(parsed, "start_from", None)


def evidence(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Find log Z of a target, and draw from it, by sequential Monte Carlo without any flow.

    Examples:
      rkl evidence --target "mine:log_prob(event_shape=(2,))"
      rkl evidence --target "xy(side=4)" --condition T=0.5:1.5 --values 5 --out draws.npz
    """

    def find(chosen: EvidenceSettings, parsed: Namespace) -> str:
        from rkl.sample.evidence_run import find_evidence

        return find_evidence(**vars(chosen), out=parsed.out, overwrite=parsed.overwrite)

    run = _command(parser, EvidenceSettings, find)
    words_of_out = "write the draws too: .npz with x and condition, as fit and evaluate read them"
    parser.add_argument("--out", type=path, metavar="FILE", help=words_of_out)
    _add_overwrite_flag(parser)
    return run


def sample(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Draw samples of the flow of a run, at the trade-off of your choice.

    Examples:
      rkl sample RUN -n 10000 --out samples.npy
      rkl sample RUN -n 10000 --budget 4 --out samples.npy
      rkl sample RUN --latent-temperature 0.8 --out samples.csv
      rkl sample RUN --condition T=0.9 -n 100000 --out chains.nc
    """
    return _on_run(parser, words, "sample")


def generate(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Generate text with the model of a run.

    Examples:
      rkl generate RUN --data prompts.jsonl --seeds 3
    """
    return _on_run(parser, words, "generate")


def judge(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Compare the replies of two runs by a chat model on a server.

    Examples:
      rkl judge RUN1 RUN2 --judge http://localhost:8000/v1 --out verdicts.jsonl --dry-run
      rkl judge RUN1 RUN2 --judge http://localhost:8000/v1 --out verdicts.jsonl
      rkl judge RUN1 RUN2 --judge http://localhost:8000/v1 --out verdicts.jsonl --resume
    """
    from rkl.distill import judge as wing

    def compare_replies(chosen: wing.JudgeSettings, parsed: Namespace) -> Any:
        replies = parsed.first, parsed.second
        if parsed.dry_run:
            return wing.judge_cost(*replies, chosen)
        if parsed.resume and parsed.overwrite:
            raise ValueError("overwrite and resume exclude one another; got both.")
        how = {"resume": parsed.resume, "overwrite": parsed.overwrite}
        judged = wing.judge_runs(*replies, chosen, parsed.out, **how)
        return _as_json(judged) if parsed.json else judged

    for name in ("first", "second"):
        described = "a run with replies of rkl generate, or JSON lines with prompt and text"
        parser.add_argument(name, type=path, metavar="RUN", help=described)
    run = _command(parser, wing.JudgeSettings, compare_replies)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    out = {"required": True, "metavar": "FILE", "help": "the file of verdicts, JSON lines"}
    parser.add_argument("--out", type=path, **out)
    parser.add_argument("--resume", action="store_true", help="go on with the verdicts in --out")
    _add_overwrite_flag(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="count requests and tokens, and ask nothing"
    )
    return run


def evaluate(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Measure a run on data held out from it or on its target, or compare any two models.

    Examples:
      rkl evaluate RUN --data heldout.jsonl
      rkl evaluate RUN --data heldout.txt --divergences todi --prompts 0
      rkl evaluate RUN --reference --strict
      rkl evaluate STUDENT --teacher BASE --data heldout.txt
    """
    before = ["", *words]
    named = [word for word, last in zip(words, before, strict=False) if last != "--teacher"]
    run = any(Path(word, "run.json").is_file() for word in named)
    if not run and settings.is_set("teacher", words):
        return _on_models(parser)
    runner = _on_run(parser, words, "evaluate")
    if not run and {"-h", "--help"} & set(words):
        shown = _flags_by_kind(parser, "PairSettings", "settings of two models")
        parser.epilog = "\n\n".join([str(parser.epilog), *shown])
    return runner


def _on_models(parser: ArgumentParser) -> Runner:
    """Flags for the comparison of two models that need not be runs."""
    from rkl import distill

    words = "the model to compare: a folder, a .gguf file, package:NAME or a name on the Hub"
    parser.add_argument("student", metavar="STUDENT", help=words)

    def compare_pair(chosen: distill.PairSettings, parsed: Namespace) -> Any:
        return distill.evaluate_pair(parsed.student, chosen)

    return _command(parser, distill.PairSettings, compare_pair)


def compare(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Compare runs in one table and one report.

    Examples:
      rkl compare RUN1 RUN2 --out comparison.html
    """
    return _across_runs(parser, "compare_runs")


def report(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Write the report of one run or more, a single HTML file.

    Examples:
      rkl report RUN
      rkl report RUN1 RUN2 --out report.html
    """
    return _across_runs(parser, "report_runs")


# Each command, and the module without which it is not there.
COMMANDS: dict[str, tuple[Command, str]] = {
    "demo": (demo, "demos"),
    "distill": (distill, "distill.run"),
    "cache": (cache, "distill.run"),
    "estimate": (estimate, "bayes.run"),
    "metrics": (metrics, "metrics"),
    "fit": (fit, "fit.run"),
    "evidence": (evidence, "sample.run"),
    "sample": (sample, "sample.run"),
    "generate": (generate, "distill.run"),
    "judge": (judge, "distill.judge"),
    "evaluate": (evaluate, "runs"),
    "compare": (compare, "runs"),
    "report": (report, "runs"),
    "study": (study, "studies"),
    "divergences": (divergences, "divergences"),
}


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from rkl.divergences import catalogue

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("name", "D(p ‖ q)", "properties"):
        table.add_column(heading)
    for name, cls in catalogue().items():
        holding = [word for word, holds in _properties(cls()).items() if holds]
        table.add_row("\n".join([name, *cls.aliases]), _sentence(cls), ", ".join(holding))
    console = Console(highlight=False)
    with console.capture() as shown:  # rich itself would exit where nobody reads it any more
        console.print(table)
        console.print("\np is the target, q the model. rkl divergences NAME explains one.")
    print(shown.get(), end="")


def _sentence(explained: Any) -> str:
    return without_markup(documentation(explained)).partition("\n")[0]


def _properties(divergence: "Divergence") -> dict[str, bool]:
    """Properties computed from the formula; only an f-divergence can be sampled."""
    from rkl.divergences import FDivergence

    sampled = isinstance(divergence, FDivergence)
    return {
        "f-divergence": sampled,
        "exact only": not sampled,
        "symmetric": divergence.symmetric,
        "bounded": divergence.bounded,
        "scale-free": sampled and divergence.scale_free,
    }


def _explain(text: str) -> None:
    from rkl.divergences import FDivergence, parse

    divergence = parse(text)
    print(f"{divergence!r}\n\n{without_markup(documentation(divergence))}\n")
    for word, holds in _properties(divergence).items():
        print(f"{word:14}{'yes' if holds else 'no'}")
    if isinstance(divergence, FDivergence):
        from rkl.metrics.precision_recall.spectrum import spectrum_text

        print(f"\n{spectrum_text(divergence)}")


def _command(
    parser: ArgumentParser, wanted: type, verb: Callable[[Any, Namespace], Any]
) -> Runner:
    """Flags of these settings, and a function that calls the verb and prints its result."""
    settings.add_flags(parser, wanted)

    def run(parsed: Namespace) -> None:
        result = verb(settings.gather(wanted, parsed), parsed)
        if result is not None:
            _show(result)

    return run


def _run_command(
    parser: ArgumentParser,
    wanted: type,
    dry_run: Callable[[Any], Any],
    make: Callable[..., Any],
    title: str = "settings",
    start: Callable[[Namespace], Path | None] = lambda parsed: None,
) -> Runner:
    """Flags of a command that makes a run; a resumed run's settings are its defaults."""
    settings.add_flags(parser, wanted, title)
    _add_flags(parser, *FLAGS, required=True)

    def run(parsed: Namespace) -> None:
        if parsed.verify and not parsed.resume:
            raise ValueError("verify goes with --resume: there is nothing to verify before a run.")
        exists = (parsed.out / "run.json").exists()
        _verify(parsed, *([parsed.out] if exists else []))
        earlier = parsed.out if parsed.resume and exists else start(parsed)
        chosen = settings.gather(wanted, parsed, earlier)
        if parsed.dry_run:
            _show(dry_run(chosen))
        else:
            _show(make(chosen, parsed.out, resume=parsed.resume, overwrite=parsed.overwrite))

    return run


def _add_flags(
    parser: ArgumentParser, *names: str, required: bool = False, default: Path | None = None
) -> None:
    group = parser.add_argument_group("the run")
    for name in names:
        how = {"required": required, "default": default} if name == "out" else {}
        group.add_argument(f"--{name.replace('_', '-')}", **FLAGS[name], **how)


def _verify(parsed: Namespace, *folders: Path) -> None:
    """Verify runs if --verify is given; the line goes to stderr, only the result to stdout."""
    for folder in folders if parsed.verify else ():
        print(printable(runs.Run.open(folder).verify()), file=sys.stderr)


def _on_run(parser: ArgumentParser, words: Sequence[str], name: str) -> Runner:
    """A verb on one run, with the settings of the wing that made it as flags.

    Without a run, the help shows the flags of all kinds of runs.
    """
    parser.add_argument("run", type=_run, metavar="RUN", help="the folder of a run of any kind")
    parser.add_argument("--verify", **FLAGS["verify"])
    rest = words[list(words).index(name) + 1 :] if name in words else words
    named = [word for word in rest if Path(word, "run.json").is_file()]
    flags = f"{name.capitalize()}Settings"
    wanted: Any = runs.verb(flags, named[0]) if named else None
    if wanted:
        settings.add_flags(parser, wanted)
    if name != "evaluate":
        _add_overwrite_flag(parser)
    if not wanted and {"-h", "--help"} & set(words):
        parser.epilog = "\n\n".join([str(parser.epilog), *_flags_by_kind(parser, flags)])

    def run(parsed: Namespace) -> None:
        chosen: Any = settings.gather(wanted, parsed)
        how = {} if name == "evaluate" else {"overwrite": parsed.overwrite}
        _verify(parsed, parsed.run)
        _show(runs.verb(f"{name}_run", parsed.run)(parsed.run, chosen, **how))

    return run


def _flags_by_kind(parser: ArgumentParser, name: str, title: str = "") -> Iterator[str]:
    """Help of the settings of this name, wing by wing, read from their sources."""
    for source in sorted(HERE.glob("*/__init__.py")):
        if name in source.read_text("utf-8"):
            wing = source.parent.name
            heading = title or f"settings, where {MADE_BY.get(wing, f'rkl {wing}')} made RUN"
            try:
                wanted = getattr(importlib.import_module(f"rkl.{wing}"), name)
            except Exception as error:  # a broken package of one wing leaves the help of the rest
                yield f"{heading}:\n  not shown: {in_words(root_cause(error))}"
            else:
                yield _help_of(parser, wanted, heading)


def _help_of(parser: ArgumentParser, wanted: type, title: str) -> str:
    how: Any = {"add_help": False, "formatter_class": parser.formatter_class}
    alone = ArgumentParser(usage=SUPPRESS, **how)
    settings.add_flags(alone, wanted, title)
    return alone.format_help().strip()


def _run(text: str) -> Path:
    """A folder that holds a run, checked before its flags are."""
    try:
        return runs.Run.open(text).path
    except (FileNotFoundError, ValueError) as error:
        raise ArgumentTypeError(str(error)) from None


def _across_runs(parser: ArgumentParser, name: str) -> Runner:
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=path, default=None, metavar="FILE", help="the HTML file")
    _add_overwrite_flag(parser)
    parser.add_argument("--verify", **FLAGS["verify"])

    def run(parsed: Namespace) -> None:
        settings.refuse_device(parsed)
        _verify(parsed, *parsed.runs)
        how = {"out": parsed.out, "overwrite": parsed.overwrite}
        _show(runs.verb(name, *parsed.runs)(parsed.runs, **how))

    return run


def _add_overwrite_flag(parser: ArgumentParser) -> None:
    words = "replace the file at --out"
    parser.add_argument("--overwrite", action="store_true", help=words)


def _show(result: Any) -> None:
    """Print a result, with terminal controls in names escaped."""
    print(printable(result))

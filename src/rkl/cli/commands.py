"""One thin function per command: it declares its arguments and returns what runs them.

The first line of its docstring is its summary in ``rkl --help``, the rest its examples. A wing
is imported only here, inside the command that needs it.
"""

import importlib
import json
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkl import runs
from rkl.cli import settings
from rkl.cli.documentation import documentation
from rkl.cli.settings import path
from rkl.cli.terminal import in_words, root_cause
from rkl.text import printable

if TYPE_CHECKING:
    from rkl.divergences import Divergence

Runner = Callable[[Namespace], None]
Command = Callable[[ArgumentParser, Sequence[str]], Runner]
HERE = Path(__file__).parents[1]


def divergences(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """List the divergences, or explain one.

    Examples:
      rkl divergences
      rkl divergences "akl(mu=0.3)"
      rkl divergences "0.5*kl + 0.5*my_package.losses:Mine"
    """
    parser.add_argument("name", nargs="?", help="a divergence; all of them if left out")
    return lambda parsed: _explain(parsed.name) if parsed.name else _list()


def distill(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Train a student to imitate a teacher under a divergence.

    Examples:
      rkl distill --teacher T --student S --data train.jsonl --divergence "akl(mu=0.5)" --out RUN
      rkl distill --config settings.yaml --out RUN --dry-run
      rkl distill --out RUN --resume
      rkl distill --config RUN --divergence reverse-kl --out RUN2
    """
    from rkl.distill import run

    settings.add_flags(parser, run.DistillSettings)
    _add_run_flags(parser)

    def distilled(parsed: Namespace) -> None:
        _verify_resumed(parsed)
        earlier = parsed.out if parsed.resume and (parsed.out / "run.json").exists() else None
        chosen = settings.gather(run.DistillSettings, parsed, earlier)
        if parsed.dry_run:
            _show(run.estimate(chosen))
        else:
            how = {"resume": parsed.resume, "overwrite": parsed.overwrite}
            _show(run.distill(chosen, parsed.out, **how))

    return distilled


def demo(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Watch the whole of rkl at work on a small problem, and read the report.

    Examples:
      rkl demo
      rkl demo distill --out runs/demo
      rkl demo real --out runs/demo-real --steps 60
      rkl demo neyman-scott --out runs/neyman-scott
      rkl demo precision-recall --out runs/precision-recall
      rkl demo xy --out runs/xy
    """
    known = "distill (default), real, neyman-scott, precision-recall or xy"
    parser.add_argument("name", nargs="?", default="distill", help=known)
    parser.add_argument("--steps", type=int, metavar="N", help="of each distillation")
    _add_out_flags(parser, Path("runs/demo"), resumable=True)

    def demonstrated(parsed: Namespace) -> None:
        from rkl import demos

        how = {name: getattr(parsed, name) for name in ("steps", "overwrite", "resume")}
        how |= _common(parsed)
        _show(demos.run(parsed.name, parsed.out, **how))

    return demonstrated


def study(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Test what a paper claims, and write the figures.

    Examples:
      rkl study akl --part toy --out runs/akl
      rkl study neyman-scott
      rkl study neyman-scott --part errors-in-variables
      rkl study advnf --part xy
      rkl study precision-recall --part mnist --data t10k-images-idx3-ubyte.gz
    """
    from rkl import studies

    parser.add_argument("name", choices=studies.papers(), help="the paper")
    parser.add_argument("--part", help="which of its claims; the first of them by default")
    parser.add_argument("--data", type=path, help="what a part reads that rkl does not have")
    _add_out_flags(parser, None, resumable=True)

    def studied(parsed: Namespace) -> None:
        parsed.out = parsed.out or studies.default_folder(parsed.name, parsed.part)
        how = {name: getattr(parsed, name) for name in ("overwrite", "resume", "data")}
        _show(studies.run(parsed.name, parsed.part, parsed.out, **how, **_common(parsed)))

    return studied


def estimate(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Say which single value to report of a posterior, with its error.

    Examples:
      rkl estimate posterior.nc --family "normal(loc=mu, scale=sigma)"
      rkl estimate posterior.nc --family "poisson(rate=lam)" --divergence js --log-posterior lp
      rkl estimate draws.zarr --family "normal(loc=theta, scale=10)" --prob 0.9 --out RUN
      rkl estimate chain_*.csv --family "normal(loc=mu, scale=sigma)"
    """
    from rkl.bayes import run
    from rkl.bayes.settings import EstimateSettings

    settings.add_flags(parser, EstimateSettings)
    parser.add_argument(  # the chains of CmdStan, which a shell lists behind the first
        "chains",
        type=path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="more chains of CmdStan",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_out_flags(parser, None)

    def estimated(parsed: Namespace) -> None:
        if parsed.chains:
            parsed.further = [*getattr(parsed, "further", ()), *parsed.chains]
        chosen = settings.gather(EstimateSettings, parsed)
        found = run.estimate(chosen, parsed.out, overwrite=parsed.overwrite)
        _show(json.dumps(found.to_dict(), indent=2) if parsed.json else found)

    return estimated


def metrics(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Measure samples against real ones: precision, recall and more, with errors.

    Examples:
      rkl metrics --real real.npy --fake samples.npy
      rkl metrics --real real.npy --fake samples.npy --k 3 --inclusive --json
      rkl metrics --real held-out.csv --fake samples.csv --train train.csv --standardise
    """
    for side, of in (("real", "the target"), ("fake", "the model")):
        says = f"samples of {of}, [samples, features] (required)"
        parser.add_argument(f"--{side}", type=path, required=True, metavar="FILE", help=says)
    parser.add_argument("--k", type=int, default=5, help="which neighbour (default: 5)")
    parser.add_argument("--inclusive", action="store_true", help="closed balls, not open ones")
    says = "divide each column by its spread among the real samples"
    parser.add_argument("--standardise", action="store_true", help=says)
    says = "what the model was trained on, where --real was not: are the samples copies of it?"
    parser.add_argument("--train", type=path, metavar="FILE", help=says)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def measured(parsed: Namespace) -> None:
        from rkl.metrics import samples

        arrays, notes = samples.read_both(parsed.real, parsed.fake, parsed.train)
        seed = {name: value for name, value in _common(parsed).items() if name == "seed"}
        how = {name: getattr(parsed, name) for name in ("k", "inclusive", "standardise")}
        found = samples.measure(**arrays, **how, **seed)
        found = replace(found, notes=[*found.notes, *notes])
        _show(json.dumps(found.to_dict(), indent=2) if parsed.json else found)

    return measured


def fit(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Fit a normalizing flow to data, or to an unnormalised density.

    Examples:
      rkl fit --data data.npy --out RUN
      rkl fit --target "xy(side=8)" --out RUN
      rkl fit --target "mine:log_prob(event_shape=(2,))" --divergence reverse-kl --out RUN
      rkl fit --data data.npy --divergence "precision-half(lam=10)" --minutes 5 --out RUN
      rkl fit --data images/ --flow "multi-scale(scales=2)" --critic --out RUN
      rkl fit --start-from RUN --distil-budget 4 --steps 500 --out RUN2
      rkl fit --out RUN --resume
    """
    from rkl.fit import run
    from rkl.sample import run as target_run

    wanted, dry_run, run_fit = run.FitSettings, run.dry_run, run.fit
    if settings.is_set("target", words):
        wanted = target_run.TargetSettings
        dry_run, run_fit = target_run.dry_run, target_run.fit_target
    elif {"-h", "--help"} & set(words):
        flags = _help_of(parser, target_run.TargetSettings, "settings, with --target")
        parser.epilog = f"{parser.epilog}\n\n{flags}"
    settings.add_flags(parser, wanted)
    _add_run_flags(parser)

    def fitted(parsed: Namespace) -> None:
        _verify_resumed(parsed)
        begun = parsed.resume and (parsed.out / "run.json").exists()
        earlier = parsed.out if begun else _distilled(wanted, parsed)
        chosen: Any = settings.gather(wanted, parsed, earlier)
        if parsed.dry_run:
            _show(dry_run(chosen))
        else:
            how = {"resume": parsed.resume, "overwrite": parsed.overwrite}
            _show(run_fit(chosen, parsed.out, **how))

    return fitted


def _distilled(wanted: type, parsed: Namespace) -> Path | None:
    """The run that a flow of data starts from, whose settings serve where no flag says others."""
    if not hasattr(parsed, "distil_budget") or not hasattr(wanted, "distil_budget"):
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
    says = 'unnormalised density: "xy(side=8)", or "module:function(event_shape=(2,))" (required)'
    parser.add_argument("--target", required=True, metavar="TARGET", help=says)
    says = 'where: "T=0.9" or "T=0.5:1.5"; by default across all of the range of the target'
    parser.add_argument("--condition", metavar="RANGES", help=says)
    says = "values of the first condition (default: 8)"
    parser.add_argument("--values", type=int, default=8, metavar="N", help=says)
    says = "particles of an island (default: 512)"
    parser.add_argument("--particles", type=int, default=512, metavar="N", help=says)
    says = "independent populations (default: 8)"
    parser.add_argument("--islands", type=int, default=8, metavar="N", help=says)
    says = "write the draws too: .npz with x and condition, as fit and evaluate --data read them"
    parser.add_argument("--out", type=path, metavar="FILE", help=says)
    _add_overwrite_flag(parser)

    def found(parsed: Namespace) -> None:
        from rkl.sample.evidence_run import find_evidence

        names = "target", "condition", "values", "particles", "islands", "out", "overwrite"
        _show(find_evidence(**{name: getattr(parsed, name) for name in names}, **_common(parsed)))

    return found


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
    """Let the model of a run write.

    Examples:
      rkl generate RUN --data prompts.jsonl --seeds 3
    """
    return _on_run(parser, words, "generate")


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
    """The comparison of two models of which neither need be a run."""
    from rkl import distill

    words = "the model to compare: a folder, a .gguf file, package:NAME or a name on the Hub"
    parser.add_argument("student", metavar="STUDENT", help=words)
    settings.add_flags(parser, distill.PairSettings)

    def compared(parsed: Namespace) -> None:
        chosen = settings.gather(distill.PairSettings, parsed)
        _show(distill.evaluate_pair(parsed.student, chosen))

    return compared


def compare(parser: ArgumentParser, words: Sequence[str]) -> Runner:
    """Put runs side by side, in one table and one report.

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
    "estimate": (estimate, "bayes.run"),
    "metrics": (metrics, "metrics"),
    "fit": (fit, "fit.run"),
    "evidence": (evidence, "sample.run"),
    "sample": (sample, "sample.run"),
    "generate": (generate, "distill.run"),
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
    console.print(table)
    console.print("\np is the target, q the model. rkl divergences NAME explains one.")


def _sentence(spectrum_text: Any) -> str:
    return documentation(spectrum_text).partition("\n")[0]


def _properties(divergence: "Divergence") -> dict[str, bool]:
    """What holds of it, computed from its formula; only an f-divergence can be sampled."""
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
    print(f"{divergence!r}\n\n{documentation(divergence)}\n")
    for word, holds in _properties(divergence).items():
        print(f"{word:14}{'yes' if holds else 'no'}")
    if isinstance(divergence, FDivergence):
        from rkl.metrics.precision_recall.spectrum import spectrum_text

        print(f"\n{spectrum_text(divergence)}")


def _add_out_flags(
    parser: ArgumentParser, default: Path | None, *, resumable: bool = False
) -> None:
    parser.add_argument(
        "--out", type=path, default=default, metavar="RUN", help="the folder to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    if resumable:
        words = "go on with the run that is there, after the last stage that it finished"
        parser.add_argument("--resume", action="store_true", help=words)


def _add_verify_flag(parser: Any) -> None:
    words = (
        "read all that rkl wrote into the run, compare it with its sha256, and say what was read"
    )
    parser.add_argument("--verify", action="store_true", help=words)


def _verify(parsed: Namespace, *folders: Path) -> None:
    """Do as --verify says; what was read is said beside the result, which stays alone."""
    for folder in folders if parsed.verify else ():
        print(printable(runs.Run.open(folder).verify()), file=sys.stderr)


def _verify_resumed(parsed: Namespace) -> None:
    if parsed.verify and not parsed.resume:
        raise ValueError("verify goes with --resume: there is nothing to verify before a run.")
    if (parsed.out / "run.json").exists():
        _verify(parsed, parsed.out)


def _add_run_flags(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--out", type=path, required=True, metavar="RUN", help="its folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    group.add_argument("--resume", action="store_true", help="go on with the run that is there")
    _add_verify_flag(group)
    group.add_argument(
        "--dry-run", action="store_true", help="say what would happen, in what time and memory"
    )


def _on_run(parser: ArgumentParser, words: Sequence[str], name: str) -> Runner:
    """A verb on one run, whose flags are settings of the wing that made it: kind by kind.

    Where no run says which kind it is, the help shows the flags of them all.
    """
    parser.add_argument("run", type=_run, metavar="RUN", help="the folder of a run of any kind")
    _add_verify_flag(parser)
    named = [word for word in words if Path(word, "run.json").is_file()]
    flags = f"{name.capitalize()}Settings"
    wanted: Any = runs.verb(flags, named[0]) if named else None
    if wanted:
        settings.add_flags(parser, wanted)
    if name != "evaluate":
        _add_overwrite_flag(parser)
    if not wanted and {"-h", "--help"} & set(words):
        parser.epilog = "\n\n".join([str(parser.epilog), *_flags_by_kind(parser, flags)])

    def done(parsed: Namespace) -> None:
        chosen: Any = settings.gather(wanted, parsed)
        how = {} if name == "evaluate" else {"overwrite": parsed.overwrite}
        _verify(parsed, parsed.run)
        _show(runs.verb(f"{name}_run", parsed.run)(parsed.run, chosen, **how))

    return done


def _flags_by_kind(parser: ArgumentParser, name: str, said: str = "") -> Iterator[str]:
    """The help of the settings of this name, wing by wing, found in their sources."""
    for source in sorted(HERE.glob("*/__init__.py")):
        if name in source.read_text("utf-8"):
            wing = source.parent.name
            title = said or f"settings, where rkl {wing} made RUN"
            try:
                wanted = getattr(importlib.import_module(f"rkl.{wing}"), name)
            except Exception as error:  # a broken package of one wing leaves the help of the rest
                yield f"{title}:\n  not shown: {in_words(root_cause(error))}"
            else:
                yield _help_of(parser, wanted, title)


def _help_of(parser: ArgumentParser, wanted: type, title: str) -> str:
    """The help of the flags of these settings alone."""
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
    _add_verify_flag(parser)

    def done(parsed: Namespace) -> None:
        _verify(parsed, *parsed.runs)
        how = {"out": parsed.out, "overwrite": parsed.overwrite}
        _show(runs.verb(name, *parsed.runs)(parsed.runs, **how))

    return done


def _add_overwrite_flag(parser: ArgumentParser) -> None:
    words = "replace the file at --out"
    parser.add_argument("--overwrite", action="store_true", help=words)


def _show(result: Any) -> None:
    """Print what a verb gives back, in which a name may hold what a terminal would obey."""
    print(printable(result))


def _common(parsed: Namespace) -> dict[str, Any]:
    """What was said of --seed and --device; the verb's own defaults serve otherwise."""
    return {name: value for name, value in vars(parsed).items() if name in settings.COMMON}

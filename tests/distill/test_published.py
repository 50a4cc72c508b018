"""Top-k log-probabilities of others: read in each form, put at their tokens, or refused."""

import material
import numpy as np
import pytest
import torch

import rkl
from rkl.distill import DistillConfig, DistillTrainer, PublishedTeacher, cache_teacher
from rkl.distill.text.batches import PadRows, shifted

K = 6
ROWS = 3


@pytest.fixture(scope="module")
def teacher():
    return material.model(2, 16, seed=1).eval()


@pytest.fixture(scope="module")
def rows(teacher):
    """Tokens that the teacher drew, so that most are among its likeliest, and their labels."""
    torch.manual_seed(5)
    prompts = torch.randint(1, material.VOCAB, (ROWS, 4))
    written = teacher.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=K,
        min_new_tokens=8,
        max_new_tokens=8,
    )
    labels = written.clone()
    labels[:, :4] = -100
    return [
        {"input_ids": one.tolist(), "labels": two.tolist()}
        for one, two in zip(written, labels, strict=True)
    ]


def of_tokens(teacher, row):
    """The top k of each token but the first, from what stands before it."""
    with torch.no_grad():
        logp = teacher(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    values, index = logp[:-1].topk(K)
    return values, index


def lists(teacher, row, places):
    """Columns of log-probabilities and tokens, at some of the places of ``of_tokens``."""
    values, index = (it.tolist() for it in of_tokens(teacher, row))
    chosen = [(values[it], index[it]) if it is not None else ([], []) for it in places]
    return {
        "target_logprobs": [it[0] for it in chosen],
        "target_token_ids": [it[1] for it in chosen],
    }


def at_own_token(teacher, row):
    return lists(teacher, row, [None, *range(len(row["input_ids"]) - 1)])


def where_predicted(teacher, row):
    columns = lists(teacher, row, [*range(len(row["input_ids"]) - 1), None])
    labels = [*row["labels"][1:], -100]
    return columns | {"target_mask": [[int(it != -100)] * K for it in labels]}


def of_the_reply(teacher, row):
    return lists(teacher, row, range(3, len(row["input_ids"]) - 1))


def of_a_server(teacher, row):
    columns = of_the_reply(teacher, row)
    return {
        "target_logprobs": [
            [
                {"token": f"token_id:{token}", "logprob": logp}
                for token, logp in zip(tokens, values, strict=True)
            ]
            for tokens, values in zip(
                columns["target_token_ids"], columns["target_logprobs"], strict=True
            )
        ]
    }


FORMS = [at_own_token, where_predicted, of_the_reply, of_a_server]


def published(teacher, rows, form):
    return PublishedTeacher([row | form(teacher, row) for row in rows], vocab=material.VOCAB)


@pytest.mark.parametrize("form", FORMS)
def test_atoms_are_put_at_the_tokens_that_they_are_of(form, teacher, rows):
    known = published(teacher, rows, form)
    assert known.rows == rows
    batch = shifted(PadRows()(rows))
    top = known.observe(batch.inputs, batch.predicting)
    parts = zip(*(of_tokens(teacher, it) for it in rows), strict=True)
    expected = [torch.cat(it) for it in parts]
    values, index = (it.reshape(ROWS, -1, K)[batch.predicting] for it in expected)
    torch.testing.assert_close(top.logp, values)
    assert torch.equal(top.index, index)


@pytest.mark.parametrize("kind", ["NumPy", "objects", "tensors", "ragged tensors", "frame"])
def test_rows_may_hold_arrays_or_be_a_data_frame(kind, teacher, rows):
    """As pandas reads them from a parquet file, and with_format of datasets gives them."""
    columns = [at_own_token(teacher, row) for row in rows]
    if kind in ("NumPy", "tensors"):  # of which all places must have as many atoms
        columns = [lists(teacher, row, [0, *range(len(row["input_ids"]) - 1)]) for row in rows]
    array = {"NumPy": np.array, "tensors": torch.tensor}.get(kind, ragged)
    if kind == "ragged tensors":
        array = as_tensors
    arrays = [{name: array(it) for name, it in row.items()} for row in columns]
    given = [row | it for row, it in zip(rows, arrays, strict=True)]
    if kind == "frame":
        given = pytest.importorskip("pandas").DataFrame(given)
    whole = [row | it for row, it in zip(rows, columns, strict=True)]
    expected = PublishedTeacher(whole, vocab=material.VOCAB)
    known = PublishedTeacher(given, vocab=material.VOCAB)
    assert known.rows == expected.rows
    assert [*known.contents()] == [*expected.contents()]


def as_tensors(places):
    return [torch.tensor(it) for it in places]


def ragged(places):
    """An array of arrays of different lengths."""
    made = np.empty(len(places), object)
    for at, it in enumerate(places):
        made[at] = np.array(it)
    return made


def test_a_token_without_atoms_is_not_trained_on(teacher, rows):
    columns = at_own_token(teacher, rows[0])
    for name in columns:
        columns[name][6] = []
    (row,) = PublishedTeacher([rows[0] | columns], vocab=material.VOCAB).rows
    labels = [*rows[0]["labels"]]
    labels[6] = -100
    assert row["labels"] == labels


def test_tokens_with_fewer_atoms_are_filled_up(teacher, rows):
    columns = of_the_reply(teacher, rows[0])
    for name in columns:
        columns[name][2] = columns[name][2][:3]
    known = PublishedTeacher([rows[0] | columns], vocab=material.VOCAB)
    batch = shifted(PadRows()(known.rows))
    top = known.observe(batch.inputs, batch.predicting)
    assert top.logp[2].isneginf().tolist() == [False] * 3 + [True] * 3
    assert len(set(top.index[2].tolist())) == K
    student = torch.zeros(8, material.VOCAB)
    assert rkl.exact(rkl.KL(), p=top, q=student).isfinite()


def test_rows_of_text_are_tokenized(teacher):
    words = material.tokenizer()
    texts = ["one two three", "the number of a module"]
    rows = []
    for text in texts:
        tokens = [*words(text)["input_ids"], words.eos_token_id]
        columns = at_own_token(teacher, {"input_ids": tokens})
        for token, atoms in zip(tokens[1:], columns["target_token_ids"][1:], strict=True):
            atoms[-1] = atoms[-1] if token in atoms else token  # as servers add the text's own
        rows.append({"text": text} | columns)
    known = PublishedTeacher(rows, vocab=material.VOCAB, tokenizer=words)
    assert [row["input_ids"][:-1] for row in known.rows] == [
        words(it)["input_ids"] for it in texts
    ]
    with pytest.raises(ValueError, match="tokenizer must be given"):
        PublishedTeacher(rows, vocab=material.VOCAB)


def test_a_student_learns_from_them_and_from_their_cache_alike(teacher, rows, tmp_path):
    known = published(teacher, rows, of_a_server)
    cached = cache_teacher(known, known.rows, tmp_path / "cache", keep=f"top-k={K}")
    losses = []
    for source in (known, cached):
        trainer = DistillTrainer(
            material.model(1, 8, seed=2),
            DistillConfig(
                str(tmp_path / "out"),
                max_steps=2,
                per_device_train_batch_size=2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
            teacher=source,
            divergence=rkl.KL(),
            train_dataset=known.rows,
        )
        with pytest.warns(UserWarning, match="of its mass"):  # as 6 of 300 atoms have
            trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history[:2]])
    assert losses[0] == losses[1]
    assert all(loss > 0 for loss in losses[0])


def test_rows_that_are_not_known_are_refused(teacher, rows):
    known = published(teacher, rows[:2], at_own_token)
    known.check_rows(rows[:2])
    with pytest.raises(ValueError, match="not among those"):
        known.check_rows(rows)


def other_tokens(row):
    return row | {"input_ids": [(it + 7) % material.VOCAB for it in row["input_ids"]]}


def without(name):
    return lambda row: {key: value for key, value in row.items() if key != name}


def with_first(value):
    def changed(row):
        values = [list(it) for it in row["target_logprobs"]]
        values[1] = [value, *values[1][1:]]
        return row | {"target_logprobs": values}

    return changed


WRONG = {
    "another tokenizer": (other_tokens, "do not fit"),
    "no column": (without("target_logprobs"), "no column 'target_logprobs'"),
    "no tokens of atoms": (without("target_token_ids"), "no column 'target_token_ids'"),
    "probabilities": (with_first(0.9), "at most 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_columns_that_do_not_fit_are_refused_by_row(case, teacher, rows):
    change, message = WRONG[case]
    row = change(rows[0] | at_own_token(teacher, rows[0]))
    with pytest.raises(ValueError, match=message):
        PublishedTeacher([row], vocab=material.VOCAB)


def test_rows_that_contradict_one_another_are_refused(teacher, rows):
    row = rows[0] | at_own_token(teacher, rows[0])
    PublishedTeacher([row, row], vocab=material.VOCAB)
    other = {**row}
    other["target_logprobs"] = [
        [value - 1.0 for value in place] if place else place for place in row["target_logprobs"]
    ]
    with pytest.raises(ValueError, match=r"row 1 has the tokens .* of an earlier row, but other"):
        PublishedTeacher([row, other], vocab=material.VOCAB)

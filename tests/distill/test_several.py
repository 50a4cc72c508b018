"""Several teachers: each row learns from its own, and from nobody else."""

import pytest
import torch

import rkl
from rkl.distill import Teacher
from rkl.distill.models.heads import logits_of
from rkl.distill.teachers.several import RouteRows, SeveralTeachers, together
from rkl.distill.teachers.teacher import ModelTeacher
from rkl.distill.text.batches import ROUTE, PadRows, shifted


def routed(rows, names=("math", "code")):
    return [row | {"teacher_id": names[at % len(names)]} for at, row in enumerate(rows)]


def trained(tiny_trainer, student, teachers, rows, *, teacher=None, **changes):
    how = {"train_dataset": rows, "eval_dataset": rows, "teachers": teachers}
    defaults = {"save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    trainer = tiny_trainer(student, teacher, settings=how, **defaults | changes)
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([it.detach().flatten() for it in trainer.model.parameters()])


def test_a_single_one_of_several_is_that_teacher_to_the_bit(tiny_model, tiny_rows, tiny_trainer):
    rows, found = tiny_rows(8), []
    for how in ({"teacher": tiny_model(seed=1)}, {"teachers": {"math": tiny_model(seed=1)}}):
        given = how | {"teachers": how.get("teachers")}
        marked = routed(rows, ["math"]) if "teacher" not in how else rows
        trainer = trained(tiny_trainer, tiny_model(seed=2), rows=marked, **given)
        found.append((weights(trainer), [it.get("loss") for it in trainer.state.log_history]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_each_row_learns_from_its_teacher(tiny_model, tiny_rows, tiny_trainer):
    rows = routed(tiny_rows(9))
    models = {"math": tiny_model(seed=1), "code": tiny_model("Llama", seed=3)}
    student = tiny_model(seed=2)
    how = {"divergence": rkl.JensenShannon(), "teachers": models}
    trainer = tiny_trainer(student, None, rows, settings=how)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(student, dict(batch))
    values = []
    for name, model in models.items():
        own = [{k: v for k, v in row.items() if k != "teacher_id"} for row in rows]
        own = [it for it, row in zip(own, rows, strict=True) if row["teacher_id"] == name]
        alone = shifted(PadRows()(own))
        p, q = (logits_of(ModelTeacher(it).observe(*alone[:2])) for it in (model, student))
        values.append(rkl.per_token({"d": rkl.JensenShannon()}, p=p.detach(), q=q.detach())["d"])
    torch.testing.assert_close(loss.detach(), torch.cat(values).mean(), rtol=1e-5, atol=0)
    loss.backward()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_one_at_a_time_is_the_same(tiny_model, tiny_rows, tiny_trainer):
    rows, found = routed(tiny_rows(8)), []
    for where in ("all", "one"):
        models = {"math": tiny_model(seed=1), "code": tiny_model(seed=3)}
        found.append(
            weights(
                trained(tiny_trainer, tiny_model(seed=2), models, rows, teachers_on_device=where)
            )
        )
    assert torch.equal(*found)


def test_another_column_may_name_the_teacher(tiny_model, tiny_rows, tiny_trainer):
    rows = [row | {"domain": "code"} for row in tiny_rows(4)]
    models = {"math": tiny_model(seed=1), "code": tiny_model(seed=3)}
    how = {"teachers": models}
    trainer = tiny_trainer(
        tiny_model(seed=2), None, rows, settings=how, teacher_routing_column="domain"
    )
    assert trainer.data_collator(rows)[ROUTE].tolist() == [1, 1, 1, 1]


def test_parts_of_distributions_stay_what_they_are_and_do_not_mix():
    logits, tokens = torch.randn(5, 7), (torch.tensor([0, 3]), torch.tensor([1, 2, 4]))
    tops = [rkl.TopK(*logits[it].log_softmax(-1).topk(3)) for it in tokens]
    merged = together([*zip(tokens, tops, strict=True)])
    whole = logits.log_softmax(-1).topk(3)
    assert isinstance(merged, rkl.TopK)
    assert torch.equal(merged.index, whole.indices)
    with pytest.raises(ValueError, match="teachers must tell the same of the tokens of one batch"):
        together([(tokens[0], tops[0]), (tokens[1], logits[tokens[1]])])


def test_a_teacher_without_rows_in_a_batch_is_not_asked(tiny_model, tiny_rows):
    class Never(Teacher):
        vocab = 40

        def observe(self, inputs, predicting, *, vocab=None):
            raise AssertionError

    several = SeveralTeachers({"a": ModelTeacher(tiny_model(seed=1)), "b": Never()})
    inputs, predicting, _ = shifted(PadRows()(tiny_rows(3)))
    told = several.observe(inputs | {ROUTE: torch.zeros(3, dtype=torch.long)}, predicting)
    assert isinstance(told, rkl.LinearHead)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"teacher_id": "art"}, "teacher_id must be one of math, code, the teachers; got 'art'"),
        ({}, "teacher_id must name the teacher of each row, one of math, code; got a row of inp"),
    ],
)
def test_a_row_without_a_teacher_is_refused(row, named):
    collator = RouteRows(PadRows(), "teacher_id", ["math", "code"])
    with pytest.raises(ValueError, match=named):
        collator([{"input_ids": [4, 5], "labels": [4, 5]} | row])


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"teachers": {}}, TypeError, "teachers must map names to one teacher at least; got {}"),
        ({"teachers": {"a": "model"}}, TypeError, "teacher must be a model, 'base' or"),
        ({}, TypeError, "teacher must be a model, 'base' or a rkl.distill.Teacher; got None"),
    ],
)
def test_what_are_no_teachers_is_refused(given, error, named, tiny_model, tiny_rows, tiny_trainer):
    with pytest.raises(error, match=named):
        tiny_trainer(tiny_model(), None, tiny_rows(2), settings=given)


def test_what_several_teachers_cannot_do_is_refused(tiny_model, tiny_rows, tiny_trainer):
    both = {"teachers": {"a": tiny_model(), "b": tiny_model()}}
    with pytest.raises(ValueError, match="teacher and teachers exclude one another"):
        tiny_trainer(tiny_model(), tiny_model(), tiny_rows(2), settings=both)
    with pytest.raises(NotImplementedError, match="seq_kd needs one teacher, which writes; got 2"):
        tiny_trainer(
            tiny_model(),
            None,
            tiny_rows(2),
            settings=both,
            seq_kd=True,
            max_completion_length=4,
        )
    with pytest.raises(ValueError, match="teachers_on_device must be one of all, one"):
        tiny_trainer(tiny_model(), tiny_model(), tiny_rows(2), teachers_on_device="two")

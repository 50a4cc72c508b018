"""A student as its own teacher, and weights of tokens that depend on both distributions."""

import pytest
import torch
from safetensors.torch import load_file

import rkl
from rkl.distill import PadRows, read_head
from rkl.distill.teachers.self_teacher import SelfTeacher

pytestmark = pytest.mark.filterwarnings("ignore:.* is 0 at the first step")
QUICK = {"learning_rate": 1e-2, "hard_label_weight": 1.0, "max_steps": 4}


def flat(model):
    return torch.cat([it.detach().flatten() for it in model.parameters()])


@pytest.fixture
def self_trainer(tiny_model, tiny_rows, tiny_trainer, tmp_path):
    """A function that makes a trainer of a student that is its own teacher."""

    def make(kind, *, out="out", **changes):
        how = {"divergence": rkl.JensenShannon()}
        changes = {"save_strategy": "no"} | QUICK | changes
        return tiny_trainer(
            tiny_model("Llama", seed=1),
            None,
            tiny_rows(8),
            out=tmp_path / out,
            settings=how,
            teacher_model_kind=kind,
            **changes,
        )

    return make


def test_the_base_stays_as_the_student_began(self_trainer):
    trainer = self_trainer("base")
    began = flat(trainer.model)
    trainer.train()
    assert torch.equal(flat(trainer._teacher.model), began)
    assert not torch.equal(flat(trainer.model), began)


def test_the_live_student_is_no_further_away_than_rounding(self_trainer, tiny_rows):
    trainer = self_trainer("live", hard_label_weight=0.0)
    trainer.train()
    loss = trainer.compute_loss(trainer.model, PadRows()(tiny_rows(8)))
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("sync", [1, 3])
def test_the_moving_average_is_that_of_the_steps(sync, self_trainer):
    trainer = self_trainer("ema", teacher_update_rate=0.25, teacher_sync_steps=sync)
    mean, seen = flat(trainer.model), []
    follow = trainer._teacher.follow

    def noted(step):
        seen.append((step, flat(trainer.model)))
        follow(step)

    trainer._teacher.follow = noted
    trainer.train()
    for step, now in seen:
        if step % sync == 0:
            mean = mean + 0.25 * (now - mean)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    torch.testing.assert_close(flat(trainer._teacher.model), mean, rtol=1e-5, atol=1e-7)


def test_a_resumed_training_goes_on_with_its_moving_average_to_the_same_bits(self_trainer):
    how = {"save_strategy": "steps", "save_steps": 2, "teacher_update_rate": 0.5}
    whole = self_trainer("ema", out="whole", **how)
    whole.train()
    resumed = self_trainer("ema", out="resumed", **how)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert torch.equal(flat(whole.model), flat(resumed.model))
    assert torch.equal(flat(whole._teacher.model), flat(resumed._teacher.model))


@pytest.fixture
def half_student(tiny_model):
    """A student in bfloat16, its moving average, and both as they were, in double."""
    student = tiny_model("Llama", seed=1).bfloat16()
    teacher = SelfTeacher(read_head(student), "ema", device="cpu", rate=0.05)
    began = flat(student).double()
    with torch.no_grad():
        for it in student.parameters():
            it.mul_(1.25)
    return student, teacher, began, flat(student).double()


def test_the_moving_average_of_a_student_in_half_precision_reaches_it(half_student, tmp_path):
    student, teacher, began, now = half_student
    for step in range(1, 101):
        teacher.follow(step)
    expected = began + (1 - 0.95**100) * (now - began)
    # The copy is rounded to bfloat16, by eps/2; 100 steps in single precision are exact to 1e-5.
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(flat(teacher.model).double(), expected, rtol=eps, atol=1e-6)
    teacher.save(tmp_path)
    saved = load_file(tmp_path / "teacher.safetensors")
    names = [name for name, _ in student.named_parameters()]
    found = torch.cat([saved[name].double().flatten() for name in names])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_moving_average_of_half_precision_resumes_to_the_same_bits(half_student, tmp_path):
    student, teacher, *_ = half_student
    for step in range(1, 21):
        teacher.follow(step)
        if step == 10:
            teacher.save(tmp_path)
    resumed = SelfTeacher(read_head(student), "ema", device="cpu", rate=0.05)
    resumed.load(tmp_path)
    for step in range(11, 21):
        resumed.follow(step)
    saved = []
    for one in (teacher, resumed):
        one.save(tmp_path)
        saved.append(load_file(tmp_path / "teacher.safetensors"))
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert torch.equal(flat(teacher.model), flat(resumed.model))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "old"}, "teacher_model_kind must be one of base, ema, live; got 'old'"),
        ({"teacher_update_rate": 0.0}, r"teacher_update_rate must lie in \(0, 1\]; got 0.0"),
        ({"teacher_sync_steps": 0}, "teacher_sync_steps must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, named, self_trainer):
    with pytest.raises(ValueError, match=named):
        self_trainer(**{"kind": "ema"} | changes)


def test_a_teacher_beside_oneself_is_refused(tiny_model, tiny_rows, tiny_trainer):
    with pytest.raises(ValueError, match="teacher must be left out where teacher_model"):
        tiny_trainer(tiny_model(), tiny_model(), tiny_rows(2), teacher_model_kind="ema")


@pytest.fixture
def weighted(tiny_model, tiny_rows, tiny_trainer):
    """A function that gives the loss of a batch under weights of its tokens, and its gradient."""

    def measure(weigh, rows=None):
        rows = tiny_rows(8) if rows is None else rows
        student = tiny_model("Llama", seed=2)
        how = {"divergence": rkl.KL(), "token_weight": weigh}
        trainer = tiny_trainer(student, tiny_model("Llama", seed=1), rows, settings=how)
        loss = trainer.compute_loss(student, PadRows()(rows))
        loss.backward()
        gradients = [
            torch.zeros_like(it) if it.grad is None else it.grad for it in student.parameters()
        ]
        return loss.item(), torch.cat([it.flatten() for it in gradients])

    return measure


def test_a_weight_multiplies_value_and_gradient_of_its_token(weighted):
    loss, gradient = weighted(None)
    double, pull = weighted(lambda logp, logq, batch: 2 * torch.ones(len(batch.targets)))
    assert double == pytest.approx(2 * loss, rel=1e-6)
    torch.testing.assert_close(pull, 2 * gradient)
    parts = [
        weighted(lambda logp, logq, batch, odd=odd: (batch.targets % 2 == odd).float())
        for odd in (0, 1)
    ]
    assert sum(value for value, _ in parts) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts[0][1] + parts[1][1], gradient, rtol=1e-4, atol=1e-6)


def test_weights_see_both_distributions_and_hold_no_gradient(weighted):
    seen = {}

    def entropy(logp, logq, batch):
        seen.update(p=logp, q=logq, targets=batch.targets)
        return -(logp.exp() * logp).sum(-1)

    weighted(entropy)
    for side in ("p", "q"):
        assert not seen[side].requires_grad
        torch.testing.assert_close(seen[side].exp().sum(-1), torch.ones(len(seen["targets"])))
    assert seen["p"].shape == (len(seen["targets"]), 40)


def test_weights_of_0_give_a_loss_of_0(weighted):
    loss, gradient = weighted(lambda logp, logq, batch: torch.zeros(len(logp)))
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("weigh", "named"),
    [
        (lambda logp, logq, batch: -torch.ones(len(logp)), "weights of at least 0, all of them"),
        (lambda logp, logq, batch: torch.ones(3), r"a tensor of \[\d+\], one weight for each"),
        (lambda logp, logq, batch: 1.0, "one weight for each token; got float"),
    ],
)
def test_weights_that_are_none_are_refused(weigh, named, weighted):
    with pytest.raises(ValueError, match=named):
        weighted(weigh)

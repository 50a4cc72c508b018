"""The loss for any loop: that of the trainer, whatever form teacher, labels and mask come in."""

import pytest
import torch

import rkl
from rkl.distill import distill_loss

ROWS, POSITIONS, VOCAB, WIDTH = 2, 5, 11, 3


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


@pytest.fixture(autouse=True)
def _seed():
    global GENERATOR
    GENERATOR = torch.Generator().manual_seed(0)


def logits():
    return 2 * random(ROWS, POSITIONS, VOCAB)


def tokens():
    labels = torch.randint(0, VOCAB, (ROWS, POSITIONS), generator=GENERATOR)
    labels[0, :3] = labels[1, 4] = -100
    return labels


def by_hand(teacher, student, labels, *, temperature=1.0, hard=0.0):
    """Forward KL of the tokens that count, one at a time."""
    terms = []
    for row in range(ROWS):
        for position in range(1, POSITIONS):
            if (label := labels[row, position]) != -100:
                p, q = (it[row, position - 1] / temperature for it in (teacher, student))
                p, q = p.log_softmax(-1), q.log_softmax(-1)
                entropy = -student[row, position - 1].log_softmax(-1)[label]
                terms.append((p.exp() * (p - q)).sum() + hard * entropy)
    return torch.stack(terms)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_mean_over_the_tokens_that_labels_name(temperature):
    teacher, student, labels = logits(), logits().requires_grad_(), tokens()
    value = distill_loss(
        teacher=teacher,
        student=student,
        divergence=rkl.KL(),
        labels=labels,
        temperature=temperature,
        hard_label_weight=0.5,
    )
    expected = by_hand(teacher, student, labels, temperature=temperature, hard=0.5).mean()
    torch.testing.assert_close(value, expected)
    gradients = (torch.autograd.grad(it, student)[0] for it in (value, expected))
    torch.testing.assert_close(*gradients)


def in_half(dtype, count, *, vocab=64, apart=0.1, temperature=1.0):
    """Logits in half precision, and the KL of each token in double."""
    teacher = 3 * random(1, count, vocab)
    student = (teacher + apart * random(1, count, vocab)).to(dtype).requires_grad_()
    teacher = teacher.to(dtype)
    p, q = ((it.double() / temperature).log_softmax(-1)[0] for it in (teacher, student))
    return teacher, student, (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.5, 3.0])
def test_a_temperature_does_not_round_logits_in_half_precision_again(dtype, temperature):
    teacher, student, divergences = in_half(dtype, 8, temperature=temperature)
    value = distill_loss(
        teacher=teacher, student=student, divergence=rkl.KL(), temperature=temperature
    )
    expected = divergences.mean()
    # Log-probabilities down to -20 are exact to 3e-6 in single precision, and so is their mean.
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    found, gradient = (torch.autograd.grad(it, student)[0] for it in (value, expected))
    # Both are rounded to half precision; of w (q - p) single precision keeps 3e-6 w, w = 1/8.
    torch.testing.assert_close(found, gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.bfloat16, 3), (torch.bfloat16, 7), (torch.bfloat16, 513), (torch.float16, 20_011)],
)
def test_tokens_of_logits_in_half_precision_have_their_exact_share(dtype, count):
    teacher, student, divergences = in_half(dtype, count, vocab=4, apart=2.0)
    value = distill_loss(teacher=teacher, student=student, divergence=rkl.KL())
    # A KL of about 1 is exact to 1e-5 in single precision; 1/count in half is off by 4e-4.
    torch.testing.assert_close(value.double(), divergences.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int16, torch.int64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_may_be_integers_of_any_width(dtype, temperature):
    teacher, student, labels = logits(), logits(), tokens().abs() % VOCAB
    value = distill_loss(
        teacher=teacher,
        student=student,
        divergence=rkl.KL(),
        labels=labels.to(dtype),
        temperature=temperature,
        hard_label_weight=1.0,
    )
    expected = by_hand(teacher, student, labels, temperature=temperature, hard=1.0).mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_that_are_no_integers_are_refused(dtype):
    labels = torch.ones(ROWS, POSITIONS, dtype=dtype)
    with pytest.raises(TypeError, match="labels must be a tensor of integers; got torch"):
        distill_loss(teacher=logits(), student=logits(), labels=labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_hard_label_weight_needs_labels_within_the_vocabulary(temperature):
    how = {"temperature": temperature, "hard_label_weight": 0.5}
    with pytest.raises(ValueError, match="labels must be given where hard_label_weight is not 0"):
        distill_loss(teacher=logits(), student=logits(), **how)
    labels = tokens().abs() % VOCAB + VOCAB
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 11\) wherever there is a weig"):
        distill_loss(teacher=logits(), student=logits(), labels=labels, **how)


def test_labels_that_lie_where_they_are_predicted_give_the_same():
    teacher, student, labels = logits(), logits(), tokens()
    value = distill_loss(teacher=teacher, student=student, labels=labels)
    moved = torch.cat([labels[:, 1:], torch.full((ROWS, 1), -100)], 1)
    same = distill_loss(teacher=teacher, student=student, labels=moved, shift=False)
    torch.testing.assert_close(value, same)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_a_mask_says_the_same_as_labels(kind):
    teacher, student, labels = logits(), logits(), tokens()
    value = distill_loss(teacher=teacher, student=student, labels=labels)
    mask = (labels != -100).to(kind)
    torch.testing.assert_close(distill_loss(teacher=teacher, student=student, mask=mask), value)
    both = distill_loss(teacher=teacher, student=student, labels=labels.abs() % VOCAB, mask=mask)
    torch.testing.assert_close(both, value)


def test_without_labels_and_mask_every_position_counts():
    teacher, student = logits(), logits()
    value = distill_loss(teacher=teacher, student=student, divergence=rkl.KL())
    expected = rkl.KL()(teacher.log_softmax(-1), student.log_softmax(-1)).mean()
    torch.testing.assert_close(value, expected)


def test_heads_give_what_their_logits_give():
    labels = tokens()
    teacher, student = (
        rkl.LinearHead(random(ROWS, POSITIONS, WIDTH), random(VOCAB, WIDTH), temperature=t)
        for t in (1.0, 1.5)
    )
    student.hidden.requires_grad_()
    value = distill_loss(teacher=teacher, student=student, labels=labels, temperature=2.0)
    expected = distill_loss(
        teacher=teacher.hidden @ teacher.weight.T,
        student=student.hidden @ student.weight.T / 1.5,
        labels=labels,
        temperature=2.0,
    )
    torch.testing.assert_close(value, expected)
    gradients = (torch.autograd.grad(it, student.hidden)[0] for it in (value, expected))
    torch.testing.assert_close(*gradients)


def test_a_top_k_of_the_whole_vocabulary_is_the_teacher():
    teacher, student, labels = logits(), logits(), tokens()
    top = rkl.TopK(*teacher.log_softmax(-1).sort(-1, descending=True))
    both = (
        distill_loss(teacher=it, student=student, divergence=rkl.KL(), labels=labels)
        for it in (teacher, top)
    )
    torch.testing.assert_close(*both)


def test_the_denominator_may_be_that_of_several_batches():
    teacher, student, labels = logits(), logits(), tokens()
    total = by_hand(teacher, student, labels).sum()
    for count in (1, 7, torch.tensor(7)):
        value = distill_loss(
            teacher=teacher,
            student=student,
            divergence=rkl.KL(),
            labels=labels,
            num_items_in_batch=count,
        )
        torch.testing.assert_close(value, total / count)


@pytest.mark.parametrize("head", [False, True])
def test_a_batch_without_tokens_is_0_with_a_gradient_of_0(head):
    student = logits().requires_grad_()
    if head:
        student = rkl.LinearHead(
            random(ROWS, POSITIONS, WIDTH).requires_grad_(), random(VOCAB, WIDTH)
        )
    labels = torch.full((ROWS, POSITIONS), -100)
    value = distill_loss(teacher=logits(), student=student, labels=labels, num_items_in_batch=0)
    assert value.item() == 0
    leaf = student.hidden if head else student
    assert not torch.autograd.grad(value, leaf)[0].any()


def test_what_does_not_count_is_never_looked_at():
    teacher, student, labels = logits(), logits(), tokens()
    value = distill_loss(teacher=teacher, student=student, labels=labels)
    away = torch.cat([labels[:, 1:] == -100, torch.ones(ROWS, 1, dtype=torch.bool)], 1)
    for one in (teacher, student):
        one[away] = torch.nan
    torch.testing.assert_close(
        distill_loss(teacher=teacher, student=student, labels=labels), value
    )


WRONG = {
    "teacher": ({"teacher": torch.zeros(2, 4, 11)}, "teacher must have the rows and positions"),
    "labels": ({"labels": torch.zeros(2, 4, dtype=torch.long)}, r"labels must be \[2, 5\]"),
    "mask": ({"mask": torch.ones(10, dtype=torch.long)}, r"mask must be \[2, 5\]"),
    "labels as mask": (
        {"mask": torch.tensor([[-100, -100, 3, 0, 7]] * 2)},
        r"mask must hold booleans or 0 and 1; got (-100|3|7)\. Labels go into labels=",
    ),
    "no items": ({"num_items_in_batch": 0}, "num_items_in_batch must be above 0, for 10 tokens"),
    "no items counted": (
        {"num_items_in_batch": torch.tensor(0)},
        "num_items_in_batch must be above 0, for 10 tokens",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be"),
    "hard labels without labels": ({"hard_label_weight": 1.0}, "labels"),
    "vocabularies": ({"teacher": torch.zeros(2, 5, 12)}, "vocabulary of 12"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_name(case):
    changes, message = WRONG[case]
    settings = {"teacher": torch.zeros(2, 5, 11), "student": torch.zeros(2, 5, 11)}
    with pytest.raises(ValueError, match=message):
        distill_loss(**settings | changes)

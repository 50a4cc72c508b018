"""A teacher known by atoms drawn from it: unbiased against enumeration, and refused elsewhere."""

import math

import pytest
import torch
from catalogued import ALL, F

import rkl
from rkl import LinearHead, Sampled, draw, exact, per_token, sampled_terms
from rkl.estimators import effective_draws

TOKENS, VOCAB, WIDTH = 5, 7, 4
SIGMAS = 5.0  # a seed fails one of some 300 comparisons with a chance of 2e-4, and seeds are fixed
every_f = pytest.mark.parametrize("divergence", F, ids=repr)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def enumerated(logits) -> Sampled:
    """Every atom drawn once from the uniform distribution: its mean is the sum over atoms."""
    tokens, vocab = logits.shape
    logp = logits.log_softmax(-1)
    index = torch.arange(vocab).expand(tokens, vocab)
    return Sampled(logp, index, logp + math.log(vocab))


def student(vocab=VOCAB, tokens=TOKENS):
    return LinearHead(
        torch.randn(tokens, WIDTH).requires_grad_(),
        torch.randn(vocab, WIDTH).requires_grad_(),
        torch.randn(vocab).requires_grad_(),
        scale=0.7,
        softcap=3.0,
    )


@every_f
def test_all_atoms_weighted_are_the_exact_divergence_and_its_gradient(divergence):
    teacher, q = torch.randn(TOKENS, VOCAB), student()
    weight = torch.rand(TOKENS)
    values, gradients = [], []
    for p in (teacher, enumerated(teacher)):
        value = exact(divergence, p=p, q=q, weight=weight, chunk=2)
        values.append(value)
        gradients.append(torch.autograd.grad(value, q[:3]))
    # A few thousand roundings of double precision, of sums whose terms are of order 1.
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-12)
    for whole, drawn in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, drawn, rtol=1e-10, atol=1e-12)
    of_tokens = (
        per_token({"d": divergence}, p=p, q=q)["d"] for p in (teacher, enumerated(teacher))
    )
    torch.testing.assert_close(*of_tokens, rtol=1e-10, atol=1e-12)


def deviations(divergence, p, q, *, estimate, copies=4000, draws=6, temperature=1.0):
    """By how many standard errors the means of values and logit gradients miss the exact ones."""
    many = p.expand(copies, -1)
    sampled = estimate(draw(many, draws, temperature=temperature))
    b = q.expand(copies, -1).clone().requires_grad_()
    values = sampled_terms(divergence, p=sampled, q=b).mean(-1)
    exact(divergence, p=sampled, q=b, weight=torch.ones(copies) * 2).backward()
    whole = q.clone().requires_grad_()
    value = exact(divergence, p=p, q=whole)
    value.backward()
    assert b.grad is not None
    assert whole.grad is not None
    found = torch.cat([values[:, None], b.grad / 2], 1)
    expected = torch.cat([value.detach()[None], whole.grad[0]])
    error = found.std(0) / math.sqrt(copies)
    return ((found.mean(0) - expected).abs() / error.clamp_min(1e-12)).max().item()


@every_f
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_in_value_and_gradient(divergence, temperature):
    p, q = torch.randn(2, 1, VOCAB)
    missed = deviations(divergence, p, q, estimate=lambda it: it, temperature=temperature)
    assert missed < SIGMAS


def test_normalised_weights_would_be_noticed():
    def normalised(it):
        assert it.log_weight is not None
        total = it.log_weight.logsumexp(-1, keepdim=True) - math.log(it.log_weight.shape[-1])
        return it._replace(log_weight=it.log_weight - total)

    p, q = 2 * torch.randn(2, 1, VOCAB)
    assert deviations(rkl.KL(), p, q, estimate=lambda it: it, temperature=3.0) < SIGMAS
    assert deviations(rkl.KL(), p, q, estimate=normalised, temperature=3.0) > 2 * SIGMAS


def test_forgotten_weights_would_be_noticed():
    p, q = torch.randn(2, 1, VOCAB)
    missed = deviations(
        rkl.KL(), p, q, estimate=lambda it: it._replace(log_weight=None), temperature=2.0
    )
    assert missed > 2 * SIGMAS


@pytest.mark.parametrize("divergence", [rkl.JensenShannon(), rkl.TotalVariation()], ids=repr)
def test_mass_that_the_teacher_has_none_of_is_counted(divergence):
    p = torch.tensor([[0.0, 1.0, -math.inf]])
    q = torch.tensor([[0.5, 0.0, 1.0]])
    values = sampled_terms(divergence, p=draw(p, 40_000), q=q)[0]
    error = values.std() / math.sqrt(len(values))
    assert (values.mean() - exact(divergence, p=p, q=q)).abs() < SIGMAS * error
    # the atoms that both have alone, as without the control variate
    logq, logp = q.log_softmax(-1), p.log_softmax(-1)
    seen = divergence.integrand(logp[:, :2], logq[:, :2]).sum()
    assert (values.mean() - seen).abs() > 2 * SIGMAS * error


def test_standard_errors_of_terms_are_those_of_repeated_draws():
    p, q = torch.randn(2, 1, VOCAB)
    terms = sampled_terms(rkl.KL(), p=draw(p.expand(2000, -1), 25), q=q.expand(2000, -1))
    said = (terms.var(-1) / 25).mean().sqrt()
    assert said.item() == pytest.approx(terms.mean(-1).std().item(), rel=0.06)


@pytest.mark.parametrize("divergence", [d for d in ALL if d not in F], ids=repr)
def test_what_is_no_f_divergence_is_refused_with_the_reason(divergence):
    teacher = draw(torch.randn(TOKENS, VOCAB), 3)
    for verb in (exact, lambda d, **how: per_token({"d": d}, **how), sampled_terms):
        with pytest.raises(TypeError, match="must be an f-divergence where p is Sampled; got"):
            verb(divergence, p=teacher, q=torch.randn(TOKENS, VOCAB))


def test_an_atom_that_the_student_gives_no_mass_is_infinite_and_silent():
    teacher = Sampled(torch.tensor([[-0.5, -1.0], [-0.5, -0.5]]), torch.tensor([[0, 2], [1, 1]]))
    b = torch.tensor([[0.0, 1.0, -math.inf]] * 2).requires_grad_()
    value = exact(rkl.KL(), p=teacher, q=b)
    value.backward()
    assert value.item() == math.inf
    assert b.grad is not None
    assert b.grad.isfinite().all()
    assert (b.grad[0] == 0).all()
    b.grad = None
    exact(rkl.ReverseKL(), p=teacher, q=b).backward()
    assert b.grad.isfinite().all()


def test_hard_labels_beside_draws_are_those_of_the_whole_vocabulary():
    q, labels = student(), torch.randint(VOCAB, (TOKENS,))
    p = draw(torch.randn(TOKENS, VOCAB), 4)
    soft = exact(rkl.KL(), p=p, q=q)
    both = exact(rkl.KL(), p=p, q=q, labels=labels, hard_label_weight=0.5)
    bare = q.softcap * (q.scale * (q.hidden @ q.weight.T + q.bias) / q.softcap).tanh()
    entropy = torch.nn.functional.cross_entropy(bare, labels)
    torch.testing.assert_close(both - soft, 0.5 * entropy)


def test_compiled_or_not_draws_give_the_same_bits():
    p, q = draw(torch.randn(TOKENS, VOCAB), 4), torch.randn(TOKENS, VOCAB)
    assert exact(rkl.JensenShannon(), p=p, q=q, compiled=True) == exact(
        rkl.JensenShannon(), p=p, q=q, compiled=False
    )


def test_effective_draws_are_all_where_models_agree_and_few_where_one_draw_weighs_most():
    p = torch.randn(TOKENS, VOCAB)
    torch.testing.assert_close(effective_draws(draw(p, 30), p), torch.full((TOKENS,), 30.0))
    rare = Sampled(torch.tensor([[0.9, 0.9, 0.9, 1e-6]]).log(), torch.tensor([[0, 0, 0, 1]]))
    assert effective_draws(rare, torch.tensor([[0.0, 0.0]])).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index": torch.zeros(TOKENS, 3, dtype=torch.long)}, "p.index must have the shape"),
        ({"index": torch.full((TOKENS, 2), VOCAB)}, r"p.index must lie in \[0, 7\)"),
        ({"logp": torch.full((TOKENS, 2), 1.0)}, "p.logp must be log-probabilities, at most 0"),
        ({"logp": torch.full((TOKENS, 2), -math.inf)}, "p.logp must be finite"),
        ({"log_weight": torch.zeros(TOKENS, 3)}, "p.log_weight must be as p.logp"),
    ],
)
def test_malformed_draws_are_refused_by_name(change, named):
    p = Sampled(torch.full((TOKENS, 2), -1.0), torch.zeros(TOKENS, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=named):
        exact(rkl.KL(), p=p._replace(**change), q=torch.randn(TOKENS, VOCAB))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.zeros(3), 2), r"logits must be \[tokens, vocab\]; got \[3\]"),
        ((torch.zeros(1, 3), 0), "draws must be at least 1; got 0"),
    ],
)
def test_malformed_arguments_of_draw_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        draw(*arguments)

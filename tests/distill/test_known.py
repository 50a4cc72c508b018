"""A teacher declares what it knows of p: the whole, its top k or draws; the trainer takes each."""

import math
from typing import Any

import pytest
import torch

import rkl
from rkl.distill import PadRows, Teacher, read_head
from rkl.distill.known import captured_mass, infinite_atoms, lost_in_the_rest, token_weights
from rkl.distill.models.heads import logits_of

CLOSE = "kl", "jensen-shannon", "skew-kl", "skew-reverse-kl", "total-variation"
CLOSE += "squared-hellinger", "precision-recall", "neg-log-acceptance", "lk-hybrid"
LOST = "reverse-kl", "jeffreys", "akl", "todi", "alpha-beta"
LOST += "pearson-chi-square", "neyman-chi-square", "taid", "amid", "entropy-aware-reverse-kl"


class _Declares(Teacher):
    """A user's own teacher, which gives of a model what it is told to give."""

    def __init__(self, model, declare):
        self.head, self.declare = read_head(model), declare
        self.vocab = self.head.vocab

    def observe(self, inputs, predicting, *, vocab=None):
        with torch.no_grad():
            logits = self.head.model(**inputs).logits[:, :-1][predicting][:, :vocab]
        return self.declare(logits)


def top(k):
    return lambda logits: rkl.TopK(*logits.log_softmax(-1).topk(k))


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: rkl.draw(logits, count, generator=generator)


@pytest.fixture
def losses(tiny_model, tiny_rows, tiny_trainer, tmp_path):
    """A function that gives the loss of a batch for what a teacher declares, and its trainer."""
    rows = tiny_rows(8)

    def measure(declare, divergence: Any = None, **changes):
        student, model = tiny_model(seed=2), tiny_model(seed=1)
        teacher = model if declare is None else _Declares(model, declare)
        settings = {"divergence": rkl.KL() if divergence is None else divergence}
        settings["eval_dataset"] = rows
        trainer = tiny_trainer(student, teacher, rows, settings=settings, **changes)
        return trainer.compute_loss(student, PadRows()(rows)).item(), trainer

    return measure


def test_logits_and_a_top_k_of_all_atoms_are_the_model(losses):
    expected, _ = losses(None)
    for declare in (lambda logits: logits, top(40)):
        assert losses(declare)[0] == pytest.approx(expected, rel=1e-5)
    # of all atoms nothing is lost, whatever the divergence
    assert losses(top(40), rkl.ReverseKL())[0] == pytest.approx(
        losses(None, rkl.ReverseKL())[0], rel=1e-5
    )


def test_draws_are_the_model_in_the_mean(losses):
    expected, _ = losses(None)
    found = torch.tensor([losses(draws(16, seed))[0] for seed in range(30)])
    error = found.std() / math.sqrt(len(found))
    assert (found.mean() - expected).abs() < 4 * error
    assert error < 0.05 * expected


@pytest.mark.parametrize("name", LOST)
def test_a_divergence_whose_value_may_lie_in_the_rest_is_refused(name, losses):
    assert lost_in_the_rest(rkl.parse(name)) is not None
    with pytest.raises(ValueError, match=r"divergence: .* on a teacher known by the 20 likeliest"):
        losses(top(20), rkl.parse(name))


def test_it_is_refused_before_an_evaluation_too_and_taken_where_allowed(losses):
    with pytest.warns(UserWarning, match="the 20 likeliest atoms"):
        value, _ = losses(top(20), rkl.ReverseKL(), allow_partial=True)
    assert 0 < value < losses(None, rkl.ReverseKL())[0]
    _, trainer = losses(None, rkl.ReverseKL())
    trainer._teacher = _Declares(trainer._teacher.head.model, top(20))
    with pytest.raises(ValueError, match="most of it may lie among the atoms that are not known"):
        trainer.evaluate()


@pytest.mark.parametrize("name", CLOSE)
def test_the_others_are_taken_with_a_warning_below_95_of_100(name, losses):
    assert lost_in_the_rest(rkl.parse(name)) is None
    with pytest.warns(UserWarning, match=r"teacher gives the 5 likeliest atoms, with 0\.\d+ of"):
        losses(top(5), rkl.parse(name))
    losses(top(39), rkl.parse(name))  # a warning would be an error


def test_a_sum_with_a_part_that_may_lie_in_the_rest_is_refused():
    assert lost_in_the_rest(0.5 * rkl.KL() + 0.5 * rkl.JensenShannon()) is None
    assert lost_in_the_rest(0.9 * rkl.KL() + 0.1 * rkl.ReverseKL()) is not None
    assert lost_in_the_rest(0.5 * rkl.KL() + 0.5 * rkl.NegLogAcceptance()) is None
    assert lost_in_the_rest(0.9 * rkl.LKHybrid() + 0.1 * rkl.TAID()) is not None


def test_what_is_no_f_divergence_is_refused_on_draws(losses):
    with pytest.raises(TypeError, match=r"divergence must be an f-divergence where p is Sampled"):
        losses(draws(4), rkl.AKL())


def test_few_effective_draws_are_refused_where_terms_have_no_bound(losses):
    with pytest.raises(ValueError, match=r"divergence: ReverseKL\(\) on atoms drawn .* of 4 at"):
        losses(draws(3), rkl.ReverseKL())
    losses(draws(3))
    with pytest.warns(UserWarning, match=r"16 draws a token are worth \d+\.\d of the"):
        losses(draws(16), rkl.ReverseKL())


@pytest.mark.filterwarnings("ignore:teacher gives the")
@pytest.mark.parametrize("declare", [top(5), draws(5)], ids=["top k", "draws"])
def test_a_temperature_needs_the_whole_distribution(declare, losses):
    with pytest.raises(ValueError, match="temperature must be 1 for a teacher known by"):
        losses(declare, temperature=2.0, allow_partial=True)


@pytest.mark.filterwarnings("ignore:teacher gives the")
@pytest.mark.parametrize(
    ("declare", "logged"),
    [
        (None, set()),
        (top(5), {"captured_mass"}),
        (draws(8), {"captured_mass", "loss_error"}),
    ],
    ids=["whole", "top k", "draws"],
)
def test_what_is_not_known_is_logged(declare, logged, losses, tiny_model):
    _, trainer = losses(declare, logging_steps=2, max_steps=4, save_strategy="no")
    trainer.train()
    rows = [it for it in trainer.state.log_history if "loss" in it]
    assert len(rows) == 2
    for row in rows:
        assert {"captured_mass", "loss_error"} & set(row) == logged
    if "captured_mass" in logged:
        assert 0 < rows[0]["captured_mass"] < 1
    if "loss_error" in logged:
        assert 0 < rows[0]["loss_error"] < rows[0]["loss"]


def test_the_error_in_the_log_is_that_of_repeated_draws(losses, tiny_rows):
    _, trainer = losses(draws(16))
    trainer.state.logging_steps = 1
    found, errors = [], []
    for _ in range(40):
        loss = trainer.compute_loss(trainer.model, PadRows()(tiny_rows(8)))
        found.append(loss.item())
        errors.append(trainer._batch_loss.observations.pop(lambda sums: sums)["loss_error"])
    # the standard deviation of 40 values is known to 11 %
    assert torch.tensor(errors).mean().item() == pytest.approx(
        torch.tensor(found).std().item(), rel=0.35
    )


def test_captured_mass_of_draws_counts_an_atom_once():
    p = rkl.Sampled(torch.tensor([[0.5, 0.25, 0.5]]).log(), torch.tensor([[3, 1, 3]]))
    mass = captured_mass(p)
    assert mass is not None
    assert mass.item() == pytest.approx(0.75)


def test_what_needs_whole_distributions_refuses_parts():
    for p, named in ((top(2), "its top k"), (draws(2), "some drawn atoms")):
        with pytest.raises(TypeError, match=f"teacher gives {named} alone"):
            logits_of(p(torch.zeros(1, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_tokens_see_log_probabilities_that_are_not_in_half_precision(dtype):
    logits = (3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    seen = []

    def weigh(logp, logq, batch):
        seen.extend([logp, logq])
        return torch.ones(len(logp))

    token_weights(weigh, logits, logits, None)
    expected = logits.double().log_softmax(-1)
    for found in seen:  # down to -20, exact to 3e-6 in single precision
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_atoms_in_half_precision_are_infinite_only_where_they_are():
    p = torch.tensor([[9.0, 9.0, 9.0]], dtype=torch.float16)
    q = torch.tensor([[9.0, -9.0, -math.inf]], dtype=torch.float16)
    # the term p^2/q of the second atom, near e^17, exceeds float16 but is finite
    atoms = infinite_atoms(rkl.PearsonChiSquare(), p, q, 0, torch.zeros(1, dtype=torch.long))
    assert atoms is not None
    assert atoms.tolist() == [2]


class _Cooled(_Declares):
    """A user's own teacher, whose head has a temperature of its own."""

    def observe(self, inputs, predicting, *, vocab=None):
        known: Any = self.head.observe(inputs, predicting, vocab=vocab)
        return known._replace(temperature=2.0)


def test_a_heads_own_temperature_counts_in_training_and_evaluation(
    tiny_model, tiny_rows, tiny_trainer
):
    models, rows = [tiny_model(seed=seed).eval() for seed in (1, 2)], tiny_rows()
    values = []
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])
        logits = (model(input_ids=tokens).logits[0].detach().double() for model in models)
        p, q = ((it / t).log_softmax(-1) for it, t in zip(logits, (3.0, 1.5), strict=True))
        values.append((p.exp() * (p - q)).sum(-1)[:-1][torch.tensor(row["labels"][1:]) != -100])
    expected = pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    settings = {"divergence": rkl.KL(), "eval_dataset": rows}
    teacher = _Cooled(models[0], None)
    trainer = tiny_trainer(models[1], teacher, rows, settings=settings, temperature=1.5)
    assert trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item() == expected
    assert trainer.evaluate()["eval_loss"] == expected


def test_torchs_default_dtype_changes_no_evaluation_and_no_captured_mass(
    tiny_model, tiny_rows, tiny_trainer, tmp_path
):
    model, rows = tiny_model(seed=1), tiny_rows(16, longest=30)
    settings = {"divergence": rkl.KL(), "eval_dataset": rows}
    found = []
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        student, teacher = tiny_model(seed=2), _Declares(model, top(36))
        how = {"out": tmp_path / f"{number}", "logging_steps": 1, "learning_rate": 0.0}
        trainer = tiny_trainer(student, teacher, rows, settings=settings, max_steps=2, **how)
        torch.set_default_dtype(dtype)
        try:
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
        finally:
            torch.set_default_dtype(torch.float32)
        mass = [it["captured_mass"] for it in trainer.state.log_history if "captured_mass" in it]
        found.append([loss, *mass])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-6)

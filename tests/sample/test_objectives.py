"""Objectives are read from text, and refuse what they cannot read."""

import pytest

from rkl import KL, JensenShannon, ReverseKL
from rkl.sample.objectives import VARIANTS, Objective, Term, parse_objective


def test_a_sum_is_read_with_weights_estimators_and_settings():
    text = "1.0*critic:jensen-shannon + 0.5*target:reverse-kl + amari(alpha=0.5) + 2*data:KL()"
    objective = parse_objective(text, default="data")
    assert [term.weight for term in objective.terms] == [1.0, 0.5, 1.0, 2.0]
    sources = ["critic", "target", "data", "data"]
    assert [term.estimator for term in objective.terms] == sources
    assert objective.terms[0].divergence == JensenShannon()
    assert objective.terms[3].divergence == KL()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_the_paper_have_its_weights_and_are_read_from_their_repr(name):
    objective = parse_objective(name)
    assert parse_objective(repr(objective)) == objective == VARIANTS[name]
    assert {term.estimator: term.weight for term in objective.terms}.items() <= {
        ("critic", 1.0),
        ("target", 0.5),
        ("data", 1.0),
    }


def test_there_are_seven_variants_and_all_differ():
    assert len({repr(it) for it in VARIANTS.values()}) == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read"),
        ("0.5*reward:kl", "'reward'"),
        ("kl + ", "is empty"),
        ("nothing", "nothing"),
        ("0*kl", "weight"),
        ("akl", "f-divergence"),
    ],
)
def test_what_cannot_be_read_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_objective(text)


def test_terms_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="estimator must be one of"):
        Term(1.0, ReverseKL(), "reward")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="terms"):
        Objective(())

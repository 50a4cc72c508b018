"""Flows are single, whatever torch.set_default_dtype says elsewhere in a program."""

import pytest
import torch

from rkl.fit import fit_to_samples
from rkl.flows import NSF, Coupling
from rkl.sample import (
    CoarseToFine,
    CoarseToFineField,
    condition_grid,
    evaluate_on_target,
    fit_to_target,
)
from rkl.sample.targets import XY, MoG4, Phi4

X = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))


def fitted_to_rows():
    torch.manual_seed(0)
    fitted = fit_to_samples(Coupling(2, (4,)), X, steps=4)
    with torch.no_grad():
        return fitted.flow().log_prob(X[:5])


def fitted_to_target(architecture, target):
    torch.manual_seed(0)
    fitted = fit_to_target(architecture, target, steps=2)
    where = condition_grid(target.conditions, 2)
    evaluate_on_target(fitted.flow, target, where[:1], draws=64)
    law = fitted.flow(where[0]) if target.conditions else fitted.flow()
    torch.manual_seed(1)
    return law.sample((5,))


MADE = {
    "rows": fitted_to_rows,
    "MoG4": lambda: fitted_to_target(NSF(transforms=1), MoG4()),
    "XY": lambda: fitted_to_target(CoarseToFine(), XY(side=4)),
    "Phi4": lambda: fitted_to_target(CoarseToFineField(), Phi4(side=4)),
}


@pytest.mark.filterwarnings("ignore")  # so few steps cover nothing
@pytest.mark.parametrize(
    "name", ["rows", "XY", "Phi4", pytest.param("MoG4", marks=pytest.mark.slow)]
)
def test_the_default_dtype_changes_no_fit_and_no_draw(name):
    expected = MADE[name]()
    torch.set_default_dtype(torch.float64)
    try:
        found = MADE[name]()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)

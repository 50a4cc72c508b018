"""Settings of ``rkl fit --data``, and of sampling and evaluation of its runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rkl.checks import LARGEST_COUNT, LARGEST_RATE, LARGEST_SEED, integer, number
from rkl.divergences import FDivergence, parse
from rkl.fit.fit import Method, share_of_steps
from rkl.fit.operating import check_point
from rkl.flows.architectures import Architecture, parse_architecture
from rkl.flows.runs import budget_of, check_budget
from rkl.flows.weights import is_likelihood


@dataclass(frozen=True)
class FitSettings:
    """Data, flow, divergence and budget of a fit.

    Args:
        data: Rows: .csv or another table, .npy, .npz, .parquet, .nc, IDX, or a folder of images.
        divergence: f-divergence to minimise: "precision-recall(lam=10)".
        flow: Architecture: coupling, nsf, maf or multi-scale, with settings in brackets.
        labels: Class of each row: a file of them, or the name of a column or an array.
        dequantise: Spread quantised values over one step, as image files are; --no-dequantise
            does not change floats on a grid.
        steps: Budget in steps.
        minutes: Budget in minutes, critics included; by default 2.
        estimator: Estimator of the gradient; auto chooses.
        start: Share of the budget for maximum likelihood, with which a fit begins.
        anchor: Weight of plain likelihood after that.
        batch: Rows in a step; all of them, where they are fewer.
        lr: Highest learning rate; by default 2e-3, and less where there are few rows.
        held_out: Share of the rows to hold out.
        guard: Keep the parameters that are best on held-out rows, not the last.
        critic: Train a critic at the end even where none is needed, for rejection.
        target_precision: Precision at slope 1 for rejection to reach; the fit reports the result.
        budget: Draws per sample that rejection may take.
        start_from: Run with a critic, for --distil-budget; its settings are the defaults here.
        distil_budget: Draws per sample of the rejection to train into the flow of that run, so
            that a sample takes one draw.
        seed: Random seed.
        device: Device to compute on.
    """

    data: Path = field(metadata={"metavar": "DATA"})
    divergence: str = field(default="kl", metadata={"metavar": "D"})
    flow: str = "coupling"
    labels: str | None = None
    dequantise: bool | None = None
    steps: int | None = field(default=None, metadata={"metavar": "N", "instead_of": "minutes"})
    minutes: float | None = field(default=None, metadata={"metavar": "M", "instead_of": "steps"})
    estimator: Literal["auto", "data", "draws", "path", "both"] = "auto"
    start: float = 0.5
    anchor: float = 0.1
    batch: int = 512
    lr: float | None = None
    held_out: float = 0.1
    guard: bool = True
    critic: bool = False
    target_precision: float | None = field(default=None, metadata={"metavar": "P"})
    budget: float | None = field(default=None, metadata={"metavar": "K"})
    start_from: Path | None = field(default=None, metadata={"metavar": "RUN"})
    distil_budget: float | None = field(default=None, metadata={"metavar": "K"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        check_point(self.target_precision, self.budget)
        object.__setattr__(self, "data", Path(self.data))
        if (self.start_from is None) != (self.distil_budget is None):
            raise ValueError(
                "start_from and distil_budget go together; got "
                f"{self.start_from} and {self.distil_budget}."
            )
        if self.start_from is not None and self.distil_budget is not None:
            number("distil_budget", self.distil_budget, at_least=1)
            object.__setattr__(self, "start_from", Path(self.start_from))
            for name in ("target_precision", "budget"):  # of the run that it starts from
                object.__setattr__(self, name, None)
            object.__setattr__(self, "critic", False)
        check_budget(self)
        if self.lr is not None:
            number("lr", self.lr, above=0, at_most=LARGEST_RATE)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        _ = self.method, self.architecture, self.parsed_divergence

    @property
    def method(self) -> Method:
        """The method of the fit."""
        names = "start", "anchor", "batch", "lr", "held_out", "guard"
        estimator = None if self.estimator == "auto" else self.estimator
        return Method(estimator=estimator, **{name: getattr(self, name) for name in names})

    @property
    def architecture(self) -> Architecture:
        """The architecture, parsed."""
        return parse_architecture(self.flow)

    @property
    def parsed_divergence(self) -> FDivergence:
        """The divergence, parsed."""
        divergence = parse(self.divergence)
        if not isinstance(divergence, FDivergence):
            raise ValueError(f"divergence must be an f-divergence; got {divergence!r}.")
        return divergence

    @property
    def allowance(self) -> dict[str, Any]:
        """Budget of training: in steps, or in minutes."""
        return budget_of(self)

    @property
    def share_of_steps(self) -> float:
        """Share of a budget in minutes that the steps of the flow take, before critics follow."""
        if self.start_from is not None:
            return 1.0
        aimed = self.target_precision is not None or self.budget is not None
        critic = self.critic or aimed or not is_likelihood(self.parsed_divergence)
        return share_of_steps(self.parsed_divergence, critic=critic, aimed=aimed)


@dataclass(frozen=True)
class SampleSettings:
    """The number of samples, and the trade-off between precision and recall.

    Args:
        n: Number of samples.
        out: File to write: .npy or .csv.
        condition: Class to draw, if rows had labels.
        latent_temperature: Standard deviation of the latents; below 1 for the middle alone.
        truncation: Bound of the latents, in standard deviations.
        levels: Put quantised values back on their levels; --no-levels leaves them spread.
        budget: Draws per sample in optimal rejection by the critic; 1 rejects none.
        target_precision: Precision for rejection to reach, instead of a budget.
        seed: Random seed.
        device: Device to compute on.
    """

    n: int = field(default=1000, metadata={"metavar": "N"})
    out: Path = Path("samples.npy")
    condition: str | None = None
    latent_temperature: float = field(default=1.0, metadata={"metavar": "T"})
    truncation: float | None = field(default=None, metadata={"metavar": "BOUND"})
    levels: bool = True
    budget: float | None = field(default=None, metadata={"metavar": "K"})
    target_precision: float | None = field(default=None, metadata={"metavar": "P"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        integer("n", self.n, at_least=1, at_most=LARGEST_COUNT)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        if self.budget is not None and self.target_precision is not None:
            raise ValueError(
                f"one of budget and target_precision; got {self.budget} and "
                f"{self.target_precision}."
            )
        for name in ("latent_temperature", "truncation"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0, at_most=LARGEST_RATE)


@dataclass(frozen=True)
class EvaluateSettings:
    """Rows that a flow of data is measured on.

    Args:
        data: Rows that the flow was not fitted to.
        labels: Class of each row, as for the fit.
        dequantise: Spread quantised values over one step; always as the fit did.
        seed: Random seed.
        device: Device to compute on.
    """

    data: Path | None = field(default=None, metadata={"metavar": "DATA"})
    labels: str | None = None
    dequantise: bool | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        if self.data is not None:
            object.__setattr__(self, "data", Path(self.data))
        integer("seed", self.seed, at_most=LARGEST_SEED)

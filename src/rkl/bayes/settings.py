"""The settings of ``rkl estimate`` and ``rkl evaluate``."""

from dataclasses import dataclass, field
from pathlib import Path

from rkl.bayes.loss.between import AnyLoss, parse_loss
from rkl.checks import LARGEST_SEED, integer, number


@dataclass(frozen=True)
class EstimateSettings:
    """The posterior, the family and the loss of an estimate.

    Args:
        posterior: Draws: .nc or .zarr as ArviZ writes them, an .npz, a table from R with .chain
            and .iteration, or CmdStan's .csv, several or a pattern.
        family: Distribution of one experiment, its parameters named as the draws are:
            "normal(loc=mu, scale=sigma)", or of a regression with its design
            "poisson-regression(coefficients=[Intercept, x1])".
        divergence: Loss, from the distribution of each draw to the reported one: a divergence, or
            intrinsic.
        prob: Posterior probability of the credible region.
        losses: Losses of the comparison, such as js intrinsic; by default five, without those that
            would take more than about eight seconds.
        log_posterior: Variable that holds the log posterior density of each draw, such as lp;
            without it there is no posterior mode to compare with.
        weights: Variable that holds the weight of each draw, if they are weighted.
        design: Design matrix of a regression: .npy, .csv, or another table of numbers. The family
            may name columns of it: offset=NAME, exposure=NAME, trials=NAME.
        further: More files of CmdStan, one chain each.
        seed: Random seed, for families whose divergences are estimated from samples.
        device: Always cpu, for double precision.
    """

    posterior: Path = field(
        # other draws replace all files that --config names
        metadata={"positional": True, "metavar": "POSTERIOR", "instead_of": "further"}
    )
    family: str = field(metadata={"metavar": "FAMILY"})
    divergence: str = field(default="reverse-kl", metadata={"metavar": "D"})
    prob: float = field(default=0.9, metadata={"metavar": "P"})
    losses: tuple[str, ...] = field(default=(), metadata={"metavar": "D"})
    log_posterior: str | None = field(default=None, metadata={"metavar": "NAME"})
    weights: str | None = field(default=None, metadata={"metavar": "NAME"})
    design: Path | None = field(default=None, metadata={"metavar": "FILE"})
    further: tuple[Path, ...] = field(default=(), metadata={"metavar": "FILE"})
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for name in ("posterior", "design"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))
        object.__setattr__(self, "further", tuple(map(Path, self.further)))
        number("prob", self.prob, above=0, below=1)
        integer("seed", self.seed, at_most=LARGEST_SEED)
        if self.device != "cpu":
            raise ValueError(
                f"device must be cpu, where double precision is at home; got {self.device!r}."
            )

    @property
    def loss(self) -> AnyLoss:
        """The divergence, or the intrinsic loss."""
        return parse_loss(self.divergence)


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings of ``rkl evaluate`` for an estimate.

    Args:
        posterior: Other draws of the same variables: of another model, or of later data.
    """

    posterior: Path
    seed: int = 0
    device: str = "cpu"

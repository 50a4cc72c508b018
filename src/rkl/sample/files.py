"""Files of chains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rkl.extras import optional_import
from rkl.sample.metropolis import Chain
from rkl.sample.targets import Target


def write_chain(path: Path, chain: Chain, observed: Mapping[str, Tensor], target: Target) -> None:
    """Write chains under one condition atomically: .nc as in ArviZ, .npz, or states as .npy.

    The first two contain the states, log p and log q, their difference, whether each proposal
    was accepted, and the observables. An observable called as one of the others is written as
    ``observable_NAME``, and in .nc, where names have no /, as ``E_N`` if it is called ``E/N``.
    """
    from rkl.runs import replacing

    stats = {"accepted": chain.accepted, "log_ratio": chain.log_ratio}
    stats |= {"lp": chain.log_p, "log_q": chain.log_q}
    taken = {"x", "condition", *stats}
    named = {f"observable_{it}" if it in taken else it: value for it, value in observed.items()}
    columns = {name: it.cpu().numpy() for name, it in {**named, "x": chain.x, **stats}.items()}
    condition = chain.condition.cpu().numpy()
    with replacing(path) as temporary:
        if path.suffix == ".nc":
            _write_groups(temporary, columns, set(stats), condition, target)
            return
        with temporary.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, columns["x"].reshape(-1, *chain.x.shape[2:]))
            else:
                np.savez(file, allow_pickle=False, **{**columns, "condition": condition})


def _write_groups(
    path: Path, columns: dict[str, np.ndarray], stats: set[str], condition: Any, target: Target
) -> None:
    with optional_import(f"Writing {path.suffix}"):
        import h5netcdf  # noqa: F401
        import xarray as xr

    groups: dict[str, dict[str, Any]] = {"posterior": {}, "sample_stats": {}}
    for given, it in columns.items():
        name = given.replace("/", "_")
        axes = ["chain", "draw", *(f"{name}_dim_{i}" for i in range(it.ndim - 2))]
        observable = given.removeprefix("observable_")
        units = {"units": target.units[observable]} if observable in target.units else {}
        groups["sample_stats" if name in stats else "posterior"][name] = axes, it, units
    named = zip(target.conditions, condition.tolist(), strict=True)
    about = {"target": repr(target)} | {it.name: value for it, value in named}
    for mode, (group, arrays) in zip(("w", "a"), groups.items(), strict=True):
        how: Any = {"mode": mode, "engine": "h5netcdf", "group": group}
        xr.Dataset(arrays, attrs=about).to_netcdf(path, **how)

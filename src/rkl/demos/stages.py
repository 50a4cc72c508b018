"""The stages of a demonstration: each runs once, and ``run.json`` lists the finished ones."""

import sys
import time
from collections.abc import Callable, Mapping

from rkl.runs import Run
from rkl.text import printable

Stage = Callable[[], object]


def run_stages(run: Run, stages: Mapping[str, Stage]) -> None:
    """Run the stages that are not done yet, in order, and record the time of each.

    A stage that was interrupted is run again from its beginning.

    Args:
        run: The folder of the demonstration, being written.
        stages: Functions of the stages, by name.
    """
    for name, stage in stages.items():
        if name in run.record.get("phases", {}):
            continue
        print(f"\n== {printable(name)} ==", file=sys.stderr, flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        stage()
        spent = {
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        run.update(phases={**run.record.get("phases", {}), name: spent})
        print(f"== {printable(name)}: {spent['seconds']:.0f} s ==", file=sys.stderr, flush=True)

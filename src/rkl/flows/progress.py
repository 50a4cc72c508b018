"""A live line on a terminal."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[float, int, str], None]]:
    """A function of progress in [0, 1], a step and text, shown on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("step {task.fields[step]}"), BarColumn(bar_width=24)
    columns += TimeRemainingColumn(), TextColumn("{task.fields[words]}", markup=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, step=0, words="")

        def show(progress: float, step: int, words: str) -> None:
            bar.update(task, completed=progress, step=step, words=words)

        yield show

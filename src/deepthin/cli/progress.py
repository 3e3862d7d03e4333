"""A progress bar on stderr for long work."""

import time
from collections.abc import Callable

from deepthin.cli.app import notes


class Progress:
    """A progress bar for each job; without a terminal, a line when a job begins and after each tenth of it."""

    def __init__(self, doing: str, unit: str) -> None:
        self._doing, self._unit = doing, unit

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=notes,
            disable=not notes.is_terminal,
        )
        self._bar.start()
        self._name = ""
        return self._step

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _step(self, name: str, step: int, steps: int) -> None:
        if name != self._name:
            self._name, self._task = name, self._bar.add_task(name, total=steps)
            if not notes.is_terminal:
                notes.print(f"{self._doing} {name}, {steps} {self._unit}")
        elif not notes.is_terminal and step * 10 // steps > (step - 1) * 10 // steps:
            notes.print(f"{name}: {step} of {steps}, {time.strftime('%H:%M:%S')}")
        self._bar.update(self._task, completed=step)

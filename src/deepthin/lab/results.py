"""What a comparison has done: a file of rows for each trial, which no other process writes, merged in ``results.json``.

Several drivers, also on several machines, may work in one folder: no row is lost, and no trial runs twice at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deepthin.lab.claims import claim, claim_free, claimed
from deepthin.lab.rows import Row, read_rows, write_rows
from deepthin.lab.run import Trial


@dataclass(frozen=True)
class Results:
    """The rows of a comparison.

    Attributes:
        out: The folder of the comparison.
    """

    out: Path

    def file(self, trial: Trial) -> Path:
        """Where the rows of a trial are.

        Args:
            trial: The trial.

        Returns:
            The file; it exists once the trial has ended.
        """
        return self.out / "rows" / f"{trial.name}.json"

    def claim(self, name: str) -> IO[bytes]:
        """Keep other processes from doing the same, after waiting until none does.

        Args:
            name: What is to be done: the name of a trial, or of a file.

        Returns:
            What holds the claim until it is closed.
        """
        return claim(self._lock(name))

    def claim_free(self, name: str) -> IO[bytes] | None:
        """Keep other processes from doing the same, if none does.

        Args:
            name: As for ``claim``.

        Returns:
            What holds the claim until it is closed; None if another process does it.
        """
        return claim_free(self._lock(name))

    def claimed(self, trial: Trial) -> bool:
        """Whether a process runs a trial now.

        Args:
            trial: The trial.

        Returns:
            True if one does.
        """
        return claimed(self._lock(trial.name))

    def put(self, rows: Sequence[Row]) -> None:
        """Write the rows of trials.

        Args:
            rows: All rows of one or several trials.
        """
        keys = dict.fromkeys(row.key for row in rows)
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        for key in keys:
            write_rows([row for row in rows if row.key == key], self.file(Trial(*key)))

    def adopt(self) -> None:
        """Give each trial of ``results.json`` that has no file its own, as earlier versions of the library had none."""
        whole = self.out / "results.json"
        rows = read_rows(whole) if whole.exists() else []
        self.put([row for row in rows if not self.file(Trial(*row.key)).exists()])

    def rows(self, methods: Sequence[str] = ()) -> list[Row]:
        """The rows of all trials that have ended.

        Args:
            methods: Names of methods, whose rows come first, in this order.

        Returns:
            The rows by seed, method and falling ratio.

        Raises:
            ConfigError: A file is damaged.
        """
        order = {name: place for place, name in enumerate(methods)}
        files = sorted((self.out / "rows").glob("*.json"))
        rows = [row for file in files for row in read_rows(file)]
        return sorted(rows, key=lambda row: (row.seed, order.get(row.method, len(order)), -row.ratio))

    def merge(self, methods: Sequence[str] = ()) -> list[Row]:
        """Write the rows of all trials that have ended to ``results.json``.

        Args:
            methods: As for ``rows``.

        Returns:
            The rows.
        """
        with self.claim("results.json"):
            rows = self.rows(methods)
            write_rows(rows, self.out / "results.json")
        return rows

    def _lock(self, name: str) -> Path:
        return self.out / "locks" / f"{name}.lock"

"""What a format's ``write`` returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Written:
    """Files of one export, and what is known of them.

    Attributes:
        files: The files; the first is the one that was asked for.
        bytes: What a device stores: their size, or that of what a compiler makes of them.
        forms: Name of each thin tensor -> how the files compute it; None: as ``deepthin.torch.portable`` does.
        notes: Lines to show: what a device needs.
    """

    files: tuple[Path, ...]
    bytes: int
    forms: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, *files: Path, forms: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()) -> "Written":
        """Files that a device stores as they are.

        Args:
            files: The files.
            forms: How they compute each thin tensor.
            notes: Lines to show.

        Returns:
            What was written.
        """
        return cls(files, sum(file.stat().st_size for file in files), forms, notes)

"""The entry point: an error that a user can correct is one line on stderr and exit code 2, a refused export 1."""

import io
import sys
import warnings
from pathlib import Path

from rich.text import Text

from deepthin.cli import laboratory, library, search  # noqa: F401 -- their commands register with the application
from deepthin.cli.app import app, interrupted, notes, say
from deepthin.errors import DeepThinError, ExportError


def main() -> None:
    """Run the application; errors that a user can correct are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="backslashreplace")
    sys.path.insert(0, str(Path.cwd()))  # so that --model finds modules in the working directory
    warnings.showwarning = lambda message, *_: say("warning", str(message))
    try:
        app()
    except (DeepThinError, OSError) as error:
        say("error", str(error))
        sys.exit(1 if isinstance(error, ExportError) else 2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer's exit code after Ctrl-C
            raise
        notes.print(Text(interrupted()), soft_wrap=True)
        sys.exit(130)

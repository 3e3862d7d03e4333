"""The entry point: every mistake of a user is one line on stderr and exit code 2."""

import io
import sys
import warnings
from pathlib import Path

from deepthin.cli import laboratory, library  # noqa: F401 -- their commands register with the application
from deepthin.cli.app import app, notes, say
from deepthin.errors import DeepThinError


def main() -> None:
    """The entry point: errors that a user can mend are one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    sys.path.insert(0, str(Path.cwd()))  # so that --model finds modules beside the user
    warnings.showwarning = lambda message, *_: say("warning", str(message))
    try:
        app()
    except (DeepThinError, OSError) as error:
        say("error", str(error))
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # what typer makes of the keyboard's
            raise
        notes.print("interrupted; the same command goes on where it stopped")
        sys.exit(130)

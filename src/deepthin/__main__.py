"""``python -m deepthin`` is the command ``deepthin``."""

from deepthin.cli import main

main()

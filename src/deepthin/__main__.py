"""``python -m deepthin`` is the command ``deepthin``."""

from deepthin.cli.main import main

main()

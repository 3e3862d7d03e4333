"""The tasks that ``deepthin compare`` runs: each a module with data, model and metric, under one table."""

from types import ModuleType

from deepthin.lab.tasks import acoustic, conv, ctc, digits, lenet, lstm_lm

TASKS: dict[str, ModuleType] = {task.NAME: task for task in (digits, acoustic, ctc, conv, lenet, lstm_lm)}

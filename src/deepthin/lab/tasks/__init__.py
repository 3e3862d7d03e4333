"""The tasks that ``deepthin compare`` runs, by name."""

from deepthin.lab.tasks import acoustic, conv, ctc, digits, keywords, lenet, lstm_lm
from deepthin.lab.tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (digits, acoustic, ctc, conv, lenet, lstm_lm, keywords)
}

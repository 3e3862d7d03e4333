"""Search the learning rate and the allocation of every method by short trainings, judged on development data.

Optuna's tree-structured Parzen estimator (Bergstra et al., 2011), with one study for each method in an SQLite
file. Each proposal depends only on those before it, so that an interrupted search resumes with the same proposals.
"""

import math
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError

RATES = 1 / 8, 8.0  # bounds of the searched learning rate, over the task's own
ALLOCATIONS = (0.0, 0.5, 1.0)  # from equal bytes for each matrix to equal ratios


@dataclass(frozen=True)
class Choice:
    """Settings that a search chooses for a method.

    Attributes:
        lr: Learning rate of dense parameters, > 0.
        allocation: The power of their size by which bytes go to the matrices: 0 equal bytes, 1 equal ratios.
    """

    lr: float
    allocation: float


@dataclass(frozen=True)
class Search:
    """How every method is searched.

    Attributes:
        trials: Number of trainings.
        ratio: Bytes of the weight matrices over those of the dense network, 0 to 1.
        steps: Training steps of each.
    """

    trials: int
    ratio: float
    steps: int


def open_storage(path: Path, storage: str | None = None) -> Any:
    """Open what holds all studies; it is created if missing.

    Args:
        path: An SQLite file.
        storage: What to use instead: the URL of a database, or a journal file, which several machines can share.

    Returns:
        Optuna's storage.

    Raises:
        ConfigError: Optuna is not installed, or the storage cannot be opened.
    """
    if find_spec("optuna") is None:
        raise ConfigError("--search needs Optuna: pip install 'deepthin[compare]', or leave --search out.")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if storage is None:
            return optuna.storages.RDBStorage(f"sqlite:///{path}")
        if "://" in storage:
            return optuna.storages.RDBStorage(storage)
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(storage))
    except Exception as error:  # SQLAlchemy and Optuna have no single class for what cannot be opened
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if storage is None:
            raise ConfigError(f"{path} cannot be read ({reason}): remove it to search anew.") from None
        raise ConfigError(
            f"--storage {storage} cannot be opened ({reason}): name a journal file in a folder that exists, or the URL "
            "of a database, such as postgresql://user@host/name."
        ) from None


def search(
    storage: Any, method: str, default: Choice, allocates: bool, trials: int, call: Callable[[Choice], Any]
) -> Generator[Any, float | None, tuple[Choice, float | None]]:
    """Search the learning rate and the allocation of one method.

    A generator: it yields the call of one training after another and is sent the development value of each, lower being
    better. The first training uses the task's own choice; a training that diverges, sent as None, counts too. Trials of
    earlier runs are not repeated; those that were interrupted are. Tree-structured Parzen estimator: Bergstra,
    Bardenet, Bengio and Kegl, 2011, "Algorithms for hyper-parameter optimization".

    Args:
        storage: Optuna's storage, as ``open_storage`` returns it.
        method: Name of the method, which names the study.
        default: The task's own choice. Rates are searched from an eighth of its rate to eight times that.
        allocates: Whether the allocation is searched too.
        trials: Number of trainings, those of earlier runs included.
        call: Turns a choice into the call of its training.

    Yields:
        What ``call`` returns for the next choice.

    Returns:
        The best choice and its value; ``default`` and None if all trainings diverged.
    """
    import optuna
    from optuna.trial import TrialState

    study = optuna.create_study(storage=storage, study_name=method, load_if_exists=True)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # left by an interrupted run
        study.tell(trial.number, state=TrialState.FAIL)
    finished = (TrialState.COMPLETE, TrialState.PRUNED)
    while (count := len(study.get_trials(states=finished))) < trials:
        study.sampler = optuna.samplers.TPESampler(
            seed=zlib.crc32(f"{method} {count}".encode()), n_startup_trials=max(3, trials // 3)
        )
        if count == 0 and not study.get_trials(states=(TrialState.WAITING,)):
            first = {"lr": default.lr} | ({"allocation": default.allocation} if allocates else {})
            study.enqueue_trial(first, skip_if_exists=False)
        trial = study.ask()
        lr = trial.suggest_float("lr", default.lr * RATES[0], default.lr * RATES[1], log=True)
        powers = sorted({*ALLOCATIONS, default.allocation})
        allocation = trial.suggest_categorical("allocation", powers) if allocates else default.allocation
        value = yield call(Choice(lr, allocation))
        if value is None or not math.isfinite(value):
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, value)
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        return default, None
    best = study.best_trial
    return Choice(best.params["lr"], best.params.get("allocation", default.allocation)), best.value

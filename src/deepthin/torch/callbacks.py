"""Training to a size by others' training loops: callbacks for Lightning and for the Trainer of Hugging Face.

Both add the gradient of the penalty to the gradients of the loss just before the optimiser's step, and steer after it.
"""

import json
from pathlib import Path
from typing import Any, Protocol


class Target(Protocol):
    """What a callback asks of ``SizeTarget``."""

    def add_gradient(self) -> None:
        """Add the penalty's gradient."""
        ...

    def step(self) -> None:
        """Steer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What steering depends on.

        Returns:
            Name -> number.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state: What ``state_dict`` returned.
        """
        ...


STATE = "size_target.json"


def lightning_callback(target: Target) -> Any:
    """A callback for ``lightning.Trainer``.

    Args:
        target: The target; its steps are those of the optimiser.

    Returns:
        A ``lightning.pytorch.Callback``, whose state is saved in Lightning's checkpoints.

    Raises:
        ImportError: Lightning is not installed.
    """
    from lightning.pytorch import Callback

    class SizeTargetCallback(Callback):
        """Adds the penalty's gradient before each step of the optimiser, and steers after it."""

        def __init__(self) -> None:
            self._due = False

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            target.add_gradient()
            self._due = True

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self._due:
                self._due = False
                target.step()

        def state_dict(self) -> dict[str, Any]:
            return target.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            target.load_state_dict(state_dict)

    return SizeTargetCallback()


def trainer_callback(target: Target) -> Any:
    """A callback for ``transformers.Trainer``.

    Args:
        target: The target; its steps are those of the optimiser.

    Returns:
        A ``transformers.TrainerCallback``. Its state is the file ``size_target.json`` in each checkpoint, from which a
        resumed training goes on.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class SizeTargetCallback(TrainerCallback):
        """Adds the penalty's gradient before each step of the optimiser, and steers after it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            saved = _checkpoint(args, state) / STATE
            if state.global_step and saved.exists():
                target.load_state_dict(json.loads(saved.read_text()))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            target.add_gradient()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            target.step()

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero and (folder := _checkpoint(args, state)).is_dir():
                (folder / STATE).write_text(json.dumps(target.state_dict()))

    return SizeTargetCallback()


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder of the checkpoint at the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"

"""Folders of thin Hugging Face models: ``config.json`` and ``model.thin`` (docs/huggingface.md)."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepthin.errors import ConfigError
from deepthin.torch.callbacks import rates_callback, recipe_callback, trainer_callback
from deepthin.torch.files import load, save
from deepthin.torch.pretrained import WEIGHTS, mark

__all__ = ["from_pretrained", "rates_callback", "recipe_callback", "save_pretrained", "trainer_callback"]


def save_pretrained(model: nn.Module, folder: str | Path, max_bytes: int | None = None) -> int:
    """Write a folder that ``from_pretrained`` of this module loads: ``config.json`` and ``model.thin``.

    transformers' own ``from_pretrained`` refuses the folder.

    Args:
        model: A ``transformers.PreTrainedModel``, thin or dense.
        folder: The folder; made if it is not there.
        max_bytes: Upper bound on ``model.thin`` in bytes; None for no bound.

    Returns:
        The size of ``model.thin`` in bytes.

    Raises:
        BudgetError: ``model.thin`` would exceed ``max_bytes``. Nothing is written.
        ConfigError: The model is none of Hugging Face.
        NonFiniteError: A tensor holds NaN or infinity.
        OSError: The folder cannot be written.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise ConfigError(
            f"save_pretrained: a {type(model).__name__} has no config of Hugging Face. For other models call "
            "deepthin.torch.save(model, path)."
        )
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    written = save(model, place / WEIGHTS, max_bytes)
    config.architectures = [type(model).__name__]
    config.save_pretrained(place)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None and hasattr(model, "generate"):
        generation.save_pretrained(place)
    mark(place)
    return written


def from_pretrained(
    auto: Any, folder: str | Path, *, frozen: bool = False, device: str | torch.device | None = None, **options: Any
) -> Any:
    """Load a folder that ``save_pretrained`` wrote, or a checkpoint of ``transformers.Trainer`` with a thin model.

    Args:
        auto: The class: ``transformers.AutoModelForCausalLM``, or a model's own, ``transformers.GPT2LMHeadModel``.
        folder: The folder, with ``config.json`` and ``model.thin``. Nothing is downloaded.
        frozen: For inference only, as in ``deepthin.torch.load``.
        device: Where the model is afterwards; None: in main memory.
        options: Changes of the configuration, by name.

    Returns:
        The model, in evaluation mode; ``generate``, ``pipeline`` and ``Trainer`` take it.

    Raises:
        ConfigError: The folder lacks a file, or the file does not fit the configuration.
        FormatError: ``model.thin`` is damaged.
        OSError: A file cannot be read.
    """
    transformers: Any = importlib.import_module("transformers")
    place = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (place / name).is_file():
            raise ConfigError(
                f"{place} has no {name}: give a local folder that deepthin.huggingface.save_pretrained wrote."
            )
    config: Any = transformers.AutoConfig.from_pretrained(place, **options)
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    if not hasattr(auto, "from_config"):  # a model's own class
        model: Any = auto(config)
    else:
        model = auto.from_config(config)
    load(model, place / WEIGHTS, frozen=frozen, device=device)
    model.name_or_path = config.name_or_path = str(place)
    if hasattr(model, "generate") and (place / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(place)
    return model.eval()

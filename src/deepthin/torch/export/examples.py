"""Example inputs of a model, given or made up."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError

_STEPS = 16  # of a sequence that is made up


def example_of(model: nn.Module, example: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Inputs on which the model runs.

    Args:
        model: The network.
        example: One input, or several; None: made up from the first layer.

    Returns:
        The inputs, batch first.

    Raises:
        ConfigError: They are no tensors, or the model does not run on them.
    """
    if example is None:
        return _made_up(model)
    given = [example] if isinstance(example, Tensor) else list(example)
    if not given or not all(isinstance(tensor, Tensor) and tensor.dim() and len(tensor) for tensor in given):
        raise ConfigError("The example must be a tensor or a tuple of tensors, batch first.")
    given = [tensor.detach().cpu() for tensor in given]
    if (problem := _problem(model, given)) is not None:
        raise ConfigError(f"The model does not run on the example: {problem}")
    return given


def _made_up(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        guesses = _guesses(layer, generator)
        for guess in guesses:
            if _problem(model, [guess]) is None:
                return [guess]
        if guesses:
            break
    raise ConfigError(
        "What the model takes does not follow from its first layer: give an example, a tuple of tensors, batch first "
        "(--example package.module:function on the command line)."
    )


def _guesses(layer: Any, generator: torch.Generator) -> list[Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    if isinstance(layer, nn.Linear):
        return [noise(layer.in_features), noise(_STEPS, layer.in_features)]
    if isinstance(layer, nn.RNNBase):
        return [noise(_STEPS, layer.input_size)]
    if isinstance(layer, nn.Embedding):
        return [torch.randint(layer.num_embeddings, (1, _STEPS), generator=generator)]
    if isinstance(layer, nn.Conv1d):
        return [noise(layer.in_channels, length) for length in (100, 1000)]
    if isinstance(layer, nn.Conv2d):
        return [noise(layer.in_channels, side, side) for side in (28, 32, 64, 224)]
    return []


def _problem(model: nn.Module, given: Sequence[Tensor]) -> str | None:
    """What the model raises, in one line; None if it runs."""
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            cast(Any, model)(*given)
    except Exception as error:  # a model may raise anything
        return (str(error) or type(error).__name__).splitlines()[0]
    finally:
        for part, was in modes.items():
            part.training = was
    return None

"""What `deepthin bench modules` and `acoustic` time: modules as users call them, dense, in fewer bits, and thin."""

import copy
import importlib
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn

from deepthin.errors import BudgetError
from deepthin.lab.bench.competitors import CODED, EIGHT_BITS, Shapes, dense_competitors, network, thin_network
from deepthin.lab.bench.timing import Timing

ACOUSTIC: Shapes = ((1024, 429), *[(1024, 1024)] * 3, (102, 1024))
"""The network of the task ``acoustic``: 429-4x1024-102."""


def dense_modules(shapes: Shapes, x: torch.Tensor) -> Iterator[Timing]:
    """The dense competitors: in float32, in bfloat16 where the processor multiplies it, and in int8.

    Args:
        shapes: (outputs, inputs) of each layer, rectified but for the last.
        x: The inputs, batch x inputs.

    Yields:
        ``dense``, ``packed`` and ``int8`` of ``dense_competitors``; ``bf16`` with weights and inputs in bfloat16;
        ``torchao`` where torchao is installed: dynamic int8, eager or compiled, whichever is faster in a first run.
    """
    yield from dense_competitors("modules", shapes, x)
    dense = network(shapes).eval()
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        yield _timing("bf16", None, copy.deepcopy(dense).bfloat16(), x.bfloat16())
    with suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield _timing("torchao", None, _torchao(dense, x), x)
        finally:
            logging.disable(logging.NOTSET)


def _torchao(dense: nn.Module, x: torch.Tensor) -> Any:
    quantization: Any = importlib.import_module("torchao.quantization")  # no dependency: timed where it is installed
    eager = copy.deepcopy(dense)
    quantization.quantize_(eager, quantization.Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(eager, dynamic=False)
    try:
        with torch.inference_mode():
            times = [min(_seconds(model, x) for _ in range(20)) for model in (eager, compiled)]
    except Exception:  # no compiler for C++, say
        return eager
    return eager if times[0] < times[1] else compiled


def _seconds(model: Any, x: torch.Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def thin_modules(shapes: Shapes, x: torch.Tensor, model: nn.Sequential, ratio: float, rank: int) -> Iterator[Timing]:
    """DeepThin at one ratio, and about as many factors in fewer bits.

    Args:
        shapes: (outputs, inputs) of each layer.
        x: The inputs, batch x inputs.
        model: The network, compressed by DeepThin with factors in float32.
        ratio: Bytes of its matrices over those of the dense ones.
        rank: Rank of the factors.

    Yields:
        ``thin``; ``thin_8bit`` with factors in 8 bits, and ``thin_coded`` with those of a learned step, as they are
        after loading, at a quarter of the bytes before coding.
    """
    yield _timing("thin", ratio, model, x)
    for name, then in (("thin_8bit", EIGHT_BITS), ("thin_coded", CODED)):
        with suppress(BudgetError):
            yield _timing(name, ratio, thin_network(network(shapes), ratio / 4, rank, then=then)[0], x)


def _timing(name: str, ratio: float | None, model: Any, x: torch.Tensor) -> Timing:
    model.eval()
    model = model[0] if isinstance(model, nn.Sequential) and len(model) == 1 else model
    return Timing(name, ratio, lambda: cast(Any, model)(x))

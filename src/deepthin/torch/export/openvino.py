"""A portable model for OpenVINO: an ``.xml`` with the graph and a ``.bin`` with the constants."""

import importlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from deepthin.torch.export.onnx import build
from deepthin.torch.export.written import Written

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
"""Single precision: with OpenVINO's own choice, results may be off by 1e-3 of the largest."""


def write(model: nn.Module, example: Sequence[Tensor], path: Path, compact: bool = False) -> Written:
    """Export a model.

    Args:
        model: A thin or dense network.
        example: Its inputs; batch and lengths may vary later.
        path: The ``.xml`` file; the ``.bin`` file is beside it.
        compact: Whether integers are stored once.

    Returns:
        The files that were written.
    """
    openvino = _openvino()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(build(model, example, "convolution", compact, folds=True).SerializeToString())
        openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)
    path.write_text(re.sub(r"\n\s*", "", path.read_text()))  # a quarter of the graph's bytes
    return Written.of(path, path.with_suffix(".bin"))


def runner(path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Load a file.

    Args:
        path: The ``.xml`` file.

    Returns:
        A function of the inputs, on one thread of the CPU.
    """
    openvino = _openvino()
    request = openvino.Core().compile_model(path, "CPU", SETTINGS).create_infer_request()
    return lambda inputs: [np.array(value) for value in request.infer(list(inputs)).values()]


def constants(path: Path) -> list[tuple[str, int, int]]:
    """The constants of a file.

    Args:
        path: The ``.xml`` file.

    Returns:
        Name, number of entries, and bytes of each.
    """
    openvino = _openvino()
    nodes = openvino.Core().read_model(path).get_ops()
    arrays = [(node.get_friendly_name(), node.get_data()) for node in nodes if node.get_type_name() == "Constant"]
    return [(name, array.size, array.nbytes) for name, array in arrays]


def warm_up() -> None:
    """Load the runtime, so that the memory of a file can be told apart from its own."""
    _openvino().Core()


def _openvino() -> Any:
    """The package, which is imported only here: types are checked without it."""
    return importlib.import_module("openvino")

"""``export``: a Keras model as a TensorFlow Lite, ONNX or SavedModel file, kept only if it is small and right."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from deepthin.errors import ConfigError, ExportError
from deepthin.keras.files import save
from deepthin.keras.generated import ThinLayer
from deepthin.keras.tree import walk
from deepthin.keras.weight import EXPORTED, ThinWeight

BATCHES = (1, 3, 8)
TOLERANCE = 1e-5  # of the largest output: sums in another order
_OVER = 1.25  # upper bound on the bytes of the file over those of the .thin file ...
_A_LAYER = 8192  # ... beside these for each layer ...
_GRAPH = {
    "tflite": 0,
    "onnx": 0,
    "savedmodel": 65536,
}  # ... and for the graph itself, which TensorFlow writes at length


@dataclass(frozen=True, slots=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        target: ``tflite``, ``onnx`` or ``savedmodel``.
        path: The file, or the folder of a SavedModel.
        bytes: Size of all files.
        thin_bytes: Size of the model's ``.thin`` file.
        error: The largest difference of an output from Keras's, over the largest output.
        batches: The batches at which outputs were compared.
        forms: Name of each thin tensor -> how the file computes it.
    """

    target: str
    path: Path
    bytes: int
    thin_bytes: int
    error: float
    batches: tuple[int, ...]
    forms: dict[str, str]


def export(model: keras.Model, path: str | Path, example: Any = None) -> Exported:
    """Write a model for another runtime.

    The file is kept only if it is at most 1.25 times the ``.thin`` file and 8 kB for each layer (a SavedModel: 64 kB
    for its graph as well), if no constant in it is as large as the dense matrix of a thin layer, and if its outputs are
    within 1e-5 of the largest at batches of 1, 3 and 8. TensorFlow Lite takes recurrent layers for one batch only, that
    of the example.

    Args:
        model: A built model, thin or dense, on TensorFlow's backend; it stays as it is.
        path: A file that ends in ``.tflite`` or ``.onnx``, or the folder of a SavedModel.
        example: One input, or several, batch first. None: made up, for a batch of one, from the model's inputs.

    Returns:
        What was written, and how it was checked.

    Raises:
        ConfigError: The backend is another one, the format is not covered, or an example is needed.
        ExportError: The file would be too large, hold a dense weight, or compute other outputs. Nothing is written.
    """
    path = Path(path)
    target = _target(path)
    if keras.config.backend() != "tensorflow":
        raise ConfigError(
            f"export needs TensorFlow's operations, and the backend is {keras.config.backend()}: save the model with "
            "deepthin.keras.save, set KERAS_BACKEND=tensorflow, build it again and deepthin.keras.load the file."
        )
    given = _example(model, example)
    with tempfile.TemporaryDirectory(dir=path.parent if path.parent.is_dir() else None) as name:
        folder = Path(name)
        thin_bytes = save(model, folder / "model.thin", finite=False)
        made = folder / path.name
        try:
            traced = _written(model, target, given, made)
        except (ConfigError, OSError):
            raise
        except Exception as error:  # converters raise whatever they meet
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            reason = next((line for line in lines if "rror" in line), lines[0])
            raise ExportError(f"{target} cannot hold this model: {type(error).__name__}: {reason.strip()}") from error
        size = _size(made)
        _check_bytes(model, target, size, thin_bytes, traced)
        _check_constants(target, made, traced)
        error, batches = _check_outputs(model, target, made, given, (len(given[0]),) if traced.fixed else BATCHES)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(made, path)
    return Exported(target, path, size, thin_bytes, error, batches, traced.forms())


def _written(model: keras.Model, target: str, given: Sequence[np.ndarray], made: Path) -> "_Traced":
    """Write the model, for any batch if the format can."""
    traced = _Traced(model, given)
    if target == "savedmodel":
        traced.as_saved_model(made)
        return traced
    if target == "onnx":
        traced.as_onnx(made)
        return traced
    try:
        made.write_bytes(traced.as_tflite())
    except Exception as error:
        if "TensorList" not in str(error):
            raise
        traced = _Traced(model, given, fixed=True)  # recurrent layers: TensorFlow Lite needs the sizes of their lists
        made.write_bytes(traced.as_tflite())
    return traced


def _target(path: Path) -> str:
    if path.suffix == ".tflite":
        return "tflite"
    if path.suffix == ".onnx":
        if missing := [name for name in ("tf2onnx", "onnxruntime") if find_spec(name) is None]:
            raise ConfigError(
                f"{path.name} needs {' and '.join(missing)}: pip install -c constraints.txt 'deepthin[keras-onnx]'."
            )
        return "onnx"
    if path.suffix:
        raise ConfigError(
            f"{path.name} is no format: use m.tflite, m.onnx, or a folder without a suffix for a SavedModel."
        )
    return "savedmodel"


def _example(model: keras.Model, example: Any) -> list[np.ndarray]:
    if example is not None:
        arrays = [
            np.asarray(ops.convert_to_numpy(a)) for a in (example if isinstance(example, list | tuple) else [example])
        ]
        return [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    inputs = getattr(model, "inputs", None)
    if not inputs or any(size is None for tensor in inputs for size in tensor.shape[1:]):
        raise ConfigError("The shapes of the inputs are not known: pass an example, export(model, path, example=x).")
    rows = min((layer.input_dim for _, layer in walk(model) if isinstance(layer, layers.Embedding)), default=2)
    drawn, made = np.random.default_rng(0), list[np.ndarray]()
    embedded = {
        id(tensor) for _, layer in walk(model) if isinstance(layer, layers.Embedding) for tensor in _inputs_of(layer)
    }
    for tensor in inputs:
        shape, kind = (1, *tensor.shape[1:]), keras.backend.standardize_dtype(tensor.dtype)
        if "int" in kind or id(tensor) in embedded:
            made.append(drawn.integers(rows, size=shape).astype(kind))
        else:
            made.append(drawn.normal(size=shape).astype(kind))
    return made


def _inputs_of(layer: Any) -> list[Any]:
    try:
        return [layer.input] if not isinstance(layer.input, list | tuple) else list(layer.input)
    except (AttributeError, ValueError):  # a layer of a subclassed model has none, a repeated one several
        return []


class _Traced:
    """A model as one graph of TensorFlow, in which thin weights are computed from small constants."""

    def __init__(self, model: keras.Model, given: Sequence[np.ndarray], fixed: bool = False) -> None:
        import tensorflow as tf

        from deepthin.keras.tensorflow_portable import Graph, PortableWeight

        layers_ = {id(layer): (name, layer) for name, layer in walk(model) if isinstance(layer, ThinLayer)}
        self.thin = list(layers_.values())
        self.weights = {id(weight): PortableWeight(weight) for _, layer in self.thin for weight in layer.thin.values()}
        nested = len(given) > 1 or isinstance(getattr(model, "input", None), list | tuple)

        def run(*inputs: Any) -> Any:
            token = EXPORTED.set(Graph(_zero(inputs[0]), self.weights))
            try:
                made = model(list(inputs) if nested else inputs[0], training=False)
            finally:
                EXPORTED.reset(token)
            return {f"output_{at}": tensor for at, tensor in enumerate(tf.nest.flatten(made))}

        self.fixed = fixed
        signature = [
            tf.TensorSpec([len(array) if fixed else None, *array.shape[1:]], array.dtype, name=f"input_{at}")
            for at, array in enumerate(given)
        ]
        self.module: Any = tf.Module()
        self.module.run = tf.function(run, input_signature=signature, autograph=False)
        self.concrete = self.module.run.get_concrete_function()
        self.module.used = list(self.concrete.graph.variables)

    def as_tflite(self) -> bytes:
        """The file."""
        import tensorflow as tf

        converter = tf.lite.TFLiteConverter.from_concrete_functions([self.concrete], self.module)
        return converter.convert()

    def as_onnx(self, path: Path) -> None:
        """Write the file, opset 18."""
        import tf2onnx  # pyright: ignore[reportMissingImports] -- in the environment of TensorFlow

        levels = logging.getLogger("tf2onnx").level
        logging.getLogger("tf2onnx").setLevel(logging.ERROR)
        try:
            tf2onnx.convert.from_function(
                self.module.run, self.module.run.input_signature, opset=18, output_path=str(path)
            )
        finally:
            logging.getLogger("tf2onnx").setLevel(levels)

    def as_saved_model(self, folder: Path) -> None:
        """Write the folder."""
        import tensorflow as tf

        module: Any = tf.Module()  # without the function itself, of which the folder would hold a second copy
        module.used = self.module.used
        tf.saved_model.save(module, str(folder), signatures={"serving_default": self.concrete})

    def forms(self) -> dict[str, str]:
        """How each thin tensor is computed."""
        return {
            f"{name}.{key}".lstrip("."): self.weights[id(weight)].forms.get(layer.indices[key], "not used")
            for name, layer in self.thin
            for key, weight in layer.thin.items()
        }

    def areas(self) -> list[int]:
        """Entries of each thin tensor that is not stored dense."""
        return [
            math.prod(weight.weight.parts[index].shape)
            for weight in self.weights.values()
            for index, form in weight.forms.items()
            if form != "decoded at export"
        ]


def _zero(x: Any) -> Any:
    """0 whatever the input: whether its first entry, but 1 at the most, is above 2. Converters do not foresee it."""
    import tensorflow as tf

    first = tf.cast(tf.reshape(x, [-1])[:1], tf.float32)
    return tf.cast(tf.reduce_any(tf.minimum(first, 1.0) > 2.0), tf.int32)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _check_bytes(model: keras.Model, target: str, size: int, thin_bytes: int, traced: _Traced) -> None:
    plain = [layer for _, layer in walk(model) if not isinstance(layer, ThinWeight)]
    count = len({id(layer) for layer in plain if isinstance(layer, ThinLayer) or layer._trainable_variables})
    most = int(_OVER * thin_bytes) + _A_LAYER * count + _GRAPH[target]
    if size <= most:
        return
    large = [name for name, form in traced.forms().items() if form == "decoded at export"]
    raise ExportError(
        f"The {target} would have {size:,} bytes, the .thin file {thin_bytes:,}; at most {most:,} are allowed. "
        + (
            f"{', '.join(large[:3])}{f' and {len(large) - 3} more' if len(large) > 3 else ''} must be stored dense: "
            "methods whose tables are as large as the weight (hashed, shuffled) have no small form elsewhere. "
            "Use deepthin, rank, kronecker, tensor-train, pruned or a quantiser."
            if large
            else "Its integers take fewer bits in the .thin file than other formats have, or its layers are so small "
            "that their operations take more than their weights. Give layers fewer bits, leave small ones dense, or "
            "send the .thin file and decode it there."
        )
    )


def _check_constants(target: str, path: Path, traced: _Traced) -> None:
    areas = traced.areas()
    if not areas:
        return
    rightful = {size for weight in traced.weights.values() for size in weight.sizes_of_results()}
    rightful |= {math.prod(variable.shape) for variable in traced.module.used}
    found = {"tflite": _tflite_constants, "onnx": _onnx_constants, "savedmodel": _graph_constants}[target](path)
    large = [
        f"{name} ({count:,} entries)"
        for name, count, size in found
        if size >= 4 * min(areas) and count >= min(areas) and count not in rightful
    ]
    if large:
        raise ExportError(
            f"The {target} holds constants as large as a dense matrix: {', '.join(large[:3])}. Please report this "
            "model: every weight should have a smaller form."
        )


def _tflite_constants(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, number of entries and bytes of each constant of a .tflite file."""
    from tensorflow.lite.python import schema_py_generated as schema  # pyright: ignore[reportMissingImports]

    held = schema.Model.GetRootAsModel(path.read_bytes(), 0)
    for graph in (held.Subgraphs(at) for at in range(held.SubgraphsLength())):
        for tensor in (graph.Tensors(at) for at in range(graph.TensorsLength())):
            size = held.Buffers(tensor.Buffer()).DataLength()
            if size:
                yield tensor.Name().decode(), math.prod(tensor.ShapeAsNumpy()) if tensor.ShapeLength() else 1, size


def _onnx_constants(path: Path) -> Iterator[tuple[str, int, int]]:
    """The same of an .onnx file, and of what ONNX Runtime makes of it when it is loaded."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "loaded.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        models = [onnx.load(path), onnx.load(options.optimized_model_filepath)]
    for model in models:
        values = (a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))
        for tensor in (*model.graph.initializer, *values):
            array = onnx.numpy_helper.to_array(tensor)
            yield tensor.name, array.size, array.nbytes


def _graph_constants(path: Path) -> Iterator[tuple[str, int, int]]:
    """The same of a SavedModel."""
    from tensorflow import make_ndarray
    from tensorflow.core.protobuf import saved_model_pb2

    stored = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    for meta in stored.meta_graphs:
        nodes = [*meta.graph_def.node, *(node for f in meta.graph_def.library.function for node in f.node_def)]
        for node in nodes:
            if node.op == "Const" and node.attr["value"].tensor.dtype != 7:  # strings
                array = make_ndarray(node.attr["value"].tensor)
                yield node.name, array.size, array.nbytes


def _runner(target: str, path: Path) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    import tensorflow as tf

    if target == "savedmodel":
        loaded = tf.saved_model.load(str(path))
        serve = loaded.signatures["serving_default"]

        def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            made = serve(**{f"input_{at}": tf.constant(array) for at, array in enumerate(inputs)})
            return [made[f"output_{at}"].numpy() for at in range(len(made))]

        run.loaded = loaded  # pyright: ignore[reportFunctionMemberAccess] -- which signatures do not keep alive
        return run
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = sorted(value.name for value in session.get_inputs())
        shown = sorted(value.name for value in session.get_outputs())

        def infer(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            by_name = {f"input_{at}": array for at, array in enumerate(inputs)}
            return session.run(shown, {name: by_name[name.split(":")[0]] for name in names})

        return infer
    serve_lite = tf.lite.Interpreter(str(path)).get_signature_runner()

    def interpret(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        made = serve_lite(**{f"input_{at}": array for at, array in enumerate(inputs)})
        return [made[f"output_{at}"] for at in range(len(made))]

    return interpret


def _check_outputs(
    model: keras.Model, target: str, path: Path, given: Sequence[np.ndarray], batches: tuple[int, ...]
) -> tuple[float, tuple[int, ...]]:
    run, worst = _runner(target, path), 0.0
    nested = len(given) > 1 or isinstance(getattr(model, "input", None), list | tuple)
    for batch in batches:
        inputs = [_drawn(array, batch) for array in given]
        made = model(list(inputs) if nested else inputs[0], training=False)
        expected = [np.asarray(ops.convert_to_numpy(t)) for t in keras.tree.flatten(made)]
        try:
            there = run(inputs)
        except Exception as error:
            raise ExportError(
                f"The {target} cannot run a batch of {batch}: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        for one, other in zip(there, expected, strict=False):
            fine = one.shape == other.shape and np.isfinite(one).all()
            scale = float(np.abs(other).max()) if other.size else 0.0
            worst = max(worst, float(np.abs(one - other).max()) / (scale or 1.0) if fine and other.size else math.inf)
        if len(there) != len(expected) or not worst <= TOLERANCE:
            raise ExportError(
                f"At a batch of {batch} the {target} computes outputs that differ by {worst:.1e} of the largest from "
                f"Keras's; at most {TOLERANCE:.0e} is allowed."
            )
    return worst, batches


def _drawn(like: np.ndarray, batch: int) -> np.ndarray:
    """Inputs of the kind of an example, for another batch."""
    rows, drawn = like[np.arange(batch) % len(like)], np.random.default_rng(batch)
    if not np.issubdtype(like.dtype, np.floating) or (like == np.round(like)).all():
        return drawn.permutation(rows.reshape(-1)).reshape(rows.shape)
    return (rows + drawn.normal(size=rows.shape) * float(like.std())).astype(like.dtype)

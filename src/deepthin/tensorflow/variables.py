"""Generated variables: a call by name returns a dense tensor, decoded from small trainable factors.

The interface of Sotoudeh and Baghsorkhi, 2018, arXiv:1802.06944, section 4: one call replaces the one that declares a
variable, and one configuration says which variables are generated, and by which method.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from deepthin.errors import BudgetError, ConfigError, closest
from deepthin.keras.layout import Layout
from deepthin.keras.tensorflow_product import product
from deepthin.keras.weight import ThinWeight
from deepthin.method import Method
from deepthin.plan.file_limit import parts_of
from deepthin.plan.parse import parse_rules
from deepthin.plan.patterns import matcher
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned, plan_tensors
from deepthin.plan.start import Start, pieces_of, relative_error
from deepthin.plan.tensor import Tensor
from deepthin.storage.contents import Part, Thin
from deepthin.storage.report import Report, report_of
from deepthin.tensorflow.entries import Asked, Entry, State, contents
from deepthin.tensorflow.host import dotted
from deepthin.tensorflow.starts import array_of, fresh_values, method_of, plan_all, start_of
from deepthin.tensorflow.weight import Weight

if keras.config.backend() != "tensorflow":
    raise ConfigError(
        f"Keras runs on {keras.config.backend()} here, but deepthin.tensorflow decodes by Keras on TensorFlow: set "
        "KERAS_BACKEND=tensorflow in the environment before Keras is imported."
    )

Source = Mapping[str, Any] | str | Path | Rules
"""A configuration: a mapping, a path to a TOML file, or Rules."""

_TYPES = ("float32", "float64", "float16", "bfloat16")


class Variables(tf.Module):
    """A factory of generated variables: call ``get`` where a variable would be declared.

    A matrix that a rule matches is generated from factors, which the factory owns and tracks; all else is an ordinary
    variable. Under ``tf.function`` and ``tf.GradientTape``, call ``get`` in each step: it decodes the present factors.
    Names may have slashes or dots; files and patterns use dots. The interface is that of Sotoudeh and Baghsorkhi, 2018,
    arXiv:1802.06944, section 4.

    Args:
        rules: The configuration (docs/configuration.md): a mapping, the path of a TOML file, or ``Rules``. Without it,
            all variables come from a file: see ``load``.
        seed: Seed of the initial values; each variable draws from a generator that depends on this seed and its name.
        shapes: Name -> shape of all variables, as ``get`` will ask for them. They then share the budget of ``[model]``,
            and ``file_bytes`` and groups are possible. Without it, each matrix meets ``[model] ratio`` by itself.
        outputs_first: Patterns of names whose shapes are (outputs, inputs), such as embeddings. All other shapes have
            the outputs last, as TensorFlow's kernels do.

    Raises:
        ConfigError: ``rules`` are invalid, or do not fit ``shapes``.
        BudgetError: The target is smaller than the smallest plan for ``shapes``.
    """

    def __init__(
        self,
        rules: Source | None = None,
        seed: int = 0,
        shapes: Mapping[str, Sequence[int]] | None = None,
        outputs_first: Sequence[str] = (),
    ) -> None:
        super().__init__()
        parsed = None if rules is None else parse_rules(rules)
        self._tracked: dict[str, tf.Variable] = {}  # what tf.Module and tf.train.Checkpoint find
        self._state = State((parsed, seed), tuple(outputs_first))
        if shapes is not None and parsed is not None:
            named = {dotted(name): tuple(map(int, shape)) for name, shape in shapes.items()}
            self._state.planned = dict.fromkeys(named)  # the names, by which patterns are read
            self._state.planned = plan_all(parsed, [self._tensor(name, shape) for name, shape in named.items()])

    def get(
        self,
        name: str,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        *,
        initializer: Any = None,
        trainable: bool = True,
    ) -> tf.Tensor:
        """The dense tensor of a name, decoded from the present factors; created at the first call.

        A new matrix that a rule matches starts with factors drawn from the seed and its name, whose decoded entries
        have mean 0 and standard deviation sqrt(0.2 / inputs).

        Args:
            name: Name of the variable, with slashes or dots.
            shape: Shape of the tensor, outputs last unless ``outputs_first`` matches; may be left out after the first
                call.
            dtype: float32 (default), float64, float16 or bfloat16; may be left out after the first call.
            initializer: An array is encoded, or assigned to an ordinary variable. A function of shape and dtype is
                called for ordinary variables only. None draws as above, and gives zeros in one dimension.
            trainable: Whether the variable, or its factors, are trained; used at the first call.

        Returns:
            A tensor of ``shape`` and ``dtype``, differentiable in the factors.

        Raises:
            ConfigError: A new name without a shape, a shape or dtype that differs from the first call's, or rules that
                need all shapes up front.
            BudgetError: The target is smaller than the smallest plan for this matrix.
            NonFiniteError: The array to be encoded has a NaN or an infinity.
        """
        return self._entry(name, shape, dtype, initializer, trainable).value()

    def product(
        self,
        x: tf.Tensor,
        name: str,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        *,
        initializer: Any = None,
        trainable: bool = True,
    ) -> tf.Tensor:
        """``x @ get(name, shape)``, by native code where that is predicted to be faster than decoding the matrix.

        Args:
            x: Tensor of shape (..., inputs).
            name: Name of the variable.
            shape: (inputs, outputs), as for ``get``.
            dtype: As for ``get``.
            initializer: As for ``get``.
            trainable: As for ``get``.

        Returns:
            Tensor of shape (..., outputs).

        Raises:
            ConfigError: The variable is not a matrix; and as for ``get``.
            BudgetError: As for ``get``.
            NonFiniteError: As for ``get``.
        """
        entry = self._entry(name, shape, dtype, initializer, trainable)
        if len(entry.shape) != 2:
            raise ConfigError(f"{name}, of shape {entry.shape}, is not a matrix (inputs, outputs): use get.")
        if isinstance(entry.held, ThinWeight) and entry.layout.axes is not None:
            y = product(entry.held, x, entry.index)
            if y is not None:
                return y
        return tf.tensordot(x, entry.value(), [[-1], [0]])

    def getter(self, getter: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        """The custom getter for ``tf.compat.v1.variable_scope(scope, custom_getter=thin.getter)``.

        In a TensorFlow 1 graph the factors are variables of the graph, created and reused as its scopes say; otherwise
        they are held by this factory, as with ``get``. In a TensorFlow 1 graph a regularizer is applied to the decoded
        matrix.

        Args:
            getter: TensorFlow's getter, which declares ordinary variables.
            name: Name of the variable, with the scope's prefix.
            *args: Shape, dtype and initializer, as TensorFlow passes them.
            **options: Further arguments of ``tf.compat.v1.get_variable``.

        Returns:
            The decoded tensor, or the variable that ``getter`` declares.

        Raises:
            ConfigError: A generated matrix with a constraint or, in a TensorFlow 1 graph, in a group; and as for
                ``get``.
            BudgetError: As for ``get``.
            NonFiniteError: As for ``get``.
        """
        options = {**dict(zip(("shape", "dtype", "initializer"), args, strict=False)), **options}
        initializer, dtype = options.get("initializer"), tf.as_dtype(options.get("dtype") or tf.float32)
        shape: Any = options.get("shape")
        shape = np.asarray(initializer).shape if shape is None else tuple(tf.TensorShape(shape).as_list())
        eager = tf.compat.v1.executing_eagerly_outside_functions()
        planned = self._plan(self._tensor(dotted(name), shape), self._state.asked[0]) if dtype.name in _TYPES else None
        if planned is not None and options.get("constraint") is not None:
            raise ConfigError(f"{name} has a constraint, which a generated matrix cannot keep: leave it out.")
        if eager and dtype.name in _TYPES:
            return self.get(
                name, shape, dtype, initializer=initializer, trainable=options.get("trainable") is not False
            )
        if planned is None:
            return getter(name, **options)
        return self._in_graph(getter, name, planned, shape, dtype.name, options)

    def report(self) -> Report:
        """Report what ``save`` would write.

        Returns:
            One row for each matrix, and the totals in bytes.
        """
        return report_of(contents(self._state))

    def _in_graph(
        self, getter: Any, name: str, planned: Planned, shape: tuple[int, ...], dtype: str, options: Mapping[str, Any]
    ) -> Any:
        """The decoded tensor, from factors that are variables of a TensorFlow 1 graph."""
        if len(planned.tensors) > 1:
            raise ConfigError(f"{name} shares a code with others: in a graph of TensorFlow 1 use a rule without group.")
        passed = {key: value for key, value in options.items() if key in ("reuse", "collections", "use_resource")}
        trains = options.get("trainable") is not False

        def make(entry: str, value: np.ndarray, trainable: bool) -> Any:
            first = tf.compat.v1.constant_initializer(value)
            like = {"shape": value.shape, "dtype": tf.as_dtype(value.dtype), "initializer": first}
            return getter(f"{name}/{entry}", **like, trainable=trainable and trains, **passed)

        dotted_name, asked = dotted(name), self._state.asked
        layout = self._layout(dotted_name, shape)
        begin = start_of(planned, asked[1], array_of(dotted_name, options.get("initializer"), shape, layout))
        weight = Weight(make, planned.name, method_of(planned), parts_of(planned), begin, dtype)
        entry = Entry(weight, 0, shape, layout, dtype, asked)
        self._state.entries[dotted_name] = entry  # for save in a session; get never asks for it
        value = entry.value()
        if options.get("regularizer") is not None:
            loss = options["regularizer"](value)
            tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.REGULARIZATION_LOSSES, loss)
        return value

    def _entry(
        self,
        name: str,
        shape: Sequence[int] | None,
        dtype: Any,
        initializer: Any,
        trainable: bool,
        asked: "Asked | None" = None,
    ) -> Entry:
        """The entry of a name; created by ``asked``, or by the factory's rules and seed, if it is new."""
        dotted_name, kind = dotted(name), None if dtype is None else tf.as_dtype(dtype).name
        entry = self._state.entries.get(dotted_name)
        if entry is None:
            if shape is None:
                hint = closest(dotted_name, self._state.entries)
                raise ConfigError(f"There is no {name!r} yet: give its shape.{hint}")
            if kind not in (None, *_TYPES):
                raise ConfigError(f"{name} cannot be {kind}: generated variables are {', '.join(_TYPES)}.")
            with tf.init_scope():
                made_by, new_shape = asked or self._state.asked, tuple(map(int, shape))
                self._make(dotted_name, new_shape, kind or "float32", initializer, trainable, made_by)
            entry = self._state.entries[dotted_name]
        if shape is not None and tuple(shape) != entry.shape:
            raise ConfigError(f"{name} has shape {entry.shape}, but is asked for as {tuple(shape)}.")
        if kind not in (None, entry.dtype):
            raise ConfigError(f"{name} is {entry.dtype}, but is asked for as {kind}.")
        if asked not in (None, entry.asked):
            raise ConfigError(f"{name} was made by other rules or another seed: use these again, or another name.")
        return entry

    def _make(
        self, name: str, shape: tuple[int, ...], dtype: str, initializer: Any, trainable: bool, asked: "Asked"
    ) -> None:
        """Create the entry of a name, and of all members of its group."""
        (rules, seed), layout = asked, self._layout(name, shape)
        if name in self._state.stored:
            self._take(name, shape, dtype, trainable, asked)
            return
        if rules is None:
            known = {*self._state.stored, *self._state.entries}
            raise ConfigError(f"No file has {name!r}, and there are no rules to make it by.{closest(name, known)}")
        given, planned = array_of(name, initializer, shape, layout), self._plan(self._tensor(name, shape), rules)
        if planned is None:
            if given is None:
                first = initializer(shape, dtype) if callable(initializer) else fresh_values(name, shape, layout, seed)
            else:
                first = layout.restored(given, shape)
            self._declare(name, first, dtype, trainable, asked)
            return
        if len(planned.tensors) > 1 and given is not None:
            raise ConfigError(f"{name} shares a code with others, which are not known here: leave initializer out.")
        parts = dict(zip((tensor.name for tensor in planned.tensors), parts_of(planned), strict=True))
        begin = start_of(planned, seed, given)
        self._generate(planned.name, method_of(planned), parts, begin, dtype, trainable, asked)
        if given is not None:
            decoded = layout.stored(np.asarray(self._state.entries[name].value(), np.float32))
            error = relative_error(name, pieces_of(given, decoded))
            if error > 0.5:
                warnings.warn(
                    f"The relative error of {name} is {error:.2f}: at this size the values given are lost. Train on "
                    "before use; without initializer a start is drawn that is as good.",
                    stacklevel=4,
                )

    def _take(self, name: str, shape: tuple[int, ...], dtype: str, trainable: bool, asked: "Asked") -> None:
        """Create the entry of a name from the loaded file, and of every name there that shares its code."""
        stored = self._state.stored
        matrix, index = stored[name]
        there = (list(matrix.parts.values())[index] if isinstance(matrix, Thin) else matrix).shape
        if there != self._layout(name, shape).shape(shape):
            here = self._model_shape(name, there)
            raise ConfigError(f"{name} has shape {here} in the file, but is asked for as {shape}.")
        aliases = {alias: at for alias, (held, at) in stored.items() if held is matrix}
        if isinstance(matrix, Thin):
            code = {entry: raw.numpy() for entry, raw in matrix.code.items()}
            self._generate(matrix.name, matrix.method, matrix.parts, (code, None), dtype, trainable, asked)
            held = self._state.entries[next(iter(matrix.parts))].held
        else:
            self._declare(name, self._layout(name, shape).restored(matrix.numpy(), shape), dtype, trainable, asked)
            held = self._state.entries[name].held
        for alias, at in aliases.items():
            there = (list(matrix.parts.values())[at] if isinstance(matrix, Thin) else matrix).shape
            here = self._model_shape(alias, there)
            self._state.entries[alias] = Entry(held, at, here, self._layout(alias, here), dtype, asked)
            del stored[alias]

    def _generate(
        self,
        method_name: str,
        method: Method,
        parts: Mapping[str, Part],
        begin: Start,
        dtype: str,
        trainable: bool,
        asked: "Asked",
    ) -> None:
        """Create a thin weight, and an entry for each of its tensors."""
        first = next(iter(parts))

        def make(entry: str, value: np.ndarray, trains: bool) -> tf.Variable:
            name = f"{first}/{entry}"
            self._tracked[name] = tf.Variable(
                tf.constant(value), trainable=trains and trainable, name=name.replace(".", "/")
            )
            return self._tracked[name]

        weight = Weight(make, method_name, method, list(parts.values()), begin, dtype)
        for index, (name, part) in enumerate(parts.items()):
            shape = self._model_shape(name, part.shape)
            self._state.entries[name] = Entry(weight, index, shape, self._layout(name, shape), dtype, asked)

    def _declare(self, name: str, value: Any, dtype: str, trainable: bool, asked: "Asked") -> None:
        """Create an ordinary variable."""
        variable = tf.Variable(tf.cast(value, dtype), trainable=trainable, name=name.replace(".", "/"))
        self._tracked[name] = variable
        shape: Any = tuple(variable.shape.as_list())
        self._state.entries[name] = Entry(variable, 0, shape, self._layout(name, shape), dtype, asked)

    def _plan(self, tensor: Tensor, rules: Rules | None) -> Planned | None:
        """The plan of a tensor; None if it is not generated."""
        planned = self._state.planned
        if planned is not None:
            if tensor.name not in planned:
                raise ConfigError(f"{tensor.name} is not among the shapes given.{closest(tensor.name, planned)}")
            plan = planned[tensor.name]
            wanted = {t.name: t.shape for t in plan.tensors} if plan else {}
            if wanted.get(tensor.name, tensor.shape) != tensor.shape:
                there = self._model_shape(tensor.name, wanted[tensor.name])
                raise ConfigError(f"{tensor.name} was given up front with shape {there}: ask for that.")
            return plan
        if rules is None:
            return None
        try:
            return next((p for p in plan_tensors(rules.for_one(tensor), [tensor]) if p.method is not None), None)
        except BudgetError as error:
            raise BudgetError(
                f"{tensor.name}, which comes alone: {error} Or give all shapes up front, Variables(rules, "
                "shapes={name: shape}), so that all share the budget.",
                smallest_bits=error.smallest_bits,
                smallest_ratio=error.smallest_ratio,
            ) from None

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as rules see it, in the file's layout."""
        in_file = self._layout(name, shape).shape(shape)
        inputs = math.prod(in_file[1:])
        return Tensor(name, in_file, std=math.sqrt(0.2 / inputs) if inputs and len(in_file) > 1 else 1.0)

    def _layout(self, name: str, shape: tuple[int, ...]) -> Layout:
        """The permutation from the model's axes to the file's: outputs, inputs, places of the kernel."""
        patterns = [dotted(pattern) for pattern in self._state.outputs_first]
        known = {*self._state.entries, *self._state.stored, *(self._state.planned or ())}  # these win over patterns
        globs = [pattern for pattern in patterns if pattern not in known]
        if len(shape) < 2 or name in patterns or any(matcher(glob)(name) for glob in globs):
            return Layout()
        last = len(shape) - 1
        return Layout((last, last - 1, *range(last - 1)))

    def _model_shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the model of a tensor that has this shape in the file."""
        return stored if self._layout(name, stored).axes is None else (*stored[2:], stored[1], stored[0])

"""The matrices of a model as the C runtime stores them: from thin weights, each constant once."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from deepthin.method import Chain, Code, Drawn, Sparse
from deepthin.methods.factor import Factored, Window
from deepthin.methods.float_coding import FloatCoding, stored_by
from deepthin.torch.export.native.matrix import Array, Core, Kind, Matrix, size_of
from deepthin.torch.export.native.stored import FLOATS, Stored, store
from deepthin.torch.weight import ThinWeight


class Matrices:
    """The matrices of a model, each constant stored once."""

    def __init__(self) -> None:
        self._stored: dict[tuple[int, Any], Stored] = {}
        self._codes: dict[int, tuple[Code, Code]] = {}

    def of_tensor(self, tensor: Tensor) -> Matrix:
        """A dense matrix.

        Args:
            tensor: Rows x anything.

        Returns:
            The matrix.
        """
        values = tensor.detach().float().numpy().reshape(tensor.shape[0], -1)
        return Matrix(Kind.DENSE, *values.shape, a=Array(Stored(np.ascontiguousarray(values).reshape(-1), values.size)))

    def of_weight(
        self, weight: ThinWeight, index: int, rows: bool = False, within: tuple[int, int] | None = None
    ) -> tuple[Matrix, str]:
        """The matrix of a thin tensor, as its method stores it: outputs x inputs.

        Args:
            weight: The thin weight.
            index: Which of its tensors.
            rows: Whether single rows are asked for.
            within: The first row and the one after the last, if only these are wanted.

        Returns:
            The matrix, and how it is stored, in words.
        """
        part, decoder, (start, stop) = weight.parts[index], FloatCoding(weight.method).decoder, weight._cuts[index]
        shape = part.shape[::-1] if part.transposed else part.shape
        height, width = shape[0], math.prod(shape[1:])
        first, last = within or (0, height)
        start, stop, height = start + first * width, start + last * width, last - first
        window = decoder.window(start, (height, width)) if isinstance(decoder, Factored) else None
        alone = len(weight.parts) == 1 and height == shape[0]
        common: dict[str, Any] = {"rows": height, "cols": width, "scale": float(part.scale)}
        matrix: Matrix | None = None
        if window is not None and not window.is_rank:
            matrix = self._windows(weight, window, common)
        elif window is not None:
            matrix = self._rank(weight, window, common)
        elif alone and isinstance(decoder, Chain):
            matrix = self._train(weight, decoder, common)
        elif alone and isinstance(decoder, Sparse) and (found := self._sparse(weight, common)) is not None:
            matrix = found
        elif isinstance(decoder, Drawn):
            values = Array(self._entry(weight, "values"))
            matrix = Matrix(
                Kind.HASHED, a=values, n=decoder.buckets, seed=decoder.seed % (1 << 64), offset=start, **common
            )
        dense = self._dense(weight, index, (start, stop), (first, last), common)
        if matrix is None or (size_of(dense) <= size_of(matrix) and not rows):
            return dense, "integers" if cast(Array, dense.a).stored.bits != FLOATS else "decoded at export"
        return matrix, _WORDS[matrix.kind]

    def _floats(self, weight: ThinWeight) -> tuple[Code, Code]:
        """The stored code, and the floats of the decoder, as arrays."""
        if id(weight) not in self._codes:
            with torch.no_grad():
                code = {entry: value.detach().cpu() for entry, value in weight.code().items()}
                floats = FloatCoding(weight.method).decode(
                    {**code, **{k: torch.from_numpy(np.asarray(v)) for k, v in weight.method.derived().items()}},
                    cast(Any, torch),
                )
            self._codes[id(weight)] = (
                {entry: value.numpy() for entry, value in code.items()},
                {entry: value.numpy() for entry, value in floats.items()},
            )
        return self._codes[id(weight)]

    def _integers(self, weight: ThinWeight, entry: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Symbols and steps of a floating entry, where it is stored so."""
        code, floats = self._floats(weight)
        prefix = f"{entry}_" if stored_by(weight.method, entry) is not None else ""
        if entry not in floats or f"{prefix}symbols" not in code or f"{prefix}step" not in code:
            return None
        return code[f"{prefix}symbols"], code[f"{prefix}step"]

    def _entry(self, weight: ThinWeight, entry: str, order: Any = None) -> Stored:
        """One floating entry, perhaps in another order: a function of an array, which gives one."""
        key = (id(weight), entry)
        if key not in self._stored:
            values = self._floats(weight)[1][entry].astype(np.float32)
            shape, integers = values.shape, self._integers(weight, entry)
            flat_shape = (values.size // shape[-1], shape[-1]) if values.ndim else (1, 1)
            if order is None:
                symbols, step = integers if integers is not None else (None, None)
                grid = symbols.shape if symbols is not None and symbols.ndim == 2 else flat_shape
                self._stored[key] = store(values.reshape(grid), symbols, step)
            else:
                turned = order(values)
                symbols, step = (None, None)
                if integers is not None and integers[1].size == 1:
                    symbols, step = order(integers[0].reshape(shape)).reshape(1, -1), integers[1]
                self._stored[key] = store(turned.reshape(1, -1), symbols, step)
        return self._stored[key]

    def _windows(self, weight: ThinWeight, window: Window, common: Mapping[str, Any]) -> Matrix:
        return Matrix(
            Kind.WINDOWS,
            a=Array(self._entry(weight, "xf"), window.first * window.rank),
            b=Array(self._entry(weight, "wf")),
            n=window.n,
            rank=window.rank,
            offset=window.offset,
            m=window.stop - window.first,
            **common,
        )

    def _rank(self, weight: ThinWeight, window: Window, common: Mapping[str, Any]) -> Matrix:
        if window.offset:
            return self._windows(weight, window, common)
        xf, wf = Array(self._entry(weight, "xf"), window.first * window.rank), Array(self._entry(weight, "wf"))
        rank = window.rank
        cores = (Core(1, window.rows, 1, rank, xf), Core(rank, 1, window.cols, 1, wf))
        return Matrix(Kind.TRAIN, cores=cores, **common)

    def _train(self, weight: ThinWeight, decoder: Chain, common: Mapping[str, Any]) -> Matrix:
        numpy: Any = np
        code = self._floats(weight)[1]
        cores = []
        for at, (entry, core) in enumerate(zip(decoder.code_shapes(), decoder.cores(code, numpy), strict=True)):

            def order(array: np.ndarray, at: int = at, entry: str = entry) -> np.ndarray:
                made = decoder.cores({**code, entry: array}, numpy)[at]
                return np.ascontiguousarray(made)

            before, rows, cols, after = core.shape
            same = np.array_equal(np.asarray(core).reshape(-1), code[entry].reshape(-1))
            cores.append(Core(before, rows, cols, after, Array(self._entry(weight, entry, None if same else order))))
        return Matrix(Kind.TRAIN, cores=tuple(cores), **common)

    def _sparse(self, weight: ThinWeight, common: Mapping[str, Any]) -> Matrix | None:
        floats = self._floats(weight)[1]
        if "positions" not in floats or "values" not in floats:
            return None
        positions = floats["positions"].reshape(-1).astype(np.int64)
        steps = np.diff(positions, prepend=-1) - 1
        gaps = np.full(positions.size + int((steps // 255).sum()), 255, np.uint8)
        ends = np.cumsum(steps // 255 + 1) - 1
        gaps[ends] = steps % 255
        values = self._entry(weight, "values")
        return Matrix(Kind.SPARSE, a=Array(values), gaps=gaps, n=gaps.size, m=positions.size, **common)

    def _dense(
        self, weight: ThinWeight, index: int, entries: tuple[int, int], rows: tuple[int, int], common: Mapping[str, Any]
    ) -> Matrix:
        part, shape = weight.parts[index], (common["rows"], common["cols"])
        with torch.no_grad():
            tensor = weight(index).detach().cpu().float()
        tensor = tensor.T if part.transposed else tensor
        values = np.ascontiguousarray(tensor.reshape(-1, shape[1])[slice(*rows)].numpy())
        integers = self._integers(weight, "weight") if part.scale == 1.0 and part.zero_row is None else None
        symbols = step = None
        if integers is not None:
            symbols, step = integers[0].reshape(-1)[slice(*entries)].reshape(shape), integers[1]
        return Matrix(Kind.DENSE, *shape, a=Array(store(values, symbols, step)))


_WORDS = {
    Kind.WINDOWS: "structured",
    Kind.TRAIN: "factors in turn",
    Kind.SPARSE: "sparse",
    Kind.HASHED: "hashed at each run",
}

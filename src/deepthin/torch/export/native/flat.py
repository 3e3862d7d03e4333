"""A program as a flat file, which runtime/dt_file.c checks and runs; docs/runtime.md describes every word."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from deepthin.torch.export.native.matrix import Array, Matrix
from deepthin.torch.export.native.program import Argument, Place, Program, Space
from deepthin.torch.export.native.stored import Stored

MAGIC = b"dtm1"
VERSION = 1
NONE = 0xFFFFFFFF
OPERATORS = (
    *("linear", "embedding", "conv", "recurrent", "map", "pair", "affine", "softmax", "normalize", "copy", "fill"),
    *("pool", "reduce", "matmul"),
)
"""In the order of runtime/dt_file.c."""
_HEADER, _ALIGNED = 16, 16  # words; bytes


class _Data:
    """Pieces of constant memory, each written once, as offsets in words."""

    def __init__(self) -> None:
        self.bytes, self._known = bytearray(), dict[int, int]()
        self._held: list[np.ndarray] = []

    def add(self, array: np.ndarray | None) -> int:
        if array is None or not array.size:
            return NONE
        if id(array) not in self._known:
            self._held.append(array)
            self._known[id(array)] = len(self.bytes) // 4
            self.bytes += array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            self.bytes += bytes(-len(self.bytes) % 4)
        return self._known[id(array)]


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *(value & NONE for value in values))


def _float(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", min(max(value, -3.4028234663852886e38), 3.4028234663852886e38)))[0]


def flat_file(program: Program) -> bytes:
    """Write a program.

    Args:
        program: The program, its tensors placed.

    Returns:
        The bytes of the file.
    """
    data, arrays, cores, matrices = _Data(), dict[int, int](), list[bytes](), dict[int, int]()
    array_words: list[bytes] = []
    matrix_words: list[bytes] = []

    def stored(array: Stored) -> int:
        if id(array) not in arrays:
            arrays[id(array)] = len(array_words)
            places = [
                data.add(one) for one in (array.data, array.step, array.least, array.table, array.fix, array.fix_at)
            ]
            sizes = (array.fix_at.size, array.zero, array.row, array.bits, array.count, 0)
            array_words.append(_words(*places, *sizes))
        return arrays[id(array)]

    def ranged(array: Array | None) -> tuple[int, int]:
        return (NONE, 0) if array is None else (stored(array.stored), array.first)

    def matrix(one: Matrix) -> int:
        if id(one) not in matrices:
            first = len(cores)
            for core in one.cores:
                cores.append(_words(core.before, core.rows, core.cols, core.after, *ranged(core.values)))
            matrices[id(one)] = len(matrix_words)
            matrix_words.append(
                _words(
                    *(one.kind, one.rows, one.cols, one.turned, _float(one.scale)),
                    *(*ranged(one.a), *ranged(one.b), one.n, one.rank, one.offset, one.m),
                    *(first, len(one.cores), data.add(one.gaps), one.seed, one.seed >> 32),
                )
            )
        return matrices[id(one)]

    def place(one: Place | None) -> tuple[int, int]:
        if one is None:
            return NONE, NONE
        buffer = one.buffer
        first = buffer.at if buffer.space is Space.ARENA else 0
        if buffer.space is Space.CONSTANT:
            first = data.add(buffer.data)
        index = buffer.index if buffer.space in (Space.INPUT, Space.OUTPUT) else 0
        return buffer.space | index << 2, first + one.offset

    def argument(value: Argument) -> bytes:
        if isinstance(value, Matrix):
            return _words(matrix(value))
        if isinstance(value, Place) or value is None:
            return _words(*place(value))
        if isinstance(value, tuple):
            return _words(*value)
        return _words(_float(value)) if isinstance(value, float) else _words(value)

    calls = b"".join(
        _words(OPERATORS.index(call.name)) + b"".join(map(argument, call.arguments)) for call in program.calls
    )
    sizes = [_words(*(buffer.floats for buffer in side)) for side in (program.inputs, program.outputs)]
    tables = b"".join([*sizes, *array_words, *cores, *matrix_words, calls])
    start = -(-(4 * _HEADER + len(tables)) // _ALIGNED) * _ALIGNED
    body = tables + bytes(start - 4 * _HEADER - len(tables)) + bytes(data.bytes)
    counts = (
        len(program.inputs),
        len(program.outputs),
        len(array_words),
        len(cores),
        len(matrix_words),
        len(calls) // 4,
    )
    total = 4 * _HEADER + len(body) + 4
    header = MAGIC + _words(VERSION, total, program.arena, program.kept, *counts, start)
    whole = header.ljust(4 * _HEADER, b"\0") + body
    return whole + _words(zlib.crc32(whole))


def bytes_of_constants(program: Program) -> int:
    """Constant memory of a program: what its matrices and vectors take.

    Args:
        program: The program.

    Returns:
        Bytes.
    """
    arrays: dict[int, int] = {}
    for matrix in program.matrices():
        ranges: Sequence[Array | None] = (matrix.a, matrix.b, *(core.values for core in matrix.cores))
        arrays |= {id(one.stored): one.stored.bytes for one in ranges if one is not None}
        if matrix.gaps is not None:
            arrays[id(matrix.gaps)] = matrix.gaps.nbytes
    vectors = sum(4 * buffer.floats for buffer in program.constants())
    return sum(arrays.values()) + vectors

"""The text of an exported model in C99."""

import re
from collections.abc import Sequence

import numpy as np

from deepthin.torch.export.native.functions import FUNCTIONS, PAIRS
from deepthin.torch.export.native.matrix import Array, Kind, Matrix, Use
from deepthin.torch.export.native.program import Argument, Call, Place, Program, Space
from deepthin.torch.export.native.stored import FLOATS, Stored

_CELLS = ("DT_TANH_CELL", "DT_RELU_CELL", "DT_GRU", "DT_LSTM")
_REDUCTIONS = ("DT_SUM", "DT_MEAN", "DT_MAXIMUM", "DT_MINIMUM")
_USES = ("DT_ONCE", "DT_PACKED", "DT_ROWS")
_NAMES = {
    "map": {0: tuple(f"DT_{name.upper()}" for name in FUNCTIONS)},
    "pair": {0: tuple(f"DT_{name.upper()}" for name in PAIRS)},
    "reduce": {0: _REDUCTIONS},
    "recurrent": {0: _CELLS, 7: _USES},
    "linear": {3: _USES},
    "conv": {4: _USES},
}
"""Arguments that are names in C: operator -> position -> names."""
_WIDTH = 118
_TURNED, _INTEGERS, _PACKED = 5, 6, 7  # further bits of the mask of kinds


def identifier(stem: str) -> str:
    """A file's name as the beginning of C names.

    Args:
        stem: The name without its suffix.

    Returns:
        Letters, digits and underscores.
    """
    made = re.sub(r"\W", "_", stem, flags=re.ASCII)
    return f"_{made}" if made[:1].isdigit() else made


def sources(program: Program, name: str, stem: str) -> dict[str, str]:
    """Write a program.

    Args:
        program: The program, its tensors placed.
        name: Beginning of its names in C.
        stem: Its files' name.

    Returns:
        Name of a file -> its text.
    """
    return {
        f"{stem}.c": _Source(program, name, stem).text(),
        f"{stem}.h": _header(program, name),
        "main.c": _main(program, name, stem),
        "Makefile": _makefile(program, stem),
    }


def _parameters(program: Program) -> list[tuple[str, str]]:
    """(type, name) of what ``run`` takes."""

    def numbered(side: str, count: int, index: int) -> str:
        return side if count == 1 else f"{side}{index}"

    given = [
        ("const int32_t *" if integers else "const float *", numbered("input", len(program.inputs), index))
        for index, integers in enumerate(program.integers)
    ]
    made = [("float *", numbered("output", len(program.outputs), index)) for index in range(len(program.outputs))]
    return [*given, *made, ("void *", "arena")]


def _header(program: Program, name: str) -> str:
    upper = name.upper()
    sizes = [
        f"#define {upper}_{label.upper()}_FLOATS {buffer.floats}"
        for (_, label), buffer in zip(_parameters(program), [*program.inputs, *program.outputs], strict=False)
    ]
    arguments = ", ".join(f"{kind}{label}" for kind, label in _parameters(program))
    return f"""/* Written by deepthin export. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

{chr(10).join(sizes)}
#define {upper}_ARENA_BYTES {4 * program.arena} /* RAM of a run, 16-byte aligned */

void {name}_reset(void *arena); /* zeros the states of recurrent layers; before the first run */
void {name}_run({arguments});

#endif
"""


class _Source:
    """The text of the model's own file; each constant is written once."""

    def __init__(self, program: Program, name: str, stem: str) -> None:
        self.program, self.name, self.stem = program, name, stem
        self.constants: list[str] = []
        self._known: dict[int, str] = {}
        self._held: list[object] = []

    def text(self) -> str:
        calls = "\n".join(f"    {self._call(call)}" for call in self.program.calls)
        arguments = ", ".join(f"{kind}{label}" for kind, label in _parameters(self.program))
        uses_arena = any(
            isinstance(argument, Place) and argument.buffer.space is Space.ARENA
            for call in self.program.calls
            for argument in call.arguments
        )
        arena = "    float *const a = arena;\n" if uses_arena else "    (void)arena;\n"
        kept = self.program.kept
        reset = f"    dt_fill({kept}, 0.0f, arena);" if kept else "    (void)arena;"
        return f"""/* Written by deepthin export. Constants and calls; dt.h describes the operators. */
#include "{self.stem}.h"

#include "dt.h"

{"".join(self.constants)}
void {self.name}_reset(void *arena) {{
{reset}
}}

void {self.name}_run({arguments}) {{
{arena}{calls}
}}
"""

    def _define(self, of: object, kind: str, declared: str, value: str) -> str:
        label = f"{kind}{sum(1 for known in self._known.values() if known.startswith(kind))}"
        self._known[id(of)] = label
        self._held.append(of)
        self.constants.append(f"static const {declared.format(label)} = {value};\n")
        return label

    def _numbers(self, array: np.ndarray | None) -> str:
        if array is None or not array.size:
            return "0"
        if id(array) in self._known:
            return self._known[id(array)]
        if array.dtype == np.float32:
            return self._define(array, "f", "float {}[]", _listed([_literal(value) for value in array.tolist()]))
        kind = {"uint8": "uint8_t", "uint32": "uint32_t"}[array.dtype.name]
        letter = "q" if kind == "uint8_t" else "i"
        return self._define(array, letter, f"{kind} {{}}[]", _listed([str(value) for value in array.tolist()]))

    def _stored(self, array: Array | None) -> str:
        if array is None:
            return "{0}"
        one: Stored = array.stored
        named = {
            "data": self._numbers(one.data),
            "step": self._numbers(one.step),
            "least": self._numbers(one.least),
            "table": self._numbers(one.table),
            "fix": self._numbers(one.fix),
            "fix_at": self._numbers(one.fix_at),
            "fixes": str(one.fix_at.size),
            "first": str(array.first),
            "row": str(one.row),
            "zero": str(one.zero),
            "bits": str(one.bits),
        }
        return _structure(named)

    def _matrix(self, matrix: Matrix) -> str:
        if id(matrix) in self._known:
            return f"&{self._known[id(matrix)]}"
        cores = "0"
        if matrix.cores:
            rows = [
                _structure(
                    {
                        "before": str(core.before),
                        "rows": str(core.rows),
                        "cols": str(core.cols),
                        "after": str(core.after),
                        "values": self._stored(core.values),
                    }
                )
                for core in matrix.cores
            ]
            cores = self._define(matrix.cores, "t", "dt_core {}[]", "{" + ", ".join(rows) + "}")
        named = {
            "kind": f"DT_{Kind(matrix.kind).name}",
            "rows": str(matrix.rows),
            "cols": str(matrix.cols),
            "turned": str(int(matrix.turned)),
            "scale": _literal(matrix.scale),
            "a": self._stored(matrix.a),
            "b": self._stored(matrix.b),
            "n": str(matrix.n),
            "rank": str(matrix.rank),
            "offset": str(matrix.offset),
            "m": str(matrix.m),
            "cores": cores,
            "count": str(len(matrix.cores)),
            "gaps": self._numbers(matrix.gaps),
            "seed": "0"
            if not matrix.seed
            else f"0x{matrix.seed:x}u"
            if matrix.seed < 1 << 32
            else f"0x{matrix.seed:x}ull",
        }
        return "&" + self._define(matrix, "w", "dt_matrix {}", _structure(named))

    def _place(self, place: Place, integers: bool) -> str:
        buffer, offset = place.buffer, place.offset
        names = [label for _, label in _parameters(self.program)]
        if buffer.space is Space.ARENA:
            base, offset = "a", buffer.at + offset
        elif buffer.space is Space.CONSTANT:
            base = self._numbers(buffer.data)
        else:
            base = names[buffer.index + (len(self.program.inputs) if buffer.space is Space.OUTPUT else 0)]
        whole = f"{base} + {offset}" if offset else base
        is_integer = buffer.space is Space.INPUT and self.program.integers[buffer.index]
        if integers != is_integer:
            return f"({'const int32_t' if integers else 'const float'} *)(const void *)({whole})"
        return whole

    def _call(self, call: Call) -> str:
        made = [self._argument(call, at, argument) for at, argument in enumerate(call.arguments)]
        return f"dt_{call.name}({', '.join(made)});"

    def _argument(self, call: Call, at: int, argument: Argument) -> str:
        if argument is None:
            return "0"
        if isinstance(argument, Matrix):
            return self._matrix(argument)
        if isinstance(argument, Place):
            return self._place(argument, call.name == "embedding" and at == 3)
        if isinstance(argument, tuple):
            if at == 0 and call.name in ("conv", "pool"):
                fields = [
                    *map(str, argument[:6]),
                    *(f"{{{a}, {b}}}" for a, b in _pairs(argument[6:14])),
                    str(argument[14]),
                ]
                return "&" + self._define(argument, "s", "dt_window {}", "{" + ", ".join(fields) + "}")
            return self._define(argument, "n", "uint32_t {}[]", "{" + ", ".join(map(str, argument)) + "}")
        if isinstance(argument, float):
            return _literal(argument)
        names = _NAMES.get(call.name, {}).get(at)
        return names[argument] if names else f"{argument}u" if argument > 0x7FFFFFFF else str(argument)


def _pairs(values: Sequence[int]) -> list[tuple[int, int]]:
    return [(values[at], values[at + 1]) for at in range(0, len(values), 2)]


def _structure(named: dict[str, str]) -> str:
    """The fields that are not zero."""
    kept = [f".{key} = {value}" for key, value in named.items() if value not in ("0", "{0}")]
    return "{" + ", ".join(kept or ["0"]) + "}"


def _literal(value: float) -> str:
    limited = min(max(value, -3.4028234663852886e38), 3.4028234663852886e38)
    text = f"{limited:.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def _listed(items: list[str]) -> str:
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) + 2 > _WIDTH:
            lines.append(line)
            line = ""
        line += f"{item},"
    return "{\n" + "\n".join([*lines, line]) + "\n}"


def _main(program: Program, name: str, stem: str) -> str:
    upper, shown = name.upper(), _parameters(program)[:-1]
    given = [(label, "int32_t" if "int32_t" in kind else "float") for kind, label in shown if "const" in kind]
    made = [label for kind, label in shown if "const" not in kind]
    memory = "\n".join(
        [
            *(f"static {kind} {label}[{upper}_{label.upper()}_FLOATS];" for label, kind in given),
            *(f"static float {label}[{upper}_{label.upper()}_FLOATS];" for label in made),
        ]
    )
    reads = "\n".join(
        f"    if (fread({label}, sizeof {label}, 1, file) != 1) return fail(argv[1], sizeof {label});"
        for label, _ in given
    )
    writes = "\n".join(f"    fwrite({label}, sizeof {label}, 1, file);" for label in made)
    arguments = ", ".join([*(label for label, _ in given), *made, "arena"])
    return f"""/* Written by deepthin export: reads inputs from a file, runs the network, writes its outputs.
 *
 *     {stem} INPUT OUTPUT [RUNS]
 *
 * Both files hold numbers one after the other, as the machine stores them: float, or int32_t for indices. With RUNS,
 * the network runs so often, and the mean time is printed. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "{stem}.h"

{memory}
static union {{
    double alignment[2];
    unsigned char bytes[{upper}_ARENA_BYTES + 1];
}} memory __attribute__((aligned(16)));

static int fail(const char *path, size_t bytes) {{
    fprintf(stderr, "%s does not hold %lu bytes more.\\n", path, (unsigned long)bytes);
    return 1;
}}

int main(int argc, char **argv) {{
    void *const arena = memory.bytes;
    const int runs = argc > 3 ? atoi(argv[3]) : 1;
    FILE *file = argc > 2 ? fopen(argv[1], "rb") : NULL;
    if (!file) {{
        fprintf(stderr, "usage: {stem} INPUT OUTPUT [RUNS]\\n");
        return 2;
    }}
{reads}
    fclose(file);
    {name}_reset(arena);
    const clock_t begin = clock();
    for (int i = 0; i < runs; i++) {name}_run({arguments});
    if (argc > 3) printf("%.1f us a run\\n", 1e6 * (double)(clock() - begin) / CLOCKS_PER_SEC / (runs > 0 ? runs : 1));
    if (!(file = fopen(argv[2], "wb"))) return 1;
{writes}
    return fclose(file) != 0;
}}
"""


def used(program: Program) -> str:
    """Flags that leave out what a program does not use.

    Args:
        program: The program.

    Returns:
        ``-DDT_KINDS=... -DDT_MAPS=...``
    """
    matrices = list(program.matrices())
    bits = {int(matrix.kind) for matrix in matrices} | {_TURNED for matrix in matrices if matrix.turned}
    arrays = [array for matrix in matrices for array in (matrix.a, matrix.b, *(core.values for core in matrix.cores))]
    bits |= {_INTEGERS for array in arrays if array is not None and array.stored.bits != FLOATS}
    bits |= {
        _PACKED
        for call in program.calls
        for at, names in _NAMES.get(call.name, {}).items()
        if names is _USES and call.arguments[at] == Use.PACKED
    }
    functions = {
        argument for call in program.calls if call.name == "map" and isinstance(argument := call.arguments[0], int)
    }
    return f"-DDT_KINDS={sum(1 << bit for bit in bits)}u -DDT_MAPS={sum(1 << function for function in functions)}u"


def _makefile(program: Program, stem: str) -> str:
    return f"""# Written by deepthin export. `make` compiles the example; `make size` shows what it takes.
CC = cc
CFLAGS = -std=c99 -pedantic -Wall -Wextra -O3 -march=native -fno-math-errno -fno-trapping-math
# What the network does not use is left out:
USED = {used(program)}

{stem}: main.c {stem}.c {stem}.h dt.c dt.h
\t$(CC) $(CFLAGS) $(USED) -ffunction-sections -Wl,--gc-sections main.c {stem}.c dt.c -o $@ -lm

size: {stem}
\tsize {stem}

clean:
\trm -f {stem}

.PHONY: size clean
"""

"""Reads files in a process whose memory is limited: ``python tests/limited.py READER EXTRA_BYTES MAX_BYTES FILE ...``.

Prints, as JSON, for each file what became of it: "read", or the error's type and message. Whatever a file says, the
process must live on: only errors with a name are expected.
"""

import contextlib
import io
import json
import resource
import sys
import warnings
from pathlib import Path

from deepthin import DeepThinError


def reader(name):
    """A function of a path and a cap in bytes."""
    import deepthin

    if name in ("load", "inspect"):
        return lambda path, most: getattr(deepthin, name)(path, most)
    if name == "command":
        from deepthin.cli import main

        def call(path, most):
            sys.argv = ["deepthin", "inspect", path, "--max-bytes", str(most)]
            said = io.StringIO()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    main.main()
            except SystemExit as stopped:
                if stopped.code:
                    raise DeepThinError(said.getvalue().strip()) from None

        return call
    if name in ("torch", "meta"):
        import torch
        from torch import nn

        import deepthin.torch as dt

        def into_torch(path, most):
            with torch.device("meta" if name == "meta" else "cpu"):
                model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20))
            dt.load(model, path, max_bytes=most)

        return into_torch
    if name == "keras":
        import keras

        import deepthin.keras as dk

        def into_keras(path, most):
            model = keras.Sequential([keras.layers.Input((20,)), keras.layers.Dense(12, name="0")])
            dk.load(model, path, max_bytes=most)

        return into_keras
    if name == "tensorflow":
        import deepthin.tensorflow as dtf

        return lambda path, most: dtf.load(dtf.Variables(), path, max_bytes=most)
    raise ValueError(name)


def outcome(read, path, most):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(path, most)
    except DeepThinError as error:
        return [type(error).__name__, str(error)]
    except Exception as error:  # what no reader may let out
        return ["unnamed " + type(error).__name__, str(error)]
    return ["read", ""]


def limit(extra_bytes):
    """From now on the process may take so many bytes of address space more than it has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    now = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmSize")))
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))


if __name__ == "__main__":
    name, extra_bytes, most, *paths = sys.argv[1:]
    read = reader(name)
    found = {}
    for number, path in enumerate(paths):
        found[path] = outcome(read, path, int(most))
        if not number:  # a first file loads what is loaded late
            limit(int(extra_bytes))
    print(json.dumps(found))

"""Build the page: the network as a flat file, and features, runtime and network's code as one wasm file.

    python examples/keywords-browser/build.py [--out DIR] [--serve [PORT]]

needs a clone, and ``pip install ziglang``. The files land beside index.html or, with ``--out``, in a folder with copies
of the page. ``--serve`` serves it on localhost, where browsers allow the microphone.
"""

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from network import BANDS, Spotter

import deepthin.torch as dt
from deepthin.torch.export.flat import flat_file
from deepthin.torch.export.operators import program_of

HERE = Path(__file__).resolve().parent
RUNTIME = HERE.parents[1] / "runtime"
PAGE = ("index.html", "page.js", "spotter.js", "capture.js", "keywords.json")
BUILT = ("spotter.wasm", "keywords.dt")
FLAGS = (
    "--target=wasm32-wasi", "-mexec-model=reactor", "-nostartfiles", "-Wl,--no-entry", "-Wl,--strip-all",
    "-std=c99", "-Wall", "-Wextra", "-O2", "-msimd128", "-mbulk-memory", "-ffunction-sections", "-fdata-sections",
)  # fmt: skip


def build(out: Path = HERE) -> int:
    """Write the page.

    Args:
        out: The folder.

    Returns:
        Bytes of all that a browser loads.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = dt.load(Spotter(), HERE / "keywords.thin").eval()
    program = program_of(model, (torch.zeros(1, 1, BANDS),), streaming=True)  # one frame at a time
    (out / "keywords.dt").write_bytes(flat_file(program))
    sources = [HERE / "spotter.c", *(RUNTIME / name for name in ("dt.c", "dt_file.c", "log_mel.c"))]
    compiler = [sys.executable, "-m", "ziglang", "cc"]
    subprocess.run([*compiler, *FLAGS, f"-I{RUNTIME}", *map(str, sources), "-o", str(out / "spotter.wasm")], check=True)
    if out != HERE:
        for name in PAGE:
            shutil.copy(HERE / name, out)
    sizes = {name: (out / name).stat().st_size for name in (*PAGE, *BUILT)}
    for name, size in sizes.items():
        print(f"{name:14} {size:7,} bytes")
    print(f"{'all':14} {sum(sizes.values()):7,} bytes")
    return sum(sizes.values())


def serve(folder: Path, port: int) -> None:
    """Serve a folder on localhost, until interrupted.

    Args:
        folder: The page.
        port: The port; 0: a free one.
    """
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("localhost", port), handler) as server:
        print(f"http://localhost:{server.server_port}/", flush=True)
        server.serve_forever()


def main() -> None:
    """Read the command line, build, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT")
    options = parser.parse_args()
    build(options.out.resolve())
    if options.serve is not None:
        serve(options.out.resolve(), options.serve)


if __name__ == "__main__":
    main()

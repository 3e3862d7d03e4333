"""Build the page: the network as a flat file, and features, runtime and network's code as one wasm file.

    python examples/keywords-browser/build.py [--out DIR] [--serve [PORT]]

needs a clone, and ``pip install ziglang``. The files land beside index.html or, with ``--out``, in a folder with copies
of the page. ``--serve`` serves it on localhost, where browsers allow the microphone.
"""

import argparse
import functools
import http.server
import shutil
from pathlib import Path

import torch
from network import BANDS, Spotter

import deepthin.torch as dt
from deepthin.torch.export import wasm
from deepthin.torch.export.native import runtime

HERE = Path(__file__).resolve().parent
PAGE = ("index.html", "page.js", "spotter.js", "capture.js", "keywords.json")
BUILT = ("keywords.wasm", "keywords.dtm", "keywords.mjs")
EXPORTS = ("spotter_open", "spotter_reset", "spotter_samples", "spotter_means", "spotter_push")


def build(out: Path = HERE) -> int:
    """Write the page.

    Args:
        out: The folder.

    Returns:
        Bytes of all that a browser loads.
    """
    out.mkdir(parents=True, exist_ok=True)
    model = dt.load(Spotter(), HERE / "keywords.thin").eval()
    sources = [HERE / "spotter.c", runtime.folder() / "log_mel.c"]
    one_frame = (torch.zeros(1, 1, BANDS),)
    wasm.write(model, one_frame, out / "keywords.wasm", streaming=True, sources=sources, exports=EXPORTS)
    if out != HERE:
        for name in PAGE:
            shutil.copy(HERE / name, out)
    sizes = {name: (out / name).stat().st_size for name in (*PAGE, *BUILT)}
    for name, size in sizes.items():
        print(f"{name:14} {size:7,} bytes")
    print(f"{'all':14} {sum(sizes.values()):7,} bytes")
    return sum(sizes.values())


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of a folder on localhost.

    Args:
        folder: The page.
        port: The port; 0: a free one.

    Returns:
        The server, which listens but does not answer yet.
    """
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    return http.server.ThreadingHTTPServer(("localhost", port), handler)


def main() -> None:
    """Read the command line, build, and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT")
    options = parser.parse_args()
    build(options.out.resolve())
    if options.serve is not None:
        with server(options.out.resolve(), options.serve) as serving:
            print(f"http://localhost:{serving.server_port}/", flush=True)
            serving.serve_forever()


if __name__ == "__main__":
    main()

"""Ray's nodes as processes of this machine, each of one core, that tests start and kill."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
ENVIRONMENT["RAY_worker_niceness"] = "0"  # else workers wait for whatever runs beside the tests
START = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--object-store-memory=100000000"]


class Nodes:
    """A head and further nodes; used as a context, which kills all of them."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.running = folder, []
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": self.address}
        self.environment.pop("DEEPTHIN_DATA", None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in list(self.running):
            self.kill(node)

    def head(self):
        """Start the head, and wait until it answers."""
        node = self._start("--head", f"--port={self.port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false")
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return node
            time.sleep(0.2)
        raise AssertionError("the head did not start")

    def node(self):
        """Start a node, which joins by itself."""
        return self._start(f"--address={self.address}", "--node-ip-address=127.0.0.1")

    def kill(self, node):
        """Kill a node with all of its processes."""
        self.running.remove(node)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def _start(self, *words):
        with (self.folder / "ray.log").open("ab") as log:
            node = subprocess.Popen(
                [sys.executable, *START, *words],
                start_new_session=True,
                env={name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.running.append(node)
        return node

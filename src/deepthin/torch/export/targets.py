"""The formats that a model can be exported to."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepthin.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Target:
    """One format.

    Attributes:
        name: Its name on the command line.
        suffix: End of its files' names.
        packages: What writes and runs it, as modules.
        fixed: Whether a file takes inputs of one shape only.
        code_bytes: Upper bound on the compiled code that a file holds beside its constants.
        streams: Whether recurrent layers can keep their states from one run to the next.
        flat: Whether its outputs come without their shapes.
        copies: Whether the format can hold how integers are copied, instead of the copies.
        instead: What to do where the file would be too large.
        install: What to install.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    fixed: bool = False
    code_bytes: int = 0
    streams: bool = False
    flat: bool = False
    copies: bool = True
    instead: str = (
        "Its integers take fewer bits in the .thin file than other formats have: give the layers fewer bits, or send "
        "the .thin file and load it there."
    )
    install: str = "pip install -c constraints.txt 'deepthin[export]'"

    def module(self) -> Any:
        """The module with ``write``, ``runner``, ``constants`` and ``warm_up``.

        Returns:
            The module.

        Raises:
            ConfigError: A package is not installed; the message says what to install.
        """
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"{self.name} needs {package}, which is not installed: {self.install}")
        return importlib.import_module(f"deepthin.torch.export.{self.name}")


TARGETS = {
    target.name: target
    for target in (
        Target("onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime")),
        Target(
            "openvino",
            ".xml",
            ("openvino", "onnx", "onnxscript"),
            copies=False,
            instead="The graph takes some 10 kB a layer in this format: export to onnx, which OpenVINO reads too.",
        ),
        Target("executorch", ".pte", ("executorch",), fixed=True, install="pip install executorch==1.5.1"),
        Target("litert", ".tflite", ("litert_torch",), fixed=True, install="pip install litert-torch==0.10.0"),
        Target("aoti", ".pt2", (), code_bytes=2_000_000),
        Target("c", ".c", (), True, code_bytes=16_000, streams=True, flat=True, copies=False),
        Target(
            "wasm",
            ".wasm",
            ("ziglang",),
            True,
            code_bytes=24_000,
            streams=True,
            flat=True,
            copies=False,
            install="pip install ziglang",
        ),
    )
}


def target_of(to: str | None, path: Path) -> Target:
    """The format that is asked for.

    Args:
        to: A name in ``TARGETS``; None: that of the file's suffix.
        path: The file to write.

    Returns:
        The format.

    Raises:
        ConfigError: There is no such format.
    """
    if to is None:
        to = next((name for name, target in TARGETS.items() if target.suffix == path.suffix), None)
        if to is None:
            suffixes = ", ".join(f"{target.suffix} ({name})" for name, target in TARGETS.items())
            raise ConfigError(f"{path} could be any format: give `to`, or a suffix of these: {suffixes}.")
    if to not in TARGETS:
        raise ConfigError(f"to = {to!r} is no format to export to. {did_you_mean(to, TARGETS)}")
    return TARGETS[to]

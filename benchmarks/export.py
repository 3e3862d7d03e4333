"""Exported networks beside their dense forms: bytes, memory, milliseconds at several batches.

python benchmarks/export.py [--networks mlp,ctc,enc,keywords] [--codes fp32,8,coded] [--to onnx] [--batches 1,8,32]

Each line is one file. Times are medians of interleaved runs on one thread: dense, int8 and thin take turns. The weights
are drawn, not trained: the integers of coded networks have a root mean square of .8, some 1.7 bits each, as
those of trainings to .2 % of the bytes. int8 is ONNX Runtime's dynamic quantisation of the dense file.
"""

import argparse
import copy
import itertools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deepthin.torch as dt
from deepthin.errors import ExportError
from deepthin.lab.tasks import keyword_networks
from deepthin.method import STEPS_OF_SPREAD
from deepthin.torch.export.measure import measured
from deepthin.torch.export.targets import TARGETS

SPREAD = 0.8
EIGHT = {"method": "uniform", "bits": 8}
RATIOS = {"mlp": 0.0099, "ctc": 0.0195, "enc": 0.04, "keywords": 0.1}


class Recogniser(nn.Module):
    """A convolution, two bidirectional LSTMs and a linear layer: speech to letters."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.front, self.norm = nn.Conv1d(39, 64, 5, stride=3, padding=2), nn.BatchNorm1d(64)
        self.lstm = nn.LSTM(64, width, num_layers=2, bidirectional=True, batch_first=True)
        self.output = nn.Linear(2 * width, 28)

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms of the letters' probabilities, batch x steps x 28."""
        x = nn.functional.hardtanh(self.norm(self.front(x.transpose(1, 2)))).transpose(1, 2)
        return nn.functional.log_softmax(self.output(self.lstm(x)[0]), 2)


class Encoder(nn.Module):
    """Four encoder layers of a transformer, 256 wide."""

    def __init__(self, width: int = 256, words: int = 1000, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.register_buffer("places", torch.randn(1, 64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.out = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the classes, batch x 10."""
        return self.out(self.layers(self.embed(ids) + self.places).mean(1))


def dense(name: str) -> tuple[nn.Module, Tensor]:
    """A network and its input, a batch of one."""
    torch.manual_seed(0)
    if name == "mlp":
        sizes = [440] + [2048] * 6 + [1952]
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1]).eval(), torch.randn(1, 440)
    if name == "ctc":
        return Recogniser().eval(), torch.randn(1, 240, 39)
    if name == "enc":
        return Encoder().eval(), torch.randint(1000, (1, 64))
    return keyword_networks.cnn().eval(), torch.randn(1, *keyword_networks.SHAPE)


def thin(name: str, code: str) -> tuple[nn.Module, Tensor]:
    """The network with all matrices thin."""
    model, x = dense(name)
    rule: dict[str, Any] = {"method": "deepthin", "ratio": RATIOS[name]}
    if code == "8":
        rule["then"] = EIGHT
    if code == "coded":
        rule |= {"rank": 4 if name == "mlp" else 1, "floats": max(0.04, RATIOS[name]), "then": {"method": "coded"}}
        del rule["ratio"]
    dt.compress(model, {"rules": {"*": rule}}, init="scratch", seed=0)
    for weight in model.modules():
        if code == "coded" and isinstance(weight, dt.ThinWeight):
            for step in weight.log_steps():
                step.data += math.log(STEPS_OF_SPREAD / SPREAD)
    return model.eval(), x


def main() -> None:
    """A line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="mlp,ctc,enc,keywords")
    parser.add_argument("--codes", default="fp32,8,coded")
    parser.add_argument("--to", default="onnx")
    parser.add_argument("--batches", default="1,8,32")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    batches = [int(batch) for batch in given.batches.split(",")]
    print(f"| network | file | .thin | bytes | memory, MB | {' | '.join(f'batch {b}, ms' for b in batches)} |")
    print(f"|---|---|---|---|---|{'---|' * len(batches)}", flush=True)
    for to in given.to.split(","):
        for name in given.networks.split(","):
            with tempfile.TemporaryDirectory() as folder:
                compared(to, name, given.codes.split(","), batches, Path(folder))


def compared(to: str, name: str, codes: list[str], batches: list[int], folder: Path) -> None:
    """Lines for one network in one format."""
    files, sizes, bytes_of = dict[str, Path](), dict[str, int](), dict[str, int]()
    target = TARGETS[to]
    for code in codes:
        model, x = thin(name, code)
        try:
            made = dt.export(model, folder / f"{code}{target.suffix}", x, to)
        except ExportError as error:
            print(f"| {name} | {to}, {code} | refused: {error} |", flush=True)
            continue
        files[code], sizes[code], bytes_of[code] = made.files[0], made.thin_bytes, made.bytes
    model, x = dense(name)
    files["dense"] = folder / f"dense{target.suffix}"
    shown = x if target.fixed else torch.cat([x, x])
    module = target.module()
    made = getattr(module, "write_dense", module.write)(copy.deepcopy(model), [shown], files["dense"])
    files["dense"], bytes_of["dense"] = made.files[0], made.bytes
    if to == "onnx":
        from onnxruntime.quantization import quantize_dynamic

        files["int8"] = folder / "int8.onnx"
        quantize_dynamic(files["dense"], files["int8"])
        bytes_of["int8"] = files["int8"].stat().st_size
    batches = [1] if target.fixed else batches
    times: dict[int, list[dict[str, float]]] = {}
    for batch in batches:
        inputs = torch.cat([x] * batch).numpy()
        times[batch] = measured(to, list(files.values()), [inputs], folder)
    for at, code in enumerate(files):
        milliseconds = " | ".join(f"{times[batch][at]['milliseconds']:.2f}" for batch in batches)
        memory = times[batches[0]][at]["megabytes"]
        size = f"{sizes[code]:,}" if code in sizes else ""
        print(f"| {name} | {to}, {code} | {size} | {bytes_of[code]:,} | {memory:.1f} | {milliseconds} |", flush=True)


if __name__ == "__main__":
    main()

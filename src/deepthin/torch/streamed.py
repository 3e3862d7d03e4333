"""Compress weights that lie in safetensors files, one matrix in memory at a time: for models that do not fit.

Each matrix is encoded for itself, by as many processes as wanted, into a file beside the output; an interrupted call
goes on with those that are missing. What stays dense goes from the weights' files to the output piece by piece.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.plan.file_limit import parts_of
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rules
from deepthin.plan.shares import Planned
from deepthin.plan.start import relative_error
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.report import Report, report_of
from deepthin.storage.write import write
from deepthin.torch.compress import compared, plan_of
from deepthin.torch.files import contents
from deepthin.torch.raws import raw_of
from deepthin.torch.tensors import encode, tensors_of

Told = Callable[[str, int, int], None]
"""Called with the name of a matrix that is encoded, how many are, and how many there are."""


@dataclass(frozen=True)
class Weights:
    """Tensors in safetensors files.

    Attributes:
        places: Name -> the file that has the tensor.
    """

    places: Mapping[str, Path]

    @classmethod
    def find(cls, folder: Path) -> "Weights":
        """The tensors of all ``.safetensors`` files of a folder, such as the shards of a Hugging Face model.

        Args:
            folder: The folder; or one file.

        Returns:
            Where each tensor is; no value is read.

        Raises:
            ConfigError: There are no such files, one is damaged, or two have a tensor of one name.
        """
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        if not files:
            raise ConfigError(f"--weights {folder} is a folder without .safetensors files.")
        places: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    names = list(opened.keys())
            except SafetensorError as error:
                raise ConfigError(f"--weights {file} cannot be read: {error}") from None
            for name in names:
                if name in places:
                    raise ConfigError(f"--weights {folder}: {places[name].name} and {file.name} both have {name}.")
                places[name] = file
        return cls(places)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, whose values are read when they are used."""
        with safe_open(self.places[name], "pt") as opened:
            return opened.get_tensor(name)

    def checked(self, held: Contents) -> "Renamed":
        """The same tensors under the names that a model stores.

        Args:
            held: What the model has; a shared tensor may lie in the files under any of its names.

        Returns:
            One place for each stored tensor.

        Raises:
            ConfigError: Names or shapes of the model and the files differ.
        """
        names = {name: [name] for name in held.dense}
        for alias, target in held.aliases.items():
            names[target].append(alias)
        found = {name: next((one for one in also if one in self.places), None) for name, also in names.items()}
        lacking = [name for name, place in found.items() if place is None]
        known = {one for also in names.values() for one in also}
        surplus = [name for name in self.places if name not in known]
        if lacking or surplus:
            what = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has {_some(surplus)}"] * bool(surplus)
            raise ConfigError(f"--weights do not fit --model: it {' and '.join(what)}, unlike the model.")
        for name, raw in held.dense.items():
            if (shape := tuple(self[str(found[name])].shape)) != raw.shape:
                raise ConfigError(
                    f"--weights do not fit --model: {name} is {shape} there, and {raw.shape} in the model."
                )
        return Renamed(self.places, {name: str(place) for name, place in found.items()})


@dataclass(frozen=True)
class Renamed(Weights):
    """Tensors in safetensors files, under a model's names.

    Attributes:
        names: Name in the model -> name in the files.
    """

    names: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(self.names[name])

    def key(self, name: str) -> tuple[str, int, int]:
        """What changes when a tensor's file does: its name, size and time."""
        file = self.places[self.names[name]]
        return file.name, file.stat().st_size, file.stat().st_mtime_ns


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def compress_weights(
    model: nn.Module,
    weights: Path,
    rules: Mapping[str, Any] | str | Path | Rules,
    out: Path,
    jobs: int = 1,
    told: Told = lambda *_: None,
) -> Report:
    """Compress trained weights from files to a ``.thin`` file, without loading the model.

    Memory: a few times the largest matrix for each job. Encoded matrices lie in ``OUT.parts`` until the file is
    written; if the call is interrupted, the same call goes on with those that are missing.

    Args:
        model: The network, on the meta device.
        weights: A folder with ``.safetensors`` files that hold its state dict, or one such file.
        rules: The configuration, as for ``compress``; with ``file_bytes``, plans keep it whatever the values are.
        out: The file to write.
        jobs: Number of matrices that are encoded at once, each in a process of its own.
        told: Called after each matrix.

    Returns:
        As ``compress``: sizes and relative errors.

    Raises:
        ConfigError: The rules or the weights do not fit the model, or a rule's size is known only after training.
        BudgetError: The target is smaller than the smallest plan.
        NonFiniteError: A weight has a NaN or an infinity.
        OSError: A file cannot be read or written.
    """
    parsed, (tensors, _) = parse_rules(rules), tensors_of(model)
    if parsed.file_bytes is not None and any(rule.learns_step for rule in parsed.rules):
        raise ConfigError(
            "Coded rules reach file_bytes by training, and weights that are streamed are not trained: name another "
            "method, such as then = { method = 'uniform' }."
        )
    held = contents(model)
    found = Weights.find(weights).checked(held)
    planned = [plan for plan in plan_of(model, parsed, tensors) if plan.method is not None]
    folder = out.with_name(f"{out.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(plan, folder / f"{place:05d}-{_key(plan, found)}.safetensors") for place, plan in enumerate(planned)]
    missing = [(found, plan, path) for plan, path in parts if not path.exists()]
    there = [plan.tensors[0].name for plan, path in parts if path.exists()]
    for done, name in enumerate(itertools.chain(there, _encoded(jobs, missing)), 1):
        told(name, done, len(parts))
    errors: dict[str, float] = {}
    thin: dict[str, Thin] = {}
    for plan, path in parts:
        names = [tensor.name for tensor in plan.tensors]
        with safe_open(path, "pt") as opened:
            errors |= json.loads(opened.metadata()["errors"])
            code = {entry: raw_of(entry, opened.get_tensor(entry)) for entry in opened.keys()}  # noqa: SIM118
        assert plan.method is not None
        ordered = {entry: code[entry] for entry in plan.method.code_shapes()}
        thin[names[0]] = Thin(plan.name, plan.method, dict(zip(names, parts_of(plan), strict=True)), ordered)
    gone = {name for matrix in thin.values() for name in matrix.parts}
    dense = {name: raw_of(name, found[name]) for name in held.dense if name not in gone}
    whole = Contents(thin, dense, held.aliases)
    write(whole, out, parsed.file_bytes)
    report = report_of(whole, errors)
    shutil.rmtree(folder)
    return report


def _key(plan: Planned, found: Renamed) -> str:
    """What a part's file is named by: it changes with the plan and with the weights."""
    what = plan.name, plan.method, parts_of(plan), [(t.name, *found.key(t.name)) for t in plan.tensors]
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _encode(job: tuple[Weights, Planned, Path]) -> str:
    """Encode the tensors of a plan, and write the code with its errors; the name of the first."""
    found, plan, path = job
    names = [tensor.name for tensor in plan.tensors]
    tensors = [found[name] for name in names]
    assert plan.method is not None
    with torch.no_grad():
        weight = encode(plan, plan.method, tensors)
        errors = {
            name: relative_error(name, compared(tensor, decoded))
            for name, tensor, decoded in zip(names, tensors, weight.decoded(), strict=True)
        }
    code = {entry: tensor.detach().contiguous() for entry, tensor in weight.code().items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(code, unfinished, {"errors": json.dumps(errors)})
    unfinished.replace(path)
    return names[0]


def _encoded(jobs: int, missing: Sequence[tuple[Weights, Planned, Path]]) -> Iterator[str]:
    """Encode what is missing, in so many processes; the name of each as it is there."""
    if jobs == 1:
        yield from map(_encode, missing)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        for future in as_completed([pool.submit(_encode, job) for job in missing]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)

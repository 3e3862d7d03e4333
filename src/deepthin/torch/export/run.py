"""``export``: write a model for another runtime, run what was written, and keep it only if it is small and right."""

import copy
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from deepthin.errors import ConfigError, ExportError
from deepthin.torch.compress import materialize
from deepthin.torch.export.examples import example_of
from deepthin.torch.export.measure import measured
from deepthin.torch.export.targets import Target, target_of
from deepthin.torch.export.written import Written
from deepthin.torch.files import save
from deepthin.torch.generated import ThinLayer
from deepthin.torch.packed import PackedIntegers
from deepthin.torch.portable import PortableWeight, forms, portable
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain

BATCHES = (1, 3, 8)
TOLERANCE = 1e-5  # of the largest output: sums in another order
_OVER = 1.25  # upper bound on the bytes of the file over those of the .thin file ...
_A_MATRIX = 8192  # ... beside these for each matrix


@dataclass(frozen=True, slots=True)
class Measured:
    """A file of a runtime, on one thread.

    Attributes:
        bytes: Size of all its files.
        megabytes: Memory for loading and running it once.
        milliseconds: Median of a run with one item.
    """

    bytes: int
    megabytes: float
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        target: Name of the format.
        files: The files that were written.
        bytes: Their size together.
        thin_bytes: Size of the model's ``.thin`` file.
        error: The largest difference of an output from torch's, over the largest output.
        batches: The batches at which outputs were compared.
        forms: Name of each thin tensor -> how the file computes it.
        thin: Memory and time; None if they were not measured.
        dense: Those of the dense network in the same format; None if they were not measured.
        notes: What else there is to say about the files: what a device needs.
    """

    target: str
    files: tuple[Path, ...]
    bytes: int
    thin_bytes: int
    error: float
    batches: tuple[int, ...]
    forms: dict[str, str]
    thin: Measured | None = None
    dense: Measured | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The fields as JSON.

        Returns:
            A JSON object.
        """
        return json.dumps(dataclasses.asdict(self) | {"files": [str(file) for file in self.files]}, indent=1)

    def __str__(self) -> str:
        """A table of the file beside the dense one, and how many tensors have which form."""
        counts = {form: list(self.forms.values()).count(form) for form in dict.fromkeys(self.forms.values())}
        lines = [
            f"{self.target}: {self.bytes:,} bytes (.thin: {self.thin_bytes:,}); outputs within {self.error:.1e} of "
            f"the largest at batch {', '.join(map(str, self.batches))}",
            "weights: " + (", ".join(f"{count} {form}" for form, count in counts.items()) or "none is thin"),
            *self.notes,
        ]
        if self.thin is not None:
            lines.append(f"{'':8}{'bytes':>14}{'memory, MB':>13}{'batch 1, ms':>13}")
            for name, one in (("thin", self.thin), ("dense", self.dense)):
                if one is not None:
                    lines.append(f"{name:8}{one.bytes:>14,}{one.megabytes:>13.1f}{one.milliseconds:>13.3f}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor | Sequence[Tensor] | None = None,
    to: str | None = None,
    *,
    compare: bool = False,
    streaming: bool = False,
) -> Exported:
    """Write a model for another runtime.

    The file is kept only if it is at most 1.25 times the ``.thin`` file and 8 kB for each matrix, if no constant in it,
    and none that the runtime computes when it loads the file, is as large as the dense matrix of a thin layer, and if
    its outputs are within 1e-5 of the largest at batches of 1, 3 and 8.

    Args:
        model: A thin or dense network, on the CPU; it stays as it is. It is exported for evaluation.
        path: The file to write.
        example: One input, or several, batch first. None: made up from the first layer, where that tells it.
        to: ``onnx``, ``openvino``, ``executorch``, ``litert``, ``aoti``, ``c`` or ``wasm``; None: by the suffix of the
            path.
        compare: Whether to export the dense network too, and to measure memory and time of both.
        streaming: For ``c`` and ``wasm``: whether recurrent layers keep their states from one run to the next. The
            example then has the steps of one run, as a rule one.

    Returns:
        What was written, and how it was measured.

    Raises:
        ConfigError: The format is unknown or its packages are missing, the example does not fit, or the model is
            wrapped.
        ExportError: The file would be too large, hold a dense weight, or compute other outputs. Nothing is written.
    """
    path = Path(path)
    target = target_of(to, path)
    module = target.module()
    if streaming and not target.streams:
        raise ConfigError(f"{target.name} files keep no states between runs: streaming is for c and wasm.")
    check_plain(model, f"export(MODEL, {str(path)!r})", replaces=False)
    given = example_of(model, example)
    if path.suffix != target.suffix:
        path = path.with_name(path.name + target.suffix)
    if hasattr(module, "check_folder"):
        module.check_folder(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent if path.parent.is_dir() else None) as name:
        folder = Path(name)
        thin_bytes = save(model, folder / "model.thin", finite=False)
        modes = {part: part.training for part in model.modules()}
        try:
            model.eval()
            options = {"streaming": True} if streaming else {}
            made = _written(module, target, model, given, folder / path.name, **options)
            if target.copies and made.bytes > _most(model, target, thin_bytes):
                made = _written(module, target, model, given, folder / path.name, compact=True)
            how = dict(forms(portable(model)) if made.forms is None else made.forms)
            _check_bytes(model, target, made.bytes, thin_bytes, how)
            _check_constants(model, target, module, made.files[0])
            error, batches = _check_outputs(model, target, module, made.files[0], given)
        finally:
            for part, was in modes.items():
                part.training = was
        thin = dense = None
        if compare:
            (folder / "dense").mkdir()
            plain = materialize(_copied(model))
            writer = getattr(module, "write_dense", None)
            there = (
                writer(plain, given, folder / "dense" / path.name)
                if writer
                else _written(module, target, plain, given, folder / "dense" / path.name)
            )
            inputs = [(tensor if target.fixed else tensor[:1]).numpy() for tensor in given]
            pair = measured(target.name, [made.files[0], there.files[0]], inputs, folder)
            thin, dense = (Measured(of.bytes, **one) for of, one in zip((made, there), pair, strict=True))
        kept = [path.with_name(file.name) for file in made.files]
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, end in zip(made.files, kept, strict=True):
            shutil.move(file, end)  # perhaps from another file system, if the folder is new
    return Exported(target.name, tuple(kept), made.bytes, thin_bytes, error, batches, how, thin, dense, made.notes)


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def _written(
    module: Any,
    target: Target,
    model: nn.Module,
    given: Sequence[Tensor],
    path: Path,
    compact: bool = False,
    **options: bool,
) -> Written:
    # A batch of two, since exporters take one for a fixed size
    shown = given if target.fixed else [torch.cat([tensor[:1], tensor[:1]]) for tensor in given]
    try:
        return module.write(model, shown, path, compact, **options)
    except (ConfigError, ExportError, OSError):
        raise
    except Exception as error:  # exporters raise whatever they meet
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        raise ExportError(
            f"{target.name} cannot export this model: {type(error).__name__}: {reason.strip()}"
        ) from error


def _most(model: nn.Module, target: Target, thin_bytes: int) -> int:
    """Upper bound on the bytes of an exported file."""
    thin = (parts for weight in model.modules() if isinstance(weight, ThinWeight) for parts in weight.parts)
    plain = (
        tensor
        for layer in model.modules()
        if not isinstance(layer, ThinWeight)
        for tensor in layer._parameters.values()
    )
    shapes = [*(part.shape for part in thin), *(tuple(tensor.shape) for tensor in plain if tensor is not None)]
    return int(_OVER * thin_bytes) + _A_MATRIX * sum(len(shape) > 1 for shape in shapes) + target.code_bytes


def _check_bytes(model: nn.Module, target: Target, size: int, thin_bytes: int, how: Mapping[str, str]) -> None:
    most = _most(model, target, thin_bytes)
    if size <= most:
        return
    tables = {
        f"{path}.{name}".lstrip(".")
        for path, layer in model.named_modules()
        if isinstance(layer, ThinLayer)
        for name, part in cast(Any, layer.thin).items()
        if (part.group if isinstance(part, ThinPart) else part).method.derived()
    }
    large = [name for name, form in how.items() if form == "decoded at export" and name in tables]
    raise ExportError(
        f"The {target.name} file would have {size:,} bytes, the .thin file {thin_bytes:,}; at most {most:,} are "
        "allowed. "
        + (
            f"{', '.join(large[:3])}{f' and {len(large) - 3} more' if len(large) > 3 else ''} must be stored dense: "
            "methods whose tables are as large as the weight (hashed, shuffled) have no small form elsewhere. "
            "Use deepthin, rank, kronecker, tensor-train, pruned or a quantiser."
            if large
            else target.instead
        )
    )


def _check_constants(model: nn.Module, target: Target, module: Any, path: Path) -> None:
    if not hasattr(module, "constants"):
        return
    copied = portable(model)
    weights = [part for part in copied.modules() if isinstance(part, PortableWeight)]
    areas = [math.prod(weight.part.shape) for weight in weights if weight.form != "decoded at export"]
    if not areas:
        return
    rightful: set[int] = set()
    for one in (copied, portable(model, "band", compact=True)):
        rightful |= {tensor.numel() for tensor in [*one.parameters(), *one.buffers()]}
        rightful |= {math.prod(part.shape) for part in one.modules() if isinstance(part, PackedIntegers)}
    rightful |= {size for weight in weights for size in weight.sizes_of_results()}
    large = [
        f"{name} ({count:,} entries)"
        for name, count, size in module.constants(path)
        if size >= 4 * min(areas) and count >= min(areas) and count not in rightful
    ]
    if large:
        raise ExportError(
            f"The {target.name} file, or what its runtime computes at loading, holds constants as large as a dense "
            f"matrix: {', '.join(large[:3])}. Please report this model: every weight should have a smaller form."
        )


def _check_outputs(
    model: nn.Module, target: Target, module: Any, path: Path, given: Sequence[Tensor]
) -> tuple[float, tuple[int, ...]]:
    run, worst, done = module.runner(path), 0.0, list[int]()
    own = len(given[0])
    for batch in (own,) if target.fixed else (*BATCHES, *(() if own in BATCHES else (own,))):
        inputs = given if target.fixed else [_drawn(tensor, batch) for tensor in given]
        try:
            with torch.no_grad():
                expected = [t.numpy() for t in _pytree.tree_leaves(model(*inputs)) if isinstance(t, Tensor)]
        except Exception:
            if batch == own:
                raise
            continue  # a model that takes no batch but the example's
        try:
            made = run([tensor.numpy() for tensor in inputs])
        except Exception as error:
            raise ExportError(
                f"The {target.name} file cannot run a batch of {batch}: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        done.append(batch)
        for there, here in zip(made, expected, strict=False):
            there = there.reshape(here.shape) if target.flat and there.size == here.size else there
            fine = there.shape == here.shape and np.isfinite(there).all()
            scale = float(np.abs(here).max()) if here.size else 0.0
            off = float(np.abs(there - here).max()) / (scale or 1.0) if fine and here.size else math.inf
            worst = max(worst, off if here.size else 0.0)
        if len(made) != len(expected) or not worst <= TOLERANCE:
            raise ExportError(
                f"At a batch of {batch} the {target.name} file computes outputs that differ by {worst:.1e} of the "
                f"largest from torch's; at most {TOLERANCE:.0e} is allowed."
            )
    return worst, tuple(done)


def _drawn(like: Tensor, batch: int) -> Tensor:
    """Inputs of the kind of an example, for another batch."""
    rows = like[torch.arange(batch) % len(like)]
    if not like.is_floating_point():
        mixed = rows.flatten()
        return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(batch))].view(rows.shape)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(batch))
    return rows + noise.to(like.dtype) * (like.std() if like.numel() > 1 else 1.0)

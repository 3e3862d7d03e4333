"""Models to ``.thin`` files and back, under the names of the dense model's state dict."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.storage.arrays import Raw
from deepthin.storage.budget import model_bytes
from deepthin.storage.contents import Contents, Thin
from deepthin.storage.decoding import check_weights
from deepthin.storage.held import Place, check_places, contents_of, names_of
from deepthin.storage.names import check_names, renamed, shapes_of
from deepthin.storage.read import read
from deepthin.storage.write import Version, write
from deepthin.torch.exchange import fresh_std, is_transposed, make_plain, make_thin, padding_row, thin_tensors, why_not
from deepthin.torch.generated import ThinLayer
from deepthin.torch.initialise import WithoutValues, fill_buffers
from deepthin.torch.pretrained import _WRITE, follow
from deepthin.torch.raws import raw_of, tensor_of
from deepthin.torch.replaced import replaces
from deepthin.torch.sequential import make_sequential
from deepthin.torch.update import BASE, HASH_BYTES, updates
from deepthin.torch.update_files import check_updates, put_updates
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain, gathered, plain_name, whole


def save(
    model: nn.Module,
    path: str | Path,
    max_bytes: int | None = None,
    *,
    finite: bool = True,
    format: Version = 2,
    only: Literal["delta"] | None = None,
) -> int:
    """Write all parameters and all saved buffers to a ``.thin`` file.

    The file is written to a temporary name and renamed, so that an interrupted call leaves no partial file.

    A model in DistributedDataParallel, DataParallel or FSDP, or compiled, is saved as the plain one: the same bytes. Of
    DistributedDataParallel, one process suffices. Of FSDP (``fully_shard`` or FullyShardedDataParallel), all processes
    must call: each gathers the tensors, the first one writes, and all return after that, or raise its exception.

    Args:
        model: A dense or thin network, also wrapped.
        path: The file to write; an existing one is replaced.
        max_bytes: Upper bound on the size of the file in bytes; None for no bound.
        finite: Whether to refuse NaN and infinity, as ``load`` does.
        format: Version of the file's format. Version 1, which is larger, is for readers that know no other.
        only: ``"delta"`` writes the updates of a model that ``delta`` made, and a hash of their base, which is not
            written. Such a model has to be merged before it can be saved as a whole.

    Returns:
        The size of the file in bytes.

    Raises:
        BudgetError: The file would exceed ``max_bytes``. Nothing is written.
        ConfigError: The model has tensors without values: on the meta device, or allocated by ``to_empty``. Or it has
            updates and ``only`` is not "delta", or the reverse; or the base of the updates has changed.
        NonFiniteError: A tensor holds NaN or infinity, and ``finite``. Nothing is written.
        TypeError: A tensor has a dtype or layout that the file cannot hold.
        ValueError: A tensor's name is reserved or ambiguous in the file, or a tensor changed during the call.
        OSError: The file cannot be written.
    """
    check_updates(model, only)
    tensors = [*model.named_parameters(), *_dense_tensors(model).items()]
    if left := [name for name, tensor in tensors if tensor.is_meta]:
        raise ConfigError(
            f"{', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''} on the meta device: there "
            "are no values to save. Load a file or a state dict, or call deepthin.torch.initialise(model, seed)."
        )
    with gathered(model) as by_first:
        held = contents(model)
        return by_first(lambda: write(held, path, max_bytes, finite=finite, version=format))


_WRITE.append(save)


@replaces("load()")
def load(
    model: nn.Module,
    path: str | Path,
    names: Mapping[str, str] | None = None,
    *,
    frozen: bool = False,
    max_bytes: int | None = None,
    finite: bool = True,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Load a ``.thin`` file into a model, in place; layers whose matrices are stored compressed become thin.

    A file of another framework may lack ``num_batches_tracked``, which then keeps its value, and the ``bias_hh_*`` of
    an LSTM or RNN, which is then 0. Unsaved buffers on the meta device, such as position ids, are computed by the
    module's ``reset_parameters`` or a Hugging Face model's ``_init_weights``; a warning names those that are not, and
    the model refuses to run without them.

    Args:
        model: A network with the architecture that was saved: dense, thin, or built on the meta device. On the meta
            device no dense weight is ever allocated, and loaded tensors are placed in main memory.
        path: The file.
        names: Name in the file -> name in the model, for names that differ.
        frozen: For inference only. No thin parameter requires a gradient. Methods with a straight-through estimator
            keep their code instead of float latents (1 byte a weight at 8 bits), and native code multiplies by it.
        max_bytes: Upper bound on the memory that the file may take beyond a few times its size, in bytes. None: 128
            for each number that the model has, and 64 MiB at least (docs/format.md).
        finite: Whether to refuse NaN and infinity in tensors that are stored as they are. In compressed ones they are
            refused in any case.
        device: Where the model is afterwards, ``"cuda"`` say, all of it; None: where it is, and what is on the meta
            device in main memory.

    Returns:
        The same model.

    Raises:
        ConfigError: Names, shapes or dtypes of the file and the model do not match, or the model is wrapped. The model
            is unchanged.
        FormatError: The file is damaged, is not a ``.thin`` file, takes more than ``max_bytes``, or is not finite.
        OSError: The file cannot be read.
        RuntimeError: There is no such device.
    """
    place = None if device is None else torch.empty(0, device=device).device  # raises before the model changes
    check_plain(model, "load(MODEL, path)", replaces=False)
    thin_now, dense_now = thin_tensors(model), _dense_tensors(model)
    have = {name: weight.parts[index].shape for name, (weight, index) in thin_now.items()}
    have |= {name: tuple(tensor.shape) for name, tensor in dense_now.items()}
    limit = model_bytes(sum(map(math.prod, have.values()))) if max_bytes is None else max_bytes
    stored = read(path, limit, finite=finite, decoded=True)
    if BASE in stored.dense:
        return put_updates(model, stored, names or {}, frozen, str(path))
    if updates(model):
        raise ConfigError(
            f"{path} is a whole network, but the model has updates: merge them, or load into a plain one."
        )
    stored = renamed(stored, names or {}, str(path))
    stored = _completed(model, stored, dense_now)
    check_names(shapes_of(stored), have, str(path))
    _check_places(model, stored, thin_now, dense_now, str(path))
    kinds = {name: _float_of(next(iter(thin.parts)), thin_now, dense_now) for name, thin in stored.thin.items()}
    check_weights(stored, str(path), {name: torch.finfo(kind).max for name, kind in kinds.items()})
    if any(_replaces(thin, thin_now, frozen) for thin in stored.thin.values()) or thin_now.keys() & stored.dense.keys():
        check_plain(model, "load(MODEL, path)")

    sharing: dict[str, list[str]] = {}
    for alias, target in stored.aliases.items():
        sharing.setdefault(target, []).append(alias)
    for thin in stored.thin.values():
        name = next(iter(thin.parts))
        old = next(thin_now[name][0].parameters()) if name in thin_now else dense_now[name]
        code = {entry: tensor_of(raw) for entry, raw in thin.code.items()}
        if not old.is_meta:
            code = {e: t.to(old.device, old.dtype if t.is_floating_point() else t.dtype) for e, t in code.items()}
        places = [
            (tensor_name, index)
            for index, part in enumerate(thin.parts)
            for tensor_name in (part, *sharing.get(part, ()))
        ]
        weight, _ = thin_now.get(name, (None, 0))
        same = weight is not None and all(thin_now.get(tensor_name) == (weight, index) for tensor_name, index in places)
        same = same and weight is not None and weight.rounds == (thin.method.trains == "through" and not frozen)
        if weight is not None and same and not old.is_meta and _plan_of(weight) == _plan_of(thin):
            weight.set_code(code)
            if frozen:
                weight.requires_grad_(False)
            continue
        fresh = ThinWeight(thin.name, thin.method, list(thin.parts.values()), code, frozen=frozen)
        fresh.requires_grad_(not frozen and old.requires_grad)
        layer = _owner(model, name)[0]
        fresh.origin = (name, 0, fresh_std(layer, thin.parts[name].shape) if len(thin.parts[name].shape) > 1 else 1.0)
        for tensor_name, index in places:
            layer, parameter = _owner(model, tensor_name)
            make_thin(layer, {parameter: fresh if len(thin.parts) == 1 else ThinPart(fresh, index)})
    replaced: dict[object, Tensor] = {}
    for name in names_of(stored, stored.dense):
        tensor = tensor_of(stored.dense[stored.aliases.get(name, name)])
        _put(model, name, tensor.clone() if name in stored.aliases else tensor, replaced)
    for layer in list(model.modules()):
        if isinstance(layer, ThinLayer) and not layer.thin:
            make_plain(layer, {})
    make_sequential(model)
    follow(model)
    fill_buffers(model)
    if left := [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]:
        model.register_forward_pre_hook(WithoutValues(left, str(path)))
        warnings.warn(
            f"{', '.join(left)}: not saved in {path} and still on the meta device. Fill them before using the model.",
            stacklevel=3,
        )
    return model if place is None else model.to(place)


def _float_of(
    name: str, thin_now: Mapping[str, tuple[ThinWeight, int]], dense_now: Mapping[str, Tensor]
) -> torch.dtype:
    """The type in which the model has a tensor."""
    return next(thin_now[name][0].parameters()).dtype if name in thin_now else dense_now[name].dtype


def _replaces(thin: Thin, now: Mapping[str, tuple[ThinWeight, int]], frozen: bool) -> bool:
    """Whether a tensor of a file replaces the model's parameters, instead of being copied into them."""
    if any(name not in now for name in thin.parts):
        return True
    weight = now[next(iter(thin.parts))][0]
    return _plan_of(weight) != _plan_of(thin) or weight.rounds != (thin.method.trains == "through" and not frozen)


def _plan_of(matrix: ThinWeight | Thin) -> tuple[object, ...]:
    parts = matrix.parts.values() if isinstance(matrix, Thin) else matrix.parts
    return matrix.name, matrix.method, *parts


def _check_places(
    model: nn.Module,
    stored: Contents,
    thin_now: Mapping[str, tuple[ThinWeight, int]],
    dense_now: Mapping[str, Tensor],
    path: str,
) -> None:
    """ConfigError if a tensor of the file cannot replace the model's tensor of that name."""
    places = {name: Place((id(weight), index), "real") for name, (weight, index) in thin_now.items()}
    for name, tensor in dense_now.items():
        layer, parameter = _owner(model, name)
        reason = why_not(layer, parameter) or (
            "" if parameter in layer._parameters else f"{parameter} is a buffer, not a parameter"
        )
        numbers = "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "whole"
        places[name] = Place((id(tensor), 0), numbers, reason)
    check_places(stored, places, path)
    parts = {name: part for thin in stored.thin.values() for name, part in thin.parts.items()}
    for name in names_of(stored, parts):
        layer, part = _owner(model, name)[0], parts[stored.aliases.get(name, name)]
        if isinstance(layer, nn.Embedding) and part.zero_row != padding_row(layer):
            raise ConfigError(
                f"{path} stores {name} with padding row {part.zero_row}, but padding_idx in the model is "
                f"{padding_row(layer)}."
            )
        if part.transposed != (is_transposed(layer) and len(part.shape) == 2):
            raise ConfigError(f"{path} stores {name} in another order of inputs and outputs than the model keeps it.")


def contents(model: nn.Module) -> Contents:
    """Everything that ``save`` writes: thin tensors, dense tensors, and which names share a tensor.

    Args:
        model: A dense or thin network; on the meta device values are zeros.

    Returns:
        References to the model's tensors, without copies: valid until the model changes. Of a model with updates, these
        and the hash of their base.

    Raises:
        TypeError: A tensor has a dtype or layout that the file cannot hold.
    """
    named = plain_name(model)
    if held := updates(model):
        places = {
            named(name): (thin.group, thin.index) if isinstance(thin := update.thin, ThinPart) else (thin, 0)
            for name, (_, _, update) in held.items()
        }
        base = Raw("U8", (HASH_BYTES,), next(iter(held.values()))[2].base)
        return contents_of(places, {BASE: (BASE, base)}, as_thin)
    dense = {name: (id(tensor), raw_of(name, whole(tensor))) for name, tensor in _dense_tensors(model).items()}
    return contents_of({named(name): place for name, place in thin_tensors(model).items()}, dense, as_thin)


def as_thin(weight: ThinWeight, names: Sequence[str]) -> Thin:
    """A thin weight as a file stores it, without copies of its tensors.

    Args:
        weight: The weight of one tensor or of a group.
        names: Names of its tensors, in the order of ``weight.parts``.

    Returns:
        The method, the parts by name, and the code.

    Raises:
        TypeError: An entry has a dtype or layout that the file cannot hold.
    """
    code = {entry: raw_of(entry, tensor) for entry, tensor in weight.code().items()}
    return Thin(weight.name, weight.method, dict(zip(names, weight.parts, strict=True)), code)


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the plain model's state dict holds besides codes; parameters themselves, not detached copies."""
    named, layers = plain_name(model), model.named_modules(remove_duplicate=False)
    inside = tuple(named(f"{path}.thin.".lstrip(".")) for path, layer in layers if isinstance(layer, ThinLayer))
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} in the state dict is {type(tensor).__name__}, not a tensor: a file cannot hold it."
            )
        if name.rpartition(".")[2] == "_extra_state":
            raise TypeError(f"{name} is a module's own extra state: a file holds parameters and buffers only.")
        if not (plain := named(name)).startswith(inside):
            tensors[plain] = tensor
    return tensors


def _completed(model: nn.Module, stored: Contents, dense_now: Mapping[str, Tensor]) -> Contents:
    """Add what files of other frameworks lack: batch counters, and the second of two biases that are added.

    An LSTM or RNN adds ``bias_hh`` to ``bias_ih``, so the file may hold their sum. In a GRU they act differently.
    """
    known, added = shapes_of(stored), dict[str, Raw]()
    for name, tensor in dense_now.items():
        layer, parameter = _owner(model, name)
        if name in known:
            continue
        if parameter == "num_batches_tracked" and isinstance(layer, nn.modules.batchnorm._NormBase):
            added[name] = raw_of(name, tensor)
        twin = name.replace("bias_hh", "bias_ih")
        if parameter.startswith("bias_hh") and isinstance(layer, nn.LSTM | nn.RNN) and twin in known:
            added[name] = raw_of(name, torch.zeros_like(tensor))
    return Contents(stored.thin, {**stored.dense, **added}, stored.aliases)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, parameter = name.rpartition(".")
    return model.get_submodule(path), parameter


def _put(model: nn.Module, name: str, tensor: Tensor, replaced: dict[object, Tensor]) -> None:
    """Copy into the model's tensor; replace it if it is on the meta device or thin. Shared tensors stay shared."""
    layer, parameter = _owner(model, name)
    if isinstance(layer, ThinLayer) and parameter in layer.thin:
        weight = layer.thin[parameter]
        del layer.thin[parameter]
        like = next(weight.parameters(), tensor)
        key = (weight.group, weight.index) if isinstance(weight, ThinPart) else (weight, 0)
        tensor = tensor if like.is_meta or not like.is_floating_point() else tensor.to(like.dtype)
        layer.register_parameter(parameter, cast(nn.Parameter, _once(key, tensor, replaced, like)))
        return
    holder = layer._parameters if parameter in layer._parameters else layer._buffers
    old = holder[parameter]
    if old is None:
        raise ConfigError(f"{name} is in the file, but the model has none.")
    if old.is_meta:
        holder[parameter] = _once(id(old), tensor, replaced, old)
    else:
        with torch.no_grad():
            old.copy_(tensor)


def _once(key: object, tensor: Tensor, replaced: dict[object, Tensor], like: Tensor) -> nn.Parameter:
    """The replacement of a tensor or ThinWeight: the same object for every name that shares it."""
    if key not in replaced:
        tensor = tensor.to("cpu" if like.is_meta else like.device)
        is_parameter = isinstance(like, nn.Parameter)
        replaced[key] = nn.Parameter(tensor, requires_grad=like.requires_grad) if is_parameter else tensor
    return replaced[key]  # pyright: ignore[reportReturnType] -- a buffer's stand-in goes back among the buffers

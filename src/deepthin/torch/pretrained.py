"""Models of Hugging Face with thin layers: tied tensors stay tied, and what a thin model cannot do is refused.

``PreTrainedModel`` ties parameters by their names, which thin tensors no longer have: it would fail half way. So the
names of what a code trains take their place. Nothing here imports transformers.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deepthin.errors import ConfigError
from deepthin.torch.generated import ThinLayer
from deepthin.torch.weight import ThinPart, ThinWeight

WEIGHTS = "model.thin"
MARK = f"{WEIGHTS}, which deepthin.huggingface.from_pretrained loads"
"""In ``config.json`` as the file of the weights: transformers' own ``from_pretrained`` refuses it, and shows it."""

_TIES, _ALL, _KEPT = "_tied_weights_keys", "all_tied_weights_keys", "_deepthin_dense"
_WRITE: list[Callable[[nn.Module, Path], int]] = []  # ``files.save``, which is built on this


def tie_first(model: nn.Module) -> None:
    """Tie what a model that is still in its ``__init__`` will tie at its end, so that it is compressed once.

    Args:
        model: Any model; nothing happens outside of Hugging Face's.
    """
    for module in _pretrained(model):
        if _ALL not in module.__dict__:
            for target, source in module.get_expanded_tied_weights_keys(all_submodels=True).items():
                path, _, name = target.rpartition(".")  # not by tie_weights, which from_pretrained turns off
                setattr(module.get_submodule(path), name, module.get_parameter(source))


def follow(model: nn.Module) -> None:
    """Bring Hugging Face's names of tied tensors, and its methods, in line with the present layers.

    Args:
        model: A model whose layers have become thin or dense.
    """
    for module in _pretrained(model):
        own = module.__dict__
        thin = _thin_names(module)
        kept: dict[str, Any] | None = own.pop(_KEPT, None)
        built = kept is None and _ALL not in own  # compressed in its ``__init__``: its class has thin layers
        if kept is not None:
            built = kept["built"]
            own.pop(_TIES, None)
            own |= {name: kept[name] for name in (_TIES, _ALL) if kept[name] is not None}
            for name in ("save_pretrained", "resize_token_embeddings"):
                own.pop(name, None)
        for layer in module.modules():
            if isinstance(layer, ThinLayer):
                layer.__dict__.pop(_TIES, None)
        if not thin:
            continue
        own[_KEPT] = {name: own.get(name) for name in (_TIES, _ALL)} | {"built": built}
        whole = own.get(_ALL, None)
        ties = module._tied_weights_keys
        if isinstance(ties, Mapping) and any(name in thin for pair in ties.items() for name in pair):
            own[_TIES] = _renamed(ties, thin)
        if whole is not None:
            own[_ALL] = _renamed(whole, thin)
        first: dict[tuple[int, int], str] = {}
        for name, (weight, index) in thin.items():  # safetensors takes each tensor once
            if first.setdefault((id(weight), index), name) != name:
                path, _, parameter = name.rpartition(".")
                layer = module.get_submodule(path)
                layer.__dict__[_TIES] = {**layer.__dict__.get(_TIES, {}), f"thin.{parameter}.": ""}
        if not built:
            own["save_pretrained"] = functools.partial(_save_pretrained, module)
            own["resize_token_embeddings"] = functools.partial(_resize, module)


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """The models of Hugging Face in a model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    kind = None if modeling is None else getattr(modeling, "PreTrainedModel", None)
    return iter(()) if kind is None else (module for module in model.modules() if isinstance(module, kind))


def _thin_names(module: nn.Module) -> dict[str, tuple[ThinWeight, int]]:
    """Dotted names of thin tensors, a shared one under each of its names."""
    return {
        f"{path}.{name}".lstrip("."): (part.group, part.index) if isinstance(part, ThinPart) else (part, 0)
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, ThinLayer)
        for name, part in layer.thin.items()
    }


def _renamed(ties: Mapping[str, str], thin: Mapping[str, tuple[ThinWeight, int]]) -> dict[str, str]:
    """Pairs of tied names, of the codes' parameters where a tensor is thin."""
    made: dict[str, str] = {}
    for target, source in ties.items():
        if target not in thin and source not in thin:
            made[target] = source
        elif target in thin and source in thin and thin[target] == thin[source]:
            for entry, _ in thin[target][0].named_parameters():
                made[_inside(target, entry)] = _inside(source, entry)
    return made


def _inside(name: str, entry: str) -> str:
    path, _, parameter = name.rpartition(".")
    return f"{path}.thin.{parameter}.{entry}"


def _save_pretrained(module: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    """As transformers does, with the thin file beside it; and a note that stops transformers from loading it."""
    type(module).save_pretrained(module, save_directory, *args, **options)
    folder = Path(save_directory)
    if options.get("is_main_process", True) and folder.is_dir():
        _WRITE[0](module, folder / WEIGHTS)
        mark(folder)


def mark(folder: Path) -> None:
    """Note in a folder's ``config.json`` that its weights are thin.

    Args:
        folder: A folder that ``config.save_pretrained`` wrote to.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "transformers_weights": MARK}, indent=2) + "\n", encoding="utf-8")


def _resize(module: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """Refuse to resize a thin table before anything changes; others are resized as transformers does."""
    tables = [module.get_input_embeddings(), module.get_output_embeddings()]
    if any(isinstance(table, ThinLayer) and "weight" in table.thin for table in tables):
        raise ConfigError(
            "resize_token_embeddings: the table of embeddings is generated from its code, which has a fixed number of "
            "rows. Resize the dense model before compress, or call deepthin.torch.materialize(model) first."
        )
    return type(module).resize_token_embeddings(module, new_num_tokens, *args, **options)

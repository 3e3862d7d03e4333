"""Values for a model that has none: one that was built on the meta device."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.torch.exchange import thin_tensors
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain


def initialise(model: nn.Module, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """Draw all values of a dense or thin model anew, in place, also of one on the meta device.

    Thin matrices get what ``compress(init="scratch", seed=seed)`` draws; all other tensors what the modules'
    ``reset_parameters`` draw, or a Hugging Face model's ``_init_weights``, with torch's generator seeded with ``seed``
    (its state is restored afterwards). Tied tensors stay tied.

    Args:
        model: The model.
        seed: Seed, a whole number >= 0.
        device: Where tensors of the meta device are allocated.

    Returns:
        The same model.

    Raises:
        ConfigError: A module has parameters or buffers, but nothing that fills them: its name is given. Or the model is
            wrapped; ``fully_shard`` is no wrapper.
    """
    check_plain(model, "initialise(MODEL, seed)", replaces=False, sharded=True)
    for name, (weight, _) in reversed(thin_tensors(model).items()):  # a group is named by its first tensor
        weight.origin = (name, seed, weight.origin[2])
    _allocate(model, torch.device(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in reversed(list(model.named_modules())):  # attention resets some tensors of its layers
            if not isinstance(module, ThinWeight | ThinPart):
                _reset(model, name, module)
    for weight in {id(weight): weight for weight, _ in thin_tensors(model).values()}.values():
        weight.reset_parameters()
    return model


def fill_buffers(model: nn.Module) -> None:
    """Compute unsaved buffers on the meta device, such as position ids, by what initialises their module.

    A buffer that nothing sets stays where it is: what is computed from different values before differs afterwards.

    Args:
        model: The model; its parameters may be on the meta device, too, and do not change.
    """
    for module in model.modules():
        meta = {
            name: buffer
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        }
        if meta:
            zeros, ones = (_filled(model, module, meta, value) for value in (0, 1))
            module._buffers.update({e: zeros[e] if torch.equal(zeros[e], ones[e]) else meta[e] for e in meta})


class WithoutValues:
    """A forward pre-hook that refuses to run a model while some of its tensors are on the meta device.

    Args:
        names: Names of the tensors.
        path: The file that does not hold them.
    """

    def __init__(self, names: list[str], path: str) -> None:
        self.names, self.path = names, path

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """Raise ConfigError while a tensor has no values; afterwards, the hook removes itself."""
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        left = [name for name in self.names if name in tensors and tensors[name].is_meta]
        if left:
            raise ConfigError(
                f"{', '.join(left)}: not saved in {self.path} and still on the meta device. Give values before using "
                "the model, or build it on the CPU and load the file then."
            )
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]


def _filled(model: nn.Module, module: nn.Module, meta: dict[str, Tensor], value: int) -> dict[str, Tensor]:
    """Buffers of a module after it was initialised: what differs between two values before was not set."""
    for own, buffer in meta.items():
        module._buffers[own] = torch.full(buffer.shape, value, dtype=buffer.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reset = _reset_of(model, module)
        parameters = module._parameters.copy()
        if reset is not None:
            module._parameters.update(  # nothing but the buffers may change
                {
                    own: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
                    for own, p in parameters.items()
                }
            )
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reset()
            finally:
                module._parameters.update(parameters)
    return {own: cast(Tensor, module._buffers[own]) for own in meta}


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Replace tensors on the meta device by zeros; the same one where the model shares it."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for holder in (module._parameters, module._buffers):
            for own, tensor in holder.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        zeros = torch.zeros_like(tensor, device=device)
                        made[id(tensor)] = (
                            nn.Parameter(zeros, requires_grad=tensor.requires_grad)
                            if isinstance(tensor, nn.Parameter)
                            else zeros
                        )
                    holder[own] = cast(Any, made[id(tensor)])


def _reset_of(model: nn.Module, module: nn.Module) -> Any:
    """What sets the values of a module's own tensors, or None."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            return reset
    owner = next((m for m in model.modules() if callable(getattr(m, "_init_weights", None))), None)
    return None if owner is None else lambda: cast(Any, owner)._init_weights(module)


def _reset(model: nn.Module, name: str, module: nn.Module) -> None:
    """Initialise the tensors of one module, without those of the modules in it."""
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    thin = getattr(module, "thin", None)
    if not tensors and not thin:
        return
    reset = _reset_of(model, module)
    if reset is None:
        raise ConfigError(
            f"{name or 'the model'} is a {type(module).__name__} with parameters or buffers of its own, but without "
            "reset_parameters: give it this method, which sets their values."
        )
    with torch.no_grad():
        reset()

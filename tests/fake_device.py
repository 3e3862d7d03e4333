"""A training step of a network by every method on an accelerator that has no values, in a process of its own.

    python tests/fake_device.py      (prints a line in JSON: rule -> "" or what went wrong)

torch's fake tensors have shapes, types and devices alone: whoever reads a value, or mixes devices, raises. Their device
is ``cuda`` where torch was built for it; elsewhere autograd cannot run there, and a device that is registered for this
process takes its place.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

import deepthin.torch as dt
from deepthin.torch.cache import StateCache
from deepthin.torch.weight import ThinWeight
from test_all_methods import RULES, Everything


def device():
    if torch.backends.cuda.is_built():
        return "cuda"
    backend_registration._setup_privateuseone_for_python_backend("gadget")
    return "gadget"


class NoTransfers(TorchDispatchMode):
    """Copies from the device to the host wait for it; so do copies of numbers to the device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if self.device in devices and isinstance(result, torch.Tensor) and result.device.type == "cpu":
            raise AssertionError(f"{func} copies to the host.")
        if len(devices) > 1 and func is torch.ops.aten.where.self:
            raise AssertionError(f"{func} copies a number to the device.")
        return result


def without_values(model, device):
    """The same network on a device, to be called where tensors are fake."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(value.shape, dtype=value.dtype, device=device), value.requires_grad
                )
        if isinstance(module, ThinWeight):
            for entry in module._exact:
                value = getattr(module, entry)
                setattr(module, entry, torch.empty(value.shape, dtype=value.dtype, device=device))
            module._coded, module._given, module._held_tables = StateCache(), None, None
            module._forget()
            module._prepare_tables()
    return model


def step(rule, device):
    torch.manual_seed(0)
    model = Everything()
    dt.compress(model, {"model": {"ratio": 0.4}, "rules": {"*": rule}}, init="scratch")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = without_values(model, device).train()
        optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
        words = torch.empty((6, 5), dtype=torch.int64, device=device)
        classes = torch.empty((6,), dtype=torch.int64, device=device)
        with NoTransfers(device):
            loss = nn.functional.cross_entropy(model(words), classes)
            loss.backward()
        optimizer.step()
        missing = [name for name, value in model.named_parameters() if value.grad is None]
        assert not missing, f"no gradient of {missing}"
        assert all(value.grad.device.type == device for value in model.parameters())
        with torch.no_grad(), NoTransfers(device):
            assert model.eval()(words).shape == (6, 30)


PLANTED = {
    "planted: a value": lambda x: float(x.sum()),
    "planted: a copy to the host": lambda x: x.cpu(),
    "planted: a number to the device": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
    "planted: two devices": lambda x: x + torch.ones(3),
}


def main():
    warnings.simplefilter("ignore")
    where, results = device(), {}
    with FakeTensorMode(), NoTransfers(where):
        for name, read in PLANTED.items():
            try:
                read(torch.ones(3, device=where))
                results[name] = ""
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
    for name, rule in RULES.items():
        try:
            step(rule, where)
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Which int8 rival is the fastest: torch's dynamic quantisation or torchao's, for a layer and an LSTM, timed in turn.

python benchmarks/int8.py (after pip install --no-deps torchao)
"""

import copy
import logging
import statistics
import time
import warnings

import torch
from torch import nn

from deepthin.lab.trial import quantised

SIZE, STEPS, ROUNDS = 2048, 20, 40


def main() -> None:
    """Print medians in microseconds and the relative error of the outputs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, dense, shape in (
        ("linear", nn.Sequential(nn.Linear(SIZE, SIZE)).eval(), (SIZE,)),
        ("lstm", nn.Sequential(nn.LSTM(SIZE // 4, SIZE // 4)).eval(), (STEPS, SIZE // 4)),
    ):
        ao = copy.deepcopy(dense)
        quantize_(ao, Int8DynamicActivationInt8WeightConfig())
        models = {"dense": dense, "torch.ao": quantised(dense), "torchao": ao}
        if name == "linear":
            models["torchao compiled"] = torch.compile(ao)
        for batch in (1, 8, 32):
            x = torch.randn(*shape[:-1], batch, shape[-1])
            times: dict[str, list[float]] = {key: [] for key in models}
            with torch.inference_mode():
                for _ in range(ROUNDS):
                    for key, model in models.items():
                        model(x)
                        start = time.perf_counter_ns()
                        model(x)
                        times[key].append((time.perf_counter_ns() - start) / 1000)
                right = _output(dense, x)
                wrong = {key: float((_output(m, x) - right).norm() / right.norm()) for key, m in models.items()}
            told = ", ".join(f"{key} {statistics.median(t):.0f} us ({wrong[key]:.4f})" for key, t in times.items())
            print(f"{name}, batch {batch}: {told}")


def _output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y[0] if isinstance(y, tuple) else y


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()

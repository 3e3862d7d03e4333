"""The networks of Deep Compression's Table 1 on MNIST: LeNet-300-100 (depth 3) and LeNet-5 (depth 5); error in percent.

Han, Mao and Dally, 2016, arXiv:1510.00149. Unlike the tasks ``digits`` and ``conv``, trained until they are done.
"""

from torch import nn

from deepthin.errors import ConfigError
from deepthin.lab.tasks import conv, digits
from deepthin.lab.tasks.task import ModuleTask
from deepthin.lab.tasks.training import Training

WIDTH, DEPTH = 1000, 5  # width in thousandths of the published units
BATCH = 50

load, rules, evaluate, example = conv.load, conv.rules, conv.evaluate, conv.example


def build(data: digits.Data | None, width: int, depth: int = DEPTH) -> nn.Module:
    """Build LeNet-300-100 or LeNet-5.

    Args:
        data: Not used.
        width: Thousandths of the published numbers of units, >= 1.
        depth: 3: LeNet-300-100; 5: LeNet-5.

    Returns:
        The dense network.

    Raises:
        ConfigError: There is no LeNet of that depth.
    """
    if depth == 3:
        return nn.Sequential(nn.Flatten(), digits.build(data, max((300 * width + 500) // 1000, 1)))
    if depth == 5:
        return conv.build(data, width, depth)
    raise ConfigError(f"No LeNet of depth {depth}: use 3 for LeNet-300-100, or 5 for LeNet-5.")


def fit(model: nn.Module, data: digits.Data, training: Training) -> None:
    """Minimise the cross entropy of the digits; the last state stays.

    Args:
        model: The network, dense or thin; changed in place.
        data: What ``load`` returned.
        training: Batches, optimiser and number of steps.

    Raises:
        NonFiniteError: The training diverges.
    """
    digits.minimise(model, data, training, BATCH)


TASK = ModuleTask(
    name="lenet",
    about="MNIST with LeNet-5 (depth 5) or LeNet-300-100 (depth 3), 20,000 steps; data as for digits",
    metrics=("error",),  # percent
    width=WIDTH,
    depth=DEPTH,
    steps=20_000,
    load=load,
    build=build,
    rules=rules,
    fit=fit,
    evaluate=evaluate,
    example=example,
    loss=digits.loss,
    calibration=digits.calibration,
    asks_teacher=True,
    learning_rate=1e-3,
)

"""Options that several commands share, each with its help text."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="The function that builds the dense network: `package.module:function`, without arguments.")
]
Config = Annotated[Path | None, typer.Option(help="The TOML file that names matrices, methods and sizes.")]
Ratio = Annotated[float | None, typer.Option(help="Instead of --config: DeepThin for all matrices at this ratio.")]
Task = Annotated[
    str | None,
    typer.Argument(
        help="digits | acoustic | ctc | conv | lenet | lstm-lm | keywords; leave it out to name your own network."
    ),
]
Data = Annotated[Path | None, typer.Option(envvar="DEEPTHIN_DATA", help="Folder with the task's data.")]
Width = Annotated[
    int | None,
    typer.Option(
        min=1, help="Units of a hidden layer; conv, lenet, keywords: thousandths of the channels  [default: the task's]"
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Hidden layers; conv: 5 for LeNet-5, 8, 14 or 20 for a ResNet; lenet: 3 for LeNet-300-100, 5 for LeNet-5  "
        "[default: the task's]",
    ),
]
Network = Annotated[
    str | None,
    typer.Option(help="keywords: cnn, ds-cnn-s, ds-cnn-m, ds-cnn-l, bc-resnet or gru  [default: the task's]"),
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        help="Your network instead of a task: `package.module:factory`; with an argument `width`, compare can run "
        "same-size too."
    ),
]
OwnTrain = Annotated[str | None, typer.Option(help="The function that trains it: `package.module:fit`.")]
OwnEvaluate = Annotated[
    str | None, typer.Option(help="The function that returns its metrics, lower is better: `package.module:evaluate`.")
]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Cores to use.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]

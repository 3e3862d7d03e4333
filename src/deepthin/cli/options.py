"""Options that several commands share, each with its help text."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Where the dense network is built: `package.module:function`, no arguments.")]
Config = Annotated[Path | None, typer.Option(help="The TOML file that names matrices, methods and sizes.")]
Ratio = Annotated[float | None, typer.Option(help="Instead of --config: DeepThin for all matrices at this ratio.")]
Task = Annotated[
    str | None,
    typer.Argument(help="digits | acoustic | ctc | conv | lenet | lstm-lm; or leave it out and name your own network."),
]
Data = Annotated[Path | None, typer.Option(envvar="DEEPTHIN_DATA", help="Folder with the task's data.")]
Width = Annotated[
    int | None,
    typer.Option(
        min=1, help="Units of a hidden layer; conv, lenet: thousandths of the channels  [default: the task's]"
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Hidden layers; conv: 5 is LeNet-5, 8, 14, 20 a ResNet; lenet: 3 is LeNet-300-100, 5 LeNet-5  "
        "[default: the task's]",
    ),
]
OwnModel = Annotated[
    str | None,
    typer.Option(help="Your network instead of a task: `package.module:factory`, best with a `width`."),
]
OwnTrain = Annotated[str | None, typer.Option(help="Its training: `package.module:fit`.")]
OwnEvaluate = Annotated[str | None, typer.Option(help="Its numbers, less being better: `package.module:evaluate`.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Cores to use.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]

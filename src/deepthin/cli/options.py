"""Options that several commands share, each with its help text."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from deepthin.cli.app import known
from deepthin.errors import ConfigError

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
TeacherFile = Annotated[
    Path | None,
    typer.Option(
        "--teacher",
        help="The .thin file of a trained dense network, such as runs/demo/models/dense-seed0.thin: all networks "
        "but dense and int8 learn from it too.",
    ),
]
TeacherKind = Annotated[
    str, typer.Option(help="Targets of the distillation: soft (probabilities at a temperature) or logits.")
]
TeacherWeight = Annotated[
    float, typer.Option(help="Weight of the distance to the teacher in the loss, 0 to 1; the labels have the rest.")
]
Temperature = Annotated[float, typer.Option(help="Temperature of soft targets.")]
TeacherNoise = Annotated[
    float, typer.Option(min=0, help="Standard deviation of the relative noise on the logits of half of the items.")
]
EngineName = Annotated[
    str,
    typer.Option(help="local; ray: machines of a Ray cluster; slurm: jobs of Slurm (docs/distributed.md)."),
]
Jobs = Annotated[int, typer.Option(min=1, max=4096, help="Number of concurrent trials.")]
Cpus = Annotated[
    float | None,
    typer.Option(
        min=0, help="Cores that Ray or Slurm reserves for each trial  [default: --threads]", show_default=False
    ),
]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs that Ray or Slurm reserves for each trial.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory that Ray or Slurm reserves for each trial: such as 500MB or 4GB.")
]
TrialTime = Annotated[
    str | None,
    typer.Option(help="Time limit of each trial: such as 90s, 30m or 2h; one that takes longer counts as failed."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Where Optuna's studies are, for several drivers: a journal file in a shared folder, or the URL of a "
        "database  [default: search.db in --out]",
        show_default=False,
    ),
]


def teacher_of(file: Path | None, kind: str, weight: float, temperature: float, noise: float) -> Any:
    """The teacher of the options, or None; ConfigError for settings of a teacher without its file."""
    from deepthin.lab.teacher import Teacher
    from deepthin.torch import Noise

    if file is not None:
        return Teacher(file.absolute(), cast(Any, kind), weight, temperature, Noise(noise) if noise else None)
    if (kind, weight, temperature, noise) != ("soft", 0.9, 4.0, 0.0):
        raise ConfigError("--teacher-kind, --teacher-weight, --temperature and --teacher-noise need --teacher FILE.")
    return None


def task_name(task: str | None, own: tuple[str | None, ...]) -> str:
    """The name of a task, or "" if the user's three functions are all named; ConfigError otherwise."""
    from deepthin.lab.tasks import TASKS

    if (task is None) != all(own) or (task is not None and any(own)):
        raise ConfigError(
            f"Name a task ({', '.join(TASKS)}), or your own network by all three of --model, --train and --evaluate."
        )
    return known(task, TASKS, "task") if task is not None else ""

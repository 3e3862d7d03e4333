"""The command that searches the best file of a size."""

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from deepthin.cli.app import app, known, notes, resumes, write_json
from deepthin.cli.options import (
    Cpus,
    Data,
    Depth,
    EngineName,
    Gpus,
    Jobs,
    Json,
    Memory,
    Network,
    OwnEvaluate,
    OwnModel,
    OwnTrain,
    Storage,
    Task,
    TeacherFile,
    TeacherKind,
    TeacherNoise,
    TeacherWeight,
    Temperature,
    Threads,
    TrialTime,
    Width,
    task_name,
    teacher_of,
)
from deepthin.errors import ConfigError


@app.command()
def search(
    file_bytes: Annotated[int, typer.Option(min=1, help="Size of the whole file in bytes, such as 30_000.")],
    task: Task = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the search  [default: runs/search/TASK-BYTES]", show_default=False)
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for the search: such as 90s, 30m, 2h or 1h30m.")] = "2h",
    microseconds: Annotated[
        float | None,
        typer.Option(
            help="Upper bound on the time for one item, on one thread; slower networks only if no other is found."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the longest trainings  [default: the task's]")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Another network for the same data, such as a small architecture: `package.module:factory`, without "
            "arguments. Its weights are coded. May be given several times."
        ),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="A TOML file that fixes or widens what is chosen (docs/search.md).")
    ] = None,
    width: Width = None,
    depth: Depth = None,
    network: Network = None,
    data: Data = None,
    model: OwnModel = None,
    train: OwnTrain = None,
    evaluate: OwnEvaluate = None,
    teacher: TeacherFile = None,
    teacher_kind: TeacherKind = "soft",
    teacher_weight: TeacherWeight = 0.9,
    temperature: Temperature = 4.0,
    teacher_noise: TeacherNoise = 0.0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of nine candidates, at most  [default: as many as fit]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the proposals and of all trainings.")] = 0,
    engine: EngineName = "local",
    jobs: Jobs = 1,
    threads: Threads = 1,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    memory: Memory = None,
    trial_time: TrialTime = None,
    storage: Storage = None,
    json_file: Json = None,
) -> None:
    """Search the best file of a size, in a given time: methods, floats, ranks, rates, decay, with a teacher or not.

    Every candidate is trained to the size. Rounds begin with nine candidates and short trainings; the best third is
    trained three times as long, and the best of these as long as --steps says. The first candidates are configurations
    that are known to be good; Optuna proposes the others. Development data choose; only the best file sees test data.

    Writes best.thin, best.toml, best.json and search.html into --out, and prints the command that trains the best
    configuration longer. If interrupted or killed, the same command goes on; with a longer --budget it searches on.

    Example: `deepthin search digits --file-bytes 6_000 --budget 10m`

    A bound on the time, and small networks beside the task's:
    `deepthin search keywords --data DIR --file-bytes 20_000 --microseconds 500 --also nets:small`

    Your own network: `deepthin search --model nets:build --train nets:fit --evaluate nets:evaluate --file-bytes 30_000`
    """
    import torch

    from deepthin.lab.calls import resources_of
    from deepthin.lab.engines import ENGINES
    from deepthin.lab.run import Setup
    from deepthin.lab.size_search.api import run
    from deepthin.lab.size_search.clock import seconds_of
    from deepthin.lab.size_search.settings import Wanted

    torch.set_num_threads(threads)
    known(engine, ENGINES, "engine")
    name = task_name(task, (model, train, evaluate))
    own = (model, train, evaluate) if model and train and evaluate else None
    taught = teacher_of(teacher, teacher_kind, teacher_weight, temperature, teacher_noise)
    setup = Setup(name, data and data.absolute(), steps, width, depth, own, taught, network)
    bound = microseconds
    needs = resources_of(cpus, gpus, memory, trial_time)
    wanted = Wanted(
        setup, file_bytes, budget, bound, tuple(also or ()), space, rounds, seed, engine, jobs, threads, needs, storage
    )  # fmt: skip
    folder = out or Path("runs") / "search" / f"{name or (model or '').partition(':')[2]}-{file_bytes}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: name a folder.")
    resumes(folder, "search.db")
    with _shown(seconds_of(budget)) as (told, progress):
        best = run(wanted, folder, shlex.join(["deepthin", *sys.argv[1:]]), told, progress)
    unit = best.metric.replace("_", " ")
    print(
        f"Best of {best.trainings} trainings: test {unit} {best.test:.4g} (development {best.development:.4g}), "
        f"{best.file_bytes:,} bytes, {best.microseconds:,.0f} µs for one item"
    )
    if best.keeps_microseconds is False:
        notes.print(
            Text(f"No network that was found keeps {bound:g} µs: this is the fastest. Allow more time for one item, or "
                 "name a smaller network by --also.", style="yellow")
        )  # fmt: skip
    print(f"{folder / 'best.thin'}, best.toml, best.json; page: {folder / 'search.html'}")
    print(f"Train it longer:\n{best.command}")
    write_json(json_file, json.dumps(best.to_dict(), indent=1))
    if best.interrupted:
        raise KeyboardInterrupt


@contextmanager
def _shown(budget: float) -> Iterator[tuple[Any, Any]]:
    """A bar of the time, and a line for each training that has ended."""
    from rich.progress import BarColumn, Progress, TextColumn

    from deepthin.lab.size_search.clock import worded
    from deepthin.lab.size_search.worth import described

    columns = TextColumn("searching, {task.fields[words]}"), BarColumn()
    bar = Progress(*columns, console=notes, disable=not notes.is_terminal, transient=True)
    task = bar.add_task("searching", total=budget, words=f"0 s of {worded(budget)}")

    def told(candidate: Any, result: Any) -> None:
        if result.value is None:
            text = f"failed: {result.failed}"
        else:
            metric, value = next(iter(result.development.items()))
            text = f"{metric} {value:.4g}, {result.bytes:,} bytes, {result.microseconds:,.0f} µs"
        line = f"candidate {candidate.number}, {result.steps:,} steps: {text}  [{described(candidate)}]"
        notes.print(Text(line), soft_wrap=True)

    def progress(spent: float, total: float) -> None:
        bar.update(task, completed=min(spent, total), words=f"{worded(spent)} of {worded(total)}")

    with bar:
        yield told, progress

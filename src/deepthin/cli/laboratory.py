"""The commands for experiments: bench, train, compare."""

import glob
import json
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, cast

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
from deepthin.cli.progress import Progress
from deepthin.errors import ConfigError


@app.command()
def bench(
    case: Annotated[
        str,
        typer.Argument(
            help="linear: a layer; modules: a layer as a module, beside bf16 and int8; acoustic: that task's network, "
            "likewise; train: a layer, forward and backward; lstm, gru: 5 layers over 100 steps; tfkaldi, deepspeech: "
            "the paper's networks; train-lstm, train-acoustic: a training step of the tasks ctc, acoustic; tensorflow: "
            "a layer in tf.function."
        ),
    ],
    ratios: Annotated[
        str,
        typer.Option(
            help="Ratios of the weights, comma-separated  [default: the paper's eight sizes]", show_default=False
        ),
    ] = "0.0195,0.0129,0.0099,0.0057,0.0040,0.0027,0.0020,0.0014",
    batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes, comma-separated  [default: 1,8,32; recurrent: 1,8; train, train-acoustic: 128; "
            "train-lstm: 16]"
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Outputs or units of a layer  [default: 2048; lstm, gru: 1024]")
    ] = None,
    cols: Annotated[int | None, typer.Option(min=1, help="Inputs of the layer  [default: as --rows]")] = None,
    rank: Annotated[str, typer.Option(help="Ranks of the factors, comma-separated.")] = "1",
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each competitor; medians are shown.")] = 21,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "--json",
            help="JSON file for the rows; the chart is written beside it  [default: runs/bench/CASE.json]",
        ),
    ] = None,
) -> None:
    """Time DeepThin and dense, int8, low-rank and sparse products, in turn in one run.

    Prints how many times faster DeepThin is, with warm and with flushed caches, and writes the rows and a chart; the
    charts of tfkaldi and deepspeech also show the figures of the paper's Table 2.

    Example: `deepthin bench linear --ratios 0.0099,0.0040 --batch 1,32 --threads 1`
    """
    from deepthin.kernels import products
    from deepthin.lab.bench import run, shown

    known(case, run.CASES, "case")
    usual = {"train": "128", "train-acoustic": "128", "train-lstm": "16"}
    usual |= dict.fromkeys(("lstm", "gru", "deepspeech"), "1,8")
    rows = rows or (1024 if case in ("lstm", "gru") else 2048)
    batches = _integers("--batch", batch or usual.get(case, "1,8,32"), "1,8,32")
    ranks = _integers("--rank", rank, "2,4,8")
    if not products.native_available:
        notes.print(Text(f"No native kernels ({products.why_not}): products use torch operations.", style="yellow"))
    sizes = _ratios(ratios)
    with Progress("timing", "rounds") as report_step:
        measured = run.run(
            case,
            (rows, cols or rows),
            sizes,
            batches,
            ranks,
            threads,
            repeats,
            lambda i, total: report_step(case, i, total),
        )
    print(shown.summary(measured))
    out = out or Path("runs") / "bench" / f"{case}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, json.dumps([row.to_json() for row in measured], indent=1))
    if find_spec("matplotlib") is not None and any(row.microseconds for row in measured):
        print(f"Chart: {shown.draw(measured, out.with_suffix('.png'))}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="The TOML file: methods, sizes, and [stages] to start dense.")],
    out: Annotated[Path, typer.Option(help="The .thin file to write.")],
    task: Task = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps  [default: the task's]")] = None,
    width: Width = None,
    depth: Depth = None,
    network: Network = None,
    data: Data = None,
    lr: Annotated[
        float | None, typer.Option(min=0, help="The dense network's learning rate  [default: the task's]")
    ] = None,
    decay: Annotated[float, typer.Option(min=0, help="Weight decay of matrices and codes (AdamW).")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the batches.")] = 0,
    model: OwnModel = None,
    train: OwnTrain = None,
    evaluate: OwnEvaluate = None,
    teacher: TeacherFile = None,
    teacher_kind: TeacherKind = "soft",
    teacher_weight: TeacherWeight = 0.9,
    temperature: Temperature = 4.0,
    teacher_noise: TeacherNoise = 0.0,
    checkpoint: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints  [default: a fiftieth of --steps]")
    ] = None,
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """Train one network as a configuration says, write one small file, and evaluate the model loaded from it.

    With a table `[stages]` in the configuration, the network starts dense, is thinned step by step and then quantised
    (Deep Compression). Without it, the network is thin from the start. If interrupted, the same
    command continues from the last checkpoint, a file beside --out, and writes the same file.

    Example: `deepthin train lenet --config deep.toml --data mnist --out lenet.thin`

    Another network for a task's data: `deepthin train digits --model nets:small --config small.toml --out small.thin`
    """
    import torch

    from deepthin.lab.run import Setup
    from deepthin.lab.train import summary
    from deepthin.lab.train import train as train_one

    torch.set_num_threads(threads)
    factory = model if task is not None and train is None and evaluate is None else None
    name = task_name(task, (None if factory else model, train, evaluate))
    if factory and not (width is depth is network is None):
        raise ConfigError(f"--model {factory} is the network: leave out --width, --depth and --network.")
    taught = teacher_of(teacher, teacher_kind, teacher_weight, temperature, teacher_noise)
    setup = Setup(name, data and data.absolute(), steps, width, depth, None, taught, network, factory)
    if model and train and evaluate:
        setup = replace(setup, own=(model, train, evaluate))
    resumes(out.parent, glob.escape(f"{out.name}.checkpoint"))
    with Progress("training", "steps") as report_step:
        found = train_one(
            setup, config, out, lr, seed, lambda step, total: report_step(str(out), step, total), checkpoint, decay
        )
    print(found.report)
    print(summary(found, out))
    write_json(json_file, json.dumps(found.to_dict(), indent=1))


@app.command()
def compare(
    task: Task = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, models and report  [default: runs/TASK]")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated: deepthin, shuffled, rank, same-size, hashed, pruned, pruned-csr (as in the paper), "
            "kronecker, tensor-train, uniform, kmeans, ecsq, binary; with -8bit or -4bit appended, the method's floats "
            "are quantised (deepthin-8bit); with -coded, trained to the size of the file (deepthin-coded, dense-coded, "
            "same-size-coded); or all. The dense network and int8 are always compared."
        ),
    ] = "dense,deepthin,shuffled,rank,same-size",
    ratios: Annotated[
        str, typer.Option(help="Ratios of the weight matrices, comma-separated; of methods with -coded, of the file.")
    ] = "0.02,0.01",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of every trial.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of every trial  [default: the task's]")
    ] = None,
    width: Width = None,
    depth: Depth = None,
    network: Network = None,
    data: Data = None,
    search: Annotated[
        int, typer.Option(min=0, help="Trainings per method to choose its learning rate and allocation.")
    ] = 0,
    search_ratio: Annotated[
        float | None, typer.Option(help="Ratio of these trainings  [default: the middle one of --ratios]")
    ] = None,
    search_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of these trainings  [default: a third of --steps]")
    ] = None,
    model: OwnModel = None,
    train: OwnTrain = None,
    evaluate: OwnEvaluate = None,
    teacher: TeacherFile = None,
    teacher_kind: TeacherKind = "soft",
    teacher_weight: TeacherWeight = 0.9,
    temperature: Temperature = 4.0,
    teacher_noise: TeacherNoise = 0.0,
    engine: EngineName = "local",
    jobs: Jobs = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Cores for each trial.")] = 1,
    cpus: Cpus = None,
    gpus: Gpus = 0,
    memory: Memory = None,
    trial_time: TrialTime = None,
    storage: Storage = None,
    json_file: Json = None,
) -> None:
    """Train one network with several methods at equal bytes, and report error against size.

    Writes results.json, PNGs, report.html and the trained models, as .thin files, into --out. The same command resumes
    an interrupted comparison.

    Example: `deepthin compare digits --methods deepthin,rank,same-size --ratios 0.02,0.01 --jobs 2`

    Your own network: `deepthin compare --model nets:build --train nets:fit --evaluate nets:evaluate --ratios 0.05`
    """
    import torch

    from deepthin.lab import compare
    from deepthin.lab.calls import resources_of
    from deepthin.lab.compared import COMPARED
    from deepthin.lab.engines import ENGINES
    from deepthin.lab.report import tables
    from deepthin.lab.report.page import write_page
    from deepthin.lab.report.points import best_thin
    from deepthin.lab.rows import write_rows
    from deepthin.lab.run import Setup
    from deepthin.lab.search import Search
    from deepthin.lab.trial import prepared

    if find_spec("matplotlib") is None:  # said before the training, not after it
        raise ConfigError("The figures of a comparison need matplotlib: pip install 'deepthin[compare]'.")
    torch.set_num_threads(threads)
    own = (model, train, evaluate)
    name = task_name(task, own)
    known(engine, ENGINES, "engine")
    names = ",".join(COMPARED) if methods == "all" else methods
    needs = resources_of(cpus, gpus, memory, trial_time)
    chosen = tuple(dict.fromkeys(known(m.strip(), COMPARED, "method") for m in names.split(",")))
    sizes = _ratios(ratios)
    three = cast(tuple[str, str, str], own) if model else None
    setup = Setup(name, data and data.absolute(), steps, width, depth, three, network=network)
    taught = teacher_of(teacher, teacher_kind, teacher_weight, temperature, teacher_noise)
    setup = replace(setup, teacher=taught)
    run = prepared(setup)
    folder = out or Path("runs") / run.task.name
    searched = None
    if search:
        if search_ratio is not None and not 0 < search_ratio < 1:
            raise ConfigError(f"--search-ratio {search_ratio:g} must lie between 0 and 1.")
        at = search_ratio or compare.searched_ratio(folder) or sorted(sizes)[len(sizes) // 2]
        searched = Search(search, at, search_steps or max(run.steps // 3, 1))
    settings = compare.Settings(setup, chosen, sizes, seeds, searched, engine, jobs, threads, needs, storage)
    resumes(folder, "results.json", "search.db", "models/*.thin")
    with Progress("running", "steps") as report_step:
        rows = compare.compare(settings, folder, report_step)
    page = write_page(rows, folder, shlex.join(["deepthin", *sys.argv[1:]]))
    print(tables.summary(rows))
    if compared := tables.cuts(rows):
        print(f"\n{compared}")
    if any(row.value is not None for row in rows):
        print("\nEvery file was loaded into a new model, whose outputs equal those of the trained one.")
    if (best := best_thin(rows)) and best.model:
        print(f"Best file by development {best.metric}: {folder / best.model}, {best.bytes:,} bytes")
    print(f"Report: {page}")
    if json_file is not None:
        write_rows(rows, json_file)


def _integers(option: str, text: str, example: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    values = tuple(dict.fromkeys(int(part) for part in parts if part.isdecimal()))
    if not all(part.isdecimal() for part in parts) or 0 in values:
        raise ConfigError(f"{option} {text!r} must be integers >= 1, separated by commas, such as {example}.")
    return values


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--ratios {text!r} must be numbers separated by commas, such as 0.02,0.01.") from None
    if not all(0 < ratio < 1 for ratio in ratios):
        raise ConfigError(f"--ratios {text!r} must lie between 0 and 1.")
    return ratios

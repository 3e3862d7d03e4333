"""The command line: plan, compress, inspect, compare, bench. Every mistake of a user is one line and exit code 2."""

import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from deepthin.method import ConfigError, DeepThinError
from deepthin.report import Report
from deepthin.storage import inspect as inspect_file
from deepthin.storage import write_atomically

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    help="Compress neural networks to 2 % - 0.1 % of their size, and compare the ways to do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_notes = Console(stderr=True, highlight=False)

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


@app.command()
def plan(model: Model, config: Config = None, ratio: Ratio = None, json_file: Json = None) -> None:
    """Show what each layer would become, and the bytes of the file, without doing it.

    Example: `deepthin plan --model nets:lenet --config thin.toml`
    """
    from deepthin.torch import plan as plan_model

    _show(plan_model(_build(model), _rules(config, ratio)), json_file)


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .thin file to write.")],
    weights: Annotated[Path, typer.Option(help="The trained state dict: .safetensors, or a torch file (.pt, .pth).")],
    config: Config = None,
    ratio: Ratio = None,
    json_file: Json = None,
) -> None:
    """Store trained weights in compressed form: encode what the configuration names and write one small file.

    At extreme sizes the network must be trained on afterwards; a warning says so.

    Example: `deepthin compress --model nets:lenet --weights dense.safetensors --ratio 0.02 --out lenet.thin`
    """
    from deepthin.torch import compress as compress_model
    from deepthin.torch import save

    rules = _rules(config, ratio)
    network = _build(model)
    _load_weights(network, weights)
    with _notes.status("encoding ..."):
        report = compress_model(network, rules)
        written = save(network, out)
    _show(report, json_file)
    print(f"wrote {out}: {written:,} bytes")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .thin file.")],
    json_file: Json = None,
) -> None:
    """Show what a .thin file holds, without decoding it; every checksum is verified.

    Example: `deepthin inspect lenet.thin`
    """
    _show(inspect_file(file), json_file)


@app.command()
def bench(
    case: Annotated[
        str,
        typer.Argument(
            help="linear: a layer; train: the same, forward and backward; lstm, gru: 5 layers over 100 steps; tfkaldi, "
            "deepspeech: the paper's networks; train-lstm: a training step of the task ctc; tensorflow: a layer in "
            "tf.function."
        ),
    ],
    ratios: Annotated[
        str, typer.Option(help="Sizes over dense, comma-separated  [default: the paper's eight]", show_default=False)
    ] = "0.0195,0.0129,0.0099,0.0057,0.0040,0.0027,0.0020,0.0014",
    batch: Annotated[
        str | None,
        typer.Option(
            help="Items at once, comma-separated  [default: 1,8,32; recurrent: 1,8; train: 128; train-lstm: 16]"
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Outputs or units of a layer  [default: 2048; lstm, gru: 1024]")
    ] = None,
    cols: Annotated[int | None, typer.Option(min=1, help="Inputs of the layer  [default: as --rows]")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the factors.")] = 1,
    threads: Threads = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each competitor; the median counts.")] = 21,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--json", help="Where the rows go; the chart lies beside it  [default: runs/bench/CASE.json]"
        ),
    ] = None,
) -> None:
    """Time DeepThin against dense, int8, low-rank and sparse products, in turn, in one run.

    Prints how many times faster it is, warm and with flushed caches, and writes the rows and a chart; those of tfkaldi
    and deepspeech show the paper's Table 2 beside ours.

    Example: `deepthin bench linear --ratios 0.0099,0.0040 --batch 1,32 --threads 1`
    """
    from deepthin import bench as engine
    from deepthin import kernels

    _known(case, engine.CASES, "case")
    usual = {"train": "128", "train-lstm": "16", "lstm": "1,8", "gru": "1,8", "deepspeech": "1,8"}
    parts = [part.strip() for part in (batch or usual.get(case, "1,8,32")).split(",")]
    rows = rows or (1024 if case in ("lstm", "gru") else 2048)
    batches = tuple(int(part) for part in parts if part.isdecimal())
    if len(batches) < len(parts) or 0 in batches:
        raise ConfigError(f"--batch {batch!r} must be whole numbers with commas, such as 1,8,32.")
    if not kernels.native_available:
        _notes.print(Text(f"No native kernels ({kernels.why_not}): products run on torch operations.", style="yellow"))
    sizes = _ratios(ratios)
    with _progress("timing", "rounds") as report_step:
        found = engine.run(
            case,
            (rows, cols or rows),
            sizes,
            batches,
            rank,
            threads,
            repeats,
            lambda i, total: report_step(case, i, total),
        )
    print(engine.summary(found))
    out = out or Path("runs") / "bench" / f"{case}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    _write_json(out, json.dumps(found, indent=1))
    if find_spec("matplotlib") is not None and any(row["microseconds"] for row in found):
        print(f"{engine.draw(found, out.with_suffix('.png'))} shows it.")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="The TOML file: methods, sizes, and [stages] if it begins dense.")],
    out: Annotated[Path, typer.Option(help="The .thin file to write.")],
    task: Task = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps  [default: the task's]")] = None,
    width: Width = None,
    depth: Depth = None,
    data: Data = None,
    lr: Annotated[float | None, typer.Option(min=0, help="What suits the dense network  [default: the task's]")] = None,
    seed: Annotated[int, typer.Option(help="Of the start and of the batches.")] = 0,
    model: OwnModel = None,
    train: OwnTrain = None,
    evaluate: OwnEvaluate = None,
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """Train one network as a configuration says, write one small file, and judge what is loaded from it.

    With a table `[stages]` in the configuration it is dense first, thinned step by step, and its values are shared in
    the end: Deep Compression. Without, it is thin from scratch.

    Example: `deepthin train lenet --config deep.toml --data mnist --out lenet.thin`
    """
    import torch

    from deepthin import train as one
    from deepthin.trial import Setup

    torch.set_num_threads(threads)
    setup = Setup(_task(task, (model, train, evaluate)), data and data.absolute(), steps, width, depth)
    if model and train and evaluate:
        setup = replace(setup, own=(model, train, evaluate))
    with _progress("training", "steps") as report_step:
        found = one.train(setup, config, out, lr, seed, lambda step, total: report_step(str(out), step, total))
    print(found.report)
    print(one.summary(found, out))
    _write_json(json_file, json.dumps(found.to_dict(), indent=1))


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
            "kronecker, tensor-train, uniform, kmeans, ecsq, binary; with -8bit or -4bit a method whose floats are "
            "then rounded, as deepthin-8bit; or all. The dense network, and the same in 8 bits, are always compared."
        ),
    ] = "dense,deepthin,shuffled,rank,same-size",
    ratios: Annotated[
        str, typer.Option(help="Sizes of the weight matrices over dense, comma-separated.")
    ] = "0.02,0.01",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of every trial.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of every trial  [default: the task's]")
    ] = None,
    width: Width = None,
    depth: Depth = None,
    data: Data = None,
    search: Annotated[
        int, typer.Option(min=0, help="Trainings for each method that choose its learning rate and allocation.")
    ] = 0,
    search_ratio: Annotated[
        float | None, typer.Option(help="The size at which they do  [default: the middle one of --ratios]")
    ] = None,
    search_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each of them  [default: a third of --steps]")
    ] = None,
    model: OwnModel = None,
    train: OwnTrain = None,
    evaluate: OwnEvaluate = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="The .thin file of a trained dense network: all but the dense row learn from it too, such as "
            "runs/demo/models/dense-seed0.thin."
        ),
    ] = None,
    teacher_kind: Annotated[
        str, typer.Option(help="What is learned: soft, its probabilities at a temperature, or logits.")
    ] = "soft",
    teacher_weight: Annotated[
        float, typer.Option(help="0 to 1: of what the teacher says; the rest is that of the labels.")
    ] = 0.9,
    temperature: Annotated[float, typer.Option(help="Of soft targets.")] = 4.0,
    teacher_noise: Annotated[
        float, typer.Option(min=0, help="Deviation of the factors by which half of the items' logits are perturbed.")
    ] = 0.0,
    engine: Annotated[str, typer.Option(help="local, or ray where one machine is not enough.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, max=4096, help="Trials at once.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Cores for each of them.")] = 1,
    json_file: Json = None,
) -> None:
    """Train one network by several methods at equal bytes, and report error against size.

    Writes results.json, PNGs, report.html and the trained models, as .thin files, into --out. If interrupted, the same
    command goes on where it stopped.

    Example: `deepthin compare digits --methods deepthin,rank,same-size --ratios 0.02,0.01 --jobs 2`

    Your own network: `deepthin compare --model nets:build --train nets:fit --evaluate nets:evaluate --ratios 0.05`
    """
    import torch

    from deepthin import compare as comparison
    from deepthin import results
    from deepthin.engines import ENGINES
    from deepthin.search import Search
    from deepthin.teacher import Teacher
    from deepthin.torch import Noise
    from deepthin.trial import COMPARED, Setup, prepared

    if find_spec("matplotlib") is None:  # said before the training, not after it
        raise ConfigError("The figures of a comparison need matplotlib: pip install 'deepthin[compare]'.")
    torch.set_num_threads(threads)
    own = (model, train, evaluate)
    name = _task(task, own)
    _known(engine, ENGINES, "engine")
    names = ",".join(COMPARED) if methods == "all" else methods
    chosen = tuple(dict.fromkeys(_known(m.strip(), COMPARED, "method") for m in names.split(",")))
    sizes = _ratios(ratios)
    setup = Setup(
        name, data and data.absolute(), steps, width, depth, cast(tuple[str, str, str], own) if model else None
    )
    if teacher is not None:
        noise = Noise(teacher_noise) if teacher_noise else None
        kind = cast(Any, teacher_kind)
        setup = replace(setup, teacher=Teacher(teacher.absolute(), kind, teacher_weight, temperature, noise))
    elif (teacher_kind, teacher_weight, temperature, teacher_noise) != ("soft", 0.9, 4.0, 0.0):
        raise ConfigError("--teacher-kind, --teacher-weight, --temperature and --teacher-noise need --teacher FILE.")
    run = prepared(setup)
    folder = out or Path("runs") / run.task.NAME
    searched = None
    if search:
        if search_ratio is not None and not 0 < search_ratio < 1:
            raise ConfigError(f"--search-ratio {search_ratio:g} must lie between 0 and 1.")
        at = search_ratio or comparison.searched_ratio(folder) or sorted(sizes)[len(sizes) // 2]
        searched = Search(search, at, search_steps or max(run.steps // 3, 1))
    settings = comparison.Settings(setup, chosen, sizes, seeds, searched, engine, jobs, threads)
    with _progress("running", "steps") as report_step:
        rows = comparison.compare(settings, folder, report_step)
    page = results.write_page(rows, folder, shlex.join(["deepthin", *sys.argv[1:]]))
    print(results.summary(rows))
    if compared := results.cuts(rows):
        print(f"\n{compared}")
    if any(row["value"] is not None for row in rows):
        print("\nEvery file was loaded into a new model, which did exactly what the trained one did.")
    if best := results.best_thin(rows):
        print(f"Best file by development {best['metric']}: {folder / best['model']}, {best['bytes']:,} bytes")
    print(f"Report: {page}")
    if json_file is not None:
        comparison.write_rows(rows, json_file)


def main() -> None:
    """The entry point: errors that a user can mend are one line on stderr."""
    sys.path.insert(0, str(Path.cwd()))  # so that --model finds modules beside the user
    warnings.showwarning = lambda message, *_: _say("warning", str(message))
    try:
        app()
    except (DeepThinError, OSError) as error:
        _say("error", str(error))
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # what typer makes of the keyboard's
            raise
        _notes.print("interrupted; the same command goes on where it stopped")
        sys.exit(130)


def _say(kind: str, message: str) -> None:
    """A message as it stands: brackets in it are no markup."""
    _notes.print(Text.assemble((f"{kind}: ", "bold red" if kind == "error" else "yellow"), message), soft_wrap=True)


def _build(spec: str) -> "nn.Module":
    from torch import nn

    from deepthin.tasks.own import function

    factory = function(spec, "--model")
    try:
        signature(factory).bind()
    except TypeError as error:
        raise ConfigError(f"--model {spec}: the function must work without arguments, but has a {error}.") from None
    network = factory()
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--model {spec} returned {type(network).__name__}, no torch.nn.Module.")
    return network


def _rules(config: Path | None, ratio: float | None) -> Any:
    if (config is None) == (ratio is None):
        raise ConfigError("Give either --config FILE or --ratio NUMBER.")
    return config if config is not None else {"model": {"ratio": ratio}}


def _load_weights(network: "nn.Module", path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--weights {path} cannot be read as a state dict: {reason}") from None
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"--weights {path} do not fit --model: {' '.join(str(error).split())}") from None


def _known(word: str, valid: Any, what: str) -> str:
    import difflib

    if word not in valid:
        closest = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.0)
        raise ConfigError(f"There is no {what} {word!r}. Did you mean {closest[0]!r}? Valid: {', '.join(valid)}.")
    return word


def _task(task: str | None, own: tuple[str | None, ...]) -> str:
    """The name of a task, or nothing if all of the user's own three functions are named; ConfigError otherwise."""
    from deepthin.tasks import TASKS

    if (task is None) != all(own) or (task is not None and any(own)):
        raise ConfigError(
            f"Name a task ({', '.join(TASKS)}), or your own network by --model, --train and --evaluate, all three."
        )
    return _known(task, TASKS, "task") if task is not None else ""


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ConfigError(f"--ratios {text!r} must be numbers with commas, such as 0.02,0.01.") from None
    if not all(0 < ratio < 1 for ratio in ratios):
        raise ConfigError(f"--ratios {text!r} must lie between 0 and 1.")
    return ratios


def _show(report: Report, json_file: Path | None) -> None:
    print(report)
    _write_json(json_file, report.to_json())


def _write_json(path: Path | None, text: str) -> None:
    if path is not None:
        write_atomically(path, text.encode())


class _progress:
    """A bar for what runs; on a pipe, a line when it begins, and for each tenth of it."""

    def __init__(self, doing: str, unit: str) -> None:
        self._doing, self._unit = doing, unit

    def __enter__(self) -> Callable[[str, int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=_notes,
            disable=not _notes.is_terminal,
        )
        self._bar.start()
        self._name = ""
        return self._step

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _step(self, name: str, step: int, steps: int) -> None:
        if name != self._name:
            self._name, self._task = name, self._bar.add_task(name, total=steps)
            if not _notes.is_terminal:
                _notes.print(f"{self._doing} {name}, {steps} {self._unit}")
        elif not _notes.is_terminal and step * 10 // steps > (step - 1) * 10 // steps:
            _notes.print(f"{name}: {step} of {steps}, {time.strftime('%H:%M:%S')}")
        self._bar.update(self._task, completed=step)

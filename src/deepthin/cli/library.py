"""The commands of the library itself: plan, compress, inspect, convert, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from deepthin.cli.app import app, notes, show, write_json
from deepthin.cli.options import Config, Json, Model, Ratio
from deepthin.errors import ConfigError
from deepthin.plan.parse import parse_rules
from deepthin.storage.read import inspect as inspect_file
from deepthin.storage.read import read
from deepthin.storage.write import MAX_BYTES, Version, write

if TYPE_CHECKING:
    from torch import nn


@app.command()
def plan(model: Model, config: Config = None, ratio: Ratio = None, json_file: Json = None) -> None:
    """Show the plan of each layer and the bytes of the file, without compressing anything.

    Example: `deepthin plan --model nets:lenet --config thin.toml`
    """
    from deepthin.torch import plan as plan_model

    rules = parse_rules(_rules(config, ratio))
    show(plan_model(_build(model), rules), json_file)
    if any(rule.learns_step for rule in rules.rules):
        aim = "Give [model] file_bytes." if rules.file_bytes is None else f"Its aim is {rules.file_bytes:,} bytes."
        print(f"Bytes of coded matrices are upper bounds: a training with SizeTarget decides how many they take. {aim}")


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .thin file to write.")],
    weights: Annotated[
        Path,
        typer.Option(
            help="The trained state dict: .safetensors, a torch file (.pt, .pth), or a folder of .safetensors files, "
            "which is compressed one matrix at a time."
        ),
    ],
    config: Config = None,
    ratio: Ratio = None,
    jobs: Annotated[int, typer.Option(min=1, help="Of a folder: matrices that are encoded at once.")] = 1,
    json_file: Json = None,
) -> None:
    """Compress trained weights: encode the matrices that the configuration names and write one small file.

    At extreme sizes the network must be trained further afterwards; a warning says so. With coded rules and
    `file_bytes`, integers are made smaller until the file fits; training to the size (`deepthin train`) is better.

    Example: `deepthin compress --model nets:lenet --weights dense.safetensors --ratio 0.02 --out lenet.thin`

    A model that does not fit into memory: `deepthin compress --model nets:large --weights shards/ --ratio 0.01 --jobs 2
    --out large.thin`. If interrupted, the same command goes on.
    """
    if weights.is_dir():
        _compress_folder(model, weights, _rules(config, ratio), out, jobs, json_file)
        return
    from deepthin.torch import compress as compress_model
    from deepthin.torch import save
    from deepthin.torch.size_target import coded_weights, fit_to

    rules = parse_rules(_rules(config, ratio))
    network = _build(model)
    _load_weights(network, weights)
    with notes.status("encoding ..."):
        report = compress_model(network, rules)
        if rules.file_bytes is not None and coded_weights(network):
            fit_to(network, rules.file_bytes)
        written = save(network, out)
    show(report if written == report.total_bytes else inspect_file(out), json_file)
    print(f"wrote {out}: {written:,} bytes")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .thin file.")],
    json_file: Json = None,
    max_bytes: Annotated[
        int, typer.Option(min=0, help="Memory that the file may take beyond a few times its size, in bytes.")
    ] = MAX_BYTES,
) -> None:
    """Show the contents of a .thin file without decoding it; every checksum is verified.

    Example: `deepthin inspect lenet.thin`
    """
    show(inspect_file(file, max_bytes), json_file)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A .thin file of any version.")],
    out: Annotated[Path, typer.Argument(help="The .thin file to write.")],
    version: Annotated[
        int, typer.Option("--format", min=1, max=2, help="Version of the format: 2, or 1 for earlier readers.")
    ] = 2,
    max_bytes: Annotated[
        int, typer.Option(min=0, help="Memory that the file may take beyond a few times its size, in bytes.")
    ] = MAX_BYTES,
) -> None:
    """Write the contents of a .thin file in another version of the format; no number changes.

    Example: `deepthin convert old.thin new.thin`
    """
    contents = read(file, max_bytes, finite=False)
    before = file.stat().st_size
    written = write(contents, out, version=cast(Version, version))
    print(f"read  {file}: {before:,} bytes, version {contents.version}")
    print(f"wrote {out}: {written:,} bytes, version {version}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A .thin file.")],
    model: Model,
    out: Annotated[
        Path, typer.Option(help="The file to write: .onnx, .xml (OpenVINO), .pte, .tflite, .pt2, .c or .wasm.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="onnx | openvino | executorch | litert | aoti | c | wasm  [default: by the suffix of --out]"),
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            help="The function that returns example inputs, a tuple of tensors, batch first: "
            "`package.module:function`  "
            "[default: made up from the first layer]"
        ),
    ] = None,
    streaming: Annotated[
        bool, typer.Option(help="c and wasm: recurrent layers keep their states from one run to the next.")
    ] = False,
    compare: Annotated[
        bool, typer.Option(help="Export the dense network too, and measure memory and time of both.")
    ] = True,
    json_file: Json = None,
) -> None:
    """Write a model for another runtime, run it there, and keep the file only if it is small and right.

    The file is at most 1.25 times the .thin file and 8 kB for each matrix, holds no dense matrix, and computes what
    torch computes within 1e-5 of the largest output, at batches of 1, 3 and 8. Otherwise nothing is written, and the
    exit code is 1. For c it is a program in C99 with a Makefile, for wasm a page's code and network: both have the
    example's shapes, and need a C compiler, or zig and node, to be checked here.

    Example: `deepthin export lenet.thin --model nets:lenet --to onnx --out lenet.onnx`
    """
    from torch import nn

    from deepthin.torch import export as export_model
    from deepthin.torch import load
    from deepthin.torch.export.targets import target_of

    target_of(to, out).module()  # an unknown format, or a missing package, before the model is built
    network: nn.Module = load(_build(model), file, frozen=True)
    inputs = None
    if example is not None:
        from deepthin.lab.tasks.own import check_no_arguments, function

        inputs = function(example, "--example")
        check_no_arguments(inputs, f"--example {example}")
        inputs = inputs()
    with notes.status("exporting ..."):
        written = export_model(network, out, inputs, to, compare=compare, streaming=streaming)
    print(written)
    write_json(json_file, written.to_json())
    print(f"wrote {', '.join(map(str, written.files))}")


def _build(spec: str) -> "nn.Module":
    from torch import nn

    from deepthin.lab.tasks.own import check_no_arguments, function

    factory = function(spec, "--model")
    check_no_arguments(factory, f"--model {spec}")
    network = factory()
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--model {spec} returned {type(network).__name__}, not a torch.nn.Module.")
    return network


def _compress_folder(model: str, weights: Path, rules: Any, out: Path, jobs: int, json_file: Path | None) -> None:
    """Compress the shards of a folder, with a bar."""
    import torch

    from deepthin.cli.progress import Progress
    from deepthin.torch.streamed import compress_weights

    with torch.device("meta"):
        network = _build(model)
    with Progress("encoding", "matrices") as step:
        report = compress_weights(
            network, weights, rules, out, jobs, lambda _, done, all_: step("matrices", done, all_)
        )
    show(report, json_file)
    print(f"wrote {out}: {out.stat().st_size:,} bytes")


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
    except Exception as error:  # a damaged file can raise any exception
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--weights {path} cannot be read as a state dict: {reason}") from None
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"--weights {path} do not fit --model: {' '.join(str(error).split())}") from None

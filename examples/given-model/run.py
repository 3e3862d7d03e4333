"""Shrink a model that is given: CREPE, a pitch tracker of 89 MB, to networks of 196 to 10 kB.

    python examples/given-model/run.py            # an hour on one core; finished parts are kept in build/
    python examples/given-model/run.py --quick    # the same steps in less than a minute, to see that they work

README.md beside this file says what to take from it for another model.
"""

import argparse
import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import crepe
import distil
import judge
import material
import teacher
import torch
from student import SHAPES, folded, student
from torch import nn

import deepthin.torch as dt
from deepthin.errors import ExportError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Effort:
    """How much of everything."""

    candidates: dict[int, list[str]]  # bytes -> shapes to try
    taught: dict[str, int]  # training frames of each kind
    judged: dict[str, int]  # frames of development and test, each at four levels of noise
    noise: float  # seconds of each noise
    dense: int  # steps of a dense student
    thin: dict[str, int]  # steps of a thin student of each shape
    runs: int  # timed


FULL = Effort(
    {196_000: ["strided", "tiny"], 60_000: ["strided", "small"], 20_000: ["small"], 10_000: ["small"]},
    {"tones": 9000, "vowels": 6000, "speech": 11000, "unchanged": 4000},
    {"tones": 500, "speech": 1000},
    60,
    6000,
    {"strided": 3000, "small": 4000, "tiny": 200},
    300,
)
QUICK = Effort(
    {20_000: ["small"]},
    {"tones": 32, "vowels": 16, "speech": 32, "unchanged": 16},
    {"tones": 8, "speech": 16},
    5,
    6,
    {"small": 4},
    5,
)


def main(words: list[str] | None = None) -> None:
    """Teach, choose, judge, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same steps with few frames")
    parser.add_argument("--out", type=Path, help="folder of all files  [default: build/ beside this file]")
    options = parser.parse_args(words)
    effort = QUICK if options.quick else FULL
    out: Path = options.out or HERE / "build" / ("quick" if options.quick else "full")
    out.mkdir(parents=True, exist_ok=True)
    if not shutil.which("espeak-ng"):
        parser.error("espeak-ng speaks the training material: apt-get install espeak-ng.")
    torch.set_num_threads(1)

    chosen = {size: chosen_of(size, shapes, effort, out) for size, shapes in effort.candidates.items()}
    rows = judged(chosen, effort, out)
    (out / "table.md").write_text(text := judge.table(rows))
    judge.picture(rows, out / "accuracy.png")
    print(text)


def chosen_of(size: int, shapes: list[str], effort: Effort, out: Path) -> str:
    """The shape with the best accuracy on development material, each trained to the size."""
    path = out / f"development-{size}.json"
    if not path.is_file():
        development, averages = judge.Judge("dev", effort.judged), {}
        for shape in shapes:
            model = thin(size, shape, effort, out)
            averages[shape] = judge.Row(shape, size, development.accuracy(model)).average()
            print(f"{shape} in {size:,} bytes: {averages[shape]:.1f} % on development material", flush=True)
        path.write_text(json.dumps(averages))
    averages = json.loads(path.read_text())
    return max(averages, key=lambda shape: averages[shape])


def judged(chosen: dict[int, str], effort: Effort, out: Path) -> list[judge.Row]:
    """CREPE, the dense students and the chosen thin ones on the test material."""
    test, path = judge.Judge("test", effort.judged), out / "rows.json"
    rows = [judge.Row(**row) for row in json.loads(path.read_text())] if path.is_file() else []

    def add(name: str, model: nn.Module, size: int) -> None:
        if name in [row.name for row in rows]:
            return
        folder = out / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        times = {"torch": judge.torch_microseconds(model, effort.runs)}
        if exported(model, folder / "pitch.onnx"):
            times["ONNX Runtime"] = judge.onnx_microseconds(folder / "pitch.onnx", effort.runs)
        if not name.startswith("CREPE") and exported(model, folder / "pitch.c") and shutil.which("cc"):
            times["C"] = judge.c_microseconds(folder / "pitch.c", effort.runs)
        rows.append(judge.Row(name, size, test.accuracy(model), times))
        path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))

    for name in ("full", "tiny"):
        add(f"CREPE {name}", crepe.given(name), (crepe.assets() / f"{name}.pth").stat().st_size)
    for shape in sorted(set(chosen.values()) & set(SHAPES)):
        add(f"{shape} dense", model := folded(dense(shape, effort, out)), dt.save(model, out / f"{shape}.thin"))
    for size, shape in chosen.items():
        add(f"{shape} {size // 1000} kB", thin(size, shape, effort, out), thin_file(size, shape, out).stat().st_size)
    return sorted(rows, key=lambda row: -row.bytes)


def exported(model: nn.Module, path: Path) -> bool:
    """Export for another runtime; False, with the reason printed, where the file would be far larger than .thin."""
    try:
        print(dt.export(model, path, example=example()), flush=True)
    except ExportError as error:
        print(error, flush=True)
        return False
    return True


def example() -> torch.Tensor:
    """One frame."""
    return torch.randn(1, 1, crepe.WINDOW, generator=torch.Generator().manual_seed(0))


def dense(shape: str, effort: Effort, out: Path) -> nn.Sequential:
    """A dense network of a shape: trained, or read if it has been; tiny's are its authors' weights."""
    if shape == "tiny":
        return crepe.given("tiny")
    torch.manual_seed(0)
    model, path = student(shape), out / f"{shape}.pt"
    if not path.is_file():
        print(f"{shape}, dense", flush=True)
        distil.train(model, lesson(effort, out, effort.dense), effort.dense, 3e-3)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def thin(size: int, shape: str, effort: Effort, out: Path) -> nn.Sequential:
    """A thin network of a shape and size: trained from the dense one, or read from its file if it has been."""
    path, model = thin_file(size, shape, out), folded(dense(shape, effort, out))
    if not path.is_file():
        print(f"{shape}, {size:,} bytes", flush=True)
        student_of = copy.deepcopy(model).train()
        dt.compress(student_of, {"model": {"file_bytes": size}, "rules": {"*": {"method": "coded"}}})
        steps = effort.thin[shape]
        distil.train(student_of, lesson(effort, out, steps), steps)
        dt.save(student_of.eval(), path, max_bytes=size)
    return dt.load(model, path).eval()


def thin_file(size: int, shape: str, out: Path) -> Path:
    """Where a thin network lies."""
    return out / f"{shape}-{size}.thin"


def lesson(effort: Effort, out: Path, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of frames in noise and what the teacher says of them."""
    clean, said = teacher.taught(out, effort.taught)
    return distil.batches(clean, distil.targets(clean, said), material.noises("train", effort.noise), steps)


if __name__ == "__main__":
    main()

"""Keywords on an emulated Cortex-M4: ``python examples/keywords-mcu/run.py [--wav FILE]``.

Exports the network of examples/keywords-browser as C for one frame a run, compiles it with features, a recording and
main program for QEMU's mps2-an386, prints flash and memory as the linker counts them, and runs it. Without ``--wav``
it takes a recording of the wake words, if ``--data`` or ``$DEEPTHIN_DATA/wakewords`` has them, else a made-up sound.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import deepthin.torch as dt
from deepthin.lab.tasks.log_mel import RATE, resampled
from deepthin.torch.export.native.runtime import folder

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "keywords-browser"
BOARD = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16")
FLAGS = (
    "-std=c99",
    "-pedantic",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-O2",
    "-fno-math-errno",
    "-ffunction-sections",
    "-fdata-sections",
)
LINK = ("-nostartfiles", "--specs=nano.specs", "--specs=nosys.specs", "-Wl,--gc-sections", "-Wl,--print-memory-usage")
SILENCE = 0.4  # seconds after a recording, in which its word may still be recognised
TOOLS = {"arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi", "qemu-system-arm": "qemu-system-arm"}


def recording(path: Path) -> np.ndarray:
    """Read a sound file.

    Args:
        path: A file that soundfile reads, of one channel.

    Returns:
        16-bit samples at 16 kHz, with some silence after them.
    """
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    if samples.ndim > 1:
        sys.exit(f"{path} has {samples.shape[1]} channels; give a file of one.")
    samples = np.append(resampled(samples, rate), np.zeros(round(SILENCE * RATE), np.float32))
    return np.clip(np.round(32768 * samples), -32768, 32767).astype(np.int16)


def made_up() -> np.ndarray:
    """A sound without words: 1.5 s of noise whose loudness and a tone's pitch move up and down.

    Returns:
        16-bit samples at 16 kHz.
    """
    seconds = np.arange(RATE * 3 // 2) / RATE
    noise = np.random.default_rng(0).standard_normal(seconds.size) * (1 + np.sin(20 * seconds))
    tone = np.sin(2 * np.pi * (300 * seconds + 40 * np.sin(9 * seconds)))
    return np.round(1500 * noise + 6000 * tone).astype(np.int16)


def sound(wav: Path | None, data: Path | None) -> tuple[np.ndarray, str]:
    """The recording, and what it is.

    Args:
        wav: A file; or None.
        data: A folder with recordings of the wake words; or None.

    Returns:
        16-bit samples at 16 kHz; words for the output.
    """
    if wav is not None:
        return recording(wav), str(wav)
    if data is not None and (data / "testing_list.txt").is_file():
        name = (data / "testing_list.txt").read_text().split()[0]
        return recording(data / name), f"{name}, a test recording"
    return made_up(), "a made-up sound without words: --wav FILE takes another"


def build(samples: np.ndarray, out: Path) -> tuple[Path, str]:
    """Write and compile the program.

    Args:
        samples: 16-bit samples at 16 kHz.
        out: The folder of what is written; it is made.

    Returns:
        The program, and what the linker says about memory.
    """
    sys.path.insert(0, str(PAGE))
    try:
        from network import BANDS, WORDS, Spotter
    finally:
        sys.path.remove(str(PAGE))
    out.mkdir(parents=True, exist_ok=True)
    model = dt.load(Spotter(), PAGE / "keywords.thin").eval()
    dt.export(model, out / "model.c", torch.zeros(1, 1, BANDS), to="c", streaming=True)
    (out / "sound.h").write_text(
        "#include <stdint.h>\n"
        f"enum {{ SOUND_SAMPLES = {samples.size}, WORDS = {len(WORDS)} }};\n"
        f"static const char *const words[WORDS] = {{{', '.join(f'{chr(34)}{word}{chr(34)}' for word in WORDS)}}};\n"
        f"static const int16_t sound[SOUND_SAMPLES] = {{{','.join(map(str, samples.tolist()))}}};\n"
    )
    used = re.findall(r"^USED = (.*)$", (out / "Makefile").read_text(), re.MULTILINE)[0].split()
    sources = [HERE / "start.c", HERE / "keywords.c", out / "model.c", out / "dt.c", folder() / "log_mel.c"]
    program, include = out / "keywords.elf", [f"-I{out}", f"-I{folder()}"]
    command = [
        "arm-none-eabi-gcc",
        *BOARD,
        *FLAGS,
        *LINK,
        *used,
        *include,
        "-T",
        HERE / "mps2.ld",
        *sources,
        "-o",
        program,
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(made.stderr)
    return program, made.stdout


def run(program: Path) -> str:
    """Run a program on the emulated board, one instruction in a nanosecond.

    Args:
        program: An ELF file.

    Returns:
        What it printed.
    """
    machine = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none"]
    counted = ["-icount", "shift=0", "-semihosting-config", "enable=on,target=native", "-kernel", program]
    made = subprocess.run(
        [*machine, *counted], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=600
    )
    if made.returncode:
        sys.exit(f"The program failed: {made.stdout}{made.stderr}")
    return made.stdout + made.stderr


def main() -> None:
    """Read the command line, build, run."""
    data = os.environ.get("DEEPTHIN_DATA")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wav", type=Path, help="a recording of one channel")
    parser.add_argument("--data", type=Path, default=Path(data) / "wakewords" if data else None)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder of what is compiled")
    options = parser.parse_args()
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not installed: apt install {package}")
    samples, what = sound(options.wav, options.data)
    print(f"sound: {samples.size / RATE:.2f} s, {2 * samples.size:,} bytes of flash: {what}")
    program, memory = build(samples, options.build.resolve())
    print(memory, end="")
    print(subprocess.run(["arm-none-eabi-size", program], capture_output=True, text=True, check=True).stdout, end="")
    print(run(program), end="")


if __name__ == "__main__":
    main()

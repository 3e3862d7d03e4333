"""Changes files as an attacker would, signs them again, and reads them: ``python tests/fuzz.py --seconds 60 --seed 0``.

Each file is of some method, pair of methods, group, coding and type (``crafted.files``). Every reader that can be
imported must give an error with a name, within the memory that it was allowed, or finite tensors, of which every
framework computes what the dense network computes. A process of its own reads, so that a crash or a hang is a finding
as well. Findings are written to ``--findings``; those in tests/corpus are tests for ever (test_fuzz.py).
"""

import argparse
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import crafted
from deepthin import METHODS, DeepThinError
from deepthin.storage.head import MAGIC, begun
from deepthin.storage.varints import Reader
from limited import limit

MAX_BYTES = 64 << 20
EXTRA_BYTES = 768 << 20  # of address space, for a process that has read one good file
HANG_SECONDS = 120  # generous: the machine may be busy
BATCHES = (1, 5, 33)
EPS32 = float(np.finfo(np.float32).eps)
ODD = [0, 1, -1, 2, 3, 7, 255, 65536, 1 << 24, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**30, 0.0, 0.5, -1.0]
ODD += [1e308, 1e-320, 1e39, True, False, None, "", "x", "row", "matrix", "csr", [], {}, [[]], [0, 0], {"a": []}]
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 65504.0, 7e4, 1e19, 3e38, -3e38, 1e300, 1e308]
LIKE = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class Finding(Exception):
    """What a reader must not do."""


# Changes


def places(tree, path=()):
    """Every place in a JSON value, as a path."""
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def change_value(rng, header, tensors):
    path = rng.choice([p for p in places(header) if p and p[0] != "crc32"])
    holder, key = at(header, path[:-1]), path[-1]
    old = holder[key]
    if type(old) is int and rng.random() < 0.6:
        holder[key] = rng.choice([old + 1, old - 1, 2 * old, old // 2, -old, old * old, 1 << rng.randrange(70)])
    elif rng.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    elif rng.random() < 0.2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(rng.choice(holder)))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def change_shape(rng, header, tensors):
    """The shape in all places where it stands."""
    entry = rng.choice(list(header["thin"].values()))
    shapes = [f["shape"] for f in (entry["fields"], entry["fields"].get("outer", {})) if "shape" in f]
    rows, cols = (rng.choice([1, 2, 12, 20, 21, 240, 4096, 1 << 20, 1 << 33]) for _ in range(2))
    for shape in shapes:
        shape[:] = [rows, cols]
    entry["parts"] = [[name, {"shape": [rows, cols]}] for name, own in header["thin"].items() if own is entry]


def change_method(rng, header, tensors):
    entry = rng.choice(list(header["thin"].values()))
    names = [*METHODS, *(f"{a} then {b}" for a in METHODS for b in ("uniform", "kmeans", "ecsq", "binary"))]
    entry["method"] = rng.choice(names)


def change_coding(rng, header, tensors):
    entry = rng.choice(list(header["thin"].values()))
    codings = entry.setdefault("codings", {})
    names = [*codings, "xf", "symbols", "values", "centres", "positions"]
    codings[rng.choice(names)] = [
        rng.choice(["packed", "gaps", "huffman", "repeats"]),
        rng.choice([0, 1, 2, 3, 4, 6, 8, 12, 13, 16, 17, 24]),
    ]


def change_part(rng, header, tensors):
    name, entry = rng.choice(list(header["thin"].items()))
    parts = entry.setdefault("parts", [[name, {"shape": [crafted.ROWS, crafted.COLS]}]])
    own = rng.choice(parts)[1]
    key = rng.choice(["scale", "transposed", "zero_row", "shape", "shape"])
    own[key] = rng.choice(
        {
            "scale": [1e308, 1e-308, 2.0, 1e38, 1.0],
            "transposed": [True, False],
            "zero_row": [0, 1, 11, 12, None],
            "shape": [[crafted.COLS, crafted.ROWS], [240], [12, 4, 5], [1] * 60 + [240], [crafted.ROWS, crafted.COLS]],
        }[key]
    )


def change_names(rng, header, tensors):
    names = [*tensors, *header["thin"], "0.weight", "../../x", "/etc/passwd", "\0", "a/b", "__crc32__", "\ud800"]
    header["aliases"][rng.choice(names)] = rng.choice(names)


def flip(rng, header, tensors):
    name = rng.choice([n for n, (_, _, data) in tensors.items() if data])
    kind, shape, data = tensors[name]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] = rng.choice([0, 255, rng.randrange(256)])
    tensors[name] = kind, shape, bytes(changed)


def set_floats(rng, header, tensors):
    name = rng.choice(list(tensors))
    kind, shape, data = tensors[name]
    if kind in LIKE and data:
        with np.errstate(all="ignore"):
            numbers = np.frombuffer(data, LIKE[kind]).copy()
            value = rng.choice(FLOATS)
            if rng.random() < 0.5:
                numbers[:] = value
            numbers[rng.randrange(len(numbers))] = value
        tensors[name] = kind, shape, numbers.tobytes()


def resize(rng, header, tensors):
    name = rng.choice(list(tensors))
    kind, _, data = tensors[name]
    item = crafted.SIZES[kind]
    count = rng.choice([0, 1, 2, len(data) // item + 1, max(len(data) // item - 1, 0), 5000])
    data = (data * (count * item // max(len(data), 1) + 1) + bytes(count * item))[: count * item]
    tensors[name] = kind, rng.choice([[count], [count, 1], [1, count], [1] * 65 + [count]]), data


def retype(rng, header, tensors):
    name = rng.choice(list(tensors))
    kind, shape, data = tensors[name]
    same = [
        k for k in (*crafted.SIZES, "U64", "U32", "U16", "F8_E4M3") if crafted.SIZES.get(k, 1) == crafted.SIZES[kind]
    ]
    tensors[name] = rng.choice(same), shape, data


def remove(rng, header, tensors):
    del tensors[rng.choice(list(tensors))]


def exchange(rng, header, tensors):
    one, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def empty(rng, header, tensors):
    tensors[rng.choice(["z", "0.bias", "0.weight/xf"])] = "F32", rng.choice([[0], [0, 1 << 62], [1 << 40, 0], []]), b""
    name = next(iter(tensors))
    if not tensors[name][1]:
        tensors[name] = "F32", [], bytes(4)


CHANGES = [change_value] * 4 + [flip] * 3 + [change_shape, change_method, change_coding, change_part, change_names]
CHANGES += [set_floats, set_floats, resize, retype, remove, exchange, empty]


def changed(rng):
    """A file with one to three changes, each checksum right, and what was done."""
    name = rng.choice(list(crafted.files()))
    data, done = crafted.files()[name], [name]
    if name.startswith("version 2"):
        return changed_2(rng, data, done)
    header, tensors = copy.deepcopy(crafted.taken_apart(data))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        change = rng.choice(CHANGES)
        try:
            change(rng, header, tensors)
        except (IndexError, KeyError, TypeError, AttributeError, ValueError):  # not for this file, or no more
            continue
        done.append(change.__name__)
    try:
        return crafted.signed(header, tensors), done
    except (UnicodeEncodeError, KeyError, TypeError, AttributeError):
        return data, [name]


# Changes of version 2: of what the header says, of its bytes, and of arrays


def item_of(rng, head, arrays):
    """An array of the file, compressed if there is one: its number, its place in the header, and what is said of it."""
    whole = list(head.items())
    number = rng.choice([k for k, (_, entry, _) in enumerate(whole) if entry] or [0])
    return number, *whole[number]


def with_item(head, name, entry, item):
    matrix = head.thin[name]
    own = dataclasses.replace(matrix, items={**matrix.items, entry: item})
    return dataclasses.replace(head, thin={**head.thin, name: own})


def other_coding(rng, head, arrays):
    _, name, entry, item = item_of(rng, head, arrays)
    ways = ["packed", "gaps", "huffman", "levels", "tree", "numbers", "planned"]
    ways = ways if item.kind == "U8" else ["short", "repeats"]
    coding = rng.choice(ways), rng.choice([0, 1, 2, 3, 4, 6, 8, 12, 13, 16, 17, 24, 1 << 16, 1 << 40])
    return with_item(head, name, entry, dataclasses.replace(item, coding=coding)), arrays


def other_length(rng, head, arrays):
    number, name, entry, item = item_of(rng, head, arrays)
    count = rng.choice([0, 1, item.bytes + 1, max(item.bytes - 1, 0), 4 * item.bytes, 5000])
    data = (arrays[number] * (count // max(item.bytes, 1) + 1) + bytes(count))[:count]
    kept = count // crafted.SIZES[item.kind]
    coding = item.coding and (item.coding[0], kept if item.kind != "U8" else item.coding[1])
    head = with_item(head, name, entry, dataclasses.replace(item, coding=coding, bytes=count))
    return head, [*arrays[:number], data, *arrays[number + 1 :]]


def other_parts(rng, head, arrays):
    name, matrix = rng.choice(list(head.thin.items()))
    own = rng.choice(list(matrix.parts))
    change = rng.choice(
        [
            {"scale": rng.choice([1e308, 1e-308, 2.0, 1e38, 0.0, -1.0, math.nan])},
            {"transposed": True},
            {"zero_row": rng.choice([0, 1, 11, 12, 1 << 40])},
            {"shape": rng.choice([(20, 12), (240,), (12, 4, 5), (1,) * 60 + (240,), (1,) * 70 + (240,), (12, 20)])},
        ]
    )
    parts = {**matrix.parts, own: dataclasses.replace(matrix.parts[own], **change)}
    return dataclasses.replace(head, thin={**head.thin, name: dataclasses.replace(matrix, parts=parts)}), arrays


def other_fields(rng, head, arrays):
    """Of a method; its entries remain as they are."""
    name, matrix = rng.choice(list(head.thin.items()))
    method = matrix.method
    key = rng.choice([f.name for f in dataclasses.fields(method)])
    old = getattr(method, key)
    new = rng.choice([old + 1, max(old - 1, 1), 2 * old, 1 << 31]) if type(old) is int else rng.choice([0, 1, "row"])
    made = dataclasses.replace(method, **{key: new})
    own = dataclasses.replace(matrix, method=made)
    return dataclasses.replace(head, thin={**head.thin, name: own}), arrays


def other_names(rng, head, arrays):
    names = [*head.dense, *head.thin, "0.weight", "../../x", "/etc/passwd", "\0", "a/b", "", "weightbias" * 40]
    return dataclasses.replace(head, aliases={**head.aliases, rng.choice(names): rng.choice(names)}), arrays


def other_tensor(rng, head, arrays):
    name = rng.choice(list(head.dense))
    tensor = head.dense[name]
    other = rng.choice(
        [
            {"kind": rng.choice(list(crafted.SIZES))},
            {"shape": rng.choice([(), (0,), (0, 1 << 62), (1 << 40, 0), (*tensor.shape, 1), (1,) * 66])},
            {"short": not tensor.short},
        ]
    )
    return dataclasses.replace(head, dense={**head.dense, name: dataclasses.replace(tensor, **other)}), arrays


def other_bytes(rng, head, arrays):
    number = rng.choice([k for k, array in enumerate(arrays) if array])
    data = bytearray(arrays[number])
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
    return head, [*arrays[:number], bytes(data), *arrays[number + 1 :]]


def other_floats(rng, head, arrays):
    kinds = [item.kind for _, _, item in head.items()]
    number = rng.choice([k for k, kind in enumerate(kinds) if kind in LIKE and arrays[k]])
    with np.errstate(all="ignore"):
        numbers = np.frombuffer(arrays[number], LIKE[kinds[number]]).copy()
        value = rng.choice(FLOATS)
        if rng.random() < 0.5:
            numbers[:] = value
        numbers[rng.randrange(len(numbers))] = value
    return head, [*arrays[:number], numbers.tobytes(), *arrays[number + 1 :]]


CHANGES_2 = [other_coding, other_length, other_parts, other_fields, other_names, other_tensor, other_bytes, other_bytes]
CHANGES_2 += [other_floats, other_floats]


def other_header(rng, header):
    """Bytes of a header changed, put in, or taken out."""
    header, at = bytearray(header), rng.randrange(len(header))
    way = rng.choice(["flip", "set", "insert", "delete", "longer", "twice", "wide"])
    if way == "flip":
        header[at] ^= 1 << rng.randrange(8)
    elif way == "set":
        header[at] = rng.choice([0, 1, 127, 128, 255, header[at] ^ 1, rng.randrange(256)])
    elif way == "insert":
        header[at:at] = rng.choice([b"\0", b"\x80\x80", b"\xff" * 9 + b"\1", rng.randbytes(3)])
    elif way == "delete":
        del header[at : at + rng.choice([1, 1, 2, 5])]
    elif way == "longer":  # a number that is not in its shortest form
        header[at : at + 1] = bytes([header[at] | 128, 0])
    elif way == "wide":
        header[at : at + 1] = b"\xff" * rng.choice([1, 3, 5, 8, 9]) + b"\1"
    else:
        header[at:at] = header[at : at + rng.randrange(1, 20)]
    return bytes(header), f"{way} a byte of the header"


def changed_2(rng, data, done):
    head, arrays = crafted.taken_apart_2(data)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        change = rng.choice(CHANGES_2)
        try:
            made = change(rng, head, arrays)
            crafted.signed_2(*made)  # whether such a header can be written at all
        except (IndexError, KeyError, TypeError, AttributeError, ValueError, DeepThinError):
            continue
        head, arrays = made
        done.append(change.__name__)
    header = None
    if rng.random() < 0.4:
        whole = Reader(start := begun(head), len(MAGIC))
        whole.number()
        header, what = other_header(rng, start[whole.at :])
        done.append(what)
    return crafted.signed_2(head, arrays, header), done


# Readers


def bounded(x, weight, largest):
    """How far a product in float32, by whatever way, may be from that in float64."""
    terms = weight.shape[1] + 300
    return terms * 8 * EPS32 * np.abs(x).sum(1, keepdims=True) * largest + 1e-37


def bounds(contents):
    """For each tensor, how large its weights can be, and the sums from which they are computed."""
    from deepthin.storage.arrays import largest
    from deepthin.storage.budget import largest_weight

    found = {name: largest(raw) for name, raw in contents.dense.items()}
    for thin in contents.thin.values():
        most = largest_weight(thin.method, {entry: largest(raw) for entry, raw in thin.code.items()})
        found |= {name: most * max(part.scale, 1e-300) for name, part in thin.parts.items()}
    return found


def numpy_readers(path):
    """``load`` and ``inspect``; what was loaded, or None for an error with a name."""
    import deepthin
    from deepthin.storage.read import from_bytes, read
    from deepthin.storage.write import to_bytes

    arrays = named(lambda: deepthin.load(path, MAX_BYTES))
    report = named(lambda: deepthin.inspect(path, MAX_BYTES))
    if arrays is None:
        return None, None
    if report is None:
        raise Finding("inspect refuses what load reads")
    for name, array in arrays.items():
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            raise Finding(f"{name} is not finite")
    contents = read(path, MAX_BYTES)
    again = to_bytes(contents)
    if to_bytes(from_bytes(again)) != again:
        raise Finding("what is read and written twice has other bytes")
    if report.total_bytes != len(again):
        raise Finding(f"the report says {report.total_bytes} bytes; written again, there are {len(again)}")
    return arrays, contents


def compare(arrays, most, forward, what):
    """Both layers at each batch, against the dense ones."""
    rng = np.random.default_rng(0)
    for layer in ("0", "1"):
        weight = arrays[f"{layer}.weight"].astype("f8")
        bias = arrays[f"{layer}.bias"].astype("f8")
        if not max(abs(weight).max(initial=0), abs(bias).max(initial=0), most[f"{layer}.weight"]) < 1e30:
            continue  # sums may overflow
        for batch in BATCHES:
            x = rng.normal(size=(batch, weight.shape[1])).astype("f4")
            y, dense = forward(layer, x), x @ weight.T + bias
            bound = bounded(x, weight, most[f"{layer}.weight"]) + 8 * EPS32 * abs(bias)
            if y.shape != dense.shape or not (abs(y - dense) <= bound).all():
                raise Finding(f"{what}: layer {layer}, batch {batch} differs by {abs(y - dense).max()}")


def torch_reader(path, arrays, contents):
    import torch
    from torch import nn

    import deepthin.torch as dt

    for device, frozen in (("cpu", False), ("cpu", True), ("meta", False)):
        with torch.device(device):
            model = nn.Sequential(nn.Linear(crafted.COLS, crafted.ROWS), nn.Linear(crafted.ROWS, crafted.COLS))
        loaded = named(lambda model=model, frozen=frozen: dt.load(model, path, frozen=frozen))
        if loaded is None:
            continue
        if arrays is None:
            raise Finding("torch reads what load refuses")
        if any(tensor.dtype != torch.float32 for tensor in loaded.parameters()):
            continue  # on the meta device each tensor has the type of the file: these are not computed in float32
        loaded.eval()

        def forward(layer, x, loaded=loaded):
            with torch.no_grad():
                return loaded[int(layer)](torch.from_numpy(x)).double().numpy()

        compare(arrays, bounds(contents), forward, f"torch, {device}, frozen {frozen}")


def keras_reader(path, arrays, contents):
    import keras

    import deepthin.keras as dk

    keras.utils.clear_session()
    first, second = keras.layers.Dense(crafted.ROWS, name="0"), keras.layers.Dense(crafted.COLS, name="1")
    model = keras.Sequential([keras.layers.Input((crafted.COLS,)), first, second])
    if named(lambda: dk.load(model, path)) is None:
        return
    if arrays is None:
        raise Finding("keras reads what load refuses")
    layers = {"0": first, "1": second}
    compare(arrays, bounds(contents), lambda layer, x: np.asarray(layers[layer](x), "f8"), "keras")


def tensorflow_reader(path, arrays, contents):
    import deepthin.tensorflow as dtf

    made = named(lambda: dtf.load(dtf.Variables(), path, max_bytes=MAX_BYTES))
    if made is not None and arrays is None:
        raise Finding("tensorflow reads what load refuses")


def readers():
    """Of the frameworks that are here."""
    found = [torch_reader] if importlib.util.find_spec("torch") else []
    if importlib.util.find_spec("keras") and os.environ.get("KERAS_BACKEND"):
        found.append(keras_reader)
    if importlib.util.find_spec("tensorflow"):
        found.append(tensorflow_reader)
    return found


def named(read):
    """What a reader gives; None where it gives an error with a name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return read()
        except DeepThinError as error:
            if "more memory than there is" in str(error):
                raise Finding(f"memory: {error}") from None
            if len(str(error)) > 100_000:
                raise Finding(f"a message of {len(str(error))} characters") from None
            return None


def examine(path, frameworks):
    """Read a file in every reader; Finding, or any other error, if one does what it must not."""
    arrays, contents = numpy_readers(path)
    for reader in frameworks:
        reader(path, arrays, contents)


# The processes


def work(folder, seed, deadline, first):
    """Read changed files until the deadline; each finding is a line on stdout, the file being read in ``folder``."""
    path, frameworks = folder / "current.thin", readers()
    for data in list(crafted.files().values())[::25]:  # what is loaded late is, before memory is limited
        path.write_bytes(data)
        if numpy_readers(path)[0] is None:
            raise Finding("a file without changes is refused")
        examine(path, frameworks)
    limit(EXTRA_BYTES)
    number = first
    while number < first + 5 or time.time() < deadline:
        rng = random.Random(f"{seed}-{number}")
        data, done = changed(rng)
        path.write_bytes(data)
        (folder / "number").write_text(str(number))
        try:
            examine(path, frameworks)
        except Exception as error:
            print(
                json.dumps({"number": number, "done": done, "error": f"{type(error).__name__}: {error}"[:500]}),
                flush=True,
            )
            kept = folder / "findings"
            kept.mkdir(exist_ok=True)
            (kept / f"{hashlib.sha256(data).hexdigest()[:16]}.thin").write_bytes(data)
        number += 1
    print(json.dumps({"read": number - first}), flush=True)


def fuzz(seconds, seed, findings):
    """Findings as lines; how many files were read."""
    deadline, first, found, read = time.time() + seconds, 0, [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        while time.time() < deadline:
            words = [sys.executable, __file__, "--work", place, "--seed", str(seed), "--first", str(first)]
            process = subprocess.Popen([*words, "--deadline", str(deadline)], stdout=subprocess.PIPE, text=True)
            try:
                said, _ = process.communicate(timeout=max(deadline - time.time(), 0) + HANG_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                said, _ = process.communicate()
            lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            found += [line for line in lines if "error" in line]
            number = int((folder / "number").read_text()) if (folder / "number").exists() else first
            read += number - first
            if process.returncode:
                data = (folder / "current.thin").read_bytes()
                found.append({"number": number, "error": f"the process ended with {process.returncode}"})
                (folder / "findings").mkdir(exist_ok=True)
                (folder / "findings" / f"{hashlib.sha256(data).hexdigest()[:16]}.thin").write_bytes(data)
                if not (folder / "number").exists():
                    break  # it never began
            first = number + 1
        for file in (folder / "findings").glob("*.thin") if (folder / "findings").exists() else ():
            findings.mkdir(parents=True, exist_ok=True)
            (findings / file.name).write_bytes(file.read_bytes())
    return found, read


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", default=str(int(time.time())), help="the same seed gives the same files")
    options.add_argument("--findings", type=Path, default=Path("build/fuzz"))
    options.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.work:
        work(given.work, given.seed, given.deadline, given.first)
    else:
        print(f"fuzz: {given.seconds:g} s, seed {given.seed}", flush=True)
        lines, number = fuzz(given.seconds, given.seed, given.findings)
        for line in lines:
            print(json.dumps(line))
        print(f"{number} files read, {len(lines)} findings" + (f", in {given.findings}" if lines else ""))
        sys.exit(1 if lines or not number else 0)

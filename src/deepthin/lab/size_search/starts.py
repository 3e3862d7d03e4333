"""Where a search begins: configurations that were good in the measurements of docs/rate.md, never from nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from deepthin.lab.size_search.candidate import Value
from deepthin.lab.size_search.space import OWN, Choice, Space, draw

REST = "*"


@dataclass(frozen=True)
class Start:
    """A known configuration.

    Attributes:
        name: What it is called in reports.
        methods: Group -> method; ``*`` for all others.
        rank: Rank of DeepThin.
        floats: Numbers of the codes over those of the default, two bits each.
        decay: Weight decay; None: the task's own.
        recurrent: Whether it is for networks with recurrent layers only.
    """

    name: str
    methods: Mapping[str, str]
    rank: int = 4
    floats: float = 1.0
    decay: float | None = None
    recurrent: bool = False


STARTS = (
    Start("Kronecker outside", {"first": "kronecker", "last": "kronecker", "convolution": "coded", REST: "deepthin"}),
    Start("DeepThin", {REST: "deepthin"}),
    Start("DeepThin, decay .3", {REST: "deepthin"}, decay=0.3, recurrent=True),
    Start("hashed recurrent", {"recurrent": "hashed", REST: "deepthin"}, recurrent=True),
    Start("large layers", {"first": "deepthin", "middle": "deepthin", "recurrent": "deepthin", REST: "coded"}),
    Start("coded weights", {REST: "coded"}),
    Start("Kronecker", {REST: "kronecker"}),
    Start("small DeepThin", {REST: "deepthin"}, rank=1, floats=0.5),
)


@dataclass(frozen=True)
class Usual:
    """What a task is trained with, if nothing else is chosen.

    Attributes:
        lr: Learning rate of dense parameters.
        coded_lr: The same where the weights themselves are coded: networks of --also among others.
        decay: Weight decay.
        floats: Numbers of the codes over weights: two bits of the file for each.
    """

    lr: float
    coded_lr: float
    decay: float
    floats: float


def known(space: Space, usual: Usual) -> list[tuple[str, dict[str, Value]]]:
    """The configurations with which a search begins, as close to the known ones as the space allows.

    Args:
        space: What may be chosen.
        usual: What the task is trained with.

    Returns:
        Name and settings, each settings once; the networks of --also after the first two.
    """
    recurrent = any(group.name == "recurrent" for group in space.groups)
    networks = [network for network in space.training["network"].values if network != OWN]
    found = [(start.name, _settings(space, usual, start, OWN)) for start in STARTS if recurrent or not start.recurrent]
    also = [(f"{network}, coded", _settings(space, usual, STARTS[0], str(network))) for network in networks]
    unique: list[tuple[str, dict[str, Value]]] = []
    for name, settings in (*found[:2], *also, *found[2:]):
        if all(settings != other for _, other in unique):
            unique.append((name, settings))
    return unique


def _settings(space: Space, usual: Usual, start: Start, network: str) -> dict[str, Value]:
    coded = network != OWN or set(start.methods.values()) == {"coded"}

    def pick(name: str, choice: Choice) -> Value:
        group, _, what = name.rpartition(".")
        wanted: dict[str, Value] = {
            "network": network,
            "lr": usual.coded_lr if coded else usual.lr,
            "decay": usual.decay if start.decay is None else start.decay,
            "teacher": True,
            "method": start.methods.get(group, start.methods[REST]),
            "floats": start.floats * usual.floats,
            "rank": start.rank,
        }
        return choice.nearest(wanted[what])

    return draw(space, pick)

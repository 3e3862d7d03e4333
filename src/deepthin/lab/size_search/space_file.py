"""The user's TOML file that fixes or widens what a search chooses (docs/search.md)."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from deepthin.errors import ConfigError, did_you_mean
from deepthin.lab.size_search.candidate import Value
from deepthin.lab.size_search.groups import AUTOMATIC, Matrices
from deepthin.lab.size_search.space import SEARCHED, Choice, Group, Space, default_group, finite
from deepthin.plan.patterns import Names

ALL = "*"
_TRAINING = ("lr", "decay", "teacher")
_GROUP = ("method", "floats", "rank")


def read(source: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any]:
    """Read the file.

    Args:
        source: A path, or what the file holds; None: nothing.

    Returns:
        Its tables.

    Raises:
        ConfigError: It is missing or no TOML.
    """
    if source is None or isinstance(source, Mapping):
        return source or {}
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--space {source} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"--space {source} is not valid TOML: {error}.") from None


def widened(space: Mapping[str, Any], training: Mapping[str, Choice], matrices: Matrices, floats: float) -> Space:
    """The space of a search: the default one, but for what the user says.

    Args:
        space: The tables of the user's file.
        training: Default choices of a training.
        matrices: The matrices of the task's network.
        floats: The centre of the default range of floats.

    Returns:
        What may be chosen.

    Raises:
        ConfigError: A key, group, pattern, method or value is invalid; the message names the closest valid one.
    """
    _known(space, ("training", "groups"), "--space")
    own = _table(space, "training")
    _known(own, _TRAINING, "--space [training]")
    chosen = {name: _choice(own[name], name, f"--space [training] {name}") if name in own else choice
              for name, choice in training.items()}  # fmt: skip
    if True in chosen["teacher"].values and True not in training["teacher"].values:
        raise ConfigError("--space [training] teacher = true needs --teacher FILE: the network to learn from.")
    tables = _table(space, "groups")
    groups: dict[str, tuple[str, ...]] = {}
    names, taken = Names(matrices.tensors), set[str]()
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"--space groups.{name} = {table!r} must be a table, such as {{ method = 'deepthin' }}.")
        _known(cast(Mapping[str, Any], table), (*_GROUP, "match"), f"--space [groups.{name}]")
        if "match" in table:
            groups[name] = _matched(names, table["match"], name, taken)
            taken |= {*groups[name]}
    for name, members in matrices.groups.items():
        rest = tuple(member for member in members if member not in taken)
        if name in groups and rest:
            raise ConfigError(f"--space [groups.{name}] has match, but {name} is a group already: name it otherwise.")
        groups |= {name: rest} if rest else {}
    if unknown := [name for name in tables if name != ALL and name not in groups]:
        kind = "is empty in this network" if unknown[0] in AUTOMATIC else "is unknown"
        raise ConfigError(
            f"--space [groups.{unknown[0]}] {kind}. Groups: {', '.join(groups)}. For a group of your own, add match = "
            "['pattern of its layers']."
        )
    everywhere = {key: value for key, value in _table(tables, ALL).items() if key != "match"}
    made = [_group(default_group(n, m, floats), {**everywhere, **_table(tables, n)}) for n, m in groups.items()]
    return Space(chosen, tuple(made))


def _group(group: Group, table: Mapping[str, Any]) -> Group:
    where = f"--space [groups.{group.name}]"
    choices = {**group.choices, **{key: _choice(table[key], key, f"{where} {key}") for key in _GROUP if key in table}}
    return replace(group, choices=choices)


def _matched(names: Names, patterns: Any, name: str, taken: set[str]) -> tuple[str, ...]:
    """The matrices of a group of the user's."""
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in cast(list[object], patterns)):
        raise ConfigError(f"--space [groups.{name}] match = {patterns!r} must be a list of patterns, such as ['fc*'].")
    found: list[str] = []
    for pattern in cast(list[str], patterns):
        reached = [tensor.name for tensor in names.reached(pattern)]
        if not reached:
            valid = sorted(names.modules | names.tensors)
            raise ConfigError(f"--space [groups.{name}] {pattern!r} matches nothing. {did_you_mean(pattern, valid)}")
        found += [one for one in reached if one not in taken and one not in found]
    if not found:
        raise ConfigError(f"--space [groups.{name}] has no matrix that is not in a group before it: leave it out.")
    return tuple(found)


def _choice(given: Any, name: str, where: str) -> Choice:
    """A value, a list of values, or a table with ``low`` and ``high``."""
    if isinstance(given, Mapping):
        table = cast(Mapping[str, Any], given)
        _known(table, ("low", "high"), where)
        low, high = cast(Any, table.get("low")), cast(Any, table.get("high"))
        if name not in ("lr", "floats", "decay") or not (_number(low) and _number(high) and 0 < low <= high):
            raise ConfigError(f"{where} = {given!r}: ranges are of lr, decay and floats, with 0 < low <= high.")
        choice = Choice(low=float(low), high=float(high))
    else:
        values = cast(list[Any], given) if isinstance(given, list) else [given]
        for value in values:
            _check(value, name, where)
        choice = Choice(tuple(dict.fromkeys(values)))
    if not choice.values and not choice.high:
        raise ConfigError(f"{where} = {given!r} leaves no choice: give a value, a list, or {{ low = .., high = .. }}.")
    for value in () if choice.values else (choice.low, choice.high):
        _check(value, name, where)
    return choice


def _check(value: Value, name: str, where: str) -> None:
    """ConfigError for a value that the choice cannot have."""
    if name == "method":
        if not isinstance(value, str) or value not in (*SEARCHED, "dense"):
            raise ConfigError(f"{where} = {value!r} is unknown. {did_you_mean(value, (*SEARCHED, 'dense'))}")
    elif name == "teacher":
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r} must be true, false or a list of both.")
    elif name == "rank":
        if value != "max" and not (type(value) is int and value >= 1):
            raise ConfigError(f"{where} = {value!r} must be a whole number from 1 on, or 'max'.")
    elif not _number(value) or not finite(value):
        raise ConfigError(f"{where} = {value!r} must be a number.")
    elif name == "decay" and float(value) < 0:
        raise ConfigError(f"{where} = {value!r} must not be below 0.")
    elif name in ("lr", "floats") and not 0 < float(value) <= (1 if name == "floats" else 1e3):
        raise ConfigError(f"{where} = {value!r} must be above 0{' and at most 1' if name == 'floats' else ''}.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = source.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"--space {key} = {table!r} must be a table.")
    return cast(Mapping[str, Any], table)


def _known(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in table:
        if key not in valid:
            raise ConfigError(f"{where} has no key {key!r}. {did_you_mean(key, valid)}")

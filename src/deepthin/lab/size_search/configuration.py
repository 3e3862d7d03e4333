"""From the settings of a candidate to a configuration, as ``compress`` and ``deepthin train`` take it, and to TOML."""

import json
from collections.abc import Mapping
from typing import Any, cast

from deepthin.errors import BudgetError
from deepthin.lab.size_search.candidate import Settings, Value
from deepthin.lab.size_search.groups import Matrices
from deepthin.lab.size_search.space import OWN, Group, Space
from deepthin.methods import METHODS
from deepthin.plan.parse import parse_rules
from deepthin.plan.shares import Unit
from deepthin.plan.tensor import Tensor

CODED: Mapping[str, Any] = {"method": "coded"}


def rules_of(settings: Settings, space: Space, networks: Mapping[str, Matrices], file_bytes: int) -> dict[str, Any]:
    """The configuration of a candidate.

    Args:
        settings: Its settings.
        space: What was to be chosen: it has the groups.
        networks: Name of each network -> its matrices.
        file_bytes: Size of the file.

    Returns:
        A mapping with the tables ``model`` and ``rules``. A matrix too small for the floats of its group is coded as it
        is.
    """
    network = str(settings["network"])
    matrices = networks[network]
    model: dict[str, Any] = {"file_bytes": file_bytes}
    if matrices.ignore:
        model["ignore"] = [*matrices.ignore]
    if network != OWN:
        return {"model": model, "rules": {"*": dict(CODED)}}
    tensors = {tensor.name: tensor for tensor in matrices.tensors}
    by_rule: dict[str, list[str]] = {}  # rules as JSON -> matrices
    for group in space.groups:
        rule = _rule(settings, group)
        for name in group.matrices:
            by_rule.setdefault(json.dumps(rule if _possible(rule, tensors[name]) else CODED), []).append(name)
    rest = max(by_rule, key=lambda rule: len(by_rule[rule]))
    rules = {name: json.loads(rule) for rule, names in by_rule.items() if rule != rest for name in names}
    return {"model": model, "rules": {**rules, "*": json.loads(rest)}}


def _rule(settings: Settings, group: Group) -> dict[str, Any]:
    """The rule of a group."""
    method = str(settings[f"{group.name}.method"])
    if method == "dense" or METHODS[method].learns_step:
        return {"method": method}
    options: dict[str, Value] = {}
    if f"{group.name}.rank" in settings:
        options["rank"] = settings[f"{group.name}.rank"]
    floats = settings[f"{group.name}.floats"]
    return {"method": method, **options, "floats": floats, "then": dict(CODED)}


def _possible(rule: Mapping[str, Any], tensor: Tensor) -> bool:
    """Whether the method can store a matrix in the floats of the rule."""
    if "floats" not in rule:
        return True
    try:
        Unit(parse_rules({"rules": {"*": rule}}).rules[0], (tensor,)).trained(0.0)
    except BudgetError:
        return False
    return True


def to_toml(rules: Mapping[str, Any], about: str) -> str:
    """Write a configuration as TOML.

    Args:
        rules: The tables ``model`` and ``rules``, of plain values.
        about: What the file says first, as comments.

    Returns:
        The text.
    """
    lines = [f"# {line}".rstrip() for line in about.splitlines()]
    lines += ["", "[model]", *(f"{key} = {_value(value)}" for key, value in rules["model"].items())]
    for pattern, rule in rules["rules"].items():
        lines += ["", f"[rules.{_text(pattern)}]", *(f"{key} = {_value(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = cast(Mapping[str, Any], value).items()
        return f"{{ {', '.join(f'{key} = {_value(one)}' for key, one in pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, cast(list[Any], value)))}]"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON; and DEL, which TOML wants escaped too."""
    return json.dumps(text).replace("\x7f", "\\u007f")

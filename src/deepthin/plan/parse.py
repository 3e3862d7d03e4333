"""Parse a configuration: a mapping or a TOML file becomes Rules."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deepthin.errors import ConfigError, did_you_mean
from deepthin.method import FLOAT_BITS
from deepthin.methods import METHODS, REST, addable
from deepthin.methods.plus import check_share
from deepthin.plan.patterns import matcher
from deepthin.plan.rules import ALLOCATIONS, BIASES, DENSE, SENSITIVITY, Rule, Rules, Stages

_MODEL_KEYS = ("ratio", "file_bytes", "ignore", "allocation", "biases")
_RULE_KEYS = ("method", "ratio", "bytes", "floats", "group", "then", "projection", "plus")
GROUPS = ("flat", "rows")
AUTO = "auto"


Source = Mapping[str, Any] | str | Path | Rules | float
"""What users give as rules: a mapping, the path of a TOML file, ``Rules``, or a ratio for the whole model."""


def parse_rules(source: Source) -> Rules:
    """Parse and check a configuration (docs/configuration.md).

    Args:
        source: A mapping with the tables ``model``, ``rules`` and ``stages``, the path of a TOML file with the same
            tables, or ``Rules``, which are returned unchanged. A number is ``{"model": {"ratio": number}}``.

    Returns:
        The configuration. Without ``[rules]``, one rule stores every matrix by ``deepthin``.

    Raises:
        ConfigError: The file is missing or is not TOML; or a key, method or value is invalid. The message names the
            closest valid key or method.
    """
    if isinstance(source, Rules):
        return source
    if isinstance(source, str | Path):
        source = _read(Path(source))
    if isinstance(source, int | float) and source is not True and source is not False:
        if source > 1:
            raise ConfigError(
                f"{source!r} is no ratio, which is above 0 and at most 1. For a size in bytes write "
                f"file_bytes={source!r}."
            )
        source = {"model": {"ratio": float(source)}}
    if not isinstance(source, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] -- what users give
        raise ConfigError(
            f"The configuration is {type(source).__name__}: give a ratio such as 0.02, a mapping such as "
            "{'model': {'ratio': 0.02}}, the path of a TOML file, or Rules."
        )
    _check_whole_numbers(source, "the configuration")
    _check_keys(source, ("model", "rules", "stages"), "the configuration")
    model = _table(source, "model")
    _check_keys(model, _MODEL_KEYS, "[model]")
    ratio = _number(model, "ratio", float, "[model]")
    file_bytes = _number(model, "file_bytes", int, "[model]")
    if ratio is not None and file_bytes is not None:
        raise ConfigError("[model] has both ratio and file_bytes: give one target.")
    ignore = model.get("ignore", ())
    if not isinstance(ignore, list | tuple) or not all(isinstance(p, str) for p in cast(list[object], ignore)):
        raise ConfigError(f"[model] ignore = {ignore!r} must be a list of patterns, such as ['output'].")
    rules = tuple(_parse_rule(pattern, table) for pattern, table in _table(source, "rules").items())
    stages = _parse_stages(_table(source, "stages")) if "stages" in source else None
    if stages is not None and (rule := next((rule for rule in rules if rule.has_rest), None)):
        raise ConfigError(
            f'[rules."{rule.pattern}"] plus = {{ method = {REST!r} }}: a sum with all weights is trained from its '
            "start on: leave [stages] out, or add another method."
        )
    allocation = _parse_allocation(model.get("allocation", "flat"))
    biases = _parse_biases(model["biases"]) if "biases" in model else "default"
    patterns = tuple(cast(list[str], ignore))
    return Rules(rules or (Rule("*"),), ratio, file_bytes, patterns, allocation, stages, biases)


def with_target(source: Source | None, ratio: float | None, file_bytes: int | None) -> Rules:
    """Parse a configuration whose target may be given beside it.

    Args:
        source: As in ``parse_rules``; None: one rule stores every matrix by ``deepthin``.
        ratio: ``[model] ratio``, or None.
        file_bytes: ``[model] file_bytes``, or None.

    Returns:
        The configuration, with the target.

    Raises:
        ConfigError: As for ``parse_rules``; or there are two targets, or neither a configuration nor a target.
    """
    given = {key: value for key, value in (("ratio", ratio), ("file_bytes", file_bytes)) if value is not None}
    if source is None and not given:
        raise ConfigError("No size is given: add a ratio such as 0.02, file_bytes=60_000, or rules with a target.")
    rules = Rules() if source is None else parse_rules(source)
    if not given:
        return rules
    target = parse_rules({"model": given})  # which refuses invalid numbers, and two targets
    if rules.ratio is not None or rules.file_bytes is not None:
        raise ConfigError(f"The rules have a target for the whole model, and {next(iter(given))} is another: give one.")
    return dataclasses.replace(rules, ratio=target.ratio, file_bytes=target.file_bytes)


def _parse_biases(biases: Any) -> Rule | None:
    """The rule of ``[model] biases``: bits, the name of a method, or a table as rules have it."""
    if type(biases) is int and biases == FLOAT_BITS:
        return None
    if type(biases) is int and 2 <= biases <= 16:
        return Rule(BIASES, "uniform", options={"bits": biases}, apart=True)
    if not isinstance(biases, str | Mapping):
        raise ConfigError(
            f"{BIASES} = {biases!r}: give their bits, 2 to 16, or 32 to store them as they are; or a method, such as "
            "'coded' or { method = 'kmeans', bits = 4 }."
        )
    rule = dataclasses.replace(
        _parse_rule(BIASES, {"method": biases} if isinstance(biases, str) else biases), apart=True
    )
    if rule.group or rule.floats or not (rule.method == DENSE or rule.own_target or rule.learns_step):
        raise ConfigError(
            f"{BIASES} = {biases!r} says no size for each vector: add ratio, bytes or bits, and no group."
        )
    return None if rule.method == DENSE else rule


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {str(path)!r}.") from None
    except OSError as error:
        raise ConfigError(f"The configuration file {str(path)!r} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # numbers of too many digits among them
        if "\0" in str(path):
            raise ConfigError(f"{str(path)!r} is not the path of a configuration file: it has a null byte.") from None
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None


def _check_whole_numbers(value: Any, where: str, depth: int = 8) -> None:
    """ConfigError for whole numbers that nothing can be as large as, wherever they are; floats hold no such ones."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{where}: a whole number of {value.bit_length()} bits is too large: stay below 2**63.")
    if isinstance(value, Mapping) and depth:
        for key, entry in cast(Mapping[object, Any], value).items():
            _check_whole_numbers(entry, f"{where}, {key}", depth - 1)
    if isinstance(value, list | tuple) and depth:
        for entry in cast(Sequence[Any], value):
            _check_whole_numbers(entry, where, depth - 1)


def _parse_allocation(allocation: Any) -> float | None:
    """The exponent for a word or number; None for ``"sensitivity"``."""
    if allocation == SENSITIVITY:
        return None
    power = ALLOCATIONS.get(allocation, allocation) if isinstance(allocation, str) else allocation
    if isinstance(power, str):
        raise ConfigError(
            f"[model] allocation = {allocation!r} is unknown. {did_you_mean(allocation, (*ALLOCATIONS, SENSITIVITY))} "
            "Or give a number from 0 (equal bytes) to 1 (equal ratios)."
        )
    if isinstance(power, bool) or not isinstance(power, int | float) or not 0 <= power <= 1:
        raise ConfigError(f"[model] allocation = {allocation!r} must be a word or a number from 0 to 1.")
    return float(power)


def _parse_stages(table: Mapping[str, Any]) -> Stages:
    usual = Stages()
    _check_keys(table, ("thin", "quantize", "every", "importance", "learning_rate_multiplier"), "[stages]")
    thin: Any = table.get("thin", usual.thin)
    pair = cast(list[Any], thin) if isinstance(thin, list | tuple) else []
    fine = len(pair) == 2 and all(type(n) in (int, float) for n in pair)
    quantize: Any = table.get("quantize", max(usual.quantize, *pair) if fine else 1.0)
    every: Any = table.get("every", usual.every)
    if not fine or type(quantize) not in (int, float) or type(every) is not int:
        raise ConfigError(
            f"[stages] thin = {thin!r}, quantize = {quantize!r}, every = {every!r}: write such as thin = [0.2, 0.6], "
            "quantize = 0.8, every = 50."
        )
    multiplier: float | None = _number(table, "learning_rate_multiplier", float, "[stages]", most=math.inf)
    importance: Any = table.get("importance", usual.importance)
    return Stages((float(pair[0]), float(pair[1])), float(quantize), every, importance, multiplier)


def _parse_rule(pattern: Any, table: Any) -> Rule:
    if not isinstance(pattern, str):
        raise ConfigError(f"[rules] has the key {pattern!r}: patterns are texts, such as 'fc1*'.")
    where = BIASES if pattern == BIASES else f'[rules."{pattern}"]'
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table such as {{ method = 'deepthin', ratio = 0.01 }}, not {table!r}.")
    matcher(pattern)
    settings = dict[str, Any](table)  # pyright: ignore[reportUnknownArgumentType] -- checked key by key below
    method = settings.get("method", "deepthin")
    if method == AUTO:
        raise ConfigError(
            f"{where} method = 'auto': which method is best for a layer is found by trainings. Run `deepthin search` "
            "with your task and --file-bytes: it writes a configuration, best.toml. Or name a method: "
            f"{', '.join((*METHODS, DENSE))}."
        )
    if not isinstance(method, str) or (method != DENSE and method not in METHODS):
        raise ConfigError(f"{where} method = {method!r} is unknown. {did_you_mean(method, (*METHODS, DENSE))}")
    options = METHODS[method].options if method in METHODS else ()
    if method == DENSE and (target := settings.keys() & {"ratio", "bytes", "group"}):
        raise ConfigError(f"{where} keeps its matrices dense, so {min(target)} has no meaning there: leave it out.")
    _check_keys(settings, (*_RULE_KEYS, *options), f"{where}, method {method}")
    ratio = _number(settings, "ratio", float, where)
    max_bytes = _number(settings, "bytes", int, where)
    if ratio is not None and max_bytes is not None:
        raise ConfigError(f"{where} has both ratio and bytes: give one target.")
    group = settings.get("group")
    if group is not None and group not in GROUPS:
        raise ConfigError(f"{where} group = {group!r} is unknown. {did_you_mean(group, GROUPS)}")
    given = {key: settings[key] for key in options if key in settings}
    then = None if settings.get("then") is None else parse_then(method, settings["then"], where)
    plus = None if settings.get("plus") is None else _parse_plus(method, settings["plus"], where)
    if (
        plus is not None
        and plus[0] == REST
        and (then is None or not METHODS[then[0]].learns_step or ratio or max_bytes)
    ):
        raise ConfigError(
            f"{where} plus = {{ method = {REST!r} }}: how many bytes these weights take is known only after training. "
            f"Give it beside then = {{ method = {REST!r} }} and [model] file_bytes, without ratio and bytes."
        )
    projection = settings.get("projection")
    if projection is not None:
        if (
            not isinstance(projection, str)
            or method != "rank"
            or group != "rows"
            or then is not None
            or plus is not None
        ):
            raise ConfigError(
                f"{where} projection = {projection!r}: give a pattern, as '*weight_hh*', beside method = 'rank' and "
                "group = 'rows', and without then and plus."
            )
        matcher(projection)
    floats = _number(settings, "floats", float, where)
    if floats is not None and (then is None or not METHODS[then[0]].learns_step or ratio or max_bytes):
        raise ConfigError(
            f"{where} floats = {floats:g}: it says how many numbers {method} gets where their bytes are known only "
            "after training. Give it beside then = { method = 'coded' }, without ratio and bytes."
        )
    return Rule(pattern, method, ratio, max_bytes, given, group, then, projection, floats, plus=plus)


def _parse_plus(method: str, table: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """Parse ``plus``: the method whose code is added; name, and options with ``share``."""
    if not addable(method):
        raise ConfigError(
            f"{where} plus = {table!r}: to the code of method = {method!r} none can be added. Valid: "
            f"{', '.join(filter(addable, METHODS))}."
        )
    valid = (*filter(addable, METHODS), REST)
    if not isinstance(table, Mapping) or table.get("method") not in valid:  # pyright: ignore[reportUnknownMemberType]
        raise ConfigError(
            f"{where} plus = {table!r}: give the method whose code is added, such as {{ method = {REST!r} }}. Valid: "
            f"{', '.join(valid)}."
        )
    settings = dict[str, Any](table)  # pyright: ignore[reportUnknownArgumentType] -- checked key by key below
    name = settings.pop("method")
    _check_keys(
        settings,
        ("method", *(() if name == REST else ("share", *METHODS[name].options))),
        f"{where} plus, method {name}",
    )
    if "share" in settings:
        check_share(settings["share"], f"{where} plus")
    return name, settings


def parse_then(method: str, table: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """Parse ``then``: the method that quantises the floats of another method's code.

    Args:
        method: Name of the outer method, for messages.
        table: Name and options of the inner method; ``bits`` is required, the bits for each float.
        where: What messages call the place in the configuration.

    Returns:
        The name of the inner method and its options.

    Raises:
        ConfigError: The inner method is unknown or is not sized by ``bits``, ``bits`` is missing, or an option is
            invalid.
    """
    sized = [name for name, named in METHODS.items() if "bits" in named.options]
    if method == DENSE or not isinstance(table, Mapping) or table.get("method") not in sized:  # pyright: ignore[reportUnknownMemberType]
        raise ConfigError(
            f"{where} then = {table!r}: give a method with a fixed number of bits for the floats of {method}, "
            f"such as {{ method = '{sized[0]}', bits = 8 }}. Valid methods: {', '.join(sized)}."
        )
    settings = dict[str, Any](table)  # pyright: ignore[reportUnknownArgumentType] -- checked key by key below
    name = settings.pop("method")
    _check_keys(settings, METHODS[name].options, f"{where} then, method {name}")
    if settings.get("bits") is None and not METHODS[name].learns_step:
        raise ConfigError(f"{where} then = {table!r} has no bits: add how many for each number, such as bits = 8.")
    METHODS[name].fit((1, 1), 1 << 20, **settings)  # refuses what makes no sense
    return name, settings


def _table(source: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = source.get(key, {})
    if not isinstance(table, Mapping):
        raise ConfigError(f"{key} must be a table, not {table!r}.")
    return table  # pyright: ignore[reportUnknownVariableType] -- its keys are checked by the caller


def _check_keys(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in table:
        if key not in valid:
            raise ConfigError(f"{where} has no key {key!r}. {did_you_mean(key, valid)}")


def _number(table: Mapping[str, Any], key: str, kind: type[int] | type[float], where: str, most: float = 1.0) -> Any:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ConfigError(f"{where} {key} = {value!r} must be {'a whole number' if kind is int else 'a number'}.")
    limit = math.inf if kind is int else most
    if not 0 < value < math.inf or value > limit:
        raise ConfigError(f"{where} {key} = {value!r} must be above 0{'' if limit > 1 else ' and at most 1'}.")
    return kind(value)

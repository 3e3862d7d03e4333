"""The configuration: mapping and TOML alike, patterns, targets, and messages that name the way out (promise 14)."""

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepthin import BudgetError, ConfigError
from deepthin.method import matrix_shape
from deepthin.plan.parse import parse_rules
from deepthin.plan.rules import Rule, Rules
from deepthin.plan.shares import plan_tensors, split_units, with_targets
from deepthin.plan.tensor import Tensor
from tolerance import bound

MODEL = [
    Tensor("encoder.fc1.weight", (300, 784)),
    Tensor("encoder.fc1.bias", (300,)),
    Tensor("encoder.fc2.weight", (100, 300)),
    Tensor("encoder.fc2.bias", (100,)),
    Tensor("norm.weight", (100,), "LayerNorm has no thin version"),
    Tensor("norm.bias", (100,), "LayerNorm has no thin version"),
    Tensor("output.weight", (10, 100)),
    Tensor("output.bias", (10,)),
]
MATRICES = ["encoder.fc1.weight", "encoder.fc2.weight", "output.weight"]
AREA = 300 * 784 + 100 * 300 + 10 * 100


def matched(rules):
    return {name: rule.pattern for name, (_, rule) in parse_rules(rules).match(MODEL).items()}


def bits(planned):
    dense = {p.tensors[0].name: 32 * math.prod(p.tensors[0].shape) for p in planned}
    return {p.tensors[0].name: dense[p.tensors[0].name] if p.method is None else p.method.bits() for p in planned}


def test_toml_and_mapping_say_the_same(tmp_path):
    path = tmp_path / "thin.toml"
    path.write_text(
        '[model]\nratio = 0.02\nignore = ["output"]\n'
        '[rules."encoder.fc*"]\nmethod = "deepthin"\nratio = 0.01\nrank = 2\n'
    )
    mapping = {
        "model": {"ratio": 0.02, "ignore": ["output"]},
        "rules": {"encoder.fc*": {"method": "deepthin", "ratio": 0.01, "rank": 2}},
    }
    assert parse_rules(path) == parse_rules(str(path)) == parse_rules(mapping) == parse_rules(parse_rules(mapping))
    assert parse_rules(mapping).rules == (Rule("encoder.fc*", "deepthin", 0.01, None, {"rank": 2}),)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", MATRICES),
        ("encoder", MATRICES[:2]),
        ("encoder.fc1", MATRICES[:1]),
        ("fc1*", None),
        ("*fc1", MATRICES[:1]),
        ("*.weight", MATRICES),
        ("encoder.fc[12]", MATRICES[:2]),
        (r"re:encoder\.fc\d", MATRICES[:2]),
        (r"re:.*fc2\.weight", MATRICES[1:2]),
        ("*bias", ["encoder.fc1.bias", "encoder.fc2.bias", "output.bias"]),
        ("encoder.fc1.bias", ["encoder.fc1.bias"]),
    ],
)
def test_what_a_pattern_covers(pattern, expected):
    rules = {"model": {"ratio": 0.5, "ignore": ["norm.bias"]}, "rules": {pattern: {}}}
    if expected is None:
        with pytest.raises(ConfigError, match="matches nothing"):
            matched(rules)
    else:
        assert list(matched(rules)) == expected


def test_the_first_match_wins_and_ignored_names_stay_dense():
    rules = {
        "model": {"ratio": 0.1, "ignore": ["output"]},
        "rules": {"encoder.fc2": {"method": "rank"}, "*": {"method": "deepthin"}},
    }
    assert matched(rules) == {"encoder.fc1.weight": "*", "encoder.fc2.weight": "encoder.fc2"}


def test_no_rules_means_deepthin_for_all():
    assert matched({"model": {"ratio": 0.1}}) == dict.fromkeys(MATRICES, "*")


def test_a_shared_tensor_is_reached_by_any_of_its_names():
    tensors = [Tensor("embed.weight", (50, 20), also=("decoder.weight",))]
    assert list(parse_rules({"rules": {"decoder": {"ratio": 0.5}}}).match(tensors)) == ["embed.weight"]


def test_a_layer_without_thin_version_is_never_silent():
    tensors = [*MODEL, Tensor("conv1.weight", (8, 1, 3, 3), "Odd has no thin version")]
    with pytest.raises(ConfigError) as caught:
        parse_rules({"model": {"ratio": 0.1}}).match(tensors)
    assert str(caught.value) == (
        "rule '*' reaches conv1.weight: Odd has no thin version. Covered are the parameters of linear, convolution, "
        "embedding, recurrent and attention layers of torch.nn. Add 'conv1' to [model] ignore to keep it dense."
    )
    assert list(parse_rules({"model": {"ratio": 0.1, "ignore": ["conv1"]}}).match(tensors)) == MATRICES


def test_a_rules_own_ratio_is_that_matrix_alone():
    planned = plan_tensors(parse_rules({"rules": {"encoder.fc1": {"ratio": 0.02}}}), MODEL)
    assert [p.name for p in planned] == ["deepthin", "dense", "dense"]
    assert 0.019 * 32 * 300 * 784 < planned[0].method.bits() <= 0.02 * 32 * 300 * 784


def test_a_rules_bytes():
    planned = plan_tensors(parse_rules({"rules": {"encoder.fc1": {"bytes": 5000}}}), MODEL)
    assert 4900 * 8 < planned[0].method.bits() <= 5000 * 8


def test_rank_alone_is_a_target_for_method_rank_only():
    planned = plan_tensors(parse_rules({"rules": {"encoder.fc2": {"method": "rank", "rank": 7}}}), MODEL)
    assert planned[1].method.rank == 7
    with pytest.raises(ConfigError, match="has no target"):
        plan_tensors(parse_rules({"rules": {"encoder.fc2": {"method": "deepthin", "rank": 7}}}), MODEL)


@pytest.mark.parametrize("allocation", ["flat", "uniform-bytes"])
@pytest.mark.parametrize("ratio", [0.006, 0.02, 0.1, 0.5])
def test_the_models_ratio_is_shared_out_and_kept(allocation, ratio):
    """Biases, which small targets store in 16 bits, do not count."""
    planned = plan_tensors(parse_rules({"model": {"ratio": ratio, "allocation": allocation}}), MODEL)
    vectors = [p for p in planned if len(p.tensors[0].shape) == 1]
    assert [p.method.width for p in vectors] == ([16] * 3 if ratio < 0.01 else [])
    planned = [p for p in planned if p not in vectors]
    taken = bits(planned)
    assert sum(taken.values()) <= ratio * 32 * AREA
    # What n = 2, 3, 5 ... leave unused at large ratios is no small part; at small ones nothing is left to speak of.
    assert sum(taken.values()) > (0.9 if ratio <= 0.02 else 0.6) * ratio * 32 * AREA


def test_flat_gives_equal_ratios_and_uniform_bytes_equal_bytes():
    wide = [Tensor("a", (1000, 1000)), Tensor("b", (500, 500)), Tensor("c", (300, 200))]
    area = [1000 * 1000, 500 * 500, 300 * 200]
    flat = bits(plan_tensors(parse_rules({"model": {"ratio": 0.02}}), wide)).values()
    ratios = [taken / (32 * weights) for taken, weights in zip(flat, area, strict=True)]
    assert max(ratios) < 1.2 * min(ratios)
    equal = bits(plan_tensors(parse_rules({"model": {"ratio": 0.02, "allocation": "uniform-bytes"}}), wide)).values()
    assert max(equal) < 1.2 * min(equal)


def test_an_own_target_is_fixed_and_the_model_shares_the_rest():
    planned = plan_tensors(
        parse_rules({"model": {"ratio": 0.05}, "rules": {"encoder.fc1": {"ratio": 0.02}, "*": {"method": "rank"}}}),
        MODEL,
    )
    taken = bits(planned)
    assert taken["encoder.fc1.weight"] <= 0.02 * 32 * 300 * 784
    assert 0.9 * 0.05 * 32 * AREA < sum(taken.values()) <= 0.05 * 32 * AREA
    assert [p.name for p in planned] == ["deepthin", "rank", "rank"]


def test_a_matrix_that_no_plan_makes_smaller_stays_dense():
    planned = plan_tensors(parse_rules({"model": {"ratio": 0.5}}), [*MODEL, Tensor("gate.weight", (1, 2))])
    assert planned[-1].method is None


def test_a_bias_is_stored_near_square():
    assert matrix_shape((2048,)) == (45, 46)
    assert matrix_shape((8, 3, 5, 5)) == (8, 75)
    for length in range(1, 300):
        rows, cols = matrix_shape((length,))
        assert rows * cols >= length > (rows - 1) * cols
        assert 0 <= cols - rows <= 1


def test_infeasible_model_ratio_names_the_smallest():
    with pytest.raises(BudgetError) as caught:
        plan_tensors(parse_rules({"model": {"ratio": 1e-9}}), MODEL)
    assert str(caught.value) == (
        "The matched matrices cannot be stored in 0 bytes: the smallest plans, and what the rules' own targets fix, "
        "need 5524. Use [model] ratio >= 0.0052, another method, or [model] ignore."
    )
    plan_tensors(parse_rules({"model": {"ratio": 0.0052}}), MODEL)
    assert caught.value.smallest_ratio == pytest.approx(5524 / 4 / AREA, rel=bound(4, 1.0, "float64"))


def test_infeasible_rule_names_the_matrix():
    with pytest.raises(
        BudgetError, match=r"^encoder\.fc1\.weight: DeepThin cannot store 300x784 .* Use ratio >= 0\.0042\.$"
    ):
        plan_tensors(parse_rules({"rules": {"*fc1": {"ratio": 1e-9}}}), MODEL)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"modle": {}}, "the configuration has no key 'modle'. Did you mean 'model'? Valid: model, rules, stages."),
        (
            {"model": {"ratoi": 0.1}},
            "[model] has no key 'ratoi'. Did you mean 'ratio'? Valid: ratio, file_bytes, ignore, allocation, biases.",
        ),
        (
            {"rules": {"*": {"method": "depthin", "ratio": 0.1}}},
            "[rules.\"*\"] method = 'depthin' is unknown. Did you mean 'deepthin'? "
            "Valid: deepthin, shuffled, rank, hashed, pruned, kronecker, tensor-train, uniform, kmeans, ecsq, "
            "binary, coded, dense.",
        ),
        (
            {"rules": {"*": {"metod": "rank"}}},
            "[rules.\"*\"], method deepthin has no key 'metod'. Did you mean 'method'? "
            "Valid: method, ratio, bytes, floats, group, then, projection, plus, rank, n, seed.",
        ),
        ({"model": {"ratio": "0.1"}}, "[model] ratio = '0.1' must be a number."),
        ({"model": {"ratio": True}}, "[model] ratio = True must be a number."),
        ({"model": {"ratio": 2}}, "[model] ratio = 2 must be above 0 and at most 1."),
        ({"model": {"ratio": float("nan")}}, "[model] ratio = nan must be above 0 and at most 1."),
        ({"model": {"file_bytes": 1e5}}, "[model] file_bytes = 100000.0 must be a whole number."),
        ({"model": {"file_bytes": -1}}, "[model] file_bytes = -1 must be above 0."),
        ({"model": {"ratio": 0.1, "file_bytes": 9}}, "[model] has both ratio and file_bytes: give one target."),
        ({"rules": {"*": {"ratio": 0.1, "bytes": 9}}}, '[rules."*"] has both ratio and bytes: give one target.'),
        ({"model": {"ignore": "output"}}, "[model] ignore = 'output' must be a list of patterns, such as ['output']."),
        (
            {"model": {"allocation": "uniform"}},
            "[model] allocation = 'uniform' is unknown. Did you mean 'uniform-bytes'? Valid: flat, uniform-bytes, "
            "sensitivity. Or give a number from 0 (equal bytes) to 1 (equal ratios).",
        ),
        ({"model": 3}, "model must be a table, not 3."),
        (
            {"rules": {"*": 0.1}},
            "[rules.\"*\"] must be a table such as { method = 'deepthin', ratio = 0.01 }, not 0.1.",
        ),
        (
            {"rules": {"re:(": {}}},
            "pattern 're:(' is not a regular expression: missing ), unterminated subpattern at position 0.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused_with_the_way_out(rules, message):
    with pytest.raises(ConfigError) as caught:
        parse_rules(rules)
    assert str(caught.value) == message


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="There is no configuration file"):
        parse_rules(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        parse_rules(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [("encodr.fc1", "encoder.fc1"), ("ouput", "output"), ("encoder.fc2.wieght", "encoder.fc2.weight")],
)
def test_a_pattern_that_matches_nothing_names_the_closest(pattern, closest):
    for rules, where in (
        ({"rules": {pattern: {"ratio": 0.1}}}, "[rules]"),
        ({"model": {"ratio": 0.1, "ignore": [pattern]}}, "[model] ignore"),
    ):
        with pytest.raises(ConfigError) as caught:
            matched(rules)
        assert str(caught.value).startswith(f"{where} pattern {pattern!r} matches nothing. Did you mean {closest!r}?")


def test_a_pattern_that_matches_only_vectors_says_so():
    with pytest.raises(ConfigError, match="'norm' matches no matrix, only tensors of one dimension"):
        matched({"rules": {"norm": {"ratio": 0.1}}})


KEYS = ["ratio", "file_bytes", "ignore", "allocation"]


@given(
    key=st.sampled_from(KEYS),
    edit=st.sampled_from("dis"),
    at=st.integers(0, 20),
    letter=st.sampled_from(string.ascii_lowercase),
)
def test_one_wrong_letter_in_a_key_is_understood(key, edit, at, letter):
    """Promise 14: delete, insert or swap one letter; the right key is suggested."""
    at %= len(key) - 1
    typo = {
        "d": key[:at] + key[at + 1 :],
        "i": key[:at] + letter + key[at:],
        "s": key[:at] + key[at + 1] + key[at] + key[at + 2 :],
    }[edit]
    if typo in KEYS:
        return
    with pytest.raises(ConfigError, match=f"Did you mean '{key}'"):
        parse_rules({"model": {typo: 1}})


def alone(name, **model):
    """The methods of tensors, each planned by itself."""
    rules = parse_rules(
        {
            "model": {"ratio": 0.05, "ignore": ["output"], **model},
            "rules": {
                "encoder.fc1": {"ratio": 0.5},
                "encoder.fc2": {},
                "encoder.fc1.bias": {"method": "dense"},
                "*.other": {"group": "flat"},
            },
        }
    )
    tensor = next(tensor for tensor in [*MODEL, Tensor("a.other", (90, 90))] if tensor.name == name)
    return [(planned.name, planned.method.bits() / (32 * math.prod(tensor.shape)))
            for planned in plan_tensors(rules.for_one(tensor), [tensor]) if planned.method]  # fmt: skip


def test_a_tensor_alone_meets_its_target_by_itself():
    (own,), (shared,) = alone("encoder.fc1.weight"), alone("encoder.fc2.weight")
    assert own[0] == shared[0] == "deepthin"
    assert 0.05 < own[1] <= 0.5
    assert 0.04 < shared[1] <= 0.05
    assert [alone(name) for name in ("encoder.fc1.bias", "encoder.fc2.bias", "output.weight", "norm.weight")] == [
        []
    ] * 4


def test_what_needs_all_tensors_is_refused_for_one_alone():
    for name, model, what in (
        ("a.other", {}, "rule '*.other' has a group"),
        ("encoder.fc2.weight", {"ratio": None, "file_bytes": 9999}, "[model] file_bytes is shared"),
    ):
        with pytest.raises(ConfigError) as raised:
            alone(name, **model)
        assert str(raised.value) == (
            f"{what}, which takes the shapes of all tensors, but {name} comes alone. Give them up front, "
            "deepthin.tensorflow.Variables(rules, shapes={name: shape}), or give a ratio instead."
        )
    assert alone("encoder.fc1.weight", ratio=None, file_bytes=9999) == alone("encoder.fc1.weight")


# Exact names win over patterns


def odd(*names, shape=(40, 40)):
    return [Tensor(f"{name}.weight", shape) for name in names]


@pytest.mark.parametrize(
    ("name", "other"),
    [("fc[0]", "fc0"), ("fc?", "fc1"), ("f*", "fc"), ("re:fc", "fc"), ("re:f.", "fa"), ("[!a]", "b"), ("re:[", "c")],
)
def test_the_name_of_a_layer_means_that_layer_only(name, other):
    """In a rule, in ignore, in projection, and where other layers match it as a glob or a regular expression."""
    tensors = odd(name, other)
    for pattern in (name, f"{name}.weight"):
        assert [t.name for t, _ in Rules((Rule(pattern, ratio=0.3),)).match(tensors).values()] == [f"{name}.weight"]
        rest = Rules((Rule("*", ratio=0.3),), ignore=(pattern,)).match(tensors)
        assert list(rest) == [f"{other}.weight"]
        planned = plan_tensors(Rules((Rule("*", "rank", 0.5, group="rows", projection=pattern),)), tensors)
        assert planned[0].projecting == (True, False)
    vectors = [Tensor(f"{name}.bias", (9,)), Tensor(f"{other}.bias", (9,)), *tensors]
    assert list(Rules((Rule(f"{name}.bias", ratio=0.9),)).match(vectors)) == [f"{name}.bias"]


def test_a_star_reaches_every_matrix_whatever_the_layers_are_called():
    assert len(parse_rules({"model": {"ratio": 0.3}}).match(odd("*", "fc"))) == 2


def test_the_name_of_a_layer_without_matrices_is_no_pattern_for_others():
    tensors = [Tensor("norm[1].weight", (40,)), *odd("norm1")]
    with pytest.raises(ConfigError, match=r"'norm\[1\]' matches no matrix, only tensors of one dimension"):
        Rules((Rule("*", ratio=0.3),), ignore=("norm[1]",)).match(tensors)


def test_an_exact_name_may_be_one_of_several_of_a_shared_tensor():
    tensors = [Tensor("a.weight", (40, 40), also=("fc[0].weight",)), *odd("fc0")]
    assert list(Rules((Rule("fc[0]", ratio=0.3),)).match(tensors)) == ["a.weight"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*", "2"), r"rule '2' has no effect: the first match wins, and the rule '\*' before it matches all"),
        (
            ("0", "re:[12]", "[01]*"),
            r"rule '\[01\]\*' has no effect: .* '0', 're:\[12\]' match all",
        ),
    ],
)
def test_a_rule_that_earlier_ones_leave_nothing_is_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        parse_rules({"rules": {pattern: {"ratio": 0.3} for pattern in patterns}}).match(odd("0", "1", "2"))


def test_targets_for_units_are_rules_by_exact_names():
    """What the library writes into rules is read back as it was meant, groups and dense matrices included."""
    tensors = [*odd("fc[0]", "fc0", "re:x", "x"), *odd("tiny[1]", "tiny1", shape=(1, 2))]
    rules = parse_rules({
        "model": {"ratio": 0.2},
        "rules": {"re:x": {"method": "rank"}, "x": {"ratio": 0.3}, "tiny*": {"group": "rows"}, "fc*": {}},
    })  # fmt: skip
    shared = {unit.name: unit for unit in split_units(rules, tensors)[2]}
    targets = {name: (1 + place) * unit.smallest_bits() for place, (name, unit) in enumerate(shared.items())}
    planned = {p.tensors[0].name: p for p in plan_tensors(with_targets(rules, tensors, targets), tensors)}
    assert planned["x.weight"].method == {p.tensors[0].name: p for p in plan_tensors(rules, tensors)}["x.weight"].method
    assert all(planned[f"{name}.weight"].method is None for name in ("tiny[1]", "tiny1"))
    assert set(shared) == {"fc[0].weight", "fc0.weight", "re:x.weight"}
    for name, unit in shared.items():
        assert planned[name].method == unit.fit(8 * -(-targets[name] // 8))

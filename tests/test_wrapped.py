"""Models inside torch's wrappers. Whatever needs two processes runs in one pair of them, for all tests of this file."""

import datetime
import functools
import pickle
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval

import deepthin.torch as dt
from deepthin import ConfigError
from deepthin.torch.exchange import thin_tensors
from test_state import RULES
from test_state import network as two_layers

pytestmark = pytest.mark.filterwarnings("ignore:The relative error of", "ignore:.*_init_weights")

TRAINED = ("deepthin", "hashed", "pruned", "uniform", "coded", "pruned then kmeans")
SINGLE = [name for name in RULES if " then " not in name and name not in TRAINED]
PAIRS = [name for name in RULES if name.startswith("pruned then") or name.endswith("then kmeans")]
THIN = {"rules": {"*": {"ratio": 0.3}}}
SHARDED = {
    "deepthin": THIN,
    "pruned then kmeans": {"rules": {"*": RULES["pruned then kmeans"]}},
    "uniform": {"rules": {"*": RULES["uniform"]}},
    "hashed then uniform": {"rules": {"*": RULES["hashed then uniform"]}},
    "group": {"rules": {"*.weight*": {"ratio": 0.3, "group": "flat"}}},
}
QUICK = ("deepthin", "pruned then kmeans", "group")  # floats alone, integers beside floats, one code for all layers
OTHERS = ("uniform", "hashed then uniform")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10))


class Recurrent(nn.Module):
    """An LSTM and its output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.outputs = nn.Linear(12, 5)

    def forward(self, x):
        return self.outputs(self.cells(x)[0])


def thin(rules=THIN, seed=0, build=network):
    model = build() if build is Recurrent else build(seed)
    dt.compress(model, rules)
    return model


def inputs(rank=0):
    return torch.linspace(-1, 1, 72).reshape(3, 24) * (1 + rank)


def sequences(rank=0):
    return torch.linspace(-1, 1, 2 * 7 * 8).reshape(2, 7, 8) * (1 + rank)


CALLS = {
    "compress": lambda model: dt.compress(model, THIN),
    "materialize": dt.materialize,
    "quantize_codes": lambda model: dt.quantize_codes(model, {"method": "uniform", "bits": 8}),
    "optimal_brain_surgeon": lambda model: dt.optimal_brain_surgeon(model, "4.bias", 3, [], nn.functional.mse_loss),
    "trim": lambda model: dt.trim(model, [inputs()]),
}
WRAPPER_CALLS = CALLS | {
    "Recipe": lambda model: dt.Recipe(model, THIN, 10),
    "Twist": lambda model: dt.Twist(model, THIN),
    "initialise": dt.initialise,
    "load": lambda model: dt.load(model, "none.thin"),
}


# ---- One process ----------------------------------------------------------------------------------------------------


def wrapped(kind, model):
    if kind == "CheckpointWrapper":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        return checkpoint_wrapper(model)
    return DataParallel(model) if kind == "DataParallel" else torch.compile(model, backend="eager")


@pytest.mark.parametrize("call", WRAPPER_CALLS)
@pytest.mark.parametrize(("kind", "inner"), [("DataParallel", "module"), ("OptimizedModule", "_orig_mod")])
def test_wrapped_models_are_refused_with_the_line_to_write(call, kind, inner):
    model = thin() if call in ("materialize", "quantize_codes") else network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"model is wrapped in {kind}.*write {call}\(model\.{inner}"):
        WRAPPER_CALLS[call](wrapped(kind, model))
    with pytest.raises(ConfigError, match=rf"model\.0 is wrapped in {kind}.*write {call}\(model\.0\.{inner}"):
        WRAPPER_CALLS[call](nn.Sequential(wrapped(kind, model)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.parametrize("kind", ["DataParallel", "OptimizedModule", "CheckpointWrapper"])
@pytest.mark.parametrize("rules", [None, *SHARDED.values()], ids=["dense", *SHARDED])
def test_a_wrapped_model_is_saved_as_the_plain_one(kind, rules, tmp_path):
    model = network() if rules is None else thin(rules)
    dt.save(model, tmp_path / "plain.thin")
    dt.save(wrapped(kind, model), tmp_path / "outside.thin")
    model[2] = wrapped(kind, model[2])
    dt.save(wrapped(kind, model), tmp_path / "both.thin")
    plain = (tmp_path / "plain.thin").read_bytes()
    assert (tmp_path / "outside.thin").read_bytes() == plain == (tmp_path / "both.thin").read_bytes()


def test_a_model_compiled_in_place_may_change(compiling):
    model = network()
    model.compile(backend="eager")
    model(inputs())
    dt.compress(model, THIN)
    torch.testing.assert_close(model(inputs()), thin()(inputs()))
    dt.materialize(model)
    torch.testing.assert_close(model(inputs()), thin()(inputs()))


@pytest.mark.parametrize("rule", [RULES["deepthin"], RULES["kmeans"], RULES["uniform"]])
def test_fusion_with_batch_normalisation_asks_to_materialize(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval()
    dt.compress(model, {"rules": {"0": rule}})
    images = torch.randn(2, 4, 6, 6)
    expected = model(images)
    with pytest.raises(ConfigError, match=r"weight of a ThinConv2d is lost.*materialize\(model\) first"):
        fuse_conv_bn_eval(model[0], model[1])
    assert torch.equal(model(images), expected)
    dt.materialize(model)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(images), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*num_workers")
@pytest.mark.parametrize("rule", ["kmeans", "pruned", "hashed then uniform", "uniform"])
def test_lightning_averages_weights(rule, tmp_path):
    """EMAWeightAveraging averages buffers, too, by default."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = thin({"rules": {"*": RULES[rule]}})

        def training_step(self, batch, index):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    expected = module.model(inputs())
    average = EMAWeightAveraging(decay=0.9)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs()), batch_size=1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[average], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, data)
    torch.testing.assert_close(module.model(inputs()), expected, rtol=0, atol=1e-6)
    dt.save(module.model, tmp_path / "m.thin")
    loaded = dt.load(network(1), tmp_path / "m.thin")
    torch.testing.assert_close(loaded(inputs()), expected, rtol=0, atol=1e-5)


# ---- Two processes --------------------------------------------------------------------------------------------------


class Broadcasts:
    """Counts bytes that are broadcast, in ``sent``."""

    def __init__(self, monkeypatch):
        self.sent = 0
        coalesced, single = dist._broadcast_coalesced, dist.broadcast
        monkeypatch.setattr(dist, "_broadcast_coalesced", lambda g, ts, *rest: self.count(ts, coalesced, g, ts, *rest))
        monkeypatch.setattr(dist, "broadcast", lambda t, **options: self.count([t], single, t, **options))

    def count(self, tensors, call, *args, **options):
        self.sent += sum(tensor.nbytes for tensor in tensors)
        return call(*args, **options)

    def since(self):
        sent, self.sent = self.sent, 0
        return sent


def everywhere(value):
    """The values of all processes."""
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def check_replicas(model, outputs):
    """The same parameters, integers and outputs in both processes."""
    one, other = everywhere((model.state_dict(), outputs))
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert torch.equal(one[1], other[1])


def ddp_trains_every_method(rank, folder):
    ddp_trains(rank, folder, [*TRAINED, *SINGLE])


def ddp_trains_methods_of_every_kind(rank, folder):
    ddp_trains(rank, folder, TRAINED)


def ddp_trains_pairs_of_methods(rank, folder):
    ddp_trains(rank, folder, PAIRS)


def ddp_trains(rank, folder, names):
    """Also from codes of different weights: the wrapper sends parameters of rank 0, and integers must follow."""
    with pytest.MonkeyPatch.context() as patch:
        broadcasts = Broadcasts(patch)
        for name in names:
            model = thin({"rules": {"*": RULES[name]}}, rank, two_layers)
            integers = {id(w): w for w, _ in thin_tensors(model).values()}.values()
            integer_bytes = sum(t.nbytes for w in integers for t in w.state().values() if not t.is_floating_point())
            broadcasts.since()
            ddp = DistributedDataParallel(model)
            assert broadcasts.since() == sum(p.nbytes for p in model.parameters()), name
            optimizer = torch.optim.Adam(dt.parameter_groups(ddp, 1e-3))
            sent = []
            for _ in range(3):
                optimizer.zero_grad()
                ddp(inputs(rank)).square().mean().backward()
                optimizer.step()
                sent.append(broadcasts.since())
            assert sent == [integer_bytes, 0, 0], name
            with torch.no_grad():
                check_replicas(model, ddp.eval()(inputs()))
            if rank == 0:  # only one process evaluates or saves: nothing waits for the other
                ddp(inputs())
                dt.save(ddp, folder / "ddp.thin")
                dt.save(model, folder / "plain.thin")
                assert (folder / "ddp.thin").read_bytes() == (folder / "plain.thin").read_bytes()
            dist.barrier()


def ddp_trains_to_a_size(rank, folder):
    """One weight of the bits for all processes, whose batches differ; and one file. The penalty is in the loss, or its
    gradient is added."""
    size = {"model": {"file_bytes": 700}, "rules": {"*": RULES["coded"]}}
    for adds in (False, True):
        model = thin(size, rank, two_layers)
        ddp = DistributedDataParallel(model)
        target = dt.SizeTarget(ddp, steps=20)
        optimizer = torch.optim.Adam(dt.parameter_groups(ddp, 1e-3))
        for _ in range(20):
            optimizer.zero_grad()
            loss = (ddp(inputs(rank)) - 1).square().mean()
            if adds:
                loss.backward()
                target.add_gradient()
            else:
                (loss + target.penalty()).backward()
            optimizer.step()
            target.step()
            sent = [None, None]
            dist.all_gather_object(sent, target.state_dict())
            assert sent[0] == sent[1]
        with torch.no_grad():
            check_replicas(model, ddp.eval()(inputs()))
        dt.save(ddp, folder / f"size{rank}.thin", max_bytes=700)
        dist.barrier()
        assert (folder / "size0.thin").read_bytes() == (folder / "size1.thin").read_bytes()
        dist.barrier()


def ddp_models_do_not_change(rank, folder):
    model = thin()
    dt.save(model, folder / f"same{rank}.thin")
    quantised = thin({"rules": {"*": RULES["deepthin then uniform"]}})
    dt.save(quantised, folder / f"other{rank}.thin")
    ddp = DistributedDataParallel(model)
    before = list(model.parameters())
    for call, function in WRAPPER_CALLS.items():
        with pytest.raises(ConfigError, match=rf"inside DistributedDataParallel.*del ddp; {call}\(model.*"):
            function(ddp)
    for call, function in CALLS.items():
        with pytest.raises(ConfigError, match=rf"inside DistributedDataParallel.*del ddp; {call}\(model.*"):
            function(ddp.module)
    with pytest.raises(ConfigError, match=r"inside DistributedDataParallel"):
        dt.materialize(ddp.module[0])
    with pytest.raises(ConfigError, match=r"inside DistributedDataParallel.*load\(model, path\)"):
        dt.load(model, folder / f"other{rank}.thin")
    dt.load(model, folder / f"same{rank}.thin")  # copied into the parameters
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    del ddp
    dt.quantize_codes(model, {"method": "uniform", "bits": 8})
    ddp = DistributedDataParallel(model)
    ddp(inputs(rank)).sum().backward()


def a_recipe_in_ddp(rank, folder):
    stages = {"thin": [0.2, 0.5], "quantize": 0.8, "every": 2}
    rules = {"rules": {"*": {"method": "pruned", "ratio": 0.3, "then": {"method": "kmeans", "bits": 3}}}}
    model = network(rank)
    recipe = dt.Recipe(model, rules | {"stages": stages}, steps=10)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3))
    replaced = []
    for step in range(1, 11):
        optimizer.zero_grad()
        ddp(inputs(rank)).square().mean().backward()
        optimizer.step()
        if recipe.replaces_next:
            with pytest.raises(ConfigError, match=r"inside DistributedDataParallel.*recipe\.step\(\)"):
                recipe.step()
            del ddp
        if recipe.step():
            replaced.append(step)
            ddp = DistributedDataParallel(model)
            optimizer = torch.optim.Adam(dt.parameter_groups(model, 1e-3, recipe.learning_rate_multiplier))
    assert replaced == [5, 8]
    assert recipe.done
    with torch.no_grad():
        check_replicas(model, model(inputs()))


def sharding(rank, folder, build, batch, units, names):
    from torch.distributed.fsdp import fully_shard

    for name in names:
        rules = SHARDED[name]
        plain, model = thin(rules, build=build), thin(rules, build=build)
        for unit in units(model):
            fully_shard(unit)
        fully_shard(model)
        for _ in range(2):
            losses = [plain(batch(r)).square().sum() for r in (0, 1)]
            (sum(losses) / 2).backward()
            loss = model(batch(rank)).square().sum()
            assert torch.equal(loss, losses[rank]), name
            loss.backward()
            expected = dict(plain.named_parameters())
            for parameter, value in model.named_parameters():
                gradient = expected[parameter].grad
                torch.testing.assert_close(value.grad.full_tensor(), gradient, rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= 0.01 * parameter.grad
                for parameter, value in model.named_parameters():
                    value -= 0.01 * torch.distributed.tensor.distribute_tensor(
                        expected[parameter].grad, value.device_mesh, value.placements
                    )
            plain.zero_grad()
            model.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(batch()), plain.eval()(batch()), rtol=0, atol=1e-6)
        size = dt.save(model, folder / "sharded.thin")
        dt.save(plain, folder / f"plain{rank}.thin")
        assert (folder / "sharded.thin").read_bytes() == (folder / f"plain{rank}.thin").read_bytes(), name
        assert size == (folder / "sharded.thin").stat().st_size
        for call in ("compress", "materialize", "Recipe", "Twist", "quantize_codes", "trim", "load"):
            for part in (model, next(model.children())):
                with pytest.raises(ConfigError, match=rf"sharded by FSDP.*{call}\(model.*before fully_shard\(model\)"):
                    WRAPPER_CALLS[call](part)
        dist.barrier()


def fully_sharded_linear_layers(rank, folder):
    sharding(rank, folder, network, inputs, lambda model: [], ("pruned then kmeans", "group"))


def fully_sharded_layer_by_layer(rank, folder, names=QUICK):
    sharding(rank, folder, network, inputs, lambda model: [model[0], model[2], model[4]], names)


def fully_sharded_lstms(rank, folder):
    sharding(rank, folder, Recurrent, sequences, lambda model: [], ("group",))


def fully_sharded_lstms_layer_by_layer(rank, folder):
    units = lambda model: [model.cells, model.outputs]  # noqa: E731
    sharding(rank, folder, Recurrent, sequences, units, ("deepthin", "pruned then kmeans", "group"))


def every_process_learns_that_saving_failed(rank, folder):
    from torch.distributed.fsdp import fully_shard

    model = thin()
    fully_shard(model)
    with pytest.raises(OSError, match="no-such-folder"):
        dt.save(model, folder / "no-such-folder" / "m.thin")


def dense_models_are_saved_whole(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    plain, two, one, original = (network() for _ in range(4))
    fully_shard(two[2])
    fully_shard(two)
    one = FullyShardedDataParallel(one, device_id=torch.device("cpu"))
    original = FullyShardedDataParallel(original, device_id=torch.device("cpu"), use_orig_params=True)
    dt.save(plain, folder / f"plain{rank}.thin")
    for model in (DistributedDataParallel(network()), two, one, original):
        if rank == 0 or not isinstance(model, DistributedDataParallel):
            dt.save(model, folder / "m.thin")
        dist.barrier()
        assert (folder / "m.thin").read_bytes() == (folder / f"plain{rank}.thin").read_bytes()
        dist.barrier()


def fsdp_1(rank, folder, names=QUICK):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name in names:
        rules = SHARDED[name]
        for original in (True, False) if name in ("deepthin", "group") else (False,):
            plain, model = thin(rules), thin(rules)
            model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
            assert torch.equal(model(inputs(rank)), plain(inputs(rank))), name
            model(inputs(rank)).sum().backward()
            dt.save(model, folder / "one.thin")
            dt.save(plain, folder / f"plain{rank}.thin")
            assert (folder / "one.thin").read_bytes() == (folder / f"plain{rank}.thin").read_bytes(), name
            for part in (model, model.module):
                with pytest.raises(ConfigError, match=r"sharded by FSDP.*before"):
                    dt.compress(part, rules)
            dist.barrier()


def tensor_parallelism_asks_to_materialize(rank, folder, names=QUICK):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for name in names:
        model = thin(SHARDED[name])
        expected = model(inputs())
        with pytest.raises(ConfigError, match=r"weight of the ThinLinear is generated.*materialize\(model\) first"):
            parallelize_module(model, mesh, plan)
        assert torch.equal(model(inputs()), expected)
        parallelize_module(dt.materialize(model), mesh, plan)
        torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-5)
        dt.save(model, folder / "parallel.thin")
        whole = dt.load(network(3), folder / "parallel.thin")
        torch.testing.assert_close(whole(inputs()), expected, rtol=1e-5, atol=1e-5)
        dist.barrier()


def sharded_models_from_the_meta_device(rank, folder, names=QUICK):
    """As torch's documentation does it: shard on the meta device, to_empty, then initialise or reset_parameters."""
    from torch.distributed.fsdp import fully_shard

    for name in names:
        rules, plain = SHARDED[name], network()
        dt.compress(plain, rules, init="scratch", seed=7)
        for fill in (False, True):
            with torch.device("meta"):
                model = network()
            dt.compress(model, rules, init="scratch", seed=7)
            fully_shard(model)
            model.to_empty(device="cpu")
            if fill:
                dt.initialise(model, seed=7)
            else:
                for module in model.modules():
                    if callable(getattr(module, "reset_parameters", None)):
                        module.reset_parameters()
            expected = plain.state_dict()
            for key, value in model.state_dict().items():
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                assert key.endswith(".bias") or torch.equal(value, expected[key])


CHECKS = {
    function.__name__: function
    for function in (
        ddp_trains_methods_of_every_kind,
        ddp_trains_every_method,
        ddp_trains_pairs_of_methods,
        ddp_trains_to_a_size,
        ddp_models_do_not_change,
        a_recipe_in_ddp,
        fully_sharded_linear_layers,
        fully_sharded_layer_by_layer,
        fully_sharded_lstms,
        fully_sharded_lstms_layer_by_layer,
        every_process_learns_that_saving_failed,
        dense_models_are_saved_whole,
        fsdp_1,
        tensor_parallelism_asks_to_materialize,
        sharded_models_from_the_meta_device,
    )
}

OF_OTHERS = {
    f"{check.__name__}_of_other_rules": functools.partial(check, names=OTHERS)
    for check in (
        fully_sharded_layer_by_layer,
        fsdp_1,
        tensor_parallelism_asks_to_materialize,
        sharded_models_from_the_meta_device,
    )
}
CHECKS |= OF_OTHERS
# What is not a kind of its own: methods are exchanged as others of their kind are, and a pair as its methods are.
LONG = ("ddp_trains_every_method", "ddp_trains_pairs_of_methods", *OF_OTHERS)


def run_checks(rank, folder, names):
    """Run every check in one of two processes, and write what it raised."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"  # a free port could be taken by another worker of the suite meanwhile
    dist.init_process_group("gloo", store, datetime.timedelta(seconds=180), world_size=2, rank=rank)
    raised = {}
    for name in names:
        try:
            CHECKS[name](rank, folder)
            raised[name] = None
        except Exception:
            raised[name] = traceback.format_exc()
        (folder / f"raised{rank}").write_bytes(pickle.dumps(raised))
        if any(everywhere(raised[name])):
            break  # the processes may no longer be at the same place
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def raised(tmp_path_factory, request):
    """For each process: what each check raised, or None."""
    folder = tmp_path_factory.mktemp("two")
    wanted = {item.callspec.params["check"] for item in request.session.items if "raised" in item.fixturenames}
    processes.spawn(run_checks, (folder, [name for name in CHECKS if name in wanted]), nprocs=2)
    return [pickle.loads((folder / f"raised{rank}").read_bytes()) for rank in (0, 1)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in CHECKS]
)
def test_two_processes(check, raised):
    for rank, errors in enumerate(raised):
        assert check in errors, f"process {rank} did not get here: an earlier check failed"
        assert errors[check] is None, f"process {rank}: {errors[check]}"

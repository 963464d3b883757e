"""Models in bfloat16 and float16: what counts, sums and accumulates is in float32, and every dtype travels."""

import numpy as np
import pytest
import torch
from test_methods import CATALOG
from torch import nn

import idiolect
from idiolect import SGD, Adam, AdamW, ClientData, RMSprop, Training, methods, parts
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree
from idiolect.engines.federation import Federation
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.rounds.client import client_round
from idiolect.running.describe import uploads
from idiolect.storage import checkpoint
from idiolect.storage.disk import DiskStore
from idiolect.storage.run_directory import RunDirectory
from idiolect.testing.checks import same_state
from idiolect.testing.worlds import fitted, network, population

NARROW = [torch.bfloat16, torch.float16]
DTYPES = [*NARROW, torch.float32, torch.float64]
SIZES = {"ada": 24, "ben": 9, "cleo": 16}


def cast(clients, dtype):
    return {
        name: ClientData(**{split: (x.to(dtype), y) for split, (x, y) in data.splits().items()})
        for name, data in clients.items()
    }


def world(method, dtype, engine=None, net=None, clients=None, participation=0.7, **training):
    settings = {"lr": 0.05, "local_epochs": 2, "batch_size": 8, "optimizer": SGD(momentum=0.5), "clip": 5.0, **training}
    with torch.random.fork_rng(devices=[]):
        model = Model(fitted(net or network(), method).to(dtype))
    held = cast(clients or population(SIZES), dtype)
    return Federation(model, method, Training(**settings), 4, participation, 0, held, engine or Sequential())


@pytest.mark.parametrize(
    ("dtype", "engine"),
    [(torch.bfloat16, None), pytest.param(torch.float16, Stacked(3), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("method", CATALOG, ids=repr)
def test_every_method_trains_in_low_precision(method, dtype, engine):
    """The loss follows that of float64, and everything keeps the form that it began with."""
    exact, made = world(method, torch.float64), world(method, dtype, engine)
    fresh, start = made.fresh(), dict(made.server)
    for _ in range(2):
        assert made.play().loss == pytest.approx(exact.play().loss, abs=0.08)
    for part, tree in start.items():
        assert made.server[part].flat.dtype == tree.flat.dtype
    assert made.server["share"].flat.dtype == dtype
    for client in made.memory:
        assert all(made.memory.get(client)[part].flat.dtype == tree.flat.dtype for part, tree in fresh.items())
    sent = client_round(method, made.model, made.training, made.assignment("ada", "train")).uploads
    for part, tree in uploads(method, made.model).items():
        assert (sent[part].layout, sent[part].flat.dtype) == (tree.layout, tree.flat.dtype)


OURS = {
    "SGD": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    "Adam": (Adam(), lambda p: torch.optim.Adam(p, 0.05)),
    "AdamW": (AdamW(weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    "RMSprop": (RMSprop(momentum=0.5), lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.5)),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_an_optimizer_keeps_its_state_in_float32(name, dtype):
    """The same bits as PyTorch's in float32 on the same rounded gradients, with the weights rounded after each step."""
    own, other = OURS[name]
    torch.manual_seed(0)
    start, slopes = torch.randn(50).to(dtype), torch.randn(300, 50).to(dtype)
    master = nn.Parameter(start.float())
    optimizer, state = other([master]), None
    tree = Tree.of({"w": start.clone()})
    for slope in slopes:
        direction = Tree.of({"w": slope})
        state = state or own.init(direction)
        move, state = own.move(direction, state)
        assert all(t.flat.dtype == torch.float32 for t in (move, *state.values()))
        tree = Tree(tree.layout, (tree.flat - 0.05 * (move + own.decoupled * own.weight_decay * tree).flat).to(dtype))
        master.grad = slope.float()
        optimizer.step()
        with torch.no_grad():
            master.copy_(master.to(dtype))
    gap = (tree["w"].float() - master).abs().max()
    assert gap <= 4 * torch.finfo(dtype).eps * master.abs().max()
    assert not torch.equal(tree["w"], start)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("engine", [None, Stacked(3), Processes(2)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_every_engine_moves_a_narrow_model_as_far_as_a_wide_one(name, engine, dtype):
    """Adam in bfloat16 with its own state in bfloat16 would divide by 0, and never move."""
    runs = [world(methods.fedavg(), kind, engine, optimizer=OURS[name][0], lr=0.01) for kind in (torch.float32, dtype)]
    starts = [made.server["share"].flat.double() for made in runs]
    for made in runs:
        made.play()
    wide, narrow = (made.server["share"].flat.double() - start for made, start in zip(runs, starts, strict=True))
    assert (wide - narrow).norm() <= 0.35 * wide.norm()
    if engine:
        engine.close()


def steady(dtype, momentum):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 2)).to(dtype)


def many(count):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return {"ada": ClientData((x, (x[:, 0] > 0).long()))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("engine", [None, Stacked(1), Processes(1)], ids=str)
def test_batches_are_counted_beyond_256(engine, dtype):
    """Also the steps, on which methods divide. The count of a model that has trained before goes on."""
    net = steady(dtype, 0.1)
    net[1].num_batches_tracked.fill_(1000)
    made = world(methods.local(), dtype, engine, net, many(606), 1.0, batch_size=2, local_epochs=1, lr=1e-3)
    (outcome,) = made.engine.train(made, ["ada"])
    assert outcome.steps.tolist() == [303.0]
    assert int(outcome.gradients) == 303
    made.memory.put("ada", outcome.memory)
    found = made.model.module(made.personal("ada"))[1]
    assert found.num_batches_tracked.item() == 1303
    if engine:
        engine.close()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_cumulative_average_is_that_of_the_module_itself(dtype):
    """With momentum=None the count is the weight of a batch: PyTorch's own module, fed the same batches, agrees."""
    made = world(
        methods.local(), dtype, None, steady(dtype, None), many(600), 1.0, batch_size=2, local_epochs=1, lr=1e-9
    )
    module = made.model.module(made.model.initial).train()
    for batch in made.assignment("ada", "train").stream.epochs(1):
        module(batch.x)
    made.play()
    found = made.model.module(made.personal("ada"))
    assert torch.equal(found[1].running_var, module[1].running_var)
    assert found[1].num_batches_tracked == module[1].num_batches_tracked == 300


@pytest.mark.parametrize(
    "part",
    [
        parts.sam(0.05),
        parts.adaptive_sam(0.05),
        parts.flexible_sam(0.05, 0.9, top=1),
        parts.estimated_sam(0.05),
        parts.consistent_sam(0.05),
        parts.server_sam(0.05),
        parts.fisher_weights(),
        parts.control_variates(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("optimizer", [SGD(), Adam(), AdamW(), RMSprop()], ids=repr)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gradients_of_zero_are_no_nan(part, optimizer, dtype):
    """A small constant such as 1e-8 is 0 in float16; its quotient with 0 would be NaN."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[2].weight.zero_(), net[0].bias.fill_(-100.0), net[2].bias.copy_(torch.tensor([100.0, -100.0]))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    clients = {"ada": ClientData((x[:9], torch.zeros(9).long())), "ben": ClientData((x, torch.zeros(20).long()))}
    made = world(methods.fedavg() + part, dtype, None, net, clients, 1.0, optimizer=optimizer)
    start = made.server["share"].flat.clone()
    for _ in range(2):
        assert made.play().dropped == {}
    assert torch.isfinite(made.server["share"].flat).all()
    if not optimizer.weight_decay:
        assert torch.equal(made.server["share"].flat, start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metrics_may_use_numpy(dtype):
    """NumPy has no bfloat16, and means of many examples in it are coarse: metrics are given float32."""
    brier = idiolect.Metric(
        "brier", lambda out, y: ((out.softmax(1).numpy() - np.eye(3)[y.numpy()]) ** 2).sum(1).mean()
    )
    clients = cast(population(SIZES), dtype)
    run = idiolect.fit(network().to(dtype), clients, methods.fedbn(), rounds=1, metrics=[brier, idiolect.accuracy])
    with torch.no_grad():
        out, y = run.personal("ada")(clients["ada"].test.x).float(), clients["ada"].test.y
    found = run.records[-1]["clients"]["ada"]["personalized"]
    assert found["brier"] == pytest.approx(((out.softmax(1) - torch.eye(3)[y]) ** 2).sum(1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_kept_on_disk_and_in_a_checkpoint(dtype, tmp_path):
    method = methods.fedbn() + parts.control_variates() + parts.server_adaptive("yogi")
    held = cast(population(SIZES), dtype)

    def made(folder):
        model = Model(network().to(dtype))
        keep = (lambda name, trees: DiskStore(trees, tmp_path / folder / name)) if folder else None
        more = {"keep": keep} if keep else {}
        return Federation(model, method, Training(batch_size=8), 4, 1.0, 0, held, Sequential(), **more)

    ram, disk = made(""), made("a")
    for _ in range(2):
        ram.play(), disk.play()
    same_state(ram, disk)
    store = RunDirectory(tmp_path / "run")
    store.write_config({})
    checkpoint.save(store, ram)
    again = made("")
    checkpoint.restore(store, again, {})
    same_state(ram, again)
    ram.play(), again.play()
    same_state(ram, again)


def test_labels_that_the_dtype_cannot_count_are_refused():
    net = nn.Sequential(nn.Linear(3, 300)).to(torch.bfloat16)
    clients = {"a": ClientData((torch.randn(8, 3).bfloat16(), torch.arange(8) * 40))}
    with pytest.raises(idiolect.UsageError, match="labels of 300 classes need weights of a wider dtype"):
        idiolect.fit(net, clients, methods.fedavg() + parts.nearest_neighbors(1), rounds=1)
    wide = {"a": ClientData((clients["a"].train.x.float(), clients["a"].train.y))}
    run = idiolect.fit(net.float(), wide, methods.fedavg() + parts.nearest_neighbors(1, share=1.0), rounds=1)
    assert run.personal("a")(wide["a"].train.x).argmax(1).tolist() == wide["a"].train.y.tolist()

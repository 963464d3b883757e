"""Optimizers and schedules against PyTorch's own, and what is refused at once."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import idiolect
from idiolect import (
    SGD,
    Adam,
    AdamW,
    Constant,
    Cosine,
    Exponential,
    Group,
    Output,
    RMSprop,
    StepDecay,
    Training,
    UsageError,
    Warmup,
    methods,
    scope,
)
from idiolect.core.rng import stream
from idiolect.engines.processes import Processes
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.registry.names import optimizer_of, schedule_of
from idiolect.rounds.schedule import rates, written
from idiolect.testing.checks import played, same_state
from idiolect.testing.worlds import RAGGED, federation, network, population

OURS = {
    "adamw(epsilon=1e-3)": (AdamW(epsilon=1e-3), lambda p: torch.optim.AdamW(p, eps=1e-3)),
    "adamw(0.5, 0.9, 1e-3, 0.3)": (
        AdamW(0.5, 0.9, 1e-3, 0.3),
        lambda p: torch.optim.AdamW(p, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3),
    ),
    "adam(epsilon=1e-3, weight_decay=0.3)": (
        Adam(epsilon=1e-3, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, eps=1e-3, weight_decay=0.3),
    ),
    "rmsprop(epsilon=1e-3)": (RMSprop(epsilon=1e-3), lambda p: torch.optim.RMSprop(p, eps=1e-3)),
    "rmsprop(0.9, 1e-3, 0.5, 0.1)": (
        RMSprop(0.9, 1e-3, 0.5, 0.1),
        lambda p: torch.optim.RMSprop(p, alpha=0.9, eps=1e-3, momentum=0.5, weight_decay=0.1),
    ),
    "sgd(0.9, 0.1, True)": (
        SGD(0.9, 0.1, nesterov=True),
        lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
}
"""Epsilon is large: a bias before batch normalization has gradient 0, and a small one would enlarge its rounding."""


def torch_rounds(make, lrs, participation, clip, local_epochs=2, batch_size=8, groups=lambda net: [{"params": net}]):
    """FedAvg by PyTorch's modules and optimizers: a new optimizer for each client and round."""
    clients, net, states = population(), network(), []
    names = sorted(clients)
    for round, lr in enumerate(lrs):
        size = max(1, int(participation * len(names) + 0.5))
        cohort = sorted(stream(0, "cohort", round).choice(len(names), size, replace=False).tolist())
        sums, total = {}, 0
        for name in (names[i] for i in cohort):
            own = network()
            own.load_state_dict(net.state_dict())
            optimizer, (x, y) = make(groups(own)), clients[name].train
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("factor", 1.0)
            for epoch in range(local_epochs):
                order = stream(0, "train", name, round, "order", epoch).permutation(len(y))
                for rows in torch.from_numpy(order).split(batch_size):
                    optimizer.zero_grad()
                    F.cross_entropy(own(x[rows]), y[rows]).backward()
                    if clip:
                        nn.utils.clip_grad_norm_(own.parameters(), clip)
                    optimizer.step()
            for key, tensor in own.state_dict().items():
                sums[key] = sums.get(key, 0) + len(y) * tensor.double()
            total += len(y)
        mean = {key: value / total for key, value in sums.items()}
        net.load_state_dict({k: v.to(net.state_dict()[k].dtype) for k, v in mean.items()})
        states.append({k: v for k, v in mean.items() if "running" not in k and "tracked" not in k})
    return states


@pytest.mark.parametrize("text", OURS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_rounds_equal_those_of_torch_optim(text, clip):
    own, other = OURS[text]
    assert optimizer_of(text) == own
    schedule = Warmup(2, Exponential(0.5))
    training = Training(0.02, 2, 8, own, schedule, clip)
    made = federation(methods.fedavg(), participation=0.6, training=training)
    expected = torch_rounds(
        lambda p: other(p), [0.01, 0.02, 0.02, 0.01], 0.6, clip, groups=lambda net: net.parameters()
    )
    for state in expected:
        made.play()
        assert max((made.server["share"][n] - t).abs().max().item() for n, t in state.items()) <= 1e-12


def test_groups_with_decoupled_decay_equal_those_of_torch_optim():
    """PyTorch multiplies the decay of a group by its own learning rate, and so do we."""
    groups = (Group(scope.head, lr=3.0, weight_decay=0.5), Group(scope.batch_norm, weight_decay=0.0))
    made = federation(methods.fedavg(), training=Training(0.02, 2, 8, AdamW(0.9, 0.999, 1e-3, 0.1), groups=groups))

    def theirs(net):
        head, norm = list(net[6].parameters()), list(net[1].parameters())
        rest = [p for p in net.parameters() if not any(p is q for q in head + norm)]
        return [
            {"params": rest},
            {"params": head, "factor": 3.0, "weight_decay": 0.5},
            {"params": norm, "weight_decay": 0.0},
        ]

    for state in torch_rounds(
        lambda p: torch.optim.AdamW(p, eps=1e-3, weight_decay=0.1), [0.02] * 3, 1.0, None, groups=theirs
    ):
        made.play()
        assert max((made.server["share"][n] - t).abs().max().item() for n, t in state.items()) <= 1e-12


@pytest.mark.parametrize("text", OURS)
def test_engines_agree(text):
    training = Training(0.02, 2, 8, OURS[text][0], Warmup(2), 0.5)
    alone = played(methods.fedbn(), clients=population(RAGGED), training=training)
    for engine in (Stacked(4), Threads(2), Processes(2)):
        same_state(alone, played(methods.fedbn(), clients=population(RAGGED), training=training, engine=engine), 1e-12)
        engine.close()


def test_schedules_equal_those_of_torch():
    """The rates of ten rounds; PyTorch's warm-up is a LinearLR before the other schedule."""

    def theirs(make):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, found = make(optimizer), []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step(), scheduler.step()
        return found

    lr = torch.optim.lr_scheduler
    pairs = [
        (Cosine(0.1), lambda o: lr.CosineAnnealingLR(o, 10, 0.03)),
        (StepDecay(3, 0.5), lambda o: lr.StepLR(o, 3, 0.5)),
        (Exponential(0.8), lambda o: lr.ExponentialLR(o, 0.8)),
        (lambda t: 1 / (1 + t), lambda o: lr.LambdaLR(o, lambda t: 1 / (1 + t))),
        (
            Warmup(4, Cosine()),
            lambda o: lr.SequentialLR(o, [lr.LinearLR(o, 0.25, total_iters=3), lr.CosineAnnealingLR(o, 6)], [4]),
        ),
    ]
    for own, make in pairs:
        assert rates(Training(schedule=own).schedule, 0.3, 10) == pytest.approx(theirs(make), abs=1e-12)


def test_schedules_by_name():
    assert schedule_of("warmup(3, cosine(0.1))") == Warmup(3, Cosine(0.1))
    assert schedule_of("warmup(3)") == Warmup(3, Constant())
    with pytest.raises(UsageError, match="did you mean"):
        schedule_of("warm_up(3, cosinus())")


def test_a_function_of_three_arguments_gives_the_rate():
    assert rates(Training(schedule=lambda lr, t, n: lr * (n - t)).schedule, 0.5, 3) == [1.5, 1.0, 0.5]
    assert rates(Training(schedule=lambda t: np.float32(0.5)).schedule, 1.0, 2) == [0.5, 0.5]


def test_a_run_uses_the_function_of_the_round():
    training = Training(0.02, schedule=lambda t: [1.0, 0.5, 0.25][t])
    run = idiolect.fit(network(), population(), methods.fedavg(), rounds=3, training=training)
    assert [record["lr"] for record in run.records] == [0.02, 0.01, 0.005]


def test_effective_steps_of_rmsprop_are_how_far_a_constant_direction_leads():
    for optimizer in (RMSprop(0.9, 0.0), RMSprop(0.99, 0.0, 0.7)):
        found = optimizer.effective_steps(torch.tensor([[1.0], [7.0], [0.0]], dtype=torch.float64))
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        theirs, ways = torch.optim.RMSprop([weight], 1.0, optimizer.alpha, 0.0, momentum=optimizer.momentum), [0.0]
        for _ in range(7):
            weight.grad = torch.full((1,), -3.0, dtype=torch.float64)
            theirs.step()
            ways.append(weight.item())
        assert found.flatten().tolist() == pytest.approx([ways[1], ways[7], 0.0], abs=1e-12)


LIST = "SGD(momentum), Adam(), AdamW(weight_decay), RMSprop()"
SCHEDULES = "there are Constant(), Exponential(gamma), StepDecay(every, gamma), Cosine(floor), Warmup(rounds, then), or"


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (
            lambda: Training(optimizer=torch.optim.AdamW),
            f"optimizer=torch.optim.adamw.AdamW is no optimizer of idiolect; there are {LIST}",
        ),
        (lambda: Training(optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))])), f"; there are {LIST}"),
        (lambda: Training(optimizer=SGD), f"SGD is no optimizer of idiolect; there are {LIST}"),
        (lambda: Training(optimizer="adam"), f"optimizer='adam' is no optimizer of idiolect; there are {LIST}"),
        (lambda: Training(optimizer=None), LIST),
        (lambda: Training(schedule="cosine"), SCHEDULES),
        (lambda: Training(schedule=Cosine), "is no schedule; write Cosine(...)"),
        (lambda: Training(schedule=torch.optim.lr_scheduler.StepLR), SCHEDULES),
        (lambda: Training(schedule=lambda: 0.1), SCHEDULES),
        (lambda: Training(schedule=lambda a, b: 0.1), SCHEDULES),
        (lambda: Training(schedule=0.5), SCHEDULES),
        (lambda: Warmup(2, "cosine"), SCHEDULES),
        (lambda: Warmup(0), "Warmup: rounds must be a whole number, at least 1, got 0"),
        (lambda: Cosine(2.0), "Cosine: floor must be in [0, 1], got 2.0"),
        (lambda: AdamW(beta1=1.0), "AdamW: beta1 must be in [0, 1), got 1.0"),
        (lambda: Adam(beta2="a"), "Adam: beta2='a' is not a number"),
        (lambda: Adam(beta2=float("nan")), "Adam: beta2=nan is not a finite number"),
        (lambda: RMSprop(weight_decay=-1.0), "RMSprop: weight_decay must be at least 0, got -1.0"),
        (lambda: Training(groups=Group(scope.head)), "write groups=(Group(names, lr=...),)"),
        (lambda: Group(scope.head, lr=-1), "Group: lr and weight_decay must be at least 0"),
        (lambda: rates(Training(schedule=lambda t: 1 / t).schedule, 1.0, 3), "fails in round 0: ZeroDivisionError"),
        (
            lambda: rates(Training(schedule=lambda t: -1.0).schedule, 1.0, 3),
            "round 0: schedule must be a number above 0",
        ),
        (lambda: rates(lambda lr, t, n: float("nan"), 1.0, 3), "the rate of round 0 must be a number above 0, got nan"),
    ],
)
def test_what_is_no_optimizer_or_schedule_is_one_line_with_what_there_is(act, line):
    with pytest.raises(UsageError, match=re.escape(line)) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_schedule_that_fails_late_is_refused_before_training():
    started = []
    training = Training(schedule=lambda t: [1.0, 1.0][t])
    with pytest.raises(UsageError, match="fails in round 2: IndexError"):
        idiolect.fit(
            network(),
            population(),
            methods.fedavg(),
            rounds=3,
            training=training,
            on_round=lambda run, record: started.append(run),
        )
    assert started == []


def test_a_resumed_run_needs_the_same_rates(tmp_path):
    """Functions have no text to compare: the rates of all rounds are compared."""
    base = {"rounds": 2, "training": Training(schedule=lambda t: 1 / (1 + t))}
    idiolect.fit(network(), population(), methods.fedavg(), **base, output=Output(tmp_path / "a", report=False))
    again = Output(tmp_path / "a", resume=True, report=False)
    idiolect.fit(network(), population(), methods.fedavg(), **base, output=again)
    other = {**base, "training": replace(base["training"], schedule=lambda t: 1 / (2 + t))}
    with pytest.raises(UsageError, match=r"rates was '0\.05 to 0\.025 \("):
        idiolect.fit(network(), population(), methods.fedavg(), **other, output=again)
    assert written([0.1, 0.2, 0.1]) != written([0.1, 0.3, 0.1])

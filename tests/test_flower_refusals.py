"""Sites that differ, hostile sites and hostile coordinators: refused by name, without effect on anyone else."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from flower_grid import after, replies_late, replies_with
from flower_worlds import World, absent, assert_same, dropped, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import idiolect
from idiolect import ClientData, methods, parts
from idiolect.core.part import Part, part
from idiolect.flower.coordinator.requests import TooFewSitesError
from idiolect.flower.protocol.messages import REFUSED
from idiolect.testing.worlds import network

METHOD = methods.fedbn() + parts.control_variates()
WARNING = "the initial weights differ from the coordinator's: personal tensors start from the site's own"

# sites that differ


def wider():
    return nn.Sequential(*list(network(0).float())[:4], nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 3))


def test_a_site_with_another_model_is_refused_by_name_and_joins_with_the_right_one(tmp_path):
    world = World(tmp_path, METHOD)
    world.models["ben"] = wider
    world.grid.stop("ben")
    world.grid.start("ben")
    seen = []

    def fix():
        seen.append(world.status())
        del world.models["ben"]
        [node] = world.grid.stop("ben")
        world.grid.start("ben", node)

    world.clock.after(100, fix)
    coordinator = world.play()
    refusal = "refused: the models differ: 4.weight is float32 (6, 48) at the coordinator, float32 (7, 48) at this site"
    assert world.events_of("ben")[0].startswith(refusal)
    assert seen[0]["sites"]["ben"]["state"].startswith(refusal.removeprefix("refused: "))
    assert world.status()["sites"]["ben"]["state"] == "ready"
    assert_same(world, coordinator, world.trained_federation())


def test_data_of_a_site_may_be_corrected_while_it_runs(tmp_path):
    world = World(tmp_path, METHOD, sizes={"ada": 4, "ben": 3}, rounds=1)
    right = world.clients["ben"]
    world.clients["ben"] = ClientData(train=(right.train.x, right.train.y + 3), test=right.test)
    world.clock.after(40, lambda: world.clients.update(ben=right))
    coordinator = world.play()
    refusal = "refused: client 'ben', train row 0: label 5 is out of range; give one class number 0 … 2 per example"
    assert world.events_of("ben")[0] == refusal
    assert [entry[1] for entry in world.grid.delivered if entry[0] == "ben"] == ["query"] * 3 + ["train", "evaluate"]
    assert_same(world, coordinator, world.trained_federation())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"model": lambda: tiny().double()},
            "the models differ: 0.weight is float32 (3, 1, 3, 3) at the coordinator, float64",
        ),
        (
            {"model": lambda: nn.Sequential(*list(tiny())[:4])},
            "the models differ: 4.weight is float32 (6, 48) at the coordinator, missing at",
        ),
        ({"metrics": ()}, "the coordinator has the metrics ['accuracy'], this site []: use the same metrics"),
        ({"data": lambda: [1, 2]}, "data must return a ClientData, got list"),
        ({"data": lambda: ClientData(([], []))}, "no client has training examples"),
        ({"data": lambda: 1 / 0}, None),
    ],
)
def test_an_unusable_site_is_refused_when_it_joins(tmp_path, changed, reason):
    world = World(tmp_path, METHOD, give_up=20, sizes={"ada": 4, "ben": 3})
    app = {"model": tiny, "data": lambda: world.clients["ben"]} | changed
    [node] = [node for node in world.grid.nodes.values() if node.client == "ben"]
    node.site = idiolect.flower.client_app(**app)
    with pytest.raises(TooFewSitesError, match="1 of 2 sites joined"):
        world.play()
    if reason:
        assert world.events_of("ben")[0].startswith(f"refused: {reason}")
    else:
        assert ("", "no reply: ZeroDivisionError: division by zero") in world.events()


def test_other_initial_weights_give_a_warning(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.models["ben"] = lambda: network(1).float()
    world.grid.stop("ben")
    world.grid.start("ben")
    assert world.play().round == 1
    assert world.events_of("ben") == [WARNING]


def test_a_site_that_joins_later_takes_part_from_then_on(tmp_path):
    world = World(tmp_path, methods.fedbn(), sites=3, rounds=4)
    world.grid.stop("dan")
    world.grid.faults["ada", "train", 1] = [after(lambda: world.grid.start("dan"), replies_late(5))]
    coordinator = world.play()
    assert [record["cohort"] for record in coordinator.records] == [["ada", "ben", "cleo"]] * 2 + [
        list(world.clients)
    ] * 2
    assert_same(world, coordinator, world.trained_federation({(0, "dan"), (1, "dan")}))


def test_an_overflow_at_one_site_is_refused_there_as_in_a_simulation(tmp_path):
    world = World(tmp_path, METHOD)
    data = world.clients["ben"]
    world.clients["ben"] = ClientData(train=(data.train.x * 1e30, data.train.y), test=data.test)
    coordinator = world.play()
    federation = world.federation()
    dropped_in_simulation = [federation.play().dropped for _ in range(world.rounds)]
    assert dropped(coordinator) == [["ben"]] * 4 == [sorted(names) for names in dropped_in_simulation]
    for record, reasons in zip(coordinator.records, dropped_in_simulation, strict=True):
        assert record["dropped"]["ben"] == f"{reasons['ben']}; the site keeps its state from before this round"
    assert coordinator.clients["ben"].base_round == 0
    assert_same(world, coordinator, federation, ["ada", "cleo", "dan"])
    assert not list((tmp_path / "sites" / "ben" / world.run).glob("state-*"))


@part
def halved(factor: float = 0.5) -> Part:
    """Half of every direction: a part of the user's own.

    Args:
        factor: factor of the direction.
    """
    return Part(idea="half of every direction", direction=lambda direction, at, local: direction * factor)


def test_a_method_may_use_own_parts_that_the_site_knows(tmp_path):
    method = methods.fedbn() + halved(0.25)
    world = World(tmp_path, method, parts=(halved,), rounds=2)
    coordinator = world.play()
    assert_same(world, coordinator, world.trained_federation())
    plain = World(tmp_path / "plain", methods.fedbn(), rounds=2).play()
    assert not torch.equal(coordinator.server["share"].flat, plain.server["share"].flat)
    unknown = World(tmp_path / "unknown", method, give_up=10)
    with pytest.raises(TooFewSitesError, match="0 of 4 sites joined"):
        unknown.play()
    assert unknown.events_of("ada")[0].startswith("refused: method: unknown name 'halved'")


# hostile sites


def fields(**changed):
    return lambda content: content["fields"].update(changed)


def tensor(change):
    """Return a function that changes an array of weights in an upload, given a function of NumPy arrays."""

    def changed(content):
        content["upload/share"]["4.weight"] = Array(change(content["upload/share"]["4.weight"].numpy()))

    return changed


def with_value(value):
    def change(array):
        array = array.copy()
        array[2, 3] = value
        return array

    return change


HOSTILE = [
    (lambda content: content["upload/share"].pop("4.bias"), "upload/share: the tensors differ: missing '4.bias'"),
    (
        lambda content: content["upload/share"].update({"5.bias": Array(np.zeros(1))}),
        "differ: unexpected '5.bias'",
    ),
    (lambda content: content.pop("upload/control_variates"), "the parts differ: missing 'upload/control_variates'"),
    (
        lambda content: content.update({"upload/sam": ArrayRecord()}),
        "the parts differ: unexpected 'upload/sam'",
    ),
    (tensor(lambda array: array[:1, :1]), "4.weight: expected shape (6, 48), got (1, 1)"),
    (tensor(lambda array: array.T), "4.weight: expected shape (6, 48), got (48, 6)"),
    (tensor(lambda array: array.astype("float64")), "4.weight: expected float32, got 'float64'"),
    (tensor(np.asfortranarray), "4.weight: invalid NumPy header for float32 (6, 48)"),
    (tensor(with_value(math.nan)), "1 values of 4.weight are not finite in its upload (share)"),
    (tensor(with_value(math.inf)), "1 values of 4.weight are not finite in its upload (share)"),
    (fields(examples=10**12), "the site has 1000000000000 examples but registered with 3: join again"),
    (fields(examples=-3), "invalid Report: examples is -3"),
    (fields(loss=math.nan), "invalid result: loss nan after 2.0 steps"),
    (fields(loss=math.inf), "invalid result: loss inf after 2.0 steps"),
    (fields(steps=math.nan), "after nan steps"),
    (fields(steps=math.inf), "after inf steps"),
    (fields(steps=0.0), "after 0.0 steps"),
    (fields(steps=-7.0), "after -7.0 steps"),
    (fields(client="ada"), "the result is from client 'ada': join again"),
    (fields(splits=["test", "test"], sizes=[5, 5], personalized=[0.0] * 4), "the evaluation does not match"),
    (fields(splits=["train"]), "the evaluation does not match the request"),
    (fields(sizes=[0]), "invalid Report: sizes.0 is 0"),
    (fields(sizes=[]), "the evaluation does not match the request"),
    (fields(personalized=[]), "the evaluation does not match the request"),
    (fields(personalized=[0.0] * 99), "the evaluation does not match the request"),
    (fields(generalized=[0.5, 0.5]), "the evaluation does not match the request"),
    (fields(gradients="many"), "invalid Report: gradients is 'many'"),
    (lambda content: content.pop("fields"), "invalid Report: client is missing"),
    (lambda content: RecordDict({**content, "fields": ArrayRecord()}), "invalid Report: client is missing"),
    (lambda content: RecordDict(), "invalid Report: client is missing"),
    (lambda content: RecordDict({REFUSED: ArrayRecord()}), "invalid Report: client is missing"),
    (lambda content: RecordDict({REFUSED: ConfigRecord({"reason": "a\n\x1b[2Jb" * 999})}), "a ?[2Jba ?[2Jb"),
    (lambda content: RecordDict({REFUSED: ConfigRecord()}), ""),
]


def test_a_hostile_result_is_refused_by_name_and_the_run_continues(tmp_path):
    """The run equals a simulation without that client."""
    world = World(tmp_path, METHOD, rounds=len(HOSTILE) + 1)
    for played, (change, _) in enumerate(HOSTILE, 1):
        world.grid.faults["ben", "train", played] = [replies_with(change)]
    coordinator = world.play()
    for record, (_, reason) in zip(coordinator.records[1:], HOSTILE, strict=True):
        assert reason in record["dropped"]["ben"], record["round"]
        assert len(record["dropped"]["ben"]) <= 500
    texts = [text for text in world.events_of("ben") if text.startswith("no result:")]
    assert texts == [f"no result: {record['dropped']['ben']}"[:500].strip() for record in coordinator.records[1:]]
    assert_same(world, coordinator, world.trained_federation(absent(coordinator)))


def test_an_evaluation_that_was_not_requested_is_refused(tmp_path):
    world = World(tmp_path, METHOD, rounds=2, evaluate_every=5)
    evaluation = {"splits": ["test"], "sizes": [5], "personalized": [0.5, 1.0]}
    world.grid.faults["ben", "train", 1] = [replies_with(fields(**evaluation))]
    coordinator = world.play()
    assert coordinator.records[1]["dropped"] == {"ben": "the evaluation does not match the request"}


def test_a_hostile_final_evaluation_is_left_out(tmp_path):
    world = World(tmp_path, methods.fedavg(), rounds=1)
    world.grid.faults["ben", "evaluate", 1] = [replies_with(fields(generalized=[]))]
    world.grid.faults["dan", "evaluate", 1] = [
        replies_with(fields(personalized=[math.inf, math.nan], generalized=[math.inf, 0.5]))
    ]
    coordinator = world.play()
    assert sorted(coordinator.records[-1]["clients"]) == ["ada", "cleo", "dan"]
    assert any(text.startswith("done: 3 of 4 sites have their final models") for _, text in world.events())
    assert world.status()["sites"]["ben"]["state"] == "the evaluation does not match the request"
    json.loads((tmp_path / "run" / "status.json").read_text(), parse_constant=lambda sign: pytest.fail(sign))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"examples": 0}, "invalid Registration: examples is 0"),
        ({"examples": 1.5}, "invalid Registration: examples is 1.5"),
        ({"client": "../../etc"}, "invalid Registration: client is '../../etc'"),
        ({"client": ""}, "invalid Registration: client is ''"),
        ({"versions": "all"}, "invalid Registration: versions is 'all'"),
    ],
)
def test_a_hostile_registration_is_refused(tmp_path, changed, reason):
    world = World(tmp_path, METHOD, sites=3, rounds=1)
    world.grid.faults["ben", "query", 0] = [replies_with(fields(**changed))]
    coordinator = world.play()
    assert ("", f"refused: {reason}") in world.events()
    assert sorted(coordinator.clients) == ["ada", "cleo", "dan"]
    assert coordinator.round == 1


def test_a_site_cannot_refuse_for_another(tmp_path):
    world = World(tmp_path, METHOD, sites=3)
    other = RecordDict({REFUSED: ConfigRecord({"reason": "I will not", "client": "ada"})})
    world.grid.faults["dan", "query", 0] = [replies_with(lambda content: other)] * 99
    coordinator = world.play()
    assert ("", "refused: I will not") in world.events()
    assert world.events_of("ada") == []
    assert dropped(coordinator) == [[]] * 4


def test_results_of_a_site_under_another_name_do_not_count(tmp_path):
    """The site registers as ada, but its results name its own client."""
    world = World(tmp_path, METHOD, sites=3, rounds=1, quorum=2)
    world.grid.faults["dan", "query", 0] = [replies_with(fields(client="ada"))]
    coordinator = world.play()
    reason = "the result is from client 'dan': join again"
    texts = world.events_of("ada")
    assert texts[0] == "joined from another node: the site was restarted, or two sites use this name"
    assert texts[1:] == [f"no result: {reason}"] * 2
    assert dropped(coordinator) == [["ada"]]


# hostile coordinators


def instruction(method="fedavg()", training="Training()", run="run-1"):
    fields = {"run": run, "method": method, "training": training, "seed": 0, "round": 0, "lr": 0.1, "base_round": 0}
    return RecordDict({"fields": ConfigRecord(fields | {"evaluate": False, "metrics": ["accuracy"]})})


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize(
    "text",
    [
        "os.system('touch CANARY')",
        "__import__('os').system('touch CANARY')",
        "eval(\"open('CANARY', 'w')\")",
        "open('CANARY', 'w')",
        "fedavg().__class__",
        "().__class__.__bases__[0].__subclasses__()",
        "(lambda: open('CANARY', 'w'))()",
        "[open('CANARY', 'w') for _ in (1,)]",
        "fedavg(weighting=open('CANARY', 'w'))",
        "Method((share(everything),), __import__('os').system('touch CANARY'))",
        "Training(loss=__import__('os'))",
        "fedavg() if True else None",
        "(name := fedavg())",
        "f\"{open('CANARY', 'w')}\"",
        "9 ** 9 ** 9",
        "'a' * 10 ** 10",
        "(" * 9999,
        "~" * 9999 + "1",
        "halved()",
        "nn.Linear(3, 2)",
        "",
        "\0",
    ],
)
def test_an_expression_of_a_coordinator_runs_no_code(tmp_path, monkeypatch, kind, text):
    monkeypatch.chdir(tmp_path)
    calls = []
    app = idiolect.flower.client_app(model=tiny, data=lambda: calls.append("data"))
    config = {"client-id": "ada", "state-dir": str(tmp_path / "sites")}
    for content in (instruction(method=text), instruction(training=text)):
        reply = app.answer(kind, content, config)
        assert set(reply) == {REFUSED}
        assert reply[REFUSED]["client"] == "ada"
        assert reply[REFUSED]["reason"].startswith(("method: ", "training: "))
        assert "\n" not in reply[REFUSED]["reason"]
    assert list(tmp_path.iterdir()) == []
    assert calls == []


@pytest.mark.parametrize("run", ["..", "../../run", "/tmp/run", "a" * 300, ""])
def test_the_name_of_a_run_leads_to_no_other_folder(tmp_path, run):
    data = ClientData(train=(torch.zeros(2, 1, 6, 6), [0, 1]))
    app = idiolect.flower.client_app(model=tiny, data=lambda: data)
    reply = app.answer("query", instruction(run=run), {"client-id": "ada", "state-dir": str(tmp_path / "sites")})
    assert "invalid run name" in reply[REFUSED]["reason"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("client", ["../evil", "..", "/tmp/evil", "a/b", ".hidden", "a\nb", "a" * 101])
def test_a_client_name_leads_to_no_other_folder(tmp_path, client):
    app = idiolect.flower.client_app(model=tiny, data=lambda: 1 / 0)
    reply = app.answer("train", instruction(), {"client-id": client, "state-dir": str(tmp_path / "sites")})
    assert "invalid client name" in reply[REFUSED]["reason"]
    assert list(tmp_path.iterdir()) == []
    for config in ({}, {"client-id": "ada"}, {"state-dir": str(tmp_path)}):
        assert "client-id or state-dir is not set" in app.answer("train", instruction(), config)[REFUSED]["reason"]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_an_incomplete_message_is_refused(tmp_path, kind):
    world = World(tmp_path, METHOD)
    app, config = world.grid.nodes[1].site, world.grid.config("ada")
    for content in (RecordDict(), instruction(method=repr(METHOD)), RecordDict({"fields": ArrayRecord()})):
        assert set(app.answer(kind, content, config)) == {REFUSED}
    assert not list(tmp_path.rglob("state-*"))


def test_an_event_is_a_line_of_json_with_time_and_completed_rounds(tmp_path, capsys):
    world = World(tmp_path, METHOD, rounds=2)
    world.play()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [set(event) for event in events] == [{"time", "round", "client", "event"}] * len(events)
    assert [event["round"] for event in events] == sorted(event["round"] for event in events)
    assert events[-2]["event"].startswith("4 of 4 sites, loss ")
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("idiolect: 0 of 2 rounds completed: client 'ada': joined with 9 examples; idiolect ")
    assert len(printed) == len(events)

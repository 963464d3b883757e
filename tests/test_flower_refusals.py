"""Sites that differ or lie, and coordinators that lie: refused, named, and without effect on anybody else."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from flower_net import after_which, answers, late
from flower_worlds import World, absent, dropped, same, tiny
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import idiolect
from idiolect import ClientData, methods, parts
from idiolect.core.part import Part, part
from idiolect.flower.coordinator.requests import TooFewSitesError
from idiolect.flower.site.app import REFUSED
from idiolect.testing.worlds import network

METHOD = methods.fedbn() + parts.control_variates()

# sites that differ


def wider():
    return nn.Sequential(*list(network(0).float())[:4], nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 3))


def test_a_site_with_another_model_is_refused_by_name_and_admitted_with_the_right_one(tmp_path):
    world = World(tmp_path, METHOD)
    world.make["ben"] = wider
    world.net.stop("ben")
    world.net.start("ben")
    seen = []

    def mend():
        seen.append(world.status())
        del world.make["ben"]
        [node] = world.net.stop("ben")
        world.net.start("ben", node)

    world.clock.after(100, mend)
    made = world.play()
    said = "refused: the models differ: 4.weight is float32 (6, 48) there, float32 (7, 48) here; 4.bias is float32 (6,)"
    assert world.said("ben")[0].startswith(said)
    assert seen[0]["sites"]["ben"]["state"].startswith(said.removeprefix("refused: "))
    assert world.status()["sites"]["ben"]["state"] == "ready"
    same(world, made, world.rehearsed())


def test_what_was_wrong_with_a_site_may_be_put_right_while_it_runs(tmp_path):
    world = World(tmp_path, METHOD, sizes={"ada": 4, "ben": 3}, rounds=1)
    right = world.clients["ben"]
    world.clients["ben"] = ClientData(train=(right.train.x, right.train.y + 3), test=right.test)
    world.clock.after(40, lambda: world.clients.update(ben=right))
    made = world.play()
    said = "refused: client 'ben', train row 0: label 5 is out of range; give one class number 0 … 2 per example"
    assert world.said("ben")[0] == said
    assert [entry[1] for entry in world.net.log if entry[0] == "ben"] == ["query"] * 3 + ["train", "evaluate"]
    same(world, made, world.rehearsed())


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"model": lambda: tiny().double()}, "the models differ: 0.weight is float32 (3, 1, 3, 3) there, float64 (3,"),
        (
            {"model": lambda: nn.Sequential(*list(tiny())[:4])},
            "the models differ: 4.weight is float32 (6, 48) there, n",
        ),
        ({"metrics": ()}, "the coordinator measures ['accuracy'], this site []: give both the same metrics"),
        ({"data": lambda: [1, 2]}, "data must give a ClientData, it gives a list"),
        ({"data": lambda: ClientData(([], []))}, "no client has training examples"),
        ({"data": lambda: 1 / 0}, None),
    ],
)
def test_what_a_site_cannot_do_is_said_when_it_joins(tmp_path, differs, said):
    world = World(tmp_path, METHOD, give_up=20, sizes={"ada": 4, "ben": 3})
    app = {"model": tiny, "data": lambda: world.clients["ben"]} | differs
    [node] = [node for node in world.net.nodes.values() if node.client == "ben"]
    node.site = idiolect.flower.client_app(**app)
    with pytest.raises(TooFewSitesError, match="1 of 2 sites joined"):
        world.play()
    if said:
        assert world.said("ben")[0].startswith(f"refused: {said}")
    else:
        assert ("", "no reply: ZeroDivisionError: division by zero") in world.events()


def test_other_initial_weights_are_said_and_no_obstacle(tmp_path):
    world = World(tmp_path, METHOD, rounds=1)
    world.make["ben"] = lambda: network(1).float()
    world.net.stop("ben")
    world.net.start("ben")
    assert world.play().round == 1
    assert world.said("ben") == ["its initial weights are not the coordinator's: what is personal starts from its own"]


def test_a_site_that_joins_later_takes_part_from_then_on(tmp_path):
    world = World(tmp_path, methods.fedbn(), sites=3, rounds=4)
    world.net.stop("dan")
    world.net.plan["ada", "train", 1] = [after_which(lambda: world.net.start("dan"), late(5))]
    made = world.play()
    assert [record["cohort"] for record in made.records] == [["ada", "ben", "cleo"]] * 2 + [list(world.clients)] * 2
    same(world, made, world.rehearsed({(0, "dan"), (1, "dan")}))


def test_numbers_that_overflow_at_one_site_are_refused_there_as_in_a_simulation(tmp_path):
    world = World(tmp_path, METHOD)
    data = world.clients["ben"]
    world.clients["ben"] = ClientData(train=(data.train.x * 1e30, data.train.y), test=data.test)
    made = world.play()
    federation = world.federation()
    dropped_there = [federation.play().dropped for _ in range(world.rounds)]
    assert dropped(made) == [["ben"]] * 4 == [sorted(names) for names in dropped_there]
    for record, there in zip(made.records, dropped_there, strict=True):
        assert record["dropped"]["ben"] == f"{there['ben']}; its state stays as it was before this round"
    assert made.memory["ben"].base == 0
    same(world, made, federation, ["ada", "cleo", "dan"])
    assert not list((tmp_path / "sites" / "ben" / world.run).glob("state-*"))


@part
def halved(factor: float = 0.5) -> Part:
    """Half of every direction, as a part of the user's own.

    Args:
        factor: what is left of it.
    """
    return Part(idea="half of it", direction=lambda direction, at, local, slot: direction * factor)


def test_parts_of_the_users_own_are_named_by_the_coordinator_and_known_at_the_site(tmp_path):
    method = methods.fedbn() + halved(0.25)
    world = World(tmp_path, method, parts=(halved,), rounds=2)
    made = world.play()
    same(world, made, world.rehearsed())
    plain = World(tmp_path / "plain", methods.fedbn(), rounds=2).play()
    assert not torch.equal(made.server["share"].flat, plain.server["share"].flat)
    strange = World(tmp_path / "strange", method, give_up=10)
    with pytest.raises(TooFewSitesError, match="0 of 4 sites joined"):
        strange.play()
    assert strange.said("ada")[0].startswith("refused: method: unknown name 'halved'")


# sites that lie


def words(**changed):
    return lambda content: content["words"].update(changed)


def tensor(change):
    """Return a change of an upload's array of weights, given as an array of NumPy."""

    def changed(content):
        content["upload/share"]["4.weight"] = Array(change(content["upload/share"]["4.weight"].numpy()))

    return changed


def spoilt(value):
    def change(array):
        array = array.copy()
        array[2, 3] = value
        return array

    return change


HOSTILE = [
    (lambda content: content["upload/share"].pop("4.bias"), "upload/share: the tensors differ: without '4.bias'"),
    (lambda content: content["upload/share"].update({"5.bias": Array(np.zeros(1))}), "tensors differ: with '5.bias'"),
    (lambda content: content.pop("upload/control_variates"), "the parts differ: without 'upload/control_variates'"),
    (lambda content: content.update({"upload/sam": ArrayRecord()}), "upload: the parts differ: with 'upload/sam'"),
    (tensor(lambda array: array[:1, :1]), "4.weight: expected shape (6, 48), got (1, 1)"),
    (tensor(lambda array: array.T), "4.weight: expected shape (6, 48), got (48, 6)"),
    (tensor(lambda array: array.astype("float64")), "4.weight: expected float32, got 'float64'"),
    (tensor(np.asfortranarray), "4.weight: its bytes are not what NumPy writes of float32 (6, 48)"),
    (tensor(spoilt(math.nan)), "1 values of 4.weight are not finite in its upload (share)"),
    (tensor(spoilt(math.inf)), "1 values of 4.weight are not finite in its upload (share)"),
    (words(examples=10**12), "has 1000000000000 examples, and had 3 when it joined: join again"),
    (words(examples=-3), "no Report: examples is -3"),
    (words(loss=math.nan), "a loss of nan after 2.0 steps cannot be counted"),
    (words(loss=math.inf), "a loss of inf after 2.0 steps cannot be counted"),
    (words(steps=math.nan), "steps cannot be counted"),
    (words(steps=math.inf), "steps cannot be counted"),
    (words(steps=0.0), "after 0.0 steps cannot be counted"),
    (words(steps=-7.0), "after -7.0 steps cannot be counted"),
    (words(client="ada"), "says that it is client 'ada': join again"),
    (words(splits=["test", "test"], sizes=[5, 5], personalized=[0.0] * 4), "has not measured what it was asked to"),
    (words(splits=["train"]), "has not measured what it was asked to measure"),
    (words(sizes=[0]), "no Report: sizes.0 is 0"),
    (words(sizes=[]), "has not measured what it was asked to measure"),
    (words(personalized=[]), "has not measured what it was asked to measure"),
    (words(personalized=[0.0] * 99), "has not measured what it was asked to measure"),
    (words(generalized=[0.5, 0.5]), "has not measured what it was asked to measure"),
    (words(gradients="many"), "no Report: gradients is 'many'"),
    (lambda content: content.pop("words"), "no Report: client is missing"),
    (lambda content: RecordDict({**content, "words": ArrayRecord()}), "no Report: client is missing"),
    (lambda content: RecordDict(), "no Report: client is missing"),
    (lambda content: RecordDict({REFUSED: ArrayRecord()}), "no Report: client is missing"),
    (lambda content: RecordDict({REFUSED: ConfigRecord({"why": "a\n\x1b[2Jb" * 999})}), "a ?[2Jba ?[2Jb"),
    (lambda content: RecordDict({REFUSED: ConfigRecord()}), ""),
]


def test_a_hostile_result_is_refused_and_named_and_the_rounds_go_on(tmp_path):
    """As in a simulation without that client; not one of the ways ends the coordinator."""
    world = World(tmp_path, METHOD, rounds=len(HOSTILE) + 1)
    for played, (change, _) in enumerate(HOSTILE, 1):
        world.net.plan["ben", "train", played] = [answers(change)]
    made = world.play()
    for record, (_, said) in zip(made.records[1:], HOSTILE, strict=True):
        assert said in record["dropped"]["ben"], record["round"]
        assert len(record["dropped"]["ben"]) <= 500
    told = [what for what in world.said("ben") if what.startswith("no result:")]
    assert told == [f"no result: {record['dropped']['ben']}"[:500].strip() for record in made.records[1:]]
    same(world, made, world.rehearsed(absent(made)))


def test_a_result_that_says_more_than_it_was_asked_is_refused(tmp_path):
    world = World(tmp_path, METHOD, rounds=2, evaluate_every=5)
    measured = {"splits": ["test"], "sizes": [5], "personalized": [0.5, 1.0]}
    world.net.plan["ben", "train", 1] = [answers(words(**measured))]
    made = world.play()
    assert made.records[1]["dropped"] == {"ben": "has not measured what it was asked to measure"}


def test_a_hostile_measurement_at_the_end_is_left_out(tmp_path):
    world = World(tmp_path, methods.fedavg(), rounds=1)
    world.net.plan["ben", "evaluate", 1] = [answers(words(generalized=[]))]
    world.net.plan["dan", "evaluate", 1] = [
        answers(words(personalized=[math.inf, math.nan], generalized=[math.inf, 0.5]))
    ]
    made = world.play()
    assert sorted(made.records[-1]["clients"]) == ["ada", "cleo", "dan"]
    assert any(what.startswith("done: 3 of 4 sites hold their final models") for _, what in world.events())
    assert world.status()["sites"]["ben"]["state"] == "has not measured what it was asked to measure"
    json.loads((tmp_path / "run" / "status.json").read_text(), parse_constant=lambda sign: pytest.fail(sign))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"examples": 0}, "no Introduction: examples is 0"),
        ({"examples": 1.5}, "no Introduction: examples is 1.5"),
        ({"client": "../../etc"}, "no Introduction: client is '../../etc'"),
        ({"client": ""}, "no Introduction: client is ''"),
        ({"versions": "all"}, "no Introduction: versions is 'all'"),
    ],
)
def test_a_hostile_introduction_is_refused(tmp_path, changed, said):
    world = World(tmp_path, METHOD, sites=3, rounds=1)
    world.net.plan["ben", "query", 0] = [answers(words(**changed))]
    made = world.play()
    assert ("", f"refused: {said}") in world.events()
    assert sorted(made.memory) == ["ada", "cleo", "dan"]
    assert made.round == 1


def test_nobody_refuses_for_another(tmp_path):
    world = World(tmp_path, METHOD, sites=3)
    other = RecordDict({REFUSED: ConfigRecord({"why": "I will not", "client": "ada"})})
    world.net.plan["dan", "query", 0] = [answers(lambda content: other)] * 99
    made = world.play()
    assert ("", "refused: I will not") in world.events()
    assert world.said("ada") == []
    assert dropped(made) == [[]] * 4


def test_who_takes_anothers_name_is_seen_and_its_results_do_not_count(tmp_path):
    """The site says that it is ada when it joins; its own results say otherwise."""
    world = World(tmp_path, METHOD, sites=3, rounds=1, quorum=2)
    world.net.plan["dan", "query", 0] = [answers(words(client="ada"))]
    made = world.play()
    told = "says that it is client 'dan': join again"
    assert world.said("ada")[0] == "here from another node: it has come back, or joined twice"
    assert world.said("ada")[1:] == [f"no result: {told}"] * 2
    assert dropped(made) == [["ada"]]


# coordinators that lie


def brief(method="fedavg()", training="Training()", run="run-1"):
    told = {"run": run, "method": method, "training": training, "seed": 0, "round": 0, "lr": 0.1, "base": 0}
    return RecordDict({"words": ConfigRecord(told | {"evaluate": False, "metrics": ["accuracy"]})})


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
def test_nothing_that_a_coordinator_names_is_run(tmp_path, monkeypatch, kind, text):
    monkeypatch.chdir(tmp_path)
    calls = []
    app = idiolect.flower.client_app(model=tiny, data=lambda: calls.append("data"))
    config = {"client-id": "ada", "state-dir": str(tmp_path / "sites")}
    for told in (brief(method=text), brief(training=text)):
        reply = app.answer(kind, told, config)
        assert set(reply) == {REFUSED}
        assert reply[REFUSED]["client"] == "ada"
        assert reply[REFUSED]["why"].startswith(("method: ", "training: "))
        assert "\n" not in reply[REFUSED]["why"]
    assert list(tmp_path.iterdir()) == []
    assert calls == []


@pytest.mark.parametrize("run", ["..", "../../run", "/tmp/run", "a" * 300, ""])
def test_a_run_names_no_other_folder(tmp_path, run):
    data = ClientData(train=(torch.zeros(2, 1, 6, 6), [0, 1]))
    app = idiolect.flower.client_app(model=tiny, data=lambda: data)
    reply = app.answer("query", brief(run=run), {"client-id": "ada", "state-dir": str(tmp_path / "sites")})
    assert "cannot name a run" in reply[REFUSED]["why"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("client", ["../evil", "..", "/tmp/evil", "a/b", ".hidden", "a\nb", "a" * 101])
def test_a_client_id_names_no_other_folder(tmp_path, client):
    app = idiolect.flower.client_app(model=tiny, data=lambda: 1 / 0)
    reply = app.answer("train", brief(), {"client-id": client, "state-dir": str(tmp_path / "sites")})
    assert "cannot name a folder" in reply[REFUSED]["why"]
    assert list(tmp_path.iterdir()) == []
    for config in ({}, {"client-id": "ada"}, {"state-dir": str(tmp_path)}):
        assert "has no client-id and state-dir" in app.answer("train", brief(), config)[REFUSED]["why"]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_message_that_lacks_what_it_should_hold_is_refused(tmp_path, kind):
    world = World(tmp_path, METHOD)
    app, config = world.net.nodes[1].site, world.net.config("ada")
    for content in (RecordDict(), brief(method=repr(METHOD)), RecordDict({"words": ArrayRecord()})):
        assert set(app.answer(kind, content, config)) == {REFUSED}
    assert not list(tmp_path.rglob("state-*"))


def test_an_event_is_a_line_of_json_with_its_time_and_the_rounds_played(tmp_path, capsys):
    world = World(tmp_path, METHOD, rounds=2)
    world.play()
    told = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [set(event) for event in told] == [{"time", "rounds played", "client", "what"}] * len(told)
    assert [event["rounds played"] for event in told] == sorted(event["rounds played"] for event in told)
    assert told[-2]["what"].startswith("4 of 4 sites, loss ")
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("idiolect: 0 of 2 rounds played: client 'ada': here, with 9 examples; idiolect ")
    assert len(printed) == len(told)

"""Rows of the server: what it sends to one client alone reaches that client, is counted, and is kept."""

from dataclasses import replace

import pytest
import torch

from idiolect import Method, UsageError, methods
from idiolect.core.part import Part, part
from idiolect.core.scope import batch_norm, everything
from idiolect.core.tree import Tree, layout, pick
from idiolect.core.types import Central, Update
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.parts import share
from idiolect.rounds.server import Upload, server_round
from idiolect.running.describe import describe
from idiolect.testing.checks import parametrize_with_checks, same
from idiolect.testing.worlds import RAGGED, federation, population

SIZE = 8  # bytes of a float64
ROW = layout(("echo", "place", "count"), (torch.Size([1]),) * 3)
MINE = layout(("sum",), (torch.Size([1]),))


def tree(where, *columns):
    return Tree(where, torch.cat(columns, dim=-1))


def echo(silent=(), spoiled=0.0):
    """Return a part that tells each client the sum of the weights it has just sent, which only it knows.

    Args:
        silent: rounds in which the server tells nobody anything.
        spoiled: steps of the client whose upload is not finite.
    """

    def own(local):
        return local.end.flat.sum(-1, keepdim=True)

    def finish(local):
        count = local.message["count"] + 1
        upload = torch.where(local.steps == spoiled, torch.nan, own(local))
        return tree(ROW, own(local), 0 * count, count), tree(MINE, upload)

    def aggregate(central, uploads):
        if central.round in silent:
            return Update()
        sums = uploads.flat
        places = torch.tensor(central.clients).to(sums)[:, None]
        rows = tree(ROW, sums.clone(), places, central.rows["count"] + 1)
        sums.zero_()  # they are the part's to spend
        return Update(rows=rows)

    def zeros(setup):
        return Tree(ROW, setup.weights.flat.new_zeros(3))

    return Part(memory=zeros, rows=zeros, finish=finish, aggregate=aggregate, individual=True)


@part
def gossip() -> Part:
    """Tell each client what it said."""
    return echo()


def method(made, scope=everything):
    return Method((share(scope), replace(made, name="gossip")), "Gossip")


@parametrize_with_checks([method(gossip()), method(gossip(), ~batch_norm)])
def test_a_part_with_rows_passes_all_checks(method, check):
    check(method)


def row(made, client):
    return made.rows.get(client)["gossip"]


def memory(made, client):
    return made.memory.get(client)["gossip"]


@pytest.mark.parametrize(("listed", "participation"), [(1, 0.5), (-1, 1.0)])
@pytest.mark.parametrize("engine", [Sequential(), Stacked(4), Threads(2), Processes(1)], ids=repr)
def test_messages_reach_the_client_they_are_for(engine, listed, participation):
    """Whatever the sizes, the order and the participation; who is absent keeps its last.

    One process has places for four clients: here six come to use them.
    """
    clients = dict(list(population(RAGGED).items())[::listed])
    made = federation(method(echo()), clients=clients, engine=engine, participation=participation)
    seen = set()
    for _ in range(5):
        before = {c: row(made, c) for c in clients}
        cohort = made.play().cohort
        seen |= set(cohort)
        for c in cohort:
            assert row(made, c)["echo"] == memory(made, c)["echo"] != 0
            assert row(made, c)["count"] == before[c]["count"] + 1  # its row was handed in and written back
            assert memory(made, c)["count"] == before[c]["count"] + 1  # it had its last one when it trained
            assert row(made, c)["place"] == sorted(clients).index(c)
        for c in set(clients) - set(cohort):
            assert torch.equal(row(made, c).flat, before[c].flat)
    assert seen == set(clients)
    engine.close()


def test_bytes_down_count_messages():
    """A row is sent to those who have one; at the start a client makes it itself."""
    made, told = federation(method(echo()), participation=0.5), set()
    sent = sum(t.nbytes for t in made.sent("train").values())
    for _ in range(8):
        played = made.play()
        assert played.bytes_down == 2 * sent + len(told & set(played.cohort)) * 3 * SIZE
        told |= set(played.cohort)
    assert told == set(made.clients)


def test_without_an_update_rows_stay_as_they_are():
    made = federation(method(echo(silent=[1])))
    made.play()
    before = {c: row(made, c) for c in made.clients}
    made.play()
    for c in made.clients:
        same({"row": row(made, c)}, {"row": before[c]})
        assert memory(made, c)["count"] == 2  # the rest of its memory is this round's


def test_a_dropped_client_keeps_its_row():
    """Sixteen examples, eight a batch, twice, are four steps: cleo's. The others get what is theirs."""
    made = federation(method(echo(spoiled=4.0)))
    played = made.play()
    assert list(played.dropped) == ["cleo"]
    assert "cleo" not in made.memory
    assert "cleo" not in made.rows
    for c in ("ada", "ben", "dan"):
        assert row(made, c)["echo"] == memory(made, c)["echo"] != 0


def test_a_server_round_does_not_change_its_inputs():
    made = federation(method(echo()))
    outs = [made.worker.train(made.assignment(c, "train")) for c in ("ada", "ben")]
    uploads = [Upload(k, out.uploads, 3, out.steps) for k, out in enumerate(outs)]
    before = [{p: t.clone() for p, t in u.uploads.items()} for u in uploads]
    server = {p: t.clone() for p, t in made.server.items()}
    central = Central(made.model.structure, made.server["share"], made.server["share"], made.lr, 1.0)
    rows = Tree(ROW, torch.zeros(2, 3, dtype=torch.float64))
    after = server_round(made.method, made.server, uploads, central, 4, lambda clients: {"gossip": rows})
    for upload, trees in zip(uploads, before, strict=True):
        same(upload.uploads, trees)
    same(made.server, server)
    assert not rows.flat.any()
    same({"gossip": after.server["gossip"]}, {"gossip": made.server["gossip"]})
    assert after.rows["gossip"]["echo"].flatten().tolist() == [float(b["gossip"]["sum"]) for b in before]


def test_rows_may_be_made_of_all_uploads():
    """So a part may mix weights that `share` has sent already."""
    names = {"6.bias"}

    def contribute(central, arrival):
        return pick(arrival.weights, names)

    def rows(setup):
        return pick(setup.weights, names)

    part = Part(rows=rows, contribute=contribute, aggregate=lambda _, uploads: Update(rows=uploads), individual=True)
    made = federation(method(part))
    made.play()
    assert len({tuple(row(made, c).flat.tolist()) for c in made.clients}) == 4
    mean = sum(len(d.train.y) * row(made, c)["6.bias"] for c, d in made.clients.items()) / 80
    assert torch.allclose(mean, made.server["share"]["6.bias"], atol=1e-14)


def test_an_individual_upload_has_no_weight():
    made = federation(method(replace(echo(), contribute=lambda central, arrival: (arrival.own, 2.0))))
    with pytest.raises(UsageError, match="gossip: individual uploads have no mean: weigh them in aggregate"):
        made.play()


def test_rows_of_any_clients_may_be_read():
    """Those of clients that have not trained are as at the start; of nobody there are none."""
    counts = []

    def message(central):
        counts.append([len(central.rows_of([]).flat), central.rows_of([0, 3])["count"].flatten().tolist()])
        return central.rows

    made = federation(method(replace(echo(), message=message)), participation=0.25)
    cohort = {sorted(made.clients).index(client) for client in made.play().cohort}
    made.messages("ada")
    assert counts[0] == [0, [0.0, 0.0]]
    assert counts[-1] == [0, [float(0 in cohort), float(3 in cohort)]]


def test_rows_of_the_server_alone_are_not_sent():
    def finish(local):
        return local.memory, tree(MINE, local.end.flat.sum(-1, keepdim=True))

    made = federation(method(replace(echo(), server_only=True, finish=finish)))
    made.play()
    assert len(made.assignment("ada", "train").messages["gossip"]) == 0
    assert row(made, "ada")["count"] == 1


def test_a_message_is_made_of_state_and_row():
    """It is sent from the first round on, since the client cannot make it."""

    def message(central):
        return Tree(ROW, central.rows.flat + central.clients[0] + 10 * central.round)

    made = federation(method(replace(echo(), message=message)))
    assert made.assignment("ben", "train").messages["gossip"].flat.tolist() == [1.0, 1.0, 1.0]
    sent = sum(t.nbytes for t in made.sent("train").values())
    assert made.play().bytes_down == 4 * (sent + 3 * SIZE)
    assert made.assignment("ben", "deploy").messages["gossip"]["count"] == 1 + 1 + 10


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            lambda u: Tree(ROW, u.flat[:1].expand(-1, 3)),
            r"gossip: .* form of its rows from \(4,\) rows",
        ),
        (lambda u: u, r"gossip: aggregate changed the form of its rows from .*count.* to .*sum"),
        (lambda u: Tree(ROW, u.flat.float().expand(-1, 3)), "from .*float64 to .*float32"),
        (lambda u: u.flat, "gossip: aggregate must return a Tree, not a tensor of shape"),
    ],
)
def test_rows_have_a_form(rows, said):
    made = federation(method(replace(echo(), aggregate=lambda _, uploads: Update(rows=rows(uploads)))))
    with pytest.raises((ValueError, TypeError), match=said):
        made.play()


def test_describe_counts_messages():
    made = federation(methods.fedavg())
    row = describe(method(gossip()), made.model)[1]
    assert (row["receives"], row["sends"]) == ("3 values in 3 tensors", "1 value in 1 tensor")

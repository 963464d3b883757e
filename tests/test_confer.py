"""What the server tells one client alone reaches that client, is counted, and is kept with its memory."""

from dataclasses import replace

import pytest
import torch

from idiolect import Method, methods
from idiolect.core.part import Part, part
from idiolect.core.scope import batch_norm, everything
from idiolect.core.tree import EMPTY, Tree, layout, pick
from idiolect.core.types import Arrival, Central
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.engines.threads import Threads
from idiolect.parts import share
from idiolect.rounds.client import mail_of
from idiolect.rounds.server import server_round
from idiolect.running.describe import describe
from idiolect.testing.checks import parametrize_with_checks, same
from idiolect.testing.worlds import RAGGED, federation, population

SIZE = 8  # bytes of a float64
LETTER = layout(("echo", "place", "letters"), (torch.Size([1]),) * 3)
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

    def finish(local, slot):
        letters = slot.mail["letters"] + 1
        upload = torch.where(local.steps == spoiled, torch.nan, own(local))
        return tree(LETTER, own(local), 0 * letters, letters), tree(MINE, upload)

    def confer(central, uploads):
        if central.round in silent:
            return EMPTY
        rows = uploads.flat
        places = torch.arange(len(rows)).to(rows)[:, None]
        told = tree(LETTER, rows.clone(), places, torch.full_like(places, central.round + 1))
        rows.zero_()  # they are the part's to spend
        return told

    def zeros(start):
        return Tree(LETTER, start.weights.flat.new_zeros(3))

    return Part(memory=zeros, mail=zeros, finish=finish, confer=confer)


@part
def gossip() -> Part:
    """Tell each client what it said."""
    return echo()


def method(made, scope=everything):
    return Method((share(scope), replace(made, name="gossip")), "Gossip")


@parametrize_with_checks([method(gossip()), method(gossip(), ~batch_norm)])
def test_a_part_that_confers_passes_all_checks(method, check):
    check(method)


def letter(made, client):
    return made.memory.get(client)[mail_of(made.method.parts[1])]


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
    for r in range(5):
        before = {c: letter(made, c) for c in clients}
        cohort = made.play().cohort
        seen |= set(cohort)
        for c in cohort:
            assert letter(made, c)["echo"] == memory(made, c)["echo"] != 0
            assert letter(made, c)["letters"] == r + 1
            assert memory(made, c)["letters"] == before[c]["letters"] + 1  # it had its last one when it trained
        assert sorted(letter(made, c)["place"].item() for c in cohort) == list(range(len(cohort)))
        for c in set(clients) - set(cohort):
            assert torch.equal(letter(made, c).flat, before[c].flat)
    assert seen == set(clients)
    engine.close()


def test_bytes_down_count_messages():
    made = federation(method(echo(silent=[1])), participation=0.5)
    sent = sum(t.nbytes for t in made.sent("train").values())
    assert [made.play().bytes_down for _ in range(3)] == [2 * (sent + extra * 3 * SIZE) for extra in (1, 0, 1)]


def test_no_message_leaves_the_last_one():
    made = federation(method(echo(silent=[1])))
    made.play()
    before = {c: letter(made, c) for c in made.clients}
    made.play()
    for c in made.clients:
        same({"mail": letter(made, c)}, {"mail": before[c]})
        assert memory(made, c)["letters"] == 2  # the rest of its memory is this round's


def test_a_dropped_client_gets_no_message():
    """Sixteen examples, eight a batch, twice, are four steps: cleo's. The others get what is theirs."""
    made = federation(method(echo(spoiled=4.0)))
    played = made.play()
    assert list(played.dropped) == ["cleo"]
    assert played.bytes_down == 4 * sum(t.nbytes for t in made.sent("train").values()) + 3 * 3 * SIZE
    assert "cleo" not in made.memory
    for c in ("ada", "ben", "dan"):
        assert letter(made, c)["echo"] == memory(made, c)["echo"] != 0


def test_a_server_round_changes_nothing_it_is_given():
    made = federation(method(echo()))
    outs = [made.train(made.assignment(c, "train")) for c in ("ada", "ben")]
    arrivals = [Arrival(out.uploads, 3, out.steps) for out in outs]
    before = [{p: t.clone() for p, t in a.uploads.items()} for a in arrivals]
    slots = {p: t.clone() for p, t in made.server.items()}
    central = Central(made.model.structure, made.server["share"], made.server["share"], made.lr, 1.0)
    after = server_round(made.method, made.server, arrivals, central, 4)
    for arrival, uploads in zip(arrivals, before, strict=True):
        same(arrival.uploads, uploads)
    same(made.server, slots)
    same({"gossip": after.server["gossip"]}, {"gossip": made.server["gossip"]})
    assert [m["gossip"]["echo"] for m in after.mail] == [u["gossip"]["sum"] for u in before]


def test_what_arrives_may_be_made_of_all_uploads():
    """So a part may confer about weights that `share` has sent already."""
    names = {"6.bias"}

    def arrive(central, arrival):
        return pick(arrival.uploads["share"], names)

    def mail(start):
        return pick(start.weights, names)

    made = federation(method(Part(mail=mail, arrive=arrive, confer=lambda central, rows: rows)))
    made.play()
    assert len({tuple(letter(made, c).flat.tolist()) for c in made.clients}) == 4
    mean = sum(len(d.train.y) * letter(made, c)["6.bias"] for c, d in made.clients.items()) / 80
    assert torch.allclose(mean, made.server["share"]["6.bias"], atol=1e-14)


@pytest.mark.parametrize(
    ("confer", "said"),
    [
        (lambda central, rows: Tree(rows.layout, rows.flat[:1]), r"gossip: told \(1,\) clients something, not 4"),
        (lambda central, rows: rows, r"gossip: changed mail from .*letters.* to .*sum"),
        (lambda central, rows: Tree(LETTER, rows.flat.float().expand(-1, 3)), "from .*float64 to .*float32"),
    ],
)
def test_a_message_has_a_form(confer, said):
    made = federation(method(replace(echo(), confer=confer)))
    with pytest.raises(ValueError, match=said):
        made.play()


def test_describe_counts_what_is_told():
    made = federation(methods.fedavg())
    row = describe(method(gossip()), made.model)[1]
    assert (row["receives"], row["sends"]) == ("3 values in 3 tensors", "1 values in 1 tensor")

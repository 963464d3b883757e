"""What must hold of clients that choose models of others, or values of their own, whatever the numbers."""

import pytest
import torch
from torch import nn

from idiolect import SGD, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.errors import UsageError
from idiolect.core.method import Method
from idiolect.core.tree import Tree, vectors
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.engines.stacked import Stacked
from idiolect.parts._first_order_mix import _mixed
from idiolect.parts._grown_mask import _grow
from idiolect.testing.checks import played, same, same_state
from idiolect.testing.worlds import SIZES, examples, federation, population

PLAIN = Training(lr=0.1, batch_size=8)
NAMES = "abcd"


def half_squares(output, target):
    return 0.5 * (output - target).square().mean()


def plane(own, models, target=(1.0, 1.0), base=(0.0, 0.0), val=None, loss=half_squares, **settings):
    """Return a federation whose client a has two weights, which its examples want at a target, and is sent models."""
    net = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    x = torch.eye(2, dtype=torch.float64)

    def wants(at):
        return None if at is None else (x, torch.tensor(at, dtype=torch.float64)[:, None])

    clients = {n: ClientData(train=wants(target), val=wants(val)) for n in NAMES}
    method = methods.fedfomo(**{"others": 3, "explore": 0.0} | settings)
    made = Federation(Model(net, loss), method, PLAIN, 4, 1.0, 0, clients)
    uploaded = torch.zeros(4, dtype=torch.float64)
    for name, at in zip(NAMES[1:], models, strict=False):
        put(made.rows, name, "first_order_mix", weight=at)
        uploaded[NAMES.index(name)] = 1.0
    made.server["first_order_mix"] = vectors(**{"others/uploaded": uploaded})
    put(made.memory, "a", "share", weight=own)
    put(made.memory, "a", "first_order_mix", weight=base)
    return made


def put(store, client, part, **named):
    """Write into a client's memory, or its row."""
    trees = store.get(client)
    tree = Tree(trees[part].layout, trees[part].flat.clone())
    for name, values in named.items():
        tree[name.replace("__", "/")].copy_(torch.as_tensor(values, dtype=torch.float64))
    store.put(client, trees | {part: tree})


def start(made):
    return made.personal("a")["weight"].flatten().tolist()


def told(made, client):
    return made.assignment(client, "train").messages["first_order_mix"]["others/told"].sum()


def test_a_mixture_by_hand():
    """Losses 1/4 (w1 - 1)^2 + 1/4 (w2 - 1)^2: slopes 1/4 to (1, 0), 0 to (2, 0), 1/2 by sqrt 2 to (1, 1)."""
    own = 0.5 / 2**0.5
    expected = [1.0, own / (0.25 + own)]
    assert start(plane([1.0, 1.0], [(1.0, 0.0), (2.0, 0.0)])) == pytest.approx(expected, abs=1e-14)


def test_scale_and_level_of_the_loss_change_nothing():
    where_to = [(1.0, 0.0), (0.3, 1.4), (-1.0, 2.0)]
    found = start(plane([0.5, 0.9], where_to))
    for loss in (lambda o, t: 7 * half_squares(o, t), lambda o, t: half_squares(o, t) + 3):
        assert start(plane([0.5, 0.9], where_to, loss=loss)) == pytest.approx(found, abs=1e-13)


def test_equal_gains_at_equal_distance_give_the_mean_and_no_distance_none():
    """The own model lies where training started: it has no weight."""
    assert start(plane([0.0, 0.0], [(1.0, 0.0), (0.0, 1.0)])) == pytest.approx([0.5, 0.5], abs=1e-15)


def test_without_a_better_model_training_is_undone():
    assert start(plane([-1.0, 0.5], [(-1.0, -1.0)], base=(0.0, 0.25))) == [0.0, 0.25]
    assert start(plane([1.0, 1.0], [(-1.0, -1.0), (1e200, 0.0)])) == [1.0, 1.0]  # an infinite loss counts for nothing


def test_validation_examples_decide_where_there_are_any():
    assert start(plane([1.0, 1.0], [(-1.0, -1.0)], val=(-1.0, -1.0))) == [-1.0, -1.0]
    assert start(plane([1.0, 1.0], [(-1.0, -1.0)])) == [1.0, 1.0]


def test_scores_are_added_as_they_are():
    """Also those below zero; to the rows of their clients alone."""
    made = plane([1.0, 1.0], [(1.0, 0.0), (-1.0, 0.0)])
    put(made.rows, "a", "first_order_mix", others__affinity=[0.0, 10.0, 20.0, 5.0])
    made.play()
    affinity = made.rows.get("a")["first_order_mix"]["others/affinity"]
    assert affinity.tolist() == pytest.approx([0.0, 10 + 0.25, 20 - 0.75, 5.0], abs=1e-14)


def test_a_client_alone_trains_alone_to_the_bit():
    clients = population({"ada": 24})
    one, other = (played(m, clients=clients, training=PLAIN) for m in (methods.fedfomo(), methods.local()))
    assert torch.equal(one.personal("ada").flat, other.personal("ada").flat)


def test_a_variance_is_that_of_the_mixture():
    net = nn.BatchNorm1d(1).double()
    structure = Model(net).structure
    one, two = (
        Tree(structure.layout, torch.tensor([1.0, 0.0, mean, var, 0.0], dtype=torch.float64))
        for mean, var in ((0.0, 1.0), (4.0, 3.0))
    )
    found = _mixed(structure, [one, two], torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert (found["running_mean"].item(), found["running_var"].item()) == (1.0, 1.5 + 0.75 * 1 + 0.25 * 9)


def sent(made, client):
    models = made.assignment(client, "train").messages["first_order_mix"]
    return [models[f"{k}/weight"].flatten().tolist() for k in range(int(models["others/told"].sum()))]


def test_who_is_sent():
    """Those with the largest affinity first, of those who have uploaded; never the client's own; ties at random."""
    places = [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]
    made = plane([0.0, 0.0], places, others=2)
    put(made.rows, "a", "first_order_mix", others__affinity=[9.0, -1.0, 2.0, 1.0])
    assert sent(made, "a") == [[2.0, 0.0], [3.0, 0.0]]
    assert len(sent(plane([0.0, 0.0], places[:1], others=2), "a")) == 1
    assert sent(plane([0.0, 0.0], places, others=3), "b") in ([[2.0, 0.0], [3.0, 0.0]], [[3.0, 0.0], [2.0, 0.0]])
    first = set()
    for made.round in range(30):
        put(made.rows, "a", "first_order_mix", others__affinity=[0.0, 0.0, 0.0, 0.0])
        first.add(sent(made, "a")[0][0])
    assert first == {1.0, 2.0, 3.0}


def test_exploring_fades():
    made = plane([0.0, 0.0], [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)], others=1, explore=1.0, decay=0.02)
    put(made.rows, "a", "first_order_mix", others__affinity=[0.0, 0.0, 5.0, 0.0])
    rounds = {}
    for made.round in range(100):
        rounds[made.round] = sent(made, "a")[0][0]
    assert {rounds[t] for t in range(25)} == {1.0, 2.0, 3.0}
    assert {rounds[t] for t in range(50, 100)} == {2.0}


def test_the_form_of_a_message_does_not_depend_on_the_population():
    one, many = (federation(methods.fedfomo(), clients=population(s)) for s in ({"ada": 8}, SIZES))
    assert one.first_messages["first_order_mix"].layout is many.first_messages["first_order_mix"].layout
    many.play()
    assert many.assignment("ada", "train").messages["first_order_mix"].layout is (
        one.first_messages["first_order_mix"].layout
    )
    assert told(many, "ada") == 3


def bare(method, training=PLAIN, rounds=0):
    """Return a federation on a network of two matrices and nothing else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    clients = {name: ClientData(train=examples(name, n)) for name, n in SIZES.items()}
    made = Federation(Model(net), method, training, 4, 1.0, 0, clients)
    for _ in range(rounds):
        made.play()
    return made


def set_masks(made, **masks):
    for client in made.clients:
        put(made.memory, client, "grown_mask", **{f"mask__{n}.weight": value for n, value in masks.items()})


def test_without_growth_it_is_averaging():
    """Over whole tensors, statistics among them; no pass is added."""
    one, other = played(methods.fedselect(growth=0.0)), played(methods.fedavg("uniform"))
    same({"share": one.server["share"]}, {"share": other.server["share"]}, 1e-15)
    assert one.play().gradients == other.play().gradients


def test_where_all_is_personal_it_is_local_training():
    """Whatever is shared is never used, and stays."""
    made, alone = bare(methods.fedselect(growth=1.0, limit=1.0), rounds=1), bare(methods.local())
    for client in made.clients:
        own = made.memory.get(client)["grown_mask"]
        assert all(own[f"mask/{n}"].all() for n in ("1.weight", "3.weight"))
        put(alone.memory, client, "share", **{n: own[n] for n in ("1.weight", "3.weight")})
    nonsense = made.server["share"] * 0.0 + 7.0
    made.server["share"], alone.round = nonsense, 1
    for _ in range(2):
        made.play()
        alone.play()
    assert torch.equal(made.server["share"].flat, nonsense.flat)
    for client in made.clients:
        own, trained = made.memory.get(client)["grown_mask"], alone.memory.get(client)["share"]
        assert all(torch.equal(own[n], trained[n]) for n in trained)


def test_a_mask_of_the_head_is_fedrep():
    made, other = bare(methods.fedselect(growth=0.0)), bare(methods.fedrep(head_epochs=1, weighting="uniform"))
    set_masks(made, **{"3": 1.0})
    for _ in range(3):
        made.play()
        other.play()
    for client in made.clients:
        same({"own": made.personal(client)}, {"own": other.personal(client)}, 1e-14)


def test_who_keeps_a_value_does_not_change_it_for_others():
    made = bare(methods.fedselect(growth=0.0))
    put(made.memory, "ada", "grown_mask", **{"mask__1.weight": 1.0, "mask__3.weight": 1.0})
    ends = {c: made.worker.train(made.assignment(c, "train")).uploads["share"] for c in made.clients}
    made.play()
    mean = (ends["ben"] + ends["cleo"] + ends["dan"]) / 3
    assert torch.allclose(made.server["share"].flat, mean.flat, rtol=0, atol=1e-15)


def test_a_share_grows_as_it_should():
    """Exactly so many, whatever the ties; the limit is looked at before, and may be passed once."""
    mask, counts = torch.zeros(64), [0]
    for _ in range(8):
        grown = _grow(mask, torch.zeros(64), 0.25, 0.8)
        assert (grown >= mask).all()
        mask = grown
        counts.append(int(mask.sum()))
    assert counts == [0, 16, 28, 37, 44, 49, 53, 53, 53]  # shares .25, .4375, .578, .69, .77, .83
    assert _grow(torch.tensor([1.0, 0, 0, 0]), torch.tensor([9.0, 1, 3, 2]), 0.25, 0.25).tolist() == [1, 0, 1, 0]
    assert _grow(torch.tensor([1.0, 1, 0, 0]), torch.ones(4), 0.5, 0.25).tolist() == [1, 1, 0, 0]
    assert _grow(torch.zeros(3), torch.ones(3), 0.25, 0.8).tolist() == [1, 0, 0]  # round(2.25) stay
    assert _grow(torch.zeros(7), torch.ones(7), 0.5, 0.8).tolist() == [1, 1, 1, 0, 0, 0, 0]  # round(3.5) is 4


def test_growth_goes_by_a_clients_own_participations():
    made, seen = federation(methods.fedselect(every=2), participation=0.5), dict.fromkeys(SIZES, 0)
    for _ in range(6):
        for client in made.play().cohort:
            seen[client] += 1
        for client, times in seen.items():
            mask = made.memory.get(client)["grown_mask"]["mask/4.weight"].flatten()
            expected = mask * 0
            for _ in range(times // 2):
                expected = _grow(expected, mask, 0.25, 0.8)
            assert mask.sum() == expected.sum()


def test_vectors_and_statistics_have_no_mask():
    memory = federation(methods.fedselect()).memory.get("ada")["grown_mask"]
    assert {n for n in memory if n.startswith("mask/")} == {"mask/0.weight", "mask/4.weight", "mask/6.weight"}


def test_who_has_nothing_personal_yet_has_no_first_pass_in_a_stack_either():
    settings = Training(lr=0.1, batch_size=8, optimizer=SGD(weight_decay=0.1))
    one, other = (
        played(methods.fedselect(), rounds=4, participation=0.5, engine=engine, training=settings)
        for engine in (None, Stacked(4))
    )
    same_state(one, other, 1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.first_order_mix(others=0), "others must be at least 1"),
        (lambda: parts.first_order_mix(explore=1.5), r"explore must be in \[0, 1\]"),
        (lambda: parts.first_order_mix(decay=-0.1), "decay must be at least 0"),
        (lambda: parts.grown_mask(growth=2.0), r"growth must be in \[0, 1\]"),
        (lambda: parts.grown_mask(limit=-1.0), r"limit must be in \[0, 1\]"),
        (lambda: parts.grown_mask(every=0), "every must be at least 1"),
        (
            lambda: federation(Method((parts.share(scope.batch_norm), parts.grown_mask()))),
            "no weight with two axes or more is exchanged",
        ),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(UsageError, match=said):
        make()

"""What must hold of split models, of a step looked ahead, and of clusters, whatever the numbers."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from idiolect import Method, Training, methods, parts, scope
from idiolect.compute.autograd import Model
from idiolect.core.tree import Tree, norm, overlay, pick
from idiolect.core.types import Batch
from idiolect.data import ClientData
from idiolect.engines.federation import Federation
from idiolect.testing.checks import played, same
from idiolect.testing.worlds import SIZES, examples, federation, network

PLAIN = Training(lr=0.1, local_epochs=5, batch_size=None)
HEAD = ["6.weight", "6.bias"]
FLEXIBLE = parts.flexible_sam(rho=0.05, rho_larger=0.6, top=2)


def half_squares(output, target):
    return 0.5 * (output - target).square().mean()


def line(start):
    """Return a model with one weight."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, start)
    return Model(net, half_squares)


def at_target(target, count, curvature=1.0):
    """Return examples whose mean loss is curvature * (w - target)^2 / 2."""
    x = torch.full((count, 1), curvature**0.5, dtype=torch.float64)
    return x, x * target


def same_federations(one, other):
    same({"share": one.server["share"]}, {"share": other.server["share"]}, 1e-12)
    for client in SIZES:
        same({"": one.personal(client)}, {"": other.personal(client)}, 1e-12)


def test_what_is_personal_and_what_is_shared_are_the_whole():
    structure = Model(network()).structure
    body, head = (set(federation(m).server["share"]) for m in (methods.fedper(), methods.lg_fedavg()))
    assert body | head == structure.exchangeable
    assert not body & head
    same_federations(played(methods.fedper(scope.everything)), played(methods.local()))


def test_fedrep_without_epochs_for_the_head_is_fedbabu_without_tuning():
    rep, babu = played(methods.fedrep(head_epochs=0)), played(methods.fedbabu(epochs=0))
    same_federations(rep, babu)
    refitted = played(methods.fedrep(head_epochs=1)).personal("ada")
    assert not torch.allclose(refitted["6.weight"], rep.personal("ada")["6.weight"])


def test_a_head_fitted_first_fits_the_body_that_was_received():
    """The body is the received one, the head is better on it than before, and nothing of it is kept."""
    made = played(methods.fedrep(head_epochs=20), rounds=1)
    own, kept = made.personal("ada"), made.memory.get("ada")["share"]
    body = made.model.structure.trainable.only(made.server["share"])
    assert torch.equal(pick(own, body.starts).flat, pick(made.server["share"], body.starts).flat)
    x, y = examples("ada", SIZES["ada"])
    before = overlay(own, pick(kept, HEAD))
    fitted, received = (nn.functional.cross_entropy(made.model.predict(w, x), y) for w in (own, before))
    assert fitted < received - 0.01
    same({"": made.memory.get("ada")["share"]}, {"": kept})


def test_fedrep_finds_the_representation_that_clients_have_in_common():
    """Clients y = x B w_i, with one B for all and each its own w_i: the body ends with the plane of B."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))[0]
    clients = {}
    for i in range(6):
        x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
        own = torch.randn(2, 1, generator=generator, dtype=torch.float64)
        clients[f"{i}"] = ClientData(train=(x, x @ plane @ own))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    angles = {}
    for method in (methods.fedrep(head_epochs=10), methods.fedavg()):
        made = Federation(Model(net, half_squares), method, PLAIN, 30, 1.0, 0, clients)
        for _ in range(30):
            made.play()
        body = torch.linalg.qr(made.server["share"]["0.weight"].T)[0]
        angles[method.name] = float(torch.linalg.matrix_norm(plane - body @ (body.T @ plane), 2))
    assert angles["FedRep"] < 1e-3 < 0.5 < angles["FedAvg"]


def test_frozen_tensors_do_not_count_when_gradients_are_clipped():
    """One step of clipped descent on the body alone is as long as the clip allows."""
    training = Training(lr=1.0, batch_size=None, clip=1e-3)
    made = federation(Method((parts.share(), parts.freeze())), clients={"ada": ClientData(train=examples("ada", 8))})
    made.training = training
    before = made.server["share"]
    made.play()
    moved = pick(made.server["share"] - before, made.model.structure.names("weight"))
    assert float(norm(moved)) == pytest.approx(1e-3, rel=1e-2)
    assert not moved["6.weight"].any()
    assert made.server["share"]["1.running_mean"].ne(before["1.running_mean"]).all()


def test_a_perturbed_fedrep_fits_its_heads_unperturbed():
    plain, sharp = (played(m, rounds=1) for m in (methods.fedrep(), methods.fedrep() + FLEXIBLE))
    same({"": plain.memory.get("ada")["share"]}, {"": sharp.memory.get("ada")["share"]}, 1e-12)
    assert float(norm(plain.server["share"] - sharp.server["share"])) > 1e-4


def test_a_perturbed_ditto_leaves_personal_models_to_the_anchor():
    """The shared model is FedAvg's under the same perturbation; a personal one sees it as its anchor alone."""
    sharp = played(methods.ditto(0.5) + FLEXIBLE)
    same({"": sharp.server["share"]}, {"": played(methods.fedavg() + FLEXIBLE).server["share"]}, 1e-12)
    free = (played(m).personal("ada") for m in (methods.ditto(0.0), methods.ditto(0.0) + FLEXIBLE))
    assert torch.equal(*(tree.flat for tree in free))
    assert not torch.allclose(sharp.personal("ada").flat, played(methods.ditto(0.5)).personal("ada").flat, atol=1e-5)


@pytest.mark.parametrize(("variant", "power"), [("first_order", 1), ("hessian_free", 2)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_meta_gradient_on_a_quadratic_is_known_by_hand(variant, power, count):
    """A step a leaves (1 - a h) of the way; the Hessian is h, so that it enters once more if it is not left out."""
    model, part = line(5.0), parts.meta_gradient(0.2, variant)
    found = part.gradient(model.grad, None)(model.initial, Batch(*at_target(2.0, count, 3.0)))
    assert found.gradient["weight"].item() == pytest.approx(3.0 * 0.4**power * 3.0, abs=1e-9)
    assert found.loss.item() == pytest.approx(3.0 * 9.0 / 2)


def test_hessian_free_is_the_gradient_of_the_loss_after_a_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model, (x, y) = Model(net), (t.repeat_interleave(2, 0) for t in examples("ada", 8))
    weights = {n: t.detach() for n, t in net.named_parameters()}

    def loss(at):
        return nn.functional.cross_entropy(functional_call(net, at, (x,)), y)

    def after_a_step(at):
        slope = grad(loss)(at)
        return loss({n: at[n] - 0.5 * slope[n] for n in at})

    expected = Tree.of(grad(after_a_step)(weights)).flat
    exact, rough = (
        parts.meta_gradient(0.5, v, 1e-4).gradient(model.grad, None)(model.initial, Batch(x, y)).gradient.flat
        for v in ("hessian_free", "first_order")
    )
    assert torch.allclose(exact, expected, atol=1e-8)
    assert not torch.allclose(rough, expected, atol=1e-3)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_client_predicts_after_plain_steps_on_all_its_examples(steps):
    """Whatever the run's optimizer, rate and batches are: each leaves (1 - a h) of the way."""
    clients = {"a": ClientData(train=at_target(2.0, 7, 3.0))}
    training = Training(lr=9.0, batch_size=2, clip=1e-9)
    made = Federation(line(5.0), methods.per_fedavg(0.2, steps=steps), training, 1, 1.0, 0, clients)
    assert made.personal("a")["weight"].item() == pytest.approx(2.0 + 3.0 * 0.4**steps)


def test_ifca_tells_clients_of_two_kinds_apart():
    """Each cluster ends at its members' mean by examples; FedAvg in between, where nobody is served."""
    targets = {"a": (4.0, 10), "b": (5.0, 30), "c": (-4.0, 20), "d": (-6.0, 20)}
    clients = {name: ClientData(train=at_target(*made)) for name, made in targets.items()}
    ends = {}
    for method in (methods.ifca(2), methods.fedavg()):
        made = Federation(line(0.5), method, PLAIN, 40, 1.0, 0, clients)
        for _ in range(40):
            made.play()
        ends[method.name] = {c: made.personal(c)["weight"].item() for c in clients}
    assert ends["IFCA"] == pytest.approx({"a": 4.75, "b": 4.75, "c": -5.0, "d": -5.0}, abs=1e-6)
    assert ends["FedAvg"]["a"] == pytest.approx((4.75 - 5.0) / 2, abs=1e-6)


def test_a_cluster_that_nobody_chose_keeps_its_bits_and_one_that_diverged_is_never_chosen():
    made = federation(methods.ifca(3))
    clusters = made.server["clusters"].clone()
    rows = clusters.flat.view(3, -1)
    rows[0] = torch.nan
    rows[2] *= 1e3
    made.server = {**made.server, "clusters": clusters}
    made.play()
    after = made.server["clusters"].flat.view(3, -1)
    assert {made.memory.get(c)["clusters"].flat.tolist().index(1.0) for c in SIZES} == {1}
    assert after[0].isnan().all()
    assert torch.equal(after[2], rows[2])
    assert torch.equal(after[1], made.server["share"].flat)
    assert torch.isfinite(made.personal("ada").flat).all()


def test_clusters_begin_apart_by_what_they_are_told():
    """The first is the initial model; statistics are everybody's; each tensor is off by its own size."""
    shared = federation(methods.fedavg()).server["share"]
    state = federation(methods.ifca(4, noise=0.3)).server["clusters"]
    first, *others = (Tree(shared.layout, row) for row in state.flat.view(4, -1))
    assert torch.equal(first.flat, shared.flat)
    for other in others:
        assert torch.equal(other["1.running_var"], shared["1.running_var"])
        off, size = ((t["4.weight"]).square().mean().sqrt() for t in (other - shared, shared))
        assert float(off / size) == pytest.approx(0.3, rel=0.1)
        assert abs(float((other - shared)["4.weight"].mean() / off)) < 0.2
    assert len({float(other["0.weight"].sum()) for other in (first, *others)}) == 4
    again = federation(methods.ifca(4, noise=0.3, seed=1)).server["clusters"]
    assert not torch.allclose(again.flat, state.flat)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parts.head_first(epochs=-1), "epochs"),
        (lambda: parts.meta_gradient(-0.1), "rate"),
        (lambda: parts.meta_gradient(0.1, delta=0.0), "delta"),
        (lambda: parts.meta_gradient(0.1, steps=-1), "steps"),
        (lambda: parts.meta_gradient(0.1, "exact"), "variant"),
        (lambda: parts.clusters(0), "count"),
        (lambda: parts.clusters(2, noise=0.0), "noise"),
        (lambda: federation(methods.fedper() + parts.clusters(2, scope.head)), "exchanged"),
        (lambda: federation(methods.local() + parts.clusters(2)), "exchanged"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said) as refusal:
        make()
    assert "\n" not in str(refusal.value)

"""What parts are given to work with: halves of a batch, and the loss of all of a client's examples."""

import pytest
import torch
from torch import nn

from idiolect import Method, Part, parts, scope
from idiolect.core.part import part
from idiolect.core.tree import Tree
from idiolect.core.types import Batch, ClientRows, Lockstep, halves
from idiolect.engines.processes import Processes
from idiolect.engines.sequential import Sequential
from idiolect.engines.stacked import Stacked
from idiolect.testing.worlds import RAGGED, examples, federation, population


def test_halves_hold_every_example_once_and_of_one_both_hold_it():
    for count, sizes in ((1, (1, 1)), (2, (1, 1)), (5, (3, 2)), (8, (4, 4))):
        x, y = torch.randn(count, 3), torch.arange(count)
        one, other = halves(Batch(x, y, key=7))
        assert (len(one.y), len(other.y)) == sizes
        assert sorted({*one.y.tolist(), *other.y.tolist()}) == y.tolist()
        assert all(torch.equal(half.x, x[half.y]) and half.key == 7 for half in (one, other))
        assert [half.frozen for half in (one, other)] == [size == 1 for size in sizes]
    assert all(half.frozen for half in halves(Batch(x, y, frozen=True)))


def test_halves_of_a_stack_are_those_of_its_clients():
    x, y = torch.randn(3, 6, 2), torch.arange(18).view(3, 6)
    groups = (ClientRows(slice(0, 2), Batch(x[:2], y[:2])), ClientRows(slice(2, 3), Batch(x[2:, :3], y[2:, :3])))
    stack = halves(Lockstep(groups, 3))
    for client, batch in enumerate((Batch(x[0], y[0]), Batch(x[1], y[1]), Batch(x[2, :3], y[2, :3]))):
        for alone, together in zip(halves(batch), stack, strict=True):
            group = together.groups[client // 2]
            assert torch.equal(group.batch.x[client % 2], alone.x)
            assert torch.equal(group.batch.y[client % 2], alone.y)
            assert group.batch.frozen == alone.frozen
    assert {half.live for half in stack} == {3}


@part
def asking() -> Part:
    """Keep the loss of all examples and its gradient."""

    def memory(setup):
        slope = {f"slope/{n}": torch.zeros_like(setup.weights[n]) for n in setup.structure.trainable.names}
        return Tree.of({**slope, "loss": setup.weights.flat.new_zeros(2)})

    def begin(local, weights):
        whole, cheap = local.whole(weights), local.whole(weights, only=scope.nothing)
        assert len(cheap.gradient) == 0
        found = torch.stack([whole.loss, cheap.loss], dim=-1)
        return weights, Tree(local.memory.layout, torch.cat([whole.gradient.flat, found], dim=-1))

    return Part(memory=memory, begin=begin)


@pytest.mark.parametrize("engine", [Sequential(), Stacked(6), Stacked(1), Processes(2)], ids=repr)
def test_the_whole_loss_is_that_of_all_examples_at_once(engine):
    method = Method((parts.share(), asking()))
    made = federation(method, clients=population(RAGGED), engine=engine)
    made.play()
    module = made.model.module(made.model.initial)
    for client, count in RAGGED.items():
        x, y = examples(client, count)
        loss = nn.functional.cross_entropy(module(x), y)
        slope = torch.autograd.grad(loss, list(module.parameters()))
        kept = made.memory.get(client)["asking"]
        assert torch.allclose(kept["loss"], loss.detach().expand(2), atol=1e-12)
        for name, expected in zip(made.model.structure.trainable.names, slope, strict=True):
            assert torch.allclose(kept[f"slope/{name}"], expected, atol=1e-12), (client, name)
    engine.close()

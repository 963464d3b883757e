"""A personal model that reads the inputs it is given before it predicts for them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call

from idiolect.compute.autograd import Model
from idiolect.core.nest import Nest, mapped, rows_in, tensors
from idiolect.core.structure import initial_tree
from idiolect.core.tree import Tree


class Adapting(nn.Module):
    """A module that adapts to each batch it is given, in evaluation mode; nothing of it lasts.

    The batch is all that is read: predictions for a few inputs differ from those for the same inputs among many. In
    training mode it is the plain module.

    Args:
        model: the model.
        weights: those that predict before they adapt.
        adapt: weights and unlabeled inputs to the weights that predict for these.

    Attributes:
        module: the personal model itself, which does not adapt; its weights are what adapts.
    """

    def __init__(self, model: Model, weights: Tree, adapt: Callable[[Tree, Nest], Tree]) -> None:
        super().__init__()
        self.module = model.module(weights).to(model.home)
        self._model, self._adapt = model, adapt
        self.eval()

    def forward(self, *alone: Nest, **named: Nest) -> Nest:
        """Return the outputs for a batch, given as the module itself takes it, after adapting to it."""
        x = named or (alone if len(alone) > 1 else alone[0])
        adapted = {} if self.training or not rows_in(x) else self._adapted(x)
        return functional_call(self.module, adapted, alone, named)

    def _adapted(self, x: Nest) -> dict[str, Tensor]:
        weights, device = initial_tree(self.module, self._model.structure), self._model.device
        inputs = mapped(lambda t: t.to(device), x)
        adapted = self._adapt(Tree(weights.layout, weights.flat.to(device)), inputs)
        return {name: t.to(tensors(x)[0].device) for name, t in self._model.tensors(adapted).items()}

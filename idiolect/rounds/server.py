"""The server's round: add each upload to the weighted means as it arrives, then call `aggregate` of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from idiolect.core.errors import UsageError, kind_of
from idiolect.core.method import Method
from idiolect.core.part import Part, run_hook
from idiolect.core.tree import EMPTY, Layout, Tree, overlay, pick, rounded
from idiolect.core.types import Arrival, Central, Trees, Update, Weight
from idiolect.rounds.mean import Mean


class Upload(NamedTuple):
    """An upload of one client."""

    client: int
    """Its place in the population."""
    uploads: Trees
    """One tree per part."""
    examples: int
    """Training examples of the client."""
    steps: torch.Tensor
    """(1,) local steps that it took."""


class Aggregated(NamedTuple):
    """The server after a round."""

    clients: tuple[int, ...]
    """The clients whose uploads counted, by their place in the population, in the order of arrival."""
    server: Trees
    """One state per part."""
    rows: Trees
    """The new rows of the clients that arrived, ``(n, ...)`` in the order of arrival, by part that has rows."""


RowsOf = Callable[[Sequence[int]], Trees]
"""Places of clients in the population -> their rows, ``(n, ...)``, by part that has rows."""


def broadcast(method: Method, server: Trees, central: Central) -> Trees:
    """Return what is sent to all clients that train: the shared tensors, and the state of each part."""
    shared = server["share"]
    for part in method.parts:
        if part.broadcast:
            view = replace(central, old=shared, new=shared, state=server[part.name])
            shared = same_layout(part, "broadcast", "the shared tensors", shared, run_hook(part, "broadcast", view))
    return {p.name: EMPTY if p.server_only else server[p.name] for p in method.parts} | {"share": shared}


def server_round(
    method: Method, server: Trees, arrivals: Iterable[Upload], central: Central, population: int, rows: RowsOf
) -> Aggregated:
    """Aggregate one round's uploads into the next state of the server. The inputs are not changed.

    Args:
        method: the method.
        server: the state of the server, one tree per part.
        arrivals: the cohort's uploads, consumed one by one, so that memory does not grow with the cohort unless a
            part is `individual`.
        central: what hooks of the server see; its `old` and `new` are both the shared tensors that clients received.
        population: number of clients in the population.
        rows: places of clients -> their rows, ``(n, ...)``, by part.
    """
    aggregating = [p for p in method.parts if p.aggregate]
    means = {p.name: Mean() for p in aggregating if not p.individual}
    uploads: dict[str, list[Tree]] = {p.name: [] for p in aggregating if p.individual}
    clients: list[int] = []
    for upload in arrivals:
        clients.append(upload.client)
        for part in aggregating:
            tree, weight = _contribution(part, replace(central, state=server[part.name]), upload)
            if part.individual:
                if not isinstance(weight, float) or weight != 1.0:
                    raise UsageError(f"{part.name}: individual uploads have no mean: weigh them in aggregate")
                uploads[part.name].append(tree.clone())  # the next upload may overwrite this one in place
            else:
                equal = part.uniform or method.weighting == "uniform"
                try:
                    means[part.name].add(tree, 1.0 if equal else float(upload.examples), weight)
                except ValueError as error:
                    raise UsageError(f"{part.name}: contribute: {error}") from None
    central = replace(central, participation=len(clients) / population, clients=tuple(clients))
    after, changed = dict(server), rows(clients)
    for part in aggregating:
        view = replace(central, state=server[part.name])
        if part.rows:
            view = replace(view, rows=changed[part.name], rows_of=partial(_rows_of, rows, part))
        if part.individual:
            trees = uploads[part.name]
            arrived = Tree(trees[0].layout, torch.stack([tree.flat for tree in trees]))
        else:
            arrived = means[part.name].result(partial(_default, view))
        update = _checked(part, run_hook(part, "aggregate", view, arrived))
        if update.state is not None:
            after[part.name] = same_layout(part, "aggregate", "its state", server[part.name], update.state)
        if update.rows is not None:
            changed[part.name] = same_layout(part, "aggregate", "its rows", view.rows, update.rows)
        if update.shared is not None:
            moved = same_layout(part, "aggregate", "the shared tensors", server["share"], update.shared)
            central = replace(central, new=moved)
    return Aggregated(central.clients, {**after, "share": central.new}, changed)


def message(part: Part, central: Central) -> Tree:
    """Return what a part sends to one client alone; `central` holds the part's state and the client's row."""
    if part.message:
        return tree_of(part, "message", run_hook(part, "message", central))
    return EMPTY if part.server_only else central.rows


def _contribution(part: Part, central: Central, upload: Upload) -> tuple[Tree, Weight]:
    """Return what an upload contributes to the mean of a part, and its weight."""
    own = upload.uploads[part.name]
    if not part.contribute:
        return own, 1.0
    arrival = Arrival(own, upload.uploads["share"], upload.examples, upload.steps)
    found = run_hook(part, "contribute", central, arrival)
    tree, weight = found if isinstance(found, tuple) else (found, 1.0)
    return tree_of(part, "contribute", tree), weight


def _rows_of(rows: RowsOf, part: Part, clients: Sequence[int]) -> Tree:
    return rows(clients)[part.name]


def _default(central: Central, like: Layout) -> Tree:
    """Return what a mean is where all weights are zero: the value in the state, or in the shared tensors, or 0."""
    zeros = Tree(like, central.old.flat.new_zeros(like.total))
    return overlay(zeros, *(_fitting(tree, like) for tree in (central.old, central.state)))


def _fitting(tree: Tree, like: Layout) -> Tree:
    return pick(tree, {name for name, shape in tree.layout.shape_of.items() if like.shape_of.get(name) == shape})


def _checked(part: Part, update: object) -> Update:
    if not isinstance(update, Update):
        raise UsageError(f"{part.name}: aggregate must return an Update, not {kind_of(update)}")
    return update


def tree_of(part: Part, hook: str, found: object) -> Tree:
    """Return the result of a hook; raise if it is not a tree of floating tensors."""
    if not isinstance(found, Tree):
        raise UsageError(f"{part.name}: {hook} must return a Tree, not {kind_of(found)}")
    if not found.flat.is_floating_point():
        raise UsageError(f"{part.name}: {hook} returned {found.flat.dtype} tensors: use floating ones")
    return found


def same_layout(part: Part, hook: str, what: str, before: Tree, after: object) -> Tree:
    """Return the result of a hook, `rounded`; raise if its names, shapes and dtype are not those of `before`."""
    found = rounded(tree_of(part, hook, after), before)
    if (
        found.layout is not before.layout
        or found.flat.dtype != before.flat.dtype
        or found.flat.shape != before.flat.shape
    ):
        raise UsageError(f"{part.name}: {hook} changed the form of {what} from {_form(before)} to {_form(found)}")
    return found


def _form(tree: Tree) -> str:
    lead = f"{tuple(tree.flat.shape[:-1])} rows of " if tree.flat.dim() > 1 else ""
    return f"{lead}{tree} of {tree.flat.dtype}"

"""A trial round before training, which checks the results of all hooks once, so that training steps need no checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from idiolect.core.errors import UsageError, kind_of
from idiolect.core.method import Method
from idiolect.core.part import HOOKS, Part, guarded
from idiolect.core.structure import ModelStructure
from idiolect.core.tree import Tree, rounded
from idiolect.core.types import Arrival, Central, Gradient, Local, Objective, Setup, Step, Stream, Trees
from idiolect.rounds.client import Assignment, Worker
from idiolect.rounds.server import Upload, broadcast, server_round
from idiolect.rounds.server_state import ServerState


def check_method(state: ServerState, worker: Worker, work: Assignment) -> None:
    """Broadcast, train one client for one step, aggregate and deploy, and check the results of all hooks.

    Args:
        state: the server before its first round; it is not changed.
        worker: trains and deploys.
        work: the inputs of a client's round; only the first batch is used.

    Raises:
        UsageError: one line that names the part, the hook, its result and what was expected.
    """
    method = checked(state.method, state.model.structure)
    trial = replace(worker, method=method)
    first = state.server["share"]
    broadcast(method, state.server, Central(state.model.structure, first, first, work.lr))
    one = _cut(work)
    out = trial.train(one)
    shared = work.received["share"]
    central = Central(state.model.structure, shared, shared, work.lr)
    rows = {name: Tree(row.layout, row.flat[None]) for name, row in state.first_rows.items()}
    upload = Upload(0, out.uploads, 1, out.steps)
    server_round(method, state.server, [upload], central, 1, lambda clients: rows)
    trial.deploy(one)


class FirstBatch:
    """A stream that consists of the first batch of another one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.order = stream.order

    @property
    def batches(self) -> int | Tensor:
        """Number of batches in one pass."""
        found = self._stream.batches
        return min(found, 1) if isinstance(found, int) else found.clamp(max=1)

    def epochs(self, count: int) -> Sequence[Step]:
        """Return the first batch, once for any number of passes."""
        return self._stream.epochs(1)[:1]


def checked(method: Method, structure: ModelStructure) -> Method:
    """Return a method whose hooks check their results."""
    return replace(method, parts=tuple(_checked(part, structure) for part in method.parts))


def _checked(part: Part, structure: ModelStructure) -> Part:
    checks: dict[str, Any] = dict.fromkeys(HOOKS, _found) | {
        "begin": _begin,
        "objective": _objective,
        "gradient": _gradient,
        "direction": _direction,
        "finish": _finish,
        "deploy": _deploy,
    }
    hooks = {name: getattr(part, name) for name in checks if getattr(part, name) and name != "attach"}
    return replace(part, **{n: _wrapped(part, n, hook, checks[n], structure) for n, hook in hooks.items()})


@dataclass(frozen=True)
class _Hook:
    """A hook of a part, and the checks of its result."""

    part: Part
    name: str
    structure: ModelStructure

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise UsageError(f"{self.part.name}: {self.name} {message}")

    def run(self, function: Callable[..., Any], names: str, *args: object) -> Any:  # noqa: ANN401
        """Return what the hook, or a function that it returned, gives; refuse one that fails or changes its inputs."""
        given = _trees(names, args)
        before = {name: tree.flat.clone() for name, tree in given.items()}
        try:
            found = guarded(f"{self.part.name}: {self.name}", function, function)(*args)
        except UsageError as error:
            lacks = self.name == "deploy" and not self.part.transductive and "NoneType" in str(error)
            hint = "; local.inputs is None unless the part says transductive=True" if lacks else ""
            raise UsageError(f"{error}{hint}") from error.__cause__
        changed = next((n for n, tree in given.items() if not torch.equal(_bits(tree.flat), _bits(before[n]))), None)
        self.require(changed is None, f"changes {changed} in place: return a new tree, such as a + b")
        return found

    def tree(self, found: object, what: str) -> Tree:
        self.require(isinstance(found, Tree), f"must return {what}, not {kind_of(found)}")
        assert isinstance(found, Tree)
        self.require(found.flat.is_floating_point(), f"returned {found.flat.dtype} tensors: use floating ones")
        return found

    def pair(self, found: object, what: str) -> tuple[object, object]:
        two = isinstance(found, tuple) and len(found) == 2
        self.require(two, f"must return {what}, two Trees, not {kind_of(found)}")
        return found  # type: ignore[return-value]

    def memory(self, found: object, local: Local) -> None:
        tree, like = self.tree(found, "its memory as a Tree"), local.memory
        same = tree.layout is like.layout and rounded(tree, like).flat.dtype == like.flat.dtype
        self.require(same, f"changed the form of its memory from {_form(like)} to {_form(tree)}")

    def moving(self, tree: Tree) -> None:
        shapes = self.structure.trainable.shape_of
        wrong = [n for n, shape in tree.layout.shape_of.items() if shapes.get(n) != shape]
        self.require(not wrong, f"returned {wrong[:1]}, which is no trainable tensor of the model of that shape")


def _wrapped(part: Part, name: str, hook: Callable[..., Any], check: Callable[..., Any], s: ModelStructure) -> Any:  # noqa: ANN401
    about = _Hook(part, name, s)

    @wraps(hook)
    def call(*args: Any) -> Any:  # noqa: ANN401
        return check(about, about.run(hook, HOOKS[name], *args), *args)

    return call


def _found(hook: _Hook, found: object, *args: object) -> object:
    return found


def _trees(names: str, args: Sequence[object]) -> dict[str, Tree]:
    """Return the trees that a function is given, by the names under which it knows them."""
    found: dict[str, Tree] = {}
    for name, arg in zip(names.split(", "), args, strict=True):
        if isinstance(arg, Local | Central | Setup):
            found |= {f"{name}.{f.name}": tree for f in fields(arg) if isinstance(tree := getattr(arg, f.name), Tree)}
        elif isinstance(arg, Arrival):
            found |= {f"{name}.{field}": tree for field, tree in arg._asdict().items() if isinstance(tree, Tree)}
        elif isinstance(arg, Tree):
            found[name] = arg
    return found


def _begin(hook: _Hook, found: object, local: Local, weights: Tree) -> object:
    start, memory = hook.pair(found, "(weights to start from, memory)")
    row = hook.tree(start, "the weights to start from as a Tree")
    whole = row.layout is hook.structure.layout
    hook.require(whole, f"returned weights with other tensors than the model's: {_odd(row, hook.structure)}")
    hook.memory(memory, local)
    return found


def _objective(hook: _Hook, found: object, local: Local) -> object:
    hook.require(isinstance(found, Objective), f"must return an Objective, not {kind_of(found)}")
    assert isinstance(found, Objective)

    def loss(*args: Any) -> Tensor:  # noqa: ANN401
        value: Tensor = guarded(f"{hook.part.name}: the loss of its objective", found.loss, found.loss)(*args)
        number = isinstance(value, Tensor) and value.dim() == 0
        hook.require(number, f"has a loss that must be the mean over the batch, one number, not {kind_of(value)}")
        return value

    return found._replace(loss=loss)


def _gradient(hook: _Hook, found: object, grad: object, local: Local) -> object:
    hook.require(callable(found), f"must return a function (weights, batch) -> Gradient, not {kind_of(found)}")

    def wrapped(at: Tree, batch: Step) -> Gradient:
        out = hook.run(found, "weights, batch", at, batch)  # type: ignore[arg-type]
        hook.require(isinstance(out, Gradient), f"must give a Gradient, not {kind_of(out)}")
        hook.moving(hook.tree(out.gradient, "a Gradient of Trees"))
        if not _finite(out.gradient) and _finite(grad(at, batch).gradient):  # type: ignore[operator]
            hook.require(False, f"of {hook.part!r} gives a gradient that is not finite: check its arguments")
        return out  # type: ignore[no-any-return]

    return wrapped


def _direction(hook: _Hook, found: object, direction: Tree, *args: object) -> object:
    tree = hook.tree(found, "a direction as a Tree")
    hook.moving(tree)
    fine = _finite(tree) or not _finite(direction)
    hook.require(fine, f"of {hook.part!r} gives a direction that is not finite: check its arguments")
    return found


def _finish(hook: _Hook, found: object, local: Local) -> object:
    memory, upload = hook.pair(found, "(memory, upload)")
    hook.memory(memory, local)
    hook.tree(upload, "its upload as a Tree")
    return found


def _deploy(hook: _Hook, found: object, local: Local, weights: Tree) -> object:
    row = hook.tree(found, "the weights that predict as a Tree")
    missing = [n for n in hook.structure.layout.names if n not in row]
    hook.require(not missing, f"left out {missing[:1]}: return all tensors of the model")
    return found


def _odd(tree: Tree, structure: ModelStructure) -> list[str]:
    return sorted(set(tree) ^ set(structure.layout.names))[:4] or ["the same in another order"]


def _finite(tree: Tree) -> bool:
    return bool(torch.isfinite(tree.flat).all())


def _bits(flat: Tensor) -> Tensor:
    """Return values among which NaN equals NaN."""
    return flat.nan_to_num(nan=torch.pi) if flat.is_floating_point() else flat


def _form(tree: Tree) -> str:
    return f"{tree} of {tree.flat.dtype}"


def check_stack(worker: Worker, stack: Assignment, alone: Sequence[Assignment]) -> None:
    """Check that clients in a stack get the same results as each client alone.

    Raises:
        UsageError: one line that names the part that mixes clients.
    """
    apart = _difference(worker, stack, alone)
    if not apart:
        return
    share, *others = worker.method.parts
    for part in others:
        single = replace(worker, method=replace(worker.method, parts=(share, part)))
        if _difference(single, _only(stack, single.method), [_only(w, single.method) for w in alone]):
            raise UsageError(
                f"{part.name}: mixes clients that are trained in a stack ({apart}): reduce along the last axis "
                "(dim=-1, keepdim=True), or take Machine(engine='sequential')"
            )
    raise UsageError(f"the parts of {worker.method.name} mix clients that are trained in a stack: {apart}")


def _only(work: Assignment, method: Method) -> Assignment:
    def own(trees: Trees) -> Trees:
        return {part.name: trees[part.name] for part in method.parts}

    return work._replace(received=own(work.received), memory=own(work.memory), messages=own(work.messages))


def _difference(worker: Worker, stack: Assignment, alone: Sequence[Assignment]) -> str:
    """Return how a stack and its clients alone differ by more than rounding, or an empty string."""
    together, singles = worker.train(_cut(stack)), [worker.train(_cut(work)) for work in alone]
    for kind in ("uploads", "memory"):
        for part, tree in getattr(together, kind).items():
            rows = tree.flat.expand(len(alone), -1)
            for row, single in zip(rows, singles, strict=True):
                own = getattr(single, kind)[part].flat
                gap = float((row - own).abs().max()) if own.numel() else 0.0
                if not gap <= 1e-3 * (1 + float(own.abs().max()) if own.numel() else 1):
                    return f"{kind} of {part} differ by {gap:.3g}"
    return ""


def _cut(work: Assignment) -> Assignment:
    return work._replace(stream=FirstBatch(work.stream), validation=FirstBatch(work.validation))

"""Bugs in what a module is taken for: its head, buffers, modes, hidden state and scopes."""

from mutants.planted import Mutant

HEAD, BUFFERS, MODES, HIDDEN, SCOPES = (
    f"tests/test_structure_{of}.py" for of in ("head", "buffers", "modes", "hidden", "scopes")
)
    f"tests/test_structure_{of}.py" for of in ["head", "buffers", "modes", "hidden", "scopes"]
)
SITES = "tests/test_flower_structure.py"

MUTANTS = [
    Mutant(
        "head: the layer around the one that makes the output",
        "core/makers.py",
        "            if inner.pop():  # layers inside of this one have made its output\n                return\n",
        "            inner.pop()\n",
        HEAD,
    ),
    Mutant(
        "head: normalization at the end is taken for a layer",
        "core/makers.py",
        "return any(p.dim() > 1 for p in own) and not normalizes(module)",
        "return bool(own)",
        HEAD,
    ),
    Mutant(
        "head: weights outside of their layer are overlooked",
        "core/makers.py",
        "            tensors[name] = None\n",
        "            pass\n",
        HEAD,
    ),
    Mutant(
        "head: one of several layers",
        "core/structure.py",
        "if len(self.makers.layers) == 1 == len(found):",
        "if found:",
        HEAD,
    ),
    Mutant(
        "head: a tied weight is left out",
        "core/structure.py",
        "frozenset(own | tied & self",
        "frozenset(own - tied & self",
        HEAD,
    ),
    Mutant(
        "head: a tied weight under its other name",
        "core/structure.py",
        "return self.aliases.get(name, name)",
        "return name",
        HEAD,
    ),
    Mutant(
        "named: what a part attaches belongs to the layer",
        "core/scope.py",
        "if i.name in structure.exchangeable and not i.attached",
        "if i.name in structure.exchangeable",
        HEAD,
    ),
    Mutant(
        "buffers: all floating ones are statistics",
        "core/structure.py",
        '            kind = "state" if changes else None\n',
        '            kind = "statistic" if changes else None\n',
        BUFFERS,
    ),
    Mutant(
        "buffers: constants are followed",
        "core/structure.py",
        "name in trial.changed if trial and",
        "True if trial and",
        BUFFERS,
    ),
    Mutant(
        "buffers: the trial moves the model",
        "compute/trial.py",
        "module = copied(model.training)",
        "module = model.training",
        BUFFERS,
    ),
    Mutant(
        "buffers: NaN is a change",
        "compute/hidden.py",
        "return (one == other) | ((one != one) & (other != other))",
        "return one == other",
        BUFFERS,
    ),
    Mutant(
        "buffers: integers stay numbers",
        "compute/autograd.py",
        "row[n].to(integers[n]) if n in integers else",
        "",
        BUFFERS,
    ),
    Mutant(
        "buffers: the shared model with the initial ones",
        "running/evaluation.py",
        "pick(own.weights, learner.structure.own_state)",
        "pick(own.weights, frozenset())",
        BUFFERS,
    ),
    Mutant(
        "buffers: passes before the trial move what is not followed",
        "running/validate.py",
        "untried = model.copy()",
        "untried = model",
        BUFFERS,
    ),
    Mutant(
        "buffers: a changed parameter is no matter",
        "compute/trial.py",
        "    if weights:\n",
        "    if False:\n",
        BUFFERS,
    ),
    Mutant(
        "sites: the form has what only a site can know",
        "flower/protocol/model_form.py",
        "pick(state.model.initial, state.model.structure.exchangeable)",
        "state.model.initial",
        SITES,
    ),
    Mutant(
        "kernels: a layer's own mode",
        "compute/trace.py",
        "if layer.training != training), None)",
        "if False), None)",
        MODES,
    ),
    Mutant(
        "kernels: a setting that the pass changes",
        "compute/trace.py",
        "if changed := changes(before, held(module)):",
        "if changed := changes(before, before):",
        MODES,
    ),
    Mutant(
        "kernels: a call of its own",
        "compute/trace.py",
        "if type(layer).__call__ is not nn.Module.__call__:",
        "if False:",
        MODES,
    ),
    Mutant(
        "modes: layers like batch normalization move when frozen",
        "compute/autograd.py",
        "if normalizes_by_batch(layer):",
        "if isinstance(layer, _BatchNorm):",
        MODES,
    ),
    Mutant(
        "hidden: no other examples in between",
        "compute/hidden.py",
        "    run(other)\n    if _apart(first, run(batch)):",
        "    if False:",
        HIDDEN,
    ),
    Mutant(
        "hidden: a count is not pushed ahead", "compute/hidden.py", "_LATER = (1, 997, 10**6)", "_LATER = (0,)", HIDDEN,
    ),
    Mutant(
        "hidden: buffers of a loss",
        "compute/hidden.py",
        'for inside in (vars(module), vars(module)["_buffers"]))',
        "for inside in (vars(module),))",
        HIDDEN,
    ),
    Mutant("hidden: closures", "compute/hidden.py", 'getattr(of, "__closure__", None) or ()', "()", HIDDEN),
    Mutant(
        "copies: graphs of kept tensors",
        "core/copied.py",
        "return copy.deepcopy(module, memo)",
        "return copy.deepcopy(module)",
        HIDDEN,
    ),
    Mutant(
        "normalization: by name alone",
        "core/normalization.py",
        "return len({t.numel() for t in own}) == 1 and all(",
        "return True or all(",
        SCOPES,
    ),
    Mutant(
        "normalization: blocks around a layer",
        "core/normalization.py",
        "if not own or any(True for child in module.children() for _ in child.parameters()):",
        "if not own:",
        SCOPES,
    ),
    Mutant(
        "normalization: a declared class keeps its statistics",
        "core/normalization.py",
        "if isinstance(module, _NormBase) or _registered(module):",
        "if isinstance(module, _NormBase):",
        SCOPES,
    ),
    Mutant(
        "named: parts of components",
        "core/scope.py",
        'f".{start}".endswith(f".{name}")',
        "start.endswith(name)",
        SCOPES,
    ),
    Mutant("named: several places at once", "core/scope.py", "if len(set(places.values())) > 1:", "if False:", SCOPES),
    Mutant(
        "named: components before full names", "core/scope.py", "places = {} if found else {n", "places = {n", SCOPES,
    ),
]

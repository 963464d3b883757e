"""Bugs of the gradients without autograd."""

from mutants.planted import KERNELS, Mutant

MUTANTS = [
    Mutant("kernels: a step uphill", "compute/kernels.py", "1.0, -rate)", "1.0, rate)", KERNELS),
    Mutant(
        "kernels: the gradient moves the statistics it is given",
        "compute/kernels.py",
        "combine(self.structure.buffers, weights).flat.clone()",
        "combine(self.structure.buffers, weights).flat",
        KERNELS,
    ),
    Mutant(
        "kernels: the pass back goes on below what is asked for", "compute/kernels.py", "i > lowest)", "True)", KERNELS
    ),
    Mutant(
        "kernels: weighted cross-entropy is taken for the plain",
        "compute/losses.py",
        'return options == (None, -100, "mean", 0.0) and',
        "return",
        KERNELS,
    ),
    Mutant(
        "kernels: the step before the gradient of the input",
        "compute/layers.py",
        "sink.put(bias, d.sum(0))\n        return below",
        "sink.put(bias, d.sum(0))\n        return d.mm(own[0]) if inward else d",
        KERNELS,
    ),
    Mutant("kernels: frozen statistics move", "compute/kernels.py", "not batch.frozen", "True", KERNELS),
    Mutant("kernels: batches are not counted", "compute/layers.py", "            own[-1].add_(1)\n", "", KERNELS),
    Mutant(
        "kernels: in place on the client's data",
        "compute/layers.py",
        "    owned = False\n    for",
        "    owned = True\n    for",
        KERNELS,
    ),
    Mutant(
        "kernels: a bias summed over examples alone",
        "compute/layers.py",
        "[0, 2, 3] if self.images",
        "[0, 2] if self.images",
        KERNELS,
    ),
    Mutant(
        "chain: a tensor without a layer",
        "compute/trace.py",
        "if name not in held and name not in state), None)",
        "if False), None)",
        KERNELS,
    ),
    Mutant("chain: hooks", "compute/trace.py", "any(getattr(layer, hooks) for hooks in _HOOKS)", "False", KERNELS),
    Mutant(
        "chain: gradients switched off",
        "compute/trace.py",
        "if mixed or not torch.is_grad_enabled():",
        "if mixed:",
        KERNELS,
    ),
    Mutant(
        "chain: an autograd function of its own",
        "compute/trace.py",
        "if frame.f_code is torch.autograd.Function.apply.__code__:",
        "if False:",
        KERNELS,
    ),
    Mutant(
        "chain: another forward in evaluation",
        "compute/trace.py",
        "for mode in (True, False))",
        "for mode in (True, True))",
        KERNELS,
    ),
    Mutant("chain: chance", "compute/trace.py", "if drawn() != before:", "if False:", KERNELS),
    Mutant(
        "clipping within the step: never",
        "rounds/descent.py",
        "clipping(direction, training.clip), state",
        "1.0, state",
        KERNELS,
    ),
    Mutant(
        "kernels: a large layer without its bias",
        "compute/layers.py",
        "own[1][:, None]",
        "0 * own[1][:, None]",
        KERNELS,
    ),
    Mutant(
        "kernels: a loss sees targets of inference mode",
        "compute/kernels.py",
        "leaf.clone(), cloned(y))",
        "leaf.clone(), y)",
        KERNELS,
    ),
]

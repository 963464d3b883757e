"""Planted bugs of Flower's simulation engine: incomplete messages and results in the wrong order."""

from mutants.planted import Mutant

SIMULATION = "tests/test_flower_simulation.py"

MUTANTS = [
    Mutant(
        "simulation: every client has the initial memory",
        "flower/ray/actor.py",
        "read_rows(content, name, like) for name, like in layouts)",
        '(like if name == "memory" else read_rows(content, name, like)) for name, like in layouts)',
        SIMULATION,
        "messages_hold_all and FedBN",
    ),
    Mutant(
        "simulation: it is always the first round",
        "flower/ray/actor.py",
        'int(fields["round"]), float',
        "0, float",
        SIMULATION,
        "messages_hold_all and FedAvg",
    ),
    Mutant(
        "simulation: the broadcast for prediction is that for training",
        "flower/ray/engine.py",
        'source.sent("train" if kind == TRAIN else "deploy")',
        'source.sent("train")',
        SIMULATION,
        "messages_hold_all and FedGloSS",
    ),
    Mutant(
        "simulation: results are in reverse order",
        "flower/ray/engine.py",
        "            while pending:\n                yield _checked(pending.popleft().result())",
        "            while pending:\n                yield _checked(pending.pop().result())",
        SIMULATION,
        "messages_hold_all and FedAvg",
    ),
    Mutant(
        "simulation: a copied layout is another one",
        "core/tree.py",
        "return layout, (self.names, self.shapes)",
        "return Layout, (self.names, self.shapes)",
        SIMULATION,
        "same_layout",
    ),
]

"""Planted bugs of Flower's simulation engine: incomplete messages and results in the wrong order."""

from mutants.planted import Mutant

SIMULATION = "tests/test_flower_simulation.py"

MUTANTS = [
    Mutant(
        "simulation: every client has the initial memory",
        "flower/ray/actor.py",
        'federation.memory = AtHand(read_rows(content, "memory", self._memory))',
        "federation.memory = AtHand(self._memory)",
        SIMULATION,
        "messages_hold_all and FedBN",
    ),
    Mutant(
        "simulation: it is always the first round",
        "flower/ray/actor.py",
        'federation.round = int(content.config_records[ASSIGNMENT]["round"])',
        "federation.round = 0",
        SIMULATION,
        "messages_hold_all and FedAvg",
    ),
    Mutant(
        "simulation: the broadcast for prediction is that for training",
        "flower/ray/engine.py",
        'federation.sent("train" if kind == TRAIN else "deploy")',
        'federation.sent("train")',
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

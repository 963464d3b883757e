"""Bugs of clients that are trained elsewhere: what a message forgets, and who gets whose result."""

from mutants.planted import Mutant

SIMULATION = "tests/test_flower_simulation.py"

MUTANTS = [
    Mutant(
        "simulation: every client has the memory of the start",
        "flower/ray/actor.py",
        'federation.memory = AtHand(take_rows(content, "memory", self._memory))',
        "federation.memory = AtHand(self._memory)",
        SIMULATION,
        "messages_hold_all and FedBN",
    ),
    Mutant(
        "simulation: it is always the first round",
        "flower/ray/actor.py",
        'federation.round = int(content.config_records["told"]["round"])',
        "federation.round = 0",
        SIMULATION,
        "messages_hold_all and FedAvg",
    ),
    Mutant(
        "simulation: who deploys is sent what is for training",
        "flower/ray/engine.py",
        'federation.sent("train" if kind == TRAIN else "deploy")',
        'federation.sent("train")',
        SIMULATION,
        "messages_hold_all and FedGloSS",
    ),
    Mutant(
        "simulation: results come newest first",
        "flower/ray/engine.py",
        "            while ahead:\n                yield _checked(ahead.popleft().result())",
        "            while ahead:\n                yield _checked(ahead.pop().result())",
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

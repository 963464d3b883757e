"""Bugs of clients that learn from each other, and of what the server tells one of them alone."""

from mutants.planted import Mutant

CONFER, ORACLES_, LAWS_ = "tests/test_confer.py", "tests/test_oracles_confer.py", "tests/test_laws_confer.py"

MUTANTS = [
    Mutant(
        "messages: to the clients in another order",
        "engine/federation.py",
        "in zip(counted, mail, strict=True)",
        "in zip(sorted(counted), mail, strict=True)",
        CONFER,
        "reach",
    ),
    Mutant(
        "messages: to those who were drawn, dropped or not",
        "engine/federation.py",
        "in zip(counted, mail, strict=True)",
        "in zip(longest_first, mail, strict=False)",
        CONFER,
        "dropped",
    ),
    Mutant(
        "messages: not counted",
        "engine/federation.py",
        "return sum(tree.nbytes for tree in letters.values())",
        "return 0",
        CONFER,
        "bytes_down",
    ),
    Mutant(
        "messages: what arrived is not kept",
        "server.py",
        "letters[part.name].append(tree.clone())",
        "letters[part.name].append(tree)",
        CONFER,
        "reach",
    ),
    Mutant(
        "messages: none is an empty one",
        "server.py",
        "client |= {part.name: tree} if len(tree) else {}",
        "client |= {part.name: tree}",
        CONFER,
        "leaves_the_last_one",
    ),
]

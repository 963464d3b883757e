"""Planted bugs of sites and coordinator: what they refuse."""

from mutants.planted import Mutant

ROUNDS, FAULTS, CRASHES = "tests/test_flower_rounds.py", "tests/test_flower_faults.py", "tests/test_flower_crashes.py"
WIRE, STATE = "tests/test_flower_wire.py", "tests/test_flower_state.py"
REFUSALS = "tests/test_flower_refusals.py"

MUTANTS = [
    Mutant(
        "messages: shapes are not compared",
        "flower/protocol/arrays.py",
        "if tuple(array.shape) != shape:",
        "if False:",
        WIRE,
        "another_form",
    ),
    Mutant(
        "messages: headers are not compared",
        "flower/protocol/arrays.py",
        "if array.data[:8] != _MAGIC or array.data[10:start].strip() != header:",
        "if False:",
        WIRE,
        "another_form",
    ),
    Mutant(
        "messages: names are not compared",
        "flower/protocol/arrays.py",
        '    _check_names("tensors", where, list(like), list(record))\n',
        "",
        WIRE,
        "other_names",
    ),
    Mutant(
        "results: values that are not finite count",
        "flower/coordinator/results.py",
        'if flaw := not_finite("upload", uploads):',
        'if flaw := "":',
        REFUSALS,
        "hostile_result",
    ),
    Mutant(
        "results: any number of examples is accepted",
        "flower/coordinator/results.py",
        "if report.examples != examples:",
        "if False:",
        REFUSALS,
        "hostile_result",
    ),
    Mutant(
        "results: zero steps are accepted",
        "flower/coordinator/results.py",
        "report.steps >= 1 and",
        "True and",
        REFUSALS,
        "hostile_result",
    ),
    Mutant(
        "models: not compared when a site joins",
        "flower/site/session.py",
        "        if differences:\n",
        "        if False:\n",
        REFUSALS,
        "another_model",
    ),
    Mutant(
        "messages: a client name may lead to another folder",
        "flower/protocol/messages.py",
        r're.fullmatch(r"\w[\w.-]{,99}", text)',
        "text",
        REFUSALS,
        "client_name",
    ),
    Mutant(
        "messages: any protocol version is accepted",
        "flower/protocol/messages.py",
        'found.get("protocol", PROTOCOL) != PROTOCOL',
        "False",
        WIRE,
        "other_types",
    ),
    Mutant(
        "events: an event is not logged again in the next round",
        "flower/coordinator/events.py",
        "event = self.round, client, text",
        "event = 0, client, text",
        STATE,
        "without_its_state",
    ),
]

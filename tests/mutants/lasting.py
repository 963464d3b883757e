"""Bugs of runs that are loaded, resumed and continued."""

from mutants.planted import Mutant

LASTS = "tests/test_load_run.py"

MUTANTS = [
    Mutant(
        "more rounds: other rates for those played",
        "rounds/server_state.py",
        "if longer[: len(played)] != played:",
        "if False:",
        LASTS,
        "schedule_of_the_whole",
    ),
    Mutant(
        "more rounds: the old number of rounds ends the run",
        "rounds/server_state.py",
        "self.rounds, self.rates = rounds, longer",
        "self.rates = longer",
        LASTS,
        "more_rounds",
    ),
    Mutant(
        "more rounds: the directory keeps the old number",
        "running/playing.py",
        "    if more:\n",
        "    if False:\n",
        LASTS,
        "more_rounds",
    ),
    Mutant(
        "resume='auto' never resumes",
        "running/playing.py",
        "resume = holds_run(output.directory) if",
        "resume = False if",
        LASTS,
        "one_program",
    ),
    Mutant(
        "load: rounds after the checkpoint are shown",
        "running/load.py",
        'if record["round"] <= run.round',
        "if True",
        LASTS,
        "nothing_is_written",
    ),
    Mutant(
        "load: nothing is compared",
        "storage/checkpoint.py",
        "    if differ:\n",
        "    if False:\n",
        LASTS,
        "what_differs",
    ),
    Mutant(
        "load: metrics are not compared",
        "running/run.py",
        '            "metrics": [metric.name for metric in self.metrics],\n',
        "",
        LASTS,
        "what_differs",
    ),
    Mutant(
        "load: files that a running process has written are removed",
        "storage/disk.py",
        "        self._checkpointed = set(self._segments)\n        for client",
        "        self._checkpointed = set(self._segments)\n        self._sweep()\n        for client",
        LASTS,
        "nothing_is_written",
    ),
    Mutant(
        "load: settings of one's own are lost",
        "running/load.py",
        "if name not in own}",
        "if False}",
        LASTS,
        "nothing_is_written",
    ),
]

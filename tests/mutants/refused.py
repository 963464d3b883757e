"""Bugs of refusals: what is wrong passes, is changed, or is said without its cause."""

from mutants.planted import Mutant

WRONG, AUTHOR, CLI = "tests/test_wrong_inputs.py", "tests/test_author_errors.py", "tests/test_cli.py"
POOL, UNREAD, HIDDEN = "tests/test_data_pool.py", "tests/test_data_unreadable.py", "tests/test_structure_hidden.py"
MUTANTS = [
    Mutant(
        "calls: unknown arguments are not compared",
        "core/calls.py",
        "k not in known and not open_ended",
        "False",
        WRONG,
        "not_there",
    ),
    Mutant("calls: self counts", "core/calls.py", "args[own:]", "args", WRONG, "not_there or dataclass"),
    Mutant("calls: a class is a function", "core/calls.py", "isinstance(function, type) or ", "", WRONG, "of_a_run"),
    Mutant("settings: types are not compared", "core/values.py", "        _settle(self)\n", "", WRONG, "dataclass"),
    Mutant(
        "settings: no check of their own",
        "core/values.py",
        "        if check:\n",
        "        if False:\n",
        WRONG,
        "dataclass",
    ),
    Mutant(
        "weights: statistics may be anything",
        "running/validate.py",
        'names("weight") | model.structure.names("statistic")',
        'names("weight")',
        WRONG,
        "do_not_fit",
    ),
    Mutant(
        "forms: the first alone", "running/validate.py", "    _try_forms(untried, moved)\n", "", WRONG, "do_not_fit"
    ),
    Mutant(
        "loss: with two examples alone", "running/validate.py", "    _try_more(untried, moved)\n", "", WRONG, "losses"
    ),
    Mutant(
        "loss: what broadcasts passes",
        "running/trial.py",
        'filterwarnings("error", message=BROADCASTS)',
        'filterwarnings("ignore", message=BROADCASTS)',
        WRONG,
        "broadcasts",
    ),
    Mutant(
        "loss: it need not depend on weights",
        "running/trial.py",
        "if not found.requires_grad:",
        "if False:",
        WRONG,
        "depend",
    ),
    Mutant(
        "paths: the error as it is", "core/errors.py", "except OSError", "except MemoryError", WRONG, "run_is_asked"
    ),
    Mutant("layers in lists: all", "running/trial.py", " and inner not in own", "", WRONG, "in_a_list"),
    Mutant("pool: groups stay numbers", "data/pool.py", ".astype(np.str_, copy=False)", "", POOL, "arrays_or_lists"),
    Mutant("rows: whose they are", "running/validate.py", "where._replace(client=n)", "where", UNREAD),
    Mutant(
        "buffers in evaluation: make it one",
        "compute/hidden.py",
        'if _is_buffer(roots["the model"], place[0]):',
        "if False:",
        HIDDEN,
        "of_a_model",
    ),
    Mutant(
        "describe: hooks as they are",
        "running/describe.py",
        "checked(state.method, state.model.structure)",
        "state.method",
        AUTHOR,
        "description",
    ),
    Mutant(
        "trial: inputs may change",
        "rounds/check.py",
        "if not torch.equal(_bits(tree.flat), _bits(before[n]))",
        "if False",
        AUTHOR,
        "changes_what",
    ),
    Mutant(
        "trial: one memory before and after",
        "rounds/check.py",
        "tree.flat.clone() for",
        "tree.flat for",
        AUTHOR,
        "changes_what",
    ),
    Mutant(
        "trial: no broadcast",
        "rounds/check.py",
        "    broadcast(method, state.server, Central(state.model.structure, first, first, work.lr))\n",
        "",
        AUTHOR,
        "changes_what",
    ),
    Mutant(
        "trial: a part is blamed for the gradient that it is given",
        "rounds/check.py",
        " and _finite(grad(at, batch).gradient)",
        "",
        AUTHOR,
        "infinite_without_it",
    ),
    Mutant(
        "hooks: without the cause",
        "core/part.py",
        'raises {raised(error, source)}") from error',
        'raises") from None',
        AUTHOR,
        "hook_that_raises",
    ),
    Mutant(
        "parts: neutral is anything",
        "core/part.py",
        "k for k in made.neutral or ()",
        "k for k in ()",
        AUTHOR,
        "cannot_do",
    ),
    Mutant("attach: results are dropped", "core/method.py", "if found is not None:", "if False:", AUTHOR, "cannot_do"),
    Mutant(
        "own modules: only missing ones are said",
        "registry/plugins.py",
        "    except Exception as error:  # whatever a user's module may raise\n",
        "    except ZeroDivisionError as error:\n",
        CLI,
        "of_your_own",
    ),
]

"""Bugs of what comes in: deals, augmentation, fingerprints, numbers, flags, trials."""

from mutants.planted import Mutant

DEAL, AUGMENT, PRINTS, VALUES, FLAGS, TRIAL = (
    f"tests/test_{part}.py" for part in ("data_deal", "data_augment", "fingerprint", "values", "flags", "trial")
)
MUTANTS = [
    Mutant(
        "time blocks: no gap before the test",
        "data/deal.py",
        "tested - (self.gap if tests else 0) - validations",
        "tested - validations",
        DEAL,
    ),
    Mutant(
        "time blocks: no gap before validation",
        "data/deal.py",
        "validated - (self.gap if validations else 0)",
        "validated",
        DEAL,
    ),
    Mutant("time blocks: a limit keeps the earliest", "data/deal.py", "rows[:trained][::-1]", "rows[:trained]", DEAL),
    Mutant("time blocks of scattered rows", "data/deal.py", "if not split.in_order:", "if False:", DEAL),
    Mutant("by group: each client chooses anew", "data/deal.py", "if unit not in chosen]", "]", DEAL),
    Mutant("contiguous: gaps are not left out", "data/partition.py", "rows + self.gap * place", "rows", DEAL),
    Mutant(
        "crop: as far to the left as up", "data/augment.py", "places[1, :, None] +", "places[0, :, None] +", AUGMENT
    ),
    Mutant("crop: one place per batch", "data/augment.py", "places[0, :, None] +", "places[0, :1, None] +", AUGMENT),
    Mutant("flip: upside down", "data/augment.py", "x.flip(-1)", "x.flip(-2)", AUGMENT),
    Mutant("erasing: the last rectangle", "data/augment.py", "fits.int().argmax(", "fits.int().argmin(", AUGMENT),
    Mutant("erasing: never at the edge", "data/augment.py", "(height - tall + 1)", "(height - tall)", AUGMENT),
    Mutant("noise: its variance", "data/augment.py", "x + std * noise", "x + std**2 * noise", AUGMENT),
    Mutant(
        "fingerprint: values closed over are left out",
        "running/fingerprint.py",
        "held[name] = cell.cell_contents",
        "cell.cell_contents",
        PRINTS,
    ),
    Mutant(
        "fingerprint: constants of the code are left out",
        "running/fingerprint.py",
        "(code.co_names, code.co_varnames)).encode(), *constants]",
        "(code.co_names, code.co_varnames)).encode()]",
        PRINTS,
    ),
    Mutant(
        "fingerprint: shape without values", "running/fingerprint.py", "{shape} {_hash(values.data)}", "{shape}", PRINTS
    ),
    Mutant(
        "fingerprint: the first rows of large data",
        "running/fingerprint.py",
        'np.sort(stream("fingerprint", len(tensor)).choice(len(tensor), count, replace=False))',
        "np.arange(count)",
        PRINTS,
    ),
    Mutant(
        "fingerprint: sets in the order of the process",
        "running/fingerprint.py",
        "sorted(_text(item, depth) for item in value)",
        "(_text(item, depth) for item in value)",
        PRINTS,
    ),
    Mutant("resume: what is gone is not seen", "storage/checkpoint.py", "if name not in value)", "if False)", PRINTS),
    Mutant(
        "a truth value is a number",
        "core/values.py",
        " and not isinstance(value, bool)\n    return not",
        "\n    return not",
        VALUES,
    ),
    Mutant("numbers of parts stay as they are", "core/part.py", "call.arguments.update(", "dict(", VALUES),
    Mutant(
        "the unit is a feature",
        "data/tables.py",
        "frame.drop({column for column in (label, client, unit) if",
        "frame.drop({column for column in (label, client) if",
        FLAGS,
        "features",
    ),
    Mutant(
        "arrays: the client column is ignored",
        "data/tables.py",
        "for name in (client, unit))\n    labels",
        'for name in ("client" if "client" in arrays else None, unit))\n    labels',
        FLAGS,
        "npz",
    ),
    Mutant(
        "the number of clients is ignored",
        "cli/experiment.py",
        '"clients" in experiment.model_fields_set',
        "False",
        FLAGS,
    ),
    Mutant(
        "channels last: height and width change places",
        "data/tables.py",
        "(0, 3, 1, 2)",
        "(0, 3, 2, 1)",
        FLAGS,
        "images",
    ),
    Mutant(
        "a metric may give a truth value", "running/trial.py", "if not fits(found, float):", "if found is None:", TRIAL
    ),
    Mutant(
        "a metric may change targets",
        "running/trial.py",
        "given = cloned(outputs), cloned(y)",
        "given = outputs, y",
        TRIAL,
    ),
    Mutant("two metrics of one name", "running/trial.py", "in names[i:]", "in names[i:0]", TRIAL),
    Mutant("hint: the axes of a transposed image", "running/trial.py", "(0, axes - 1, *range", "(0, 1, *range", TRIAL),
]

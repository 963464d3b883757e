"""The screens of ``describe`` and ``data``: one method, the data sets, the clients of one data set."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from idiolect import methods as catalog
from idiolect.cli.catalog import table
from idiolect.cli.experiment import build, deal_of, load_pool, model_of, shift_of, split_of
from idiolect.cli.formula import readable
from idiolect.cli.settings import Experiment
from idiolect.compute.autograd import Model
from idiolect.core.card import card_of
from idiolect.data import ClientData, Pool, Shuffled, holdings
from idiolect.data.sources import SOURCES
from idiolect.registry.names import method_of
from idiolect.running.describe import chosen, describe

MOST_CLIENTS = 40
"""More clients than this are not all shown in the terminal."""


def describe_method(console: Console, text: str, experiment: Experiment) -> None:
    """Show a method's card, arguments, formulas, and what its parts keep and send on a model."""
    method = method_of(text)
    pool = load_pool(experiment)
    model = Model(model_of(experiment, pool))
    rows = describe(method, model)
    for make in (getattr(catalog, name) for name in catalog.__all__):
        card = card_of(make)
        if card.title == method.name:
            console.print(Text(f"{card.title} ({card.year}): {card.problem}", style="bold"))
            _prose(console, make)
            if inspect.signature(make).parameters:
                console.print("", _arguments(make), sep="\n")
            console.print(f"\nReference: {card.reference}", highlight=False)
    for part in method.parts:
        console.print("\n", Text(repr(part), style="bold"), sep="")
        _prose(console, part.make)
    console.print(f"\nOn {experiment.model or 'the default network'} for {pool.name}:\n", highlight=False)
    shown = ("part", "keeps", "receives", "sends", "extra gradients a step")
    listed = table(*shown)
    for row in rows:
        listed.add_row(*(row[header] for header in shown))
    console.print(listed)
    for scope, names in chosen(method, model).items():
        console.print(f"\n{scope}: {', '.join(names) or 'no tensor'}", highlight=False)


def data_sets(console: Console, data_dir: Path | None) -> None:
    """List the named sets, and whether they are in the data folder."""
    folder = data_dir or (Path(os.environ["IDIOLECT_DATA"]) if os.environ.get("IDIOLECT_DATA") else None)
    listed = table("name", "found")
    for name, (_, file) in SOURCES.items():
        there = not file or (folder is not None and (folder / file).is_file())
        listed.add_row(name, ("yes" if file else "yes, in scikit-learn") if there else f"no: {file}")
    console.print(listed)
    where = f"looked in {folder}" if folder else "no data folder: set --data-dir or IDIOLECT_DATA"
    console.print(f"\n{where}; also hf:NAME (Hugging Face) and your own .csv, .parquet or .npz", soft_wrap=True)


def data_set(console: Console, experiment: Experiment) -> None:
    """Show a data set's size and shape, and the clients under a split and a shift."""
    pool = load_pool(experiment)
    outputs = "a number" if pool.classes is None else f"{len(pool.classes)} classes"
    shape = " x ".join(map(str, pool.x.shape[1:]))
    console.print(f"[bold]{pool.name}[/]: {len(pool):,} examples of {shape}, {outputs}", highlight=False)
    clients = build(experiment, pool).clients
    shift = shift_of(experiment)
    shifted = "" if shift is None else f", shifted by {shift}"
    deal = deal_of(experiment, pool)
    dealt = "" if deal == Shuffled() else f", dealt by {deal}"
    how = f"{split_of(experiment, pool)}{dealt}{shifted}"
    console.print(f"{len(clients)} clients by {how}\n", highlight=False, markup=False)
    console.print(_held(pool, clients, console.width))
    if len(clients) > MOST_CLIENTS:
        console.print(f"\n{len(clients) - MOST_CLIENTS} more clients are not shown")


def _held(pool: Pool, clients: Mapping[str, ClientData], width: int) -> Table:
    """Return a table of examples per client and label; labels are columns if they fit."""
    shown = dict(list(clients.items())[:MOST_CLIENTS])
    names = [name if name.strip() else repr(name) for name in pool.classes or ()]
    counts = holdings(shown) if names else {}
    most = max((n for held in counts.values() for n in held.values()), default=1)
    cell = max(len(str(most)), *map(len, names)) + 1 if names else 0
    fits = bool(names) and max(map(len, shown)) + 16 + cell * len(names) <= width
    listed = table("client", "train", "test", *([] if fits or not names else ["labels", "largest label"]))
    for header in names if fits else ():
        listed.add_column(header, justify="right", min_width=cell)
    listed.padding = (0, 0) if fits else (0, 1)
    for client, data in shown.items():
        train, test = (len(part) if part else 0 for part in (data.train, data.test))
        row: list[str | Text] = [f"{client} ", f"{train:>5}", f"{test:>5} "]
        held = counts.get(client, {})
        if fits:
            row += [_shade(held.get(label, 0), most, cell) for label in range(len(names))]
        elif held:
            label, largest = max(held.items(), key=lambda pair: pair[1])
            row += [str(len(held)), f"{names[label]} {100 * largest / train:.0f}%"]
        listed.add_row(*row)
    return listed


def _shade(count: int, most: int, width: int) -> Text:
    """Return a count on a blue that is darker the more there are."""
    if not count:
        return Text("·", style="dim")
    level = count / most
    red, green = round(235 - 205 * level), round(243 - 158 * level)
    ink = "white" if level > 0.45 else "black"
    return Text(f"{count}".rjust(width - 1), style=f"{ink} on rgb({red},{green},{round(250 - 70 * level)})")


def _prose(console: Console, make: object) -> None:
    """Print the docstring of a function up to its arguments."""
    text = (inspect.getdoc(make) or "").split("\nArgs:")[0].split("\nMemory:")[0]
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith(".. math::"):
            line = readable(paragraph.removeprefix(".. math::"))
            console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
        else:
            console.print(_plain(paragraph), highlight=False, markup=False)


def _arguments(make: Callable[..., object]) -> Table:
    """Return the arguments of a function, their defaults, and what its docstring says of them."""
    said = re.split(r"\n    (\w+): ", (inspect.getdoc(make) or "").partition("Args:")[2].split("\n\n")[0])
    words = dict(zip(said[1::2], said[2::2], strict=True))
    listed = table("argument", "default", "meaning")
    for name, argument in inspect.signature(make).parameters.items():
        listed.add_row(name, repr(argument.default), _plain(words.get(name, "")))
    return listed


def _plain(text: str) -> str:
    """Return a paragraph of a docstring in one line, formulas readable."""
    return " ".join(re.sub(r":math:`([^`]*)`", lambda found: readable(found[1]), text).replace("``", "`").split())

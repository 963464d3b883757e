"""Write the catalog, docs/methods.md and the file of `idiolect methods`, from the cards and docstrings."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from torch import nn

from idiolect import methods, parts
from idiolect.compute.autograd import Model
from idiolect.core.card import Problem, card_of
from idiolect.core.method import Method
from idiolect.models import small_cnn
from idiolect.running.describe import Cost, cost
from idiolect.testing.worlds import fitted

PAGE = Path(__file__).with_name("methods.md")
FILE = Path(methods.__file__).with_name("catalog.json")
HEAD = """\
# Catalog

Written by `python docs/catalog.py` from the cards and docstrings of the package; do not edit it by hand.
A [method](#methods) is a list of [parts](#parts), and a part is one idea. What the methods gave on real data
is in [results](results.md); how to add one is in [CONTRIBUTING](../CONTRIBUTING.md).
"""
COSTS = """\
What a client keeps, receives and sends in a round, in values (four bytes each in float32), for the network
that `digits` gets by default, of {total} values with running statistics and counters; and how many gradients
one local step takes. For the methods of adapters this network is frozen except for normalization and head, with
factors of rank 2 beside its convolutions and its other linear layers.
"""
FIELDS = "Args|Memory|Sends|Receives|Cost|Raises|Example|Reference|Differs"
LINE = ("Memory", "Sends", "Receives", "Cost")
PARAGRAPHS = ("Raises", "Reference", "Differs")


def catalog() -> str:
    """Return the page."""
    entries = [_method(name) for name in methods.__all__]
    ideas = [_entry(name, getattr(parts, name)) for name in parts.__all__]
    return "\n".join([HEAD, "## Methods\n", _index(), _costs(), *entries, "## Parts\n", *ideas])


def entries() -> str:
    """Return the file that `idiolect methods` reads: one method a line, by problem; sizes are in models."""
    whole = _cost(methods.fedavg()).sends
    rows = []
    for name in _by_problem():
        make = getattr(methods, name)
        card, found = card_of(make), _cost(make())
        row = {"name": name, "title": card.title, "year": card.year, "problem": card.problem}
        row |= {"gradients": found.gradients, "down": round(found.receives / whole, 2)}
        row |= {"up": round(found.sends / whole, 2), "idea": _idea(make)}
        rows.append(json.dumps(row, ensure_ascii=False))
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _by_problem() -> list[str]:
    order = get_args(Problem)
    return sorted(methods.__all__, key=lambda name: order.index(card_of(getattr(methods, name)).problem))


def _idea(make: Callable[..., object]) -> str:
    return (inspect.getdoc(make) or "").partition("\n")[0].rstrip(".")


def _index() -> str:
    rows = []
    for name in _by_problem():
        make = getattr(methods, name)
        card, made = card_of(make), make()
        links = " + ".join(f"[{p.name}](#{p.name})" for p in made.parts)
        rows.append(f"| [{card.title}](#{name}) | {card.year} | {card.problem} | {_idea(make)} | {links} |")
    return "\n".join(["| | year | for | what it does | parts |", "| --- | --- | --- | --- | --- |", *rows, ""])


def _costs() -> str:
    rows = []
    for name in methods.__all__:
        found = _cost(getattr(methods, name)())
        rows.append(f"| `{name}` | {' | '.join(map(_spaced, found))} |")
    head = ["| | keeps | receives | sends | gradients a step |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join([COSTS.format(total=_spaced(Model(_network()).structure.layout.total)), *head, *rows, ""])


def _network() -> nn.Module:
    return small_cnn((1, 8, 8), 10)


def _cost(method: Method) -> Cost:
    return cost(method, Model(fitted(_network(), method)))


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _method(name: str) -> str:
    make = getattr(methods, name)
    composed = "\n".join(map(repr, make().parts))
    return f"{_entry(name, make)}\n**Reference:** {card_of(make).reference}.\n\n```\n{composed}\n```\n"


def _entry(name: str, make: Callable[..., object]) -> str:
    """Return a heading, the call with its defaults, the prose and the fields of a docstring."""
    doc = re.sub(r" {2,}(?=(?:Sends|Receives): )", "\n", inspect.getdoc(make) or "")
    prose, *rest = re.split(rf"^({FIELDS}):", doc, flags=re.MULTILINE)
    said = {field: text.rstrip() for field, text in zip(rest[::2], rest[1::2], strict=True)}
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(make).parameters.values()]
    blocks = [f"### {name}", f"`{name}{inspect.Signature(plain)}`", _markdown(prose)]
    if "Args" in said:
        items = re.split(r"\n    (\w+): ", said["Args"])[1:]
        blocks.append("\n".join(f"- `{n}`: {_line(text)}" for n, text in zip(items[::2], items[1::2], strict=True)))
    if line := " ".join(f"**{field}:** {_line(said[field])}" for field in LINE if field in said):
        blocks.append(line)
    blocks += [f"**{field}:** {_line(said[field])}" for field in PARAGRAPHS if field in said]
    return "\n\n".join(blocks) + "\n"


def _line(text: str) -> str:
    return _markdown(" ".join(text.split()))


def _markdown(text: str) -> str:
    """Turn the reStructuredText of a docstring into Markdown, with formulas as GitHub shows them."""
    text = re.sub(r"``([^`]*)``", r"`\1`", text.strip())
    text = re.sub(r":math:`([^`]*)`", r"$`\1`$", text)
    return re.sub(r"^\.\. math::(.*?)(?=\n\n|\n\S|\Z)", _formula, text, flags=re.MULTILINE | re.DOTALL)


def _formula(found: re.Match[str]) -> str:
    lines = "\n".join(line.strip() for line in found[1].strip().splitlines())
    return f"```math\n{lines}\n```"


if __name__ == "__main__":
    PAGE.write_text(catalog(), encoding="utf-8")
    FILE.write_text(entries(), encoding="utf-8")

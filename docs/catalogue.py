"""Write docs/methods.md, the catalogue, from the cards and docstrings of the package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from idiolect import Method, methods, parts
from idiolect.card import card_of
from idiolect.describe import describe
from idiolect.model import Model
from idiolect.models import small_cnn

PAGE = Path(__file__).with_name("methods.md")
HEAD = """\
# Catalogue

Written by `python docs/catalogue.py` from the cards and docstrings of the package; do not edit it by hand.
Every method is a list of parts, and every part is one idea: [methods](#methods) · [parts](#parts).
To add your own, see [CONTRIBUTING](../CONTRIBUTING.md).
"""
COSTS = """\
What a client keeps and what goes up and down in a round, in numbers (values of 4 bytes in float32), for the
default network on `digits` (14 170 values), and the gradients of one local step:
"""
FIELDS = "Args|Memory|Sends|Receives|Cost|Raises|Example|Reference|Differs"


def catalogue() -> str:
    """Return the page."""
    blocks = [HEAD, "## Methods\n", *_index(), COSTS, *_costs()]
    for name in methods.__all__:
        blocks += _method(name, getattr(methods, name))
    blocks += ["## Parts\n"]
    for name in parts.__all__:
        blocks += _entry(name, getattr(parts, name), "Args|Memory|Sends|Receives|Cost|Raises|Reference|Differs")
    return "\n".join(blocks)


def _index() -> Iterator[str]:
    rows = []
    for name in methods.__all__:
        make = getattr(methods, name)
        card, made = card_of(make), make()
        links = " + ".join(f"[{p.name}](#{p.name})" for p in made.parts)
        rows.append(f"| [`{name}`](#{name}) | {card.title}, {card.year} | {card.problem} | {_idea(make)} | {links} |")
    yield "| in code | name | for | what it does | parts |\n| --- | --- | --- | --- | --- |"
    yield "\n".join(rows) + "\n"


def _costs() -> Iterator[str]:
    model = Model(small_cnn((1, 8, 8), 10))
    rows = []
    for name in methods.__all__:
        made: Method = getattr(methods, name)()
        table = describe(made, model)
        numbers = [sum(_count(row[what]) for row in table) for what in ("keeps", "receives", "sends")]
        gradients = 1 + sum(p.gradients for p in made.parts)
        rows.append(f"| `{name}` | {' | '.join(f'{n:,}'.replace(',', ' ') for n in numbers)} | {gradients} |")
    yield "| | keeps | receives | sends | gradients a step |\n| --- | ---: | ---: | ---: | ---: |"
    yield "\n".join(rows) + "\n"


def _count(size: str) -> int:
    return int(size.partition(" ")[0].replace(",", "")) if size else 0


def _idea(make: Callable[..., object]) -> str:
    return (inspect.getdoc(make) or "").partition("\n")[0].rstrip(".")


def _method(name: str, make: Callable[..., Method]) -> Iterator[str]:
    card = card_of(make)
    yield from _entry(name, make, "Args|Raises")
    yield f"**Composition:** `{make()!r}`\n"
    yield f"**Reference:** {card.title}, {card.year}, for {card.problem}: {card.reference}.\n"


def _entry(name: str, make: Callable[..., object], fields: str) -> Iterator[str]:
    """Return a heading, the call with its defaults, the prose, and the fields that are asked for."""
    doc = re.sub(r" {2,}(?=(?:Sends|Receives): )", "\n", inspect.getdoc(make) or "")
    prose, *rest = re.split(rf"^({FIELDS}):", doc, flags=re.MULTILINE)
    said = dict(zip(rest[::2], rest[1::2], strict=True))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(make).parameters.values()]
    yield f"### {name}\n\n`{name}{inspect.Signature(plain)}`\n"
    yield _markdown(prose)
    for field in (f for f in fields.split("|") if f in said):
        if field == "Args":
            items = re.split(r"\n    (\w+): ", said[field].rstrip())
            pairs = zip(items[1::2], items[2::2], strict=True)
            yield "\n".join(f"- `{item}`: {_markdown(' '.join(text.split())).strip()}" for item, text in pairs) + "\n"
        else:
            yield f"**{field}:** {_markdown(' '.join(said[field].split())).strip()}\n"


def _markdown(text: str) -> str:
    """Turn the reStructuredText of a docstring into Markdown with formulas as GitHub shows them."""
    text = re.sub(r"^\.\. math::\s*(.*?)(?=\n\n|\n\S|\Z)", _formula, text.strip() + "\n", flags=re.M | re.S)
    text = re.sub(r":math:`([^`]*)`", r"$`\1`$", text)
    return text.replace("``", "`")


def _formula(found: re.Match[str]) -> str:
    lines = "\n".join(line.strip() for line in found[1].splitlines())
    return f"```math\n{lines}\n```"


if __name__ == "__main__":
    PAGE.write_text(catalogue(), encoding="utf-8")

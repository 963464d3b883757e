"""Formulas of docstrings as plain text for the terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_SIGNS = {
    **{"leftarrow": " ← ", "in": " ∈ ", "neq": " ≠ ", "geq": " ≥ ", "leq": " ≤ ", "approx": " ≈ ", "propto": " ∝ "},
    **{
        "cup": " \u222a ",
        "mid": " | ",
        "odot": " ⊙ ",
        "cdot": "·",
        "times": "×",
        "sum": "Σ",
        "nabla": "∇",
        "ell": "\u2113",
    },
    **{"lVert": "‖", "rVert": "‖", "Vert": "‖", "lvert": "|", "rvert": "|", "langle": "⟨", "rangle": "⟩"},
    **{"lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "infty": "∞", "pm": "±", "jmath": "j", "lambda": "λ"},
    **{"big": "", "Big": "", "left": "", "right": "", "quad": "\t", "qquad": "\t", "ldots": "…", "dots": "…"},
    **{"varepsilon": "ε", "varphi": "φ", "max": "max ", "min": "min ", "log": "log ", "cos": "cos ", "arg": "arg "},
    **{",": " ", ";": " ", "!": "", " ": " ", "{": "{", "}": "}", "|": "‖"},
}
_ACCENTS = {"bar": "\u0304", "overline": "\u0304", "hat": "\u0302", "tilde": "\u0303"}
_FRACTIONS, _WORDS = ("frac", "tfrac"), ("text", "mathrm", "operatorname", "mathcal", "mathbf")
_TOKEN = re.compile(r"\\([a-zA-Z]+|.)|(\s+)|(.)", re.DOTALL)


def readable(formula: str) -> str:
    r"""Return a formula in LaTeX as plain text, in one line.

    Example:
        >>> readable(r"\varepsilon = \rho\, \frac{g}{\lVert g \rVert + 10^{-7}}")
        'ε = ρ g/(‖ g ‖ + 10^(-7))'
        >>> readable(r"r_k = \rho_{larger} \text{ if } k \in M_i \text{ else } \rho")
        'r_k = ρ_larger if k ∈ M_i else ρ'
    """
    text = re.sub(r" +", " ", "".join(_pieces(_tokens(formula))))
    text = re.sub(r" (?=[_^,)])|(?<=[(]) |(?<=max|min|log|cos) (?=[(])", "", text)
    return re.sub(r" *\t[ \t]*", "    ", text).strip()


def _tokens(formula: str) -> Iterator[str]:
    r"""Give commands with their backslash, blanks as one space, and single characters."""
    for found in _TOKEN.finditer(formula):
        yield f"\\{found[1]}" if found[1] else " " if found[2] else found[3]


def _pieces(tokens: Iterator[str]) -> Iterator[str]:
    """Give the text of the tokens up to the brace that closes their group, or to the end."""
    for token in tokens:
        name = token[1:]
        if token == "}":
            return
        if token == "{":
            yield "".join(_pieces(tokens))
        elif token in ("_", "^"):
            inner = _argument(tokens).strip()
            yield token + (inner if inner.isalnum() or len(inner) == 1 else f"({inner})")
        elif not name:
            yield token
        elif name in _FRACTIONS:
            yield f"{_grouped(_argument(tokens))}/{_grouped(_argument(tokens))}"
        elif name in _WORDS:
            yield _argument(tokens)
        elif name == "sqrt":
            yield f"√({_argument(tokens)})"
        elif name in _ACCENTS:
            inner = _argument(tokens).strip()
            yield inner[:1] + _ACCENTS[name] + inner[1:]
        else:
            yield _SIGNS[name] if name in _SIGNS else _greek(name)


def _argument(tokens: Iterator[str]) -> str:
    """Return the text of the next group, or of the next token."""
    token = next((token for token in tokens if token != " "), "")
    return "".join(_pieces(tokens)) if token == "{" else "".join(_pieces(iter([token])))


def _grouped(text: str) -> str:
    """Return text in brackets if it has several terms."""
    text = text.strip()
    return f"({text})" if re.search(r"[ +−-]", text) else text


def _greek(name: str) -> str:
    case = "CAPITAL" if name[0].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {case} LETTER {name}")
    except KeyError:
        return name

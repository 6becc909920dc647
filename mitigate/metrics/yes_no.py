"""Reading replies as yes or no: one reply, several rules, and the rule alone moves a score.

``strict``
    Exactly one of the words "yes" and "no" occurs, whatever its case and the punctuation or markdown around it.
    Anything else is no answer.
``official``
    POPE's own script: up to the first full stop, without commas, any of the space-separated tokens ``No``, ``no``,
    ``not`` means no. Everything else, also an empty reply, means yes.
``opera``
    The script of OPERA, which PAI uses too: the whole reply without full stops and commas; any of the tokens ``No``,
    ``no``, ``not``, ``NO``, or one that ends in ``n't``, means no. Everything else means yes.
``vcd``
    The script of VCD looks for the right answer only: where the label is yes, a reply with "yes" anywhere in it means
    yes and any other no; where it is no, a reply with "no" anywhere in it (also in "know") means no and any other yes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal

from mitigate.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = Literal["yes", "no"]

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_OFFICIAL = frozenset({"No", "not", "no"})
_OPERA = frozenset({"No", "not", "no", "NO"})


def _strict(text: str, label: str) -> Answer | None:
    words = set(_WORD.findall(text.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def _official(text: str, label: str) -> Answer:
    tokens = text.partition(".")[0].replace(",", "").split(" ")
    return "yes" if _OFFICIAL.isdisjoint(tokens) else "no"


def _opera(text: str, label: str) -> Answer:
    tokens = text.replace(".", "").replace(",", "").split(" ")
    return "no" if not _OPERA.isdisjoint(tokens) or any(token.endswith("n't") for token in tokens) else "yes"


def _vcd(text: str, label: str) -> Answer:
    if label not in ("yes", "no"):
        raise DataError(f"the parser vcd looks for the right answer, yes or no, which is {label!r} here")
    other: Answer = "no" if label == "yes" else "yes"
    return label if label in text.lower() else other  # type: ignore[return-value]


_RULES: Final[dict[str, Callable[[str, str], Answer | None]]] = {
    "official": _official,
    "opera": _opera,
    "vcd": _vcd,
    "strict": _strict,
}
PARSERS: Final = tuple(_RULES)


def parse(text: str, parser: str = "strict", label: str = "") -> Answer | None:
    """Read a reply as yes or no; ``None`` if it is neither (``strict`` only).

    Parameters
    ----------
    text
        Raw reply.
    parser
        One of `PARSERS`.
    label
        The right answer, which ``vcd`` depends on.

    Raises
    ------
    ConfigError
        If there is no such parser.
    DataError
        If ``vcd`` gets no label.
    """
    if parser not in _RULES:
        raise ConfigError(f"unknown answer parser {parser!r}; it must be one of {', '.join(PARSERS)}")
    return _RULES[parser](text, label)

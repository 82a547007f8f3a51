"""Lines of a terminal: Chinese characters take two columns, and 80 are there."""

import re
import unicodedata

COLUMNS = 80


def width_of(text: str) -> int:
    """Return how many columns a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, columns: int, is_right: bool = False) -> str:
    """Return a text with spaces behind it, or before it, up to so many columns."""
    spaces = " " * (columns - width_of(text))
    return spaces + text if is_right else text + spaces


# Where a line may end: behind spaces and behind any wide character, but not before a
# sign or a number that belongs to what stands before it.
PIECES = re.compile(
    r"[^\s\u2e80-\uffef]+\s*|[\u2e80-\uffef]( \d+)?[，。；：！？、）」》”]*\s*|\s+"
)


def wrap(text: str, indent: str = "  ", first: str = "") -> str:
    """Return a text as lines of at most 80 columns; longer words are left whole."""
    lines, line = [], first
    for piece in (match[0] for match in PIECES.finditer(text)):
        if line.strip() and width_of(line + piece.rstrip()) > COLUMNS:
            lines.append(line.rstrip())
            line = indent
        line += piece
    return "\n".join([*lines, line.rstrip()])

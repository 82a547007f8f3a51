"""What an owner reads at a terminal: English in the code, Chinese from words.toml.

Chinese is the default; `WXGPT_LANG=en` (the command line's `--lang en` sets it) shows
the English words as they stand in the code.
"""

import functools
import os
import pathlib
import re
import tomllib

WORDS = pathlib.Path(__file__).with_name("words.toml")
LINE_CHARS = 80  # of a broken line are shown
# Values that are not shown: what an error quotes may reach the journal.
SECRET = re.compile(r"""(?i)((?:key|token|proxy|headers)[^=＝]*[=＝]\s*["'“”‘’]?).*""")
# What is wrong with a line that is not TOML, by its text; the first counts.
HINTS = (
    ("[“”‘’「」＂]", 'write straight quotes: " "'),
    ("＝|^[^=]*[:：]", "write = between name and value"),
    (r"=\s*(?!true|false|nan|inf)[^\W\d]", 'put text in quotes: name = "text"'),
    ("，", "write , between values"),
)


@functools.cache
def read_words() -> dict[str, str]:
    """Return the Chinese for each English text, of all modules."""
    tables = tomllib.loads(WORDS.read_text("utf-8")).values()
    return {english: chinese for table in tables for english, chinese in table.items()}


def tell(english: str, **values: object) -> str:
    """Return a text in the owner's language, with its values filled in.

    A value that is a text of words.toml itself is translated, too, but no `name` of one
    word: that is a setting's or an assistant's. What has no Chinese stays English.
    """
    if os.environ.get("WXGPT_LANG", "").lower().startswith("en"):
        return english.format(**values)
    words = read_words()
    for key, value in values.items():
        if isinstance(value, str) and (key != "name" or " " in value):
            values[key] = words.get(value, value)
    return words.get(english, english).format(**values)


def explain(error: object) -> str:
    """Return what an error says, in the owner's language, a line for each mistake."""
    cause = getattr(error, "__cause__", None)
    if isinstance(cause, tomllib.TOMLDecodeError | UnicodeDecodeError):
        [(_, values)] = error.lines  # type: ignore[attr-defined]
        return explain_broken(str(values["path"]), cause)
    if isinstance(cause, FileNotFoundError) and cause.filename == "wxgpt.toml":
        return tell(
            "no wxgpt.toml here; make one with `wxgpt.py setup` or "
            "`cp wxgpt.example.toml wxgpt.toml`, or try it all first: `wxgpt.py demo`"
        )
    lines = getattr(error, "lines", None)
    if lines is None:
        return tell("{why}", why=str(error))
    return "\n".join(tell(words, **values) for words, values in lines)


def explain_broken(path: str, error: ValueError) -> str:
    """Return what is wrong with a file that is not TOML: the line, and a hint."""
    raw = pathlib.Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    why, _, where = str(error).partition(" (at ")
    place = re.match(r"line (\d+)", where)
    number = int(place[1]) if place else raw.rstrip().count(b"\n") + 1
    if isinstance(error, UnicodeDecodeError):
        number = error.object.count(b"\n", 0, error.start) + 1
    line = raw.split(b"\n")[number - 1].decode("utf-8", "replace").strip()
    if isinstance(error, UnicodeDecodeError):
        hint = "save the file as UTF-8"
    elif re.search("(?i)declare|overwrite|mutate|expand", why):
        hint = "it stands in the file twice: keep one, with the lines of both"
    else:
        hints = (hint for pattern, hint in HINTS if re.search(pattern, line))
        hint = next(hints, why)
    shown = "".join(c for c in SECRET.sub(r"\1***", line) if c.isprintable())
    return tell(
        "{path}, line {number}: {line} → {hint}",
        path=path,
        number=number,
        line=shown[:LINE_CHARS],
        hint=hint,
    )

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
SECRET = re.compile(r"(?i)((?:key(?!words)|token|proxy|headers)[\w.-]*\W*).*")
# What stands between plain quotes, or is a comment, is not what is wrong with a line.
PLAIN = re.compile(r""""[^"\\]*"|'[^']*'|#.*""")
# What is wrong with a line that is not TOML, by the rest of it; the first counts.
HINTS = (
    ("^(<<<<<<<|=======|>>>>>>>)", "git's marks of a conflict: keep one version"),
    ("^(;|；|//|＃)", "a comment begins with #"),
    ("[“”‘’「」『』＂＇]", 'write straight quotes: " "'),
    (r"\\", r"write \ twice, or / in its place"),
    ("＝|^[^=]*[:：]", "write = between name and value"),
    ("，", "write , between values"),
    ('^[^="]*[\u3400-\u9fff]', 'put a Chinese name in quotes: "name"'),
    (
        "[！-～。、【】\xa0\u200b-\u200f\u3000]",
        "a sign or a space is Chinese: retype it",
    ),
    ("(?i)=\\s*(true|false|yes|no|on|off)$", "write true or false"),
    ("(?i)=\\s*(none|null|nil)?$", "the value is missing; or take the line out"),
    (r"=\s*0\d", "write a number without 0 before it"),
    ("=\\s*[{][^}]*$", "write { } on one line"),
    ("[,;]$", "take out the sign at its end"),
    ("=\\s*[^\"'\\[{]", 'put text in quotes: name = "text"'),
    ("[\"']", "quotes come in pairs, on one line, with = before them"),
    (r"[\[\]]", "brackets come in pairs: [name]"),
    ("", 'not TOML: expected name = "text", name = number or [table]'),
)


@functools.cache
def read_words() -> dict[str, str]:
    """Return the Chinese for each English text, of all modules; none if they are lost."""
    try:
        tables = tomllib.loads(WORDS.read_text("utf-8")).values()
    except (OSError, ValueError):  # the server is to start all the same
        return {}
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
    raw = pathlib.Path(path).read_bytes()
    text = raw.decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    why, _, where = str(error).partition(" (at ")
    place = re.match(r"line (\d+)", where)
    number = int(place[1]) if place else text.rstrip().count("\n") + 1
    if isinstance(error, UnicodeDecodeError):
        number = text.count("\n", 0, text.find("\ufffd")) + 1
    line = [*text.split("\n"), ""][number - 1].strip(" \t")
    if isinstance(error, UnicodeDecodeError) or "\0" in text:
        hint = "save the file as UTF-8"
    elif re.search("(?i)declare|overwrite|mutate|expand", why):
        hint = "it stands in the file twice: keep one, with the lines of both"
    else:
        rest = PLAIN.sub(lambda m: '""' if m[0][0] != "#" else "", line).rstrip()
        hint = next(hint for pattern, hint in HINTS if re.search(pattern, rest))
    shown = "".join(c for c in SECRET.sub(r"\1***", line) if c.isprintable())
    return tell(
        "{path}, line {number}: {line} → {hint}",
        path=path,
        number=number,
        line=shown[:LINE_CHARS],
        hint=hint,
    )

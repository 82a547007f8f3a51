"""What an owner reads at a terminal: English in the code, Chinese from words.toml.

Chinese is the default; `WXGPT_LANG=en` (the command line's `--lang en` sets it) shows
the English words as they stand in the code.
"""

import functools
import os
import pathlib
import tomllib

WORDS = pathlib.Path(__file__).with_name("words.toml")


@functools.cache
def read_words() -> dict[str, str]:
    """Return the Chinese for each English text, of all modules."""
    tables = tomllib.loads(WORDS.read_text("utf-8")).values()
    return {english: chinese for table in tables for english, chinese in table.items()}


def tell(english: str, **values: object) -> str:
    """Return a text in the owner's language, with its values filled in.

    A value that is a text of words.toml itself is translated, too. What has no Chinese
    stays English.
    """
    if os.environ.get("WXGPT_LANG", "").lower().startswith("en"):
        return english.format(**values)
    words = read_words()
    values = {k: words.get(v, v) if isinstance(v, str) else v for k, v in values.items()}
    return words.get(english, english).format(**values)

"""The files around the program say what the program does."""

import dataclasses
import functools
import operator
import re
import tomllib
from collections.abc import Iterator

import pytest

import wxgpt
from conftest import ROOT
from owner.check import switch_of

README, README_ZH = "README.md", "README.zh-CN.md"
EXAMPLE = ROOT / "wxgpt.example.toml"
LINES = tomllib.loads((ROOT / "texts.toml").read_text("utf-8"))
COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    " && .venv/bin/python wxgpt.py demo",
    "python3 -m venv .venv && .venv/bin/pip install -r tests/requirements.txt"
    " && .venv/bin/pytest",
]
REQUIRED = {README: "required", README_ZH: "必填"}
TEXTS = {README: "Chinese", README_ZH: "中文"}
BLOCK = re.compile(r"(?ms)^```\w*\n(.*?)^```$")


def settings_of(kind: type, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield each setting with its default, MISSING if it is required."""
    for entry in dataclasses.fields(kind):
        if entry.name == "assistants":
            yield from settings_of(wxgpt.AssistantSettings, "assistants.NAME.")
        elif isinstance(entry.type, type) and dataclasses.is_dataclass(entry.type):
            yield from settings_of(entry.type, f"{name}{entry.name}.")
        elif entry.default_factory is not dataclasses.MISSING:
            yield name + entry.name, entry.default_factory()
        else:
            yield name + entry.name, entry.default


SETTINGS = dict(settings_of(wxgpt.Config))
PLAIN = {name: value for name, value in SETTINGS.items() if name != "texts"}


def frozen(value: object) -> object:
    """Return a TOML value as the settings hold it."""
    return tuple(value) if isinstance(value, list) else value


def value_of(cell: str) -> object:
    """Return what a table's cell gives as a default."""
    return frozen(tomllib.loads(f"x = {cell[1:-1]}")["x"])


def read(name: str) -> str:
    """Return the text of a file at the top."""
    return (ROOT / name).read_text("utf-8")


def as_table(text: str) -> dict[str, object]:
    """Return the settings that a TOML text gives, by name; chatgpt's are NAME's."""
    table = tomllib.loads(text)
    table["assistants"] = {"NAME": table["assistants"]["chatgpt"]}
    found = {}
    for name in PLAIN:
        keys = name.split(".")
        if keys[-1] in functools.reduce(operator.getitem, keys[:-1], table):
            found[name] = frozen(functools.reduce(operator.getitem, keys, table))
    return found


def headings(name: str) -> list[int]:
    """Return the levels of a README's headings."""
    prose = BLOCK.sub("", read(name))
    return [len(marks) for marks in re.findall(r"(?m)^(#+) ", prose)]


def settings_table(name: str) -> list[tuple[str, str]]:
    """Return setting and default of each row of a README's settings table."""
    section = next(s for s in read(name).split("\n## ") if "| `public_url` |" in s)
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| (.+?) \| .+ \|$", section)
    assert len(rows) == section.count("\n| `")
    return rows


def test_the_example_has_every_setting_with_its_default():
    """What is required has a value that can be used, and all else its default.

    Loading refuses what is no setting. `extra` is commented out: once given as a table,
    TOML takes no line that adds to it.
    """
    wxgpt.load_config(EXAMPLE)
    text = EXAMPLE.read_text("utf-8")
    found = as_table(text.replace('# extra.thinking.type = "disabled"', "extra = {}"))
    assert list(found) == list(PLAIN)
    required = {k: found[k] for k, v in PLAIN.items() if v is dataclasses.MISSING}
    assert found == PLAIN | required


def test_the_example_shows_how_a_text_is_changed(tmp_path):
    """It works once the mark before it is taken away; the others stay as they are."""
    path = tmp_path / "wxgpt.toml"
    text = EXAMPLE.read_text("utf-8")
    path.write_text(re.sub(r"(?m)^# (?=\w+ = )", "", text), "utf-8")
    assert wxgpt.load_config(EXAMPLE).texts == wxgpt.Texts(LINES)
    [changed] = tomllib.loads(path.read_text("utf-8"))["texts"].items()
    assert wxgpt.load_config(path).texts == wxgpt.Texts(LINES | dict([changed]))


def test_the_example_takes_a_switch_for_thinking(tmp_path):
    """The line works once the mark is taken away, and so does one in its place."""
    path = tmp_path / "wxgpt.toml"
    for old, new in (("# extra.", "extra."), ("# extra.", "extra.more = 1\n# extra.")):
        path.write_text(EXAMPLE.read_text("utf-8").replace(old, new), "utf-8")
        assert wxgpt.load_config(path).assistants["chatgpt"].extra


def test_each_setting_of_the_example_has_a_comment():
    """The line above a setting, or above its table, says what it is."""
    lines = EXAMPLE.read_text("utf-8").splitlines()
    above = {line: before for before, line in zip(lines, lines[1:], strict=False)}
    bare = [line for line in above if re.match(r"\w+ = |\[replies\.k", line)]
    assert [line for line in bare if not above[line].startswith("# ")] == []


@pytest.mark.parametrize("name", [README, README_ZH])
def test_the_settings_table_has_every_setting_with_its_default(name):
    """The rows stand in the order of the fields; all texts share one row."""
    words = {REQUIRED[name]: dataclasses.MISSING, TEXTS[name]: TEXTS}
    found = []
    for setting, cell in settings_table(name):
        found.append((setting, words[cell] if cell in words else value_of(cell)))
    wanted = list(PLAIN.items())
    wanted.insert(list(PLAIN).index("history.link_hours"), ("texts.NAME", TEXTS))
    assert found == wanted


@pytest.mark.parametrize("name", [README, README_ZH])
def test_the_commands_table_has_every_command(name):
    """What a subscriber can send is in the README, and nothing else with a slash."""
    rows = "\n".join(re.findall(r"(?m)^\| `/.*$", read(name)))
    found = re.findall(r"`/(\w+)`", rows)
    assert sorted({*found} - {"chatgpt", "NAME"}) == sorted({*wxgpt.COMMANDS})


def test_both_readmes_have_the_same_shape():
    """Headings have the same levels in the same order, code blocks the same text."""
    assert headings(README) == headings(README_ZH)
    assert BLOCK.findall(read(README)) == BLOCK.findall(read(README_ZH))


@pytest.mark.parametrize("name", [README, README_ZH])
def test_a_readme_is_short_and_has_the_two_commands(name):
    """A newcomer copies one line for the demo, one for the tests."""
    assert len(read(name).splitlines()) <= 250
    assert [line + "\n" in BLOCK.findall(read(name)) for line in COMMANDS] == [True] * 2


def test_the_path_of_a_message_names_what_is_there():
    """Each name in the drawing is a function, a class or a method of wxgpt."""
    drawing = next(b for b in BLOCK.findall(read(README)) if "receive_message" in b)
    names = re.findall(r"\b[a-z]+_\w+|\b[A-Z]\w+(?:\.\w+)?", drawing)
    assert "Store.finish_turn" in names
    assert all(operator.attrgetter(name)(wxgpt) for name in names)


def test_the_recipes_for_models_can_be_loaded(tmp_path):
    """Each is an assistant of its own, and `check` knows its switch for thinking."""
    recipes = "\n".join(
        re.findall(r"(?ms)^```toml\n(.*?)^```$", read("docs/models.md"))
    )
    path = tmp_path / "wxgpt.toml"
    head = EXAMPLE.read_text("utf-8").partition("[assistants.")[0]
    path.write_text(f"{head}\n{recipes}", "utf-8")
    found = wxgpt.load_config(path).assistants
    assert len(found) == recipes.count("[assistants.") == 7
    thinking = [one for one in found.values() if one.extra]
    switches = [switch_of(one).split("; or")[0] for one in thinking]
    assert [tomllib.loads(line.partition(": ")[2]) for line in switches] == [
        {"extra": one.extra} for one in thinking
    ]


@pytest.mark.parametrize(
    "name", [README, README_ZH, *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_what_a_page_links_to_is_there(name):
    """Links and pictures lead to files of the checkout."""
    text = BLOCK.sub("", read(name))
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", text)
    for link in map("".join, links):
        assert ((ROOT / name).parent / link).exists()


def test_the_example_settings_of_the_readme_can_be_loaded(tmp_path):
    """The assistant shown there is one."""
    shown = next(b for b in BLOCK.findall(read(README)) if "[assistants." in b)
    path = tmp_path / "wxgpt.toml"
    path.write_text(EXAMPLE.read_text("utf-8") + shown, "utf-8")
    assert wxgpt.load_config(path).assistants["deepseek"].extra

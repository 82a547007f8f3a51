"""The files around the program say what the program does."""

import dataclasses
import functools
import operator
import pathlib
import re
import tomllib
from collections.abc import Iterator

import pytest

import wxgpt
from conftest import ROOT
from owner.check import switch_of

README, README_ZH = "README.md", "README.zh-CN.md"
MODELS, MODELS_ZH = "docs/models.md", "docs/models.zh-CN.md"
EXAMPLE = ROOT / "wxgpt.example.toml"
LINES = tomllib.loads((ROOT / "texts.toml").read_text("utf-8"))
COMMANDS = [
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.lock"
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
    """Return the levels of a page's headings."""
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
    found = as_table(re.sub(r"(?m)^# ([\w.]+\.extra)\..*", r"\1 = {}", text))
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
    line = "assistants.chatgpt.extra."
    for new in (line, f"{line}more = 1\n# {line}"):
        text = EXAMPLE.read_text("utf-8").replace(f"# {line}", new)
        path.write_text(text, "utf-8")
        assert wxgpt.load_config(path).assistants["chatgpt"].extra


def test_each_setting_of_the_example_has_a_comment():
    """The line above a setting, or above its table, says what it is."""
    lines = EXAMPLE.read_text("utf-8").splitlines()
    above = {line: before for before, line in zip(lines, lines[1:], strict=False)}
    bare = [line for line in above if re.match(r"[\w.]+ = |\[replies\.k", line)]
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


@pytest.mark.parametrize("pages", [(README, README_ZH), (MODELS, MODELS_ZH)])
def test_a_page_has_the_same_shape_in_both_languages(pages):
    """Headings have the same levels in the same order, code blocks the same text."""
    english, chinese = pages
    assert headings(english) == headings(chinese)
    assert BLOCK.findall(read(english)) == BLOCK.findall(read(chinese))


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


def recipes(name: str, path: pathlib.Path) -> dict[str, wxgpt.AssistantSettings]:
    """Return the assistants of a page's recipes, loaded all together."""
    tables = "\n".join(re.findall(r"(?ms)^```toml\n(.*?)^```$", read(name)))
    head = re.findall(r"(?m)^(?:public_url|wechat\.).*$", EXAMPLE.read_text("utf-8"))
    path.write_text("\n".join([*head, tables]), "utf-8")
    found = wxgpt.load_config(path).assistants
    assert len(found) == len(re.findall(r"(?m)^\[assistants\.[^.]+\]$", tables))
    return dict(found)


def models_table(name: str) -> list[list[str]]:
    """Return the cells of each row of the table at the top of the recipes."""
    rows = re.findall(r"(?m)^\| \[.+\|$", read(name))
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


@pytest.mark.parametrize("name", [MODELS, MODELS_ZH])
def test_the_recipes_for_models_can_be_loaded(tmp_path, name):
    """Each is an assistant of its own; those of providers are in the table of all."""
    found = recipes(name, tmp_path / "wxgpt.toml").values()
    rows = [[cell.strip("`") for cell in row[1:3]] for row in models_table(name)]
    shown = [[one.base_url, one.model] for one in found]
    assert shown[: len(rows)] == rows  # what follows shows settings, not providers


@pytest.mark.parametrize("name", [MODELS, MODELS_ZH])
def test_check_advises_what_each_recipe_does(tmp_path, name):
    """The recipe, its row in the table and `check` have the same switch for thinking."""
    unneeded, rows = {"chatgpt", "gemini", "gateway"}, models_table(name)
    found = recipes(name, tmp_path / "wxgpt.toml")
    for (assistant, one), row in zip(found.items(), rows):
        switch = switch_of(one).partition(": ")[2].partition(";")[0]
        if assistant in unneeded:
            assert not one.extra
        else:
            assert tomllib.loads(switch) == {"extra": one.extra}
            assert f"`{switch}`" in row[-1]


@pytest.mark.parametrize("name", [MODELS, MODELS_ZH])
def test_the_table_of_recipes_leads_to_their_sections(name):
    """GitHub names a heading's place by its letters, digits and hyphens."""
    titles = re.findall(r"(?m)^## (.+)$", BLOCK.sub("", read(name)))
    places = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
    links = [row[0].partition("(#")[2].rstrip(")") for row in models_table(name)]
    assert [place for place in places if place in links] == links


@pytest.mark.parametrize(
    "name", [README, README_ZH, *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_what_a_page_links_to_is_there(name):
    """Links and pictures lead to files of the checkout."""
    text = BLOCK.sub("", read(name))
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", text)
    for link in map("".join, links):
        assert ((ROOT / name).parent / link).exists()


def test_the_chinese_readme_links_to_chinese_pages():
    """Where a page is there in Chinese, that is the one it leads to."""
    links = re.findall(r"\]\((docs/\w+)\.md\)", read(README_ZH))
    assert [link for link in links if (ROOT / f"{link}.zh-CN.md").exists()] == []


def test_the_example_settings_of_the_readme_can_be_loaded(tmp_path):
    """The assistant shown there is one."""
    shown = next(b for b in BLOCK.findall(read(README)) if "[assistants." in b)
    path = tmp_path / "wxgpt.toml"
    path.write_text(EXAMPLE.read_text("utf-8") + shown, "utf-8")
    assert wxgpt.load_config(path).assistants["deepseek"].extra

"""The files around the program say what the program does."""

import dataclasses
import functools
import operator
import pathlib
import re
import tomllib
from collections.abc import Iterator

import pytest

import owner.commands
import wxgpt
from conftest import ROOT
from owner.check import switch_of
from owner.stats import print_stats

README, README_ZH = "README.md", "README.zh-CN.md"
MODELS, MODELS_ZH = "docs/models.md", "docs/models.zh-CN.md"
EVERY = [README, README_ZH, *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
CHINESE = [name for name in EVERY if name.endswith(".zh-CN.md")]
ENGLISH = [name for name in EVERY if name not in CHINESE]
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
# What the pages on trouble quote of other programs, and of WeChat.
FOREIGN = (
    *("token验证失败", "verify token fail, 200302", "请求URL超时", "系统错误"),
    *("请输入正确的 Token", "MP_verify_", "ensurepip is not available"),
    *(".venv/bin/pip: cannot execute: required file not found", "bad interpreter"),
)
# Figures for the sample of docs/stats.md: one row for each name.
COUNTED = (
    *("questions", "failures", "tokens_in", "tokens_out"),
    *("median_seconds", "p95_seconds", "cost"),
)


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


def places(name: str) -> list[str]:
    """Return what links to a page's headings say, as GitHub makes it."""
    titles = re.findall(r"(?m)^#+ (.+)$", BLOCK.sub("", read(name)))
    return [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


def sister(name: str) -> str:
    """Return the Chinese page that belongs to an English one."""
    return name.removesuffix(".md") + ".zh-CN.md"


def commands(name: str) -> list[str]:
    """Return a page's code blocks, comments aside.

    What `stats` prints is in the page's own language, and has a test of its own.
    """
    blocks = [re.sub(r"(?m) *#.*$", "", block) for block in BLOCK.findall(read(name))]
    return blocks if "stats" not in name else blocks[1:]


def tables(name: str) -> list[list[str]]:
    """Return the rows of a page's tables."""
    prose = BLOCK.sub("", read(name))
    return [t.splitlines() for t in re.findall(r"(?m)(?:^\|.*\|\n)+", prose)]


def named_settings(name: str) -> set[str]:
    """Return the settings that a page names, as a group and a name."""
    groups = "|".join(
        {setting.partition(".")[0] for setting in SETTINGS if "." in setting}
    )
    return set(re.findall(rf"\b(?:{groups})\.[a-z_]+\b", read(name)))


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


def test_each_page_is_there_in_both_languages():
    """And each names its sister at its head."""
    assert sorted(map(sister, ENGLISH)) == sorted(CHINESE)
    for english in ENGLISH:
        here, there = (pathlib.Path(name).name for name in (english, sister(english)))
        assert read(english).splitlines()[2] == f"[中文]({there})"
        assert read(sister(english)).splitlines()[2] == f"[English]({here})"


@pytest.mark.parametrize("english", ENGLISH)
def test_a_page_has_the_same_shape_in_both_languages(english):
    """The same headings, commands, tables with their figures, and settings."""
    chinese = sister(english)
    assert headings(english) == headings(chinese)
    assert commands(english) == commands(chinese)
    assert named_settings(english) == named_settings(chinese)
    ours, theirs = tables(english), tables(chinese)
    assert [len(table) for table in ours] == [len(table) for table in theirs]
    for row, other in zip(sum(ours, []), sum(theirs, []), strict=True):
        figures = (
            sorted(re.findall(r"\d+(?:[.,]\d+)*", line)) for line in (row, other)
        )
        assert len({*map(tuple, figures)}) == 1, (row, other)


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
    """In the order of the sections."""
    links = [row[0].partition("(#")[2].rstrip(")") for row in models_table(name)]
    assert [place for place in places(name) if place in links] == links


@pytest.mark.parametrize("name", EVERY)
def test_what_a_page_links_to_is_there(name):
    """Links and pictures lead to files of the checkout, and to their headings."""
    text = BLOCK.sub("", read(name))
    links = re.findall(r"\]\(([^):]+)\)|src=\"([^\":]+)\"", text)
    for link in map("".join, links):
        file, _, place = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists()
        assert not place or place in places(str(path.resolve().relative_to(ROOT)))


@pytest.mark.parametrize("name", CHINESE)
def test_a_chinese_page_links_to_chinese_pages(name):
    """Each page is there in Chinese; the head alone leads to the English one."""
    links = re.findall(r"\]\(([^):#]+\.md)\b", read(name))
    own = pathlib.Path(name).name.replace(".zh-CN", "")
    assert [link for link in links if not link.endswith(".zh-CN.md")] == [own]


@pytest.mark.parametrize("name", EVERY)
def test_the_commands_that_a_page_names_are_there(name):
    """`wxgpt WORD` and `wxgpt.py WORD` are commands of the command line."""
    named = re.findall(r"`wxgpt(?:\.py)? ([a-z]+)\b[^`\n]*`", read(name))
    assert {*named} <= {*owner.commands.COMMANDS}
    assert named or "docs/benchmark" in name


@pytest.mark.parametrize(
    "name", ["docs/troubleshooting.md", sister("docs/troubleshooting.md")]
)
def test_what_a_page_on_trouble_quotes_is_said(name):
    """Symptoms are quoted as the program, its log or texts.toml say them."""
    files = [ROOT / "wxgpt.py", ROOT / "texts.toml", *ROOT.glob("owner/*.[pt]*")]
    said = "\n".join([*(file.read_text("utf-8") for file in files), *FOREIGN])
    said = re.sub(r"%\S*[sdf]|\{\w+(?::[^}]*)?\}|\d+", "…", said.replace('"\n', ""))
    lists = [rows for rows in tables(name) if re.match(r"\| (symptom|现象)", rows[0])]
    for row in sum(lists, []):
        for quoted in re.findall("`(?!wxgpt [a-z])([^`]+)`", row.split(" | ")[0]):
            for piece in re.sub(r"\d+", "…", quoted).split("…"):
                assert piece.strip(": ,") in said, quoted


def sample_row(name: str, *figures: float | None, **more: object) -> dict[str, object]:
    """Return a row of what `stats` gathers."""
    key = {"2026": "day", "oAnn": "openid", "oBob": "openid"}.get(name[:4], "model")
    row = {key: name} | dict(zip(COUNTED, figures, strict=True))
    return row | {"fallback": 0, "delivered": {}} | more


SAMPLE = {
    "days": [
        sample_row("2026-11-21", 8, 0, 28854, 3204, 2.7, 9.5, 0.083),
        sample_row("2026-11-22", 21, 2, 64824, 7616, 3.2, 8.1, 0.191),
    ],
    "subscribers": [
        sample_row("oAnn7Zt1…", 20, 2, 66120, 7501, 3.1, 9.5, 0.192),
        sample_row("oBob2Yq8…", 9, 0, 27558, 3319, 2.4, 8.1, 0.082),
    ],
    "models": [
        sample_row("gpt-6-luna", 25, 0, 87410, 9980, 2.6, 7.4, 0.254),
        sample_row("deepseek-flash", 2, 0, 6268, 840, 9.1, 9.5, 0.02),
        sample_row("-", 2, 2, 0, 0, None, None, 0),
    ],
    "total": sample_row("", 29, 2, 93678, 10820, 2.9, 8.1, 0.274, fallback=2)
    | {
        "delivered": {
            "1": 13,
            "2": 5,
            "3": 3,
            "part": 4,
            "page": 1,
            "none": 3,
            "lost": 0,
        }
    },
    "reasons": {"busy": 2},
    "slowest": [
        {"at": "2026-11-21 20:14", "seconds": 9.5, "model": "deepseek-flash"},
        {"at": "2026-11-22 09:03", "seconds": 9.1, "model": "deepseek-flash"},
    ],
    "reply_margin": 0.8,
}


@pytest.mark.parametrize(
    ("lang", "name"), [("en", "docs/stats.md"), ("zh", sister("docs/stats.md"))]
)
def test_the_sample_of_stats_is_what_it_prints(lang, name, capsys, monkeypatch):
    """In the language of the page."""
    monkeypatch.setenv("WXGPT_LANG", lang)
    print_stats(SAMPLE)
    assert capsys.readouterr().out == BLOCK.findall(read(name))[0]


def test_the_example_settings_of_the_readme_can_be_loaded(tmp_path):
    """The assistant shown there is one."""
    shown = next(b for b in BLOCK.findall(read(README)) if "[assistants." in b)
    path = tmp_path / "wxgpt.toml"
    path.write_text(EXAMPLE.read_text("utf-8") + shown, "utf-8")
    assert wxgpt.load_config(path).assistants["deepseek"].extra

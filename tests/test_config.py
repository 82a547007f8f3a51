"""Settings: one TOML file, checked before anything starts."""

import argparse
import ast
import errno
import importlib.util
import operator
import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
from packaging.requirements import Requirement

import wxgpt
from conftest import ROOT, TOKEN, copy_server
from owner.words import explain, read_words
from typist import typing_at

KEY = "sk-verySecret"
URL = 'public_url = "https://wx.example.com"\n'
WECHAT = f'[wechat]\ntoken = "{TOKEN}"\n'
CHATGPT = f'[assistants.chatgpt]\napi_key = "{KEY}"\n'
GOOD = URL + WECHAT + CHATGPT

# What is in the file, and the words that its one line of complaint has.
REFUSED = {
    "no public_url": (WECHAT + CHATGPT, ["public_url", "expected"]),
    "no token": (URL + CHATGPT, ["wechat.token", "nothing", "text"]),
    "no chatgpt": (
        URL + WECHAT,
        ["assistants.chatgpt", "nothing", "a table of this name"],
    ),
    "no key": (
        URL + WECHAT + "[assistants.chatgpt]\n",
        ["assistants.chatgpt.api_key", "nothing", "text"],
    ),
    "empty key": (
        URL + WECHAT + '[assistants.chatgpt]\napi_key = ""\n',
        ["assistants.chatgpt.api_key", "expected"],
    ),
    "fallback to nobody": (
        GOOD + 'fallback = "spare"\n',
        ["assistants.chatgpt.fallback", "'spare'", "another assistant"],
    ),
    "fallback to itself": (
        GOOD + 'fallback = "chatgpt"\n',
        ["assistants.chatgpt.fallback", "'chatgpt'", "another assistant"],
    ),
    "unknown key at the top": ("colour = 1\n" + GOOD, ["colour", "public_url"]),
    "unknown table": (GOOD + "[sessions]\nttl = 5\n", ["sessions", "public_url"]),
    "unknown key in a table": (GOOD + "[session]\ntll = 5\n", ["session.tll", "ttl"]),
    "unknown key with a line break": ('"a\\nb" = 1\n' + GOOD, ["public_url"]),
    "not a table": ("server = 5\n" + GOOD, ["server", "5", "table"]),
    "text for a number": (
        GOOD + '[session]\nttl = "soon"\n',
        ["session.ttl", "'soon'", "number"],
    ),
    "truth for a number": (
        GOOD + "[limits]\nwaiting = true\n",
        ["limits.waiting", "whole number"],
    ),
    "fraction for a count": (
        GOOD + "[limits]\nat_once = 1.5\n",
        ["limits.at_once", "1.5", "whole number"],
    ),
    "list of numbers": (
        GOOD + "[limits]\nallow = [1]\n",
        ["limits.allow", "[1]", "list of texts"],
    ),
    "no folder": (
        GOOD + '[server]\nroot_files = "/nowhere"\n',
        ["server.root_files", "/nowhere", "folder"],
    ),
    "too small": (
        GOOD.replace("[wechat]", "[wechat]\nattempt_timeout = 0.1"),
        ["wechat.attempt_timeout", "0.1", "0.2"],
    ),
    "too large": (
        GOOD + "[server]\nport = 65536\n",
        ["server.port", "65536", "65535"],
    ),
    "too short": (GOOD + "[session]\nttl = 0.5\n", ["0.5", "1", "31536000"]),
    "too small to be told shortly": (
        GOOD + "[history]\nlink_hours = 0\n",
        ["history.link_hours", "0.000001", "876000"],
    ),
    "not a number": (GOOD + "[session]\nttl = nan\n", ["session.ttl", "nan"]),
    "URL without scheme": (
        GOOD.replace("https://", ""),
        ["public_url", "'wx.example.com'", "https://"],
    ),
    "URL whose port is none": (
        GOOD.replace("wx.example.com", "wx.example.com:web"),
        ["public_url", "example.com:web'", "https://"],
    ),
    "key of two lines": (
        GOOD.replace(KEY, "two\\nlines"),
        ["assistants.chatgpt.api_key", "blanks"],
    ),
    "path without slash": (
        GOOD + '[server]\npath = "wechat"\n',
        ["server.path", "'wechat'", "/wechat"],
    ),
    "token with signs": (
        GOOD.replace(TOKEN, TOKEN + "!"),
        ["wechat.token", "letters and digits"],
    ),
    "key of another type": (
        URL + WECHAT + f'[assistants.chatgpt]\napi_key = ["{KEY}"]\n',
        ["assistants.chatgpt.api_key", "text"],
    ),
    "base URL without scheme": (
        GOOD + 'base_url = "api.example.com"\n',
        ["assistants.chatgpt.base_url", "'api.example.com'", "http"],
    ),
    "proxy of another kind": (
        GOOD + f'proxy = "ftp://me:{KEY}@proxy"\n',
        ["assistants.chatgpt.proxy", "http"],
    ),
    "header of another type": (
        GOOD + f'headers = {{X-Key = ["{KEY}"]}}\n',
        ["assistants.chatgpt.headers", "a table of texts"],
    ),
    "header with a bad name": (
        GOOD + "headers = {'X Key' = 'x'}\n",
        ["assistants.chatgpt.headers", "'X Key'"],
    ),
    "header of the body": (
        GOOD + "headers = {Content-Length = '1'}\n",
        ["assistants.chatgpt.headers", "'Content-Length'"],
    ),
    "header of two lines": (
        GOOD + f'headers = {{X-Key = "{KEY}\\nHost: x"}}\n',
        ["assistants.chatgpt.headers.X-Key", "one line"],
    ),
    "empty header": (
        GOOD + "headers = {X-Key = ''}\n",
        ["assistants.chatgpt.headers.X-Key", "one line"],
    ),
    "extra with the model": (
        GOOD + 'extra.model = "x"\n',
        ["assistants.chatgpt.extra.model"],
    ),
    "unknown text": (GOOD + '[texts]\nhallo = "x"\n', ["texts.hallo", "opened"]),
    "unknown placeholder": (
        GOOD + '[texts]\nthinking = "{who}"\n',
        ["texts.thinking", "{who}", "{question}"],
    ),
    "number for a text": (
        GOOD + "[texts]\nopened = 5\n",
        ["texts.opened", "found 5", "text"],
    ),
    "text for the texts": ('texts = "x"\n' + GOOD, ["texts: found 'x'", "a table"]),
    "open brace": (GOOD + '[texts]\nthinking = "{tap"\n', ["texts.thinking", "'}'"]),
    "assistant named like a command": (
        GOOD + f'[assistants.STOP]\napi_key = "{KEY}"\n',
        ["assistants.STOP", "command"],
    ),
    "broken TOML": ("public_url = \n", ["wxgpt.toml"]),
    "endless nesting": (f"x = {'[' * 3000}\n", ["wxgpt.toml"]),
    **{
        f"public URL {url}": (
            GOOD.replace("https://wx.example.com", url),
            ["public_url", "http:// or https:// and a host"],
        )
        for url in (
            "https://https://wx.example.com",
            "https://wx。example。com",
            "https://wx.example.com,",
            "https：//wx.example.com",
            "https://wx..example.com",
        )
    },
    "public URL with the path": (
        GOOD.replace("https://wx.example.com", "https://wx.example.com/wechat"),
        ["public_url", "without the path of server.path"],
    ),
    **{
        f"host {host}": (
            GOOD + f"[server]\nhost = '{host}'\n",
            ["server.host", "an address like 127.0.0.1"],
        )
        for host in ("http://0.0.0.0", "0.0.0.0:8080", "全部", "*")
    },
    **{
        f"path {path}": (
            GOOD + f"[server]\npath = '{path}'\n",
            ["server.path", "a path like /wechat"],
        )
        for path in ("/me", "/healthz", "/微信")
    },
    "assistant that no tap opens": (
        GOOD + '[assistants."c++"]\napi_key = "sk-2"\nmodel = "x"\n',
        ["assistants.c++", "'c++'", "a name of letters, digits, dots, - and _"],
    ),
    **{
        f"AppID {app_id}": (
            URL + WECHAT + f'app_id = "{app_id}"\naes_key = "{"a" * 43}"\n' + CHATGPT,
            ["wechat.app_id", shown, "wx and 16"],
        )
        for app_id, shown in (
            ("gh_0123456789ab", "gh_0123456789ab"),
            ("wx0123456789abcdef ", "***"),
            ("0123456789abcdef" * 2, "***"),  # AppSecret
        )
    },
    **{
        f"base URL {url}": (
            GOOD + f"base_url = '{url}'\n",
            ["assistants.chatgpt.base_url", "an http(s) URL"],
        )
        for url in ("http://[::1:80/v1", "http://api.x :80/v1", "http://api.x:99999/v1")
    },
    **{
        f"proxy {url}": (
            GOOD + f"proxy = '{url}'\n",
            ["assistants.chatgpt.proxy", "an http, https or socks URL"],
        )
        for url in ("http://", "127.0.0.1:7890", "http://127.0.0.1:78900")
    },
    **{
        f"model '{model}'": (
            GOOD + f"model = '{model}'\n",
            ["assistants.chatgpt.model", "the name of a model"],
        )
        for model in ("", " gpt")
    },
    **{
        f"extra {value}": (
            GOOD + f"extra.a = {value}\n",
            ["assistants.chatgpt.extra", "what JSON has"],
        )
        for value in ("2026-11-27", "nan")
    },
}

DEFAULTS = {
    "server.host": "127.0.0.1",
    "server.port": 8080,
    "server.path": "/wechat",
    "server.root_files": "",
    "wechat.app_id": "",
    "wechat.aes_key": "",
    "wechat.attempt_timeout": 5.0,
    "wechat.attempts": 3,
    "wechat.reply_margin": 0.8,
    "wechat.mute_guard": 30,
    "session.ttl": 300,
    "session.context_chars": 12000,
    "session.auto_open": False,
    "limits.questions_per_day": 100,
    "limits.all_per_day": 2000,
    "limits.question_chars": 2000,
    "limits.waiting": 3,
    "limits.at_once": 64,
    "limits.allow": (),
    "limits.deny": (),
    "limits.blocked_words": "",
    "replies.outside": wxgpt.HINT,
    "replies.outside_hours": 24,
    "replies.model_notice": "",
    "aliases": wxgpt.ALIASES,
    "replies.label": "（AI 生成）",
    "replies.keywords": {},
    "history.link_hours": 72,
    "history.history_minutes": 120,
    "history.keep_days": 0,
}
ASSISTANT_DEFAULTS = {
    "base_url": "https://api.openai.com/v1",
    "system_prompt": (
        "你在微信里和人聊天。用对方的语言，先给结论，一般不超过 200 字，需要时再展开。"
        "少用标题和表格，公式用普通文字写。"
    ),
    "price_in": 0,
    "price_out": 0,
    "headers": {},
    "proxy": "",
    "extra": {},
    "first_token_timeout": 60,
    "idle_timeout": 60,
    "timeout": 240,
}


# Tried with the command itself; the others with what it calls.
AT_THE_SHELL = [
    "no token",
    "no key",
    "unknown key at the top",
    "unknown key in a table",
    "text for a number",
    "too small",
    "token with signs",
    "unknown text",
    "unknown placeholder",
    "assistant named like a command",
    "broken TOML",
]


def run(
    *arguments: object, cwd: pathlib.Path = ROOT, program: pathlib.Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, with no key in the environment."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    command = [sys.executable, str(program / "wxgpt.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def load(tmp_path):
    """Load settings from a text, in an environment."""

    def load(text=GOOD, **environ):
        path = tmp_path / "wxgpt.toml"
        path.write_text(text, "utf-8")
        return wxgpt.load_config(path, environ, wxgpt.check_commands)

    return load


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Run the command with each refused file, some at a time; return how it ended."""
    folder = tmp_path_factory.mktemp("config")
    for name in AT_THE_SHELL:
        (folder / name).mkdir()
        (folder / name / "wxgpt.toml").write_text(REFUSED[name][0], "utf-8")
    paths = [folder / name / "wxgpt.toml" for name in AT_THE_SHELL]
    with ThreadPoolExecutor(4) as pool:
        ended = pool.map(lambda path: run("--config", path), paths)
        return dict(zip(AT_THE_SHELL, ended))


@pytest.mark.xdist_group(name="config")  # the commands run once for all
@pytest.mark.parametrize("name", AT_THE_SHELL)
def test_a_setting_that_cannot_be_used_ends_the_start_with_one_line(endings, name):
    """The line names the setting, what was found and what is expected; no secret."""
    ended, words = endings[name], REFUSED[name][1]
    assert ended.returncode == 2 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr
    assert KEY not in ended.stderr and TOKEN not in ended.stderr


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in AT_THE_SHELL])
def test_a_setting_is_refused_in_one_line(load, name):
    """Missing, unknown, of the wrong type or out of range, it is named as there."""
    text, words = REFUSED[name]
    with pytest.raises(wxgpt.ConfigError) as refused:
        load(text)
    line = str(refused.value)
    assert len(line.splitlines()) == 1, line
    assert [word for word in words if word not in line] == [], line
    assert KEY not in line and TOKEN not in line


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_in_chinese(load, monkeypatch, name):
    """One line, with the setting as the file has it, and none of our English."""
    monkeypatch.setenv("WXGPT_LANG", "zh")
    with pytest.raises(wxgpt.ConfigError) as refused:
        load(REFUSED[name][0])
    line = explain(refused.value)
    assert len(line.splitlines()) == 1 and re.search("[一-鿿]", line), line
    assert not re.search("found|unknown|not TOML|nothing", line), line
    assert KEY not in line and TOKEN not in line


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    """Each in a line of its own, of whatever kind, and of one setting only the first."""
    (tmp_path / "wxgpt.toml").write_text(
        'public_url = "wx.example.com"\ncolour = 1\n[wechat]\ntoken = "a-b"\n'
        '[assistants.chatgpt]\nextra.model = "x"\n[session]\nttl = "soon"\n'
        '[texts]\nopened = 5\n[aliases]\n"菜单" = "/hilfe"\n[assistants.clear]\n'
    )
    ended = run(cwd=tmp_path)
    assert ended.returncode == 2 and ended.stdout == ""
    found = [line.split(": ")[1] for line in ended.stderr.splitlines()]
    wanted = "public_url colour wechat.token assistants.chatgpt.api_key"
    wanted += " assistants.chatgpt.extra.model session.ttl texts.opened aliases.菜单"
    wanted += " assistants.clear assistants.clear.api_key"
    assert sorted(found) == sorted(wanted.split())


APP_ID = "wx0123456789abcdef"
IN_CHINESE = {  # what is in the file, and what is told of it
    "names are not translated": (
        "port = 80\nmodel = 1\nuser = 1\n" + GOOD,
        ["port：没有", "model：没有", "user：没有"],
    ),
    "an address": (f"public_url = 'x'\n{WECHAT}{CHATGPT}", ["public_url：现在是 'x'"]),
    "a variable is": (
        URL + WECHAT + "[assistants.chatgpt]",
        ["环境变量 OPENAI_API_KEY：现在是 别的内容，应为接口的密钥，只有英文字母"],
    ),
    "an app_id alone": (
        URL + WECHAT + 'app_id = "wx0123456789abcdef"\n' + CHATGPT,
        ["wechat.aes_key：现在是 空的，app_id 却写了，应为两项都写，或者都不写"],
    ),
    "an aes_key alone": (
        URL + WECHAT + f'aes_key = "{"a" * 43}"\n' + CHATGPT,
        ["wechat.aes_key：现在是 写了，app_id 却是空的，应为两项都写，或者都不写"],
    ),
    "a short aes_key": (
        URL + WECHAT + f'app_id = "{APP_ID}"\naes_key = "{"a" * 42}"\n' + CHATGPT,
        ["wechat.aes_key：现在是 42 个字符，应为 43 个字母或数字"],
    ),
    "an empty token": (
        URL + '[wechat]\ntoken = ""\n' + CHATGPT,
        ["wechat.token：现在是 空的，应为 3 到 32 个字母或数字"],
    ),
    "a table of texts": (
        "aliases = 5\n" + GOOD,
        ['aliases：现在是 5，应为一张表，左右都是文字，如 "地址" = "人民路 1 号"'],
    ),
    "a list of texts": (
        GOOD + "[limits]\ndeny = 5\n",
        ['limits.deny：现在是 5，应为方括号里的几段文字，如 ["a", "b"]'],
    ),
}


@pytest.mark.parametrize("name", IN_CHINESE)
def test_a_mistake_is_told_in_chinese(load, monkeypatch, name):
    """But the name of a setting, even if it is a word that is told elsewhere."""
    monkeypatch.setenv("WXGPT_LANG", "zh")
    text, lines = IN_CHINESE[name]
    with pytest.raises(wxgpt.ConfigError) as refused:
        load(text, OPENAI_API_KEY="密钥")
    found = explain(refused.value).splitlines()
    assert len(found) == len(lines)
    for told, words in zip(found, lines, strict=True):
        assert told.startswith(words)


BROKEN = {  # a line of TOML that is none, and what is told of it
    "curly quotes": ("model = “gpt”", "model = “gpt” → write straight quotes"),
    "a secret in curly quotes": ("token = “abc123”", "token = “*** → write straight"),
    "no quotes": ("path = /wechat", "path = /wechat → put text in quotes"),
    "no quotes before a digit": ("host = 127.0.0.1", "put text in quotes"),
    "a secret after a colon": ('token: "abc123"', 'token: "*** → write ='),
    "a secret after nothing": ('api_key "abc123"', 'api_key "*** → quotes come'),
    "Chinese brackets": ("【wechat】", "【wechat】 → a sign or a space is Chinese"),
    "Chinese digits": ("port = ８０８０", "a sign or a space is Chinese"),
    "a Chinese full stop": ("ttl = 300。0", "a sign or a space is Chinese"),
    "a hidden space": ("port\xa0= 80", "a sign or a space is Chinese"),
    "a Chinese table": ("[assistants.我的助手]", "put a Chinese name in quotes"),
    "a Chinese name": ('地址 = "人民路"', "put a Chinese name in quotes"),
    "a comment of an INI file": ("；注释", "a comment begins with #"),
    "True of Python": ("auto_open = True", "write true or false"),
    "null of JSON": ("proxy = null", "the value is missing"),
    "no value": ("port =", "the value is missing"),
    "a backslash": ('path = "C:\\data"', "write \\ twice"),
    "a table over lines": ("extra = {", "write { } on one line"),
    "a semicolon": ('host = "a";', "take out the sign at its end"),
    "a 0 before a number": ("port = 080", "without 0 before it"),
    "half a bracket": ("[wechat", "brackets come in pairs"),
    "a merge that stopped": ("<<<<<<< HEAD", "git's marks of a conflict"),
    "a web page": ("<html>", "not TOML: expected name"),
    "no quotes around a word": ("model = gpt", "put text in quotes"),
    "a Chinese equals sign": ("port ＝ 80", "port ＝ 80 → write ="),
    "a colon": ("port: 80", "port: 80 → write ="),
    "a Chinese comma": ('deny = ["a"，"b"]', "write , between"),
    "an open quote": ('model = "gpt', 'model = "gpt → '),
    "a table twice": ("[wechat]\n[wechat]", "[wechat] → it stands in the file twice"),
    "a name twice": ("port = 1\nport = 2", "port = 2 → it stands in the file twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_is_not_toml_is_quoted_with_a_hint(load, name):
    """Its number is right, and no secret is shown."""
    text, words = BROKEN[name]
    with pytest.raises(wxgpt.ConfigError) as refused:
        load(f"# one\n{text}")
    line = explain(refused.value)
    number = 2 + text.count("\n")
    assert f"wxgpt.toml, line {number}: " in line and words in line
    assert len(line.splitlines()) == 1 and "abc123" not in line


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gbk"])
def test_another_encoding_is_told(tmp_path, encoding):
    """As Notepad has them."""
    path = tmp_path / "wxgpt.toml"
    path.write_bytes(f"# 设置\n{GOOD}".encode(encoding))
    with pytest.raises(wxgpt.ConfigError) as refused:
        wxgpt.load_config(path)
    assert explain(refused.value).endswith(" → save the file as UTF-8")


def test_a_line_is_quoted_by_its_number_whatever_ends_lines(tmp_path):
    """Old Macs end them with a carriage return alone."""
    path = tmp_path / "wxgpt.toml"
    path.write_bytes(b"# one\r# two\rport ; 80\r")
    with pytest.raises(wxgpt.ConfigError) as refused:
        wxgpt.load_config(path)
    assert "wxgpt.toml, line 3: port ; 80 → " in explain(refused.value)


def test_the_mark_that_notepad_puts_before_a_file_is_taken(tmp_path):
    """A byte order mark."""
    path = tmp_path / "wxgpt.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert wxgpt.load_config(path).wechat.token == TOKEN


def start_after(code, *words, **environ):
    """Run the command line in a Python in which this code was run."""
    code = f"import runpy, sys\n{code}\nrunpy.run_path({str(ROOT / 'wxgpt.py')!r}, "
    command = [sys.executable, "-c", code + "run_name='__main__')", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environ, timeout=30
    )


def test_an_older_python_is_told_in_one_line():
    """What it would end in otherwise is a traceback."""
    ended = start_after("sys.version_info = (3, 10, 12)")
    assert ended.returncode == 1
    assert re.fullmatch(r"wxgpt: 需要 Python 3\.11 .* 3\.10 \(.*\)\n", ended.stderr)


def test_a_python_that_cannot_read_the_program_shows_why():
    """The first line it stumbles over, which it shows, has the version to take."""
    source = (ROOT / "wxgpt.py").read_text("utf-8")
    tree = ast.walk(ast.parse(source))
    first = min(node.lineno for node in tree if isinstance(node, ast.Match))
    assert "需要 Python 3.11" in source.splitlines()[first - 1]


def test_a_missing_package_is_told_in_one_line():
    """With the command that mends it."""
    ended = start_after("sys.modules['aiosqlite'] = None")
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert re.search(r"aiosqlite .*\.venv/bin/", ended.stderr)


def texts_of(path):
    """Return the texts that stand in a Python file."""
    tree = ast.walk(ast.parse(path.read_text("utf-8")))
    return {node.value for node in tree if isinstance(node, ast.Constant)}


FOREIGN = {  # what SQLite, OpenSSL and aiohttp say
    "attempt to write a readonly database",
    "database disk image is malformed",
    "database is locked",
    "database or disk is full",
    "disk I/O error",
    "file is not a database",
    "unable to open database file",
    "certificate has expired",
    "certificate is not yet valid",
    "self-signed certificate",
    "self-signed certificate in certificate chain",
    "unable to get issuer certificate",
    "unable to get local issuer certificate",
    "unable to verify the first certificate",
    "Hostname mismatch",
    "IP address mismatch",
    *vars(aiohttp),
}


def test_each_chinese_line_has_its_english_in_the_code():
    """What is translated is said somewhere, and fills in nothing else."""
    said = {os.strerror(code) for code in errno.errorcode}
    said |= texts_of(pathlib.Path(argparse.__file__)) | FOREIGN
    for path in (ROOT / "wxgpt.py", *ROOT.glob("owner/*.py")):
        said |= texts_of(path)
    said |= {f"'{text}'" for text in said}
    tables = tomllib.loads((ROOT / "owner/words.toml").read_text("utf-8")).values()
    assert len(read_words()) == sum(map(len, tables))  # one Chinese for each
    for english, chinese in read_words().items():
        assert english in said or english.partition(" → ")[2] in said
        names = [set(re.findall(r"\{\w*", text)) for text in (english, chinese)]
        assert names[0] == names[1], english


@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_socks") is not None, reason="package is there"
)
def test_a_socks_proxy_without_its_package_ends_the_start_with_one_line(tmp_path):
    """The line names the setting and the package to install."""
    text = GOOD + 'proxy = "socks5://127.0.0.1:9"\n[server]\nport = 0\n'
    (tmp_path / "wxgpt.toml").write_text(text, "utf-8")
    ended = run("--config", tmp_path / "wxgpt.toml", cwd=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "assistants.chatgpt.proxy" in ended.stderr
    assert "aiohttp-socks" in ended.stderr


def test_a_missing_file_ends_the_start_with_one_line(tmp_path):
    """Without --config the file is wxgpt.toml where the command is run."""
    ended = run("serve", cwd=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and "wxgpt.toml" in ended.stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("texts.toml", None, "texts.toml: No such file"),
        ("texts.toml", 'opened = "', "texts.toml: not TOML"),
        ("texts.toml", "opened = 1", "texts.toml: opened: found 1, expected text"),
        ("providers.toml", None, "providers.toml: No such file"),
        ("providers.toml", 'a = [["busy", "("]]', "providers.toml: a: missing )"),
        ("pages/page.js", None, "page.js: No such file"),
        ("pages/page.html", None, "page.html: not found"),
        (
            "pages/answer.html",
            "{% if %}",
            "answer.html, line 1: Expected an expression",
        ),
    ],
)
def test_a_broken_copy_of_the_server_ends_the_start_with_one_line(
    tmp_path, name, text, words
):
    """The line names the file that is missing, or what is wrong with it."""
    copy_server(tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.unlink()
    if text is not None:
        file.write_text(text, "utf-8")
    (tmp_path / "wxgpt.toml").write_text(GOOD + "[server]\nport = 0\n", "utf-8")
    ended = run("serve", cwd=tmp_path, program=tmp_path / "copy")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert words in ended.stderr


@pytest.mark.parametrize("command", ["check", "setup", "demo"])
def test_a_copy_of_the_server_alone_has_no_other_command(tmp_path, command):
    """It serves; what else it is asked for ends with one line."""
    copy_server(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/owner", ignore_errors=True)
    ended = run(command, cwd=tmp_path, program=tmp_path / "copy")
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert re.search("incomplete|not found", ended.stderr)


@pytest.mark.parametrize("text", [None, "x = y"], ids=["missing", "broken"])
def test_without_its_chinese_words_the_program_speaks_english(
    tmp_path, monkeypatch, text
):
    """They are no reason not to serve."""
    copy_server(tmp_path / "copy")
    shutil.copytree(ROOT / "owner", tmp_path / "copy/owner", dirs_exist_ok=True)
    (tmp_path / "copy/owner/words.toml").unlink()
    if text:
        (tmp_path / "copy/owner/words.toml").write_text(text)
    monkeypatch.setenv("WXGPT_LANG", "zh")
    ended = run(cwd=tmp_path, program=tmp_path / "copy")
    assert ended.returncode == 2 and "no wxgpt.toml here" in ended.stderr


def test_a_file_that_is_not_utf_8_ends_the_start_with_one_line(tmp_path):
    """Bytes of another encoding are no traceback."""
    (tmp_path / "wxgpt.toml").write_bytes(URL.encode() + b'x = "\xc4\xe3\xba\xc3"\n')
    ended = run("--config", tmp_path / "wxgpt.toml")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and "wxgpt.toml" in ended.stderr


@pytest.mark.parametrize("command", ["serve", "check"])
def test_what_is_still_the_examples_is_refused_at_once(command):
    """Everybody knows the token, and could post messages in anybody's name."""
    ended = run(command, "--config", ROOT / "wxgpt.example.toml", "--lang", "zh")
    assert ended.returncode == 2 and ended.stderr.splitlines() == [
        "wxgpt: wechat.token：现在是 'replaceThisToken'，应为你自己的：示例里的谁都知道",
        "wxgpt: assistants.chatgpt.api_key：现在是 'sk-replace-this'，应为服务商给你的密钥",
        "wxgpt: public_url：现在是 'http://wx.example.com'，应为这台机器自己的网址",
    ]


def test_a_key_of_the_documents_is_refused(tmp_path):
    """Of whichever assistant."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(GOOD + '[assistants.deepseek]\napi_key = "sk-..."\n', "utf-8")
    ended = run("--config", path)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "assistants.deepseek.api_key: found 'sk-...'" in ended.stderr


async def test_the_examples_address_alone_is_warned_of(spawn):
    """It may lead here in a trial; another one is not spoken of."""
    warned = "public_url is still the example's"
    _, process = await spawn(public_url=wxgpt.EXAMPLE_URL)
    await process.says(warned)
    await process.end()
    _, process = await spawn(public_url="http://chat.example.com")
    assert not any(warned in line for line in process.log)


@pytest.mark.parametrize(
    "url, words",
    [
        (wxgpt.EXAMPLE_URL, "public_url 还是示例里的，手机打不开"),
        (
            "http://chat.example.com",
            "下一步：用手机打开 http://chat.example.com/healthz",
        ),
    ],
)
async def test_what_to_do_next_is_said_at_a_terminal(tmp_path, url, words):
    """In the owner's language, as soon as it serves."""
    path = tmp_path / "wxgpt.toml"
    text = GOOD.replace("https://wx.example.com", url)
    text += f'[server]\nport = 0\n[database]\npath = "{tmp_path}/wxgpt.db"\n'
    path.write_text(text, "utf-8")
    program = (sys.executable, str(ROOT / "wxgpt.py"), "--config", str(path))
    async with typing_at(*program, env=os.environ | {"WXGPT_LANG": "zh"}) as typist:
        await typist.answer("serving on")
        await typist.answer(words, "\x03")
        assert await typist.ends("\x03") in (0, 1)  # 1: it was pressed twice


def test_the_placeholders_are_the_examples():
    """What is refused is what stands there."""
    example = wxgpt.load_config(ROOT / "wxgpt.example.toml")
    assert example.public_url == wxgpt.EXAMPLE_URL
    assert example.wechat.token == wxgpt.EXAMPLE_TOKEN
    assert example.assistants["chatgpt"].api_key in wxgpt.EXAMPLE_KEYS


def test_the_version_is_printed():
    """--version prints name and version, and ends well."""
    ended = run("--version")
    assert ended.returncode == 0
    assert re.fullmatch(r"wxgpt \d+\.\d+\.\d+\n", ended.stdout)


def test_help_names_the_commands_and_the_file():
    """--help tells what can be run, behind a command how; both end well."""
    ended, serve = run("--help"), run("serve", "--help")
    assert ended.returncode == serve.returncode == 0
    commands = ("serve", "check", "stats", "setup", "demo", "--version")
    assert [word for word in commands if word not in ended.stdout] == []
    assert "--config" in serve.stdout


@pytest.mark.parametrize("words", ["--lang zh --help", "stats --help --lang=zh"])
def test_help_is_chinese(words):
    """It is the owner's language unless `--lang en` or the environment says otherwise."""
    ended = run(*words.split())
    assert ended.returncode == 0 and "显示这段说明" in ended.stdout
    assert not re.search("usage|settings|show", ended.stdout)


def test_the_languages_option_counts_more_than_the_environment(tmp_path):
    """Wherever it stands."""
    assert "这里没有 wxgpt.toml" in run("--lang", "zh", cwd=tmp_path).stderr
    assert "no wxgpt.toml here" in run("check", "--lang=en", cwd=tmp_path).stderr


def test_an_unknown_command_is_refused():
    """A command line that makes no sense ends with exit status 2."""
    ended = run("fly")
    assert ended.returncode == 2 and "fly" in ended.stderr


async def test_the_settings_are_logged_at_start_without_secrets(spawn):
    """The log begins with what is in force, token and key masked."""
    _, process = await spawn(session={"ttl": 77})
    text = "".join(process.log)
    assert "ttl=77" in text and "***" in text
    assert TOKEN not in text and KEY not in text


def test_further_headers_are_masked_in_the_log(load):
    """They may hold keys."""
    config = load(GOOD + f'headers.api-key = "{KEY}"\n')
    assert config.assistants["chatgpt"].headers == {"api-key": KEY}
    lines = "\n".join(wxgpt.effective_settings(config))
    assert "headers=***" in lines and KEY not in lines


async def test_only_the_owner_may_read_the_database(serve, settings):
    """The database and what lies beside it have mode 0600."""
    server = await serve()
    await server.ask("/chatgpt 你好")
    beside = pathlib.Path(settings["database"]["path"]).parent.glob("test.db*")
    assert {stat.S_IMODE(path.stat().st_mode) for path in beside} == {0o600}


def test_what_the_file_leaves_out_has_its_default(load):
    """A file with the required settings alone gets the documented defaults."""
    config = load()
    found = {name: operator.attrgetter(name)(config) for name in DEFAULTS}
    assert found == DEFAULTS
    assert "/chatgpt" in config.replies.subscribe
    assert "mmbiz.qpic.cn" in config.wechat.picture_hosts


def test_an_assistant_has_its_defaults(load):
    """An assistant needs no more than a key."""
    chatgpt = load().assistants["chatgpt"]
    assert {k: getattr(chatgpt, k) for k in ASSISTANT_DEFAULTS} == ASSISTANT_DEFAULTS
    assert chatgpt.api_key == KEY and chatgpt.model


def test_the_environment_fills_what_the_file_leaves_out(load):
    """Key and base URL of chatgpt may come from the environment, without a table."""
    environ = {"OPENAI_API_KEY": "sk-env", "OPENAI_BASE_URL": "https://env.example/v1"}
    chatgpt = load(URL + WECHAT, **environ).assistants["chatgpt"]
    assert chatgpt.api_key == "sk-env"
    assert chatgpt.base_url == "https://env.example/v1"


@pytest.mark.parametrize(
    "name, value, wanted",
    [("OPENAI_BASE_URL", "api.example", "URL"), ("OPENAI_API_KEY", "sk 1", "blanks")],
)
def test_a_variable_that_cannot_be_used_is_named(load, name, value, wanted):
    """The owner would look in vain for it in the file."""
    environ = {"OPENAI_API_KEY": "sk-env", name: value}
    with pytest.raises(wxgpt.ConfigError, match=f"^{name} in the env.*{wanted}"):
        load(URL + WECHAT, **environ)


def test_the_file_counts_more_than_the_environment(load):
    """What the file says is not replaced."""
    assert load(OPENAI_API_KEY="sk-env").assistants["chatgpt"].api_key == KEY


def test_the_environment_fills_no_other_assistant(load):
    """The key of one provider never goes to another."""
    text = GOOD + '[assistants.other]\nbase_url = "https://other.example"\n'
    with pytest.raises(wxgpt.ConfigError, match=r"assistants\.other\.api_key"):
        load(text, OPENAI_API_KEY="sk-env")


@pytest.mark.parametrize(("margin", "counts"), [(30, 0.5), (0.25, 0.25)])
def test_the_margin_counts_as_half_an_attempt_at_most(load, margin, counts):
    """A margin longer than half an attempt would leave no time to answer."""
    times = f"attempt_timeout = 1\nreply_margin = {margin}\n"
    assert load(URL + WECHAT + times + CHATGPT).wechat.margin == counts


def test_times_may_be_fractions_and_small(load):
    """Seconds, minutes and hours are numbers, so that tests can shrink time."""
    config = load(
        URL + WECHAT + "attempt_timeout = 0.2\n" + CHATGPT + "timeout = 0.5\n"
        "[session]\nttl = 1\n[history]\nlink_hours = 0.001\nhistory_minutes = 0.01\n"
    )
    assert (config.wechat.attempt_timeout, config.session.ttl) == (0.2, 1)
    assert config.assistants["chatgpt"].timeout == 0.5
    assert config.history.link_hours == 0.001
    assert config.history.history_minutes == 0.01


@pytest.mark.parametrize("base", ["https://wx.example.com", "http://example.com/wx"])
def test_a_slash_behind_the_public_url_is_left_out(load, base):
    """Links begin with it and have one slash."""
    text = f'public_url = "{base}/"\n' + WECHAT + CHATGPT
    assert load(text).public_url == base


def test_the_database_lies_in_the_state_directory(load):
    """Under systemd the database needs no setting."""
    assert load(STATE_DIRECTORY="/srv/state").database.path == "/srv/state/wxgpt.db"


def test_a_database_path_in_the_file_is_kept(load):
    """The file counts more than the state directory."""
    text = GOOD + '[database]\npath = "/srv/mine.db"\n'
    assert load(text, STATE_DIRECTORY="/srv/state").database.path == "/srv/mine.db"


def test_assistants_may_have_chinese_names(load):
    """A quoted name of any script is an assistant."""
    text = GOOD + f'[assistants."豆包"]\napi_key = "{KEY}"\n'
    assert list(load(text).assistants) == ["chatgpt", "豆包"]


def test_the_script_header_agrees_with_the_requirements():
    """`uv run wxgpt.py` and `pip install -r requirements.txt` get the same packages."""
    source = (ROOT / "wxgpt.py").read_text("utf-8")
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)[1]
    header = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert sorted(header["dependencies"]) == sorted(wanted)
    assert header["requires-python"] == ">=3.11"


def test_the_lock_holds_each_requirement_with_hashes():
    """What the documents install is within the ranges, and pip checks every file."""
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    pins = dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+).*\\$\n +--hash=sha256:", lock))
    assert len(pins) == lock.count("==")
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    for line in wanted:
        requirement = Requirement(line)
        assert pins[requirement.name] in requirement.specifier, line


SAFE = {"app_id": "wx0123456789abcdef", "aes_key": "a" * 43}
RISKS = [  # public_url, mode of the file, user, safe mode, what is warned of
    ("https://wx.example.com", 0o600, 1000, False, []),
    ("https://wx.example.com", 0o400, 1000, False, []),
    ("https://wx.example.com", 0o640, 1000, False, ["settings"]),
    ("https://wx.example.com", 0o604, 1000, False, ["settings"]),
    ("https://wx.example.com", 0o620, 1000, False, ["settings"]),
    ("https://wx.example.com", 0o600, 0, False, ["user"]),
    ("http://wx.example.com", 0o600, 1000, False, ["public_url"]),
    ("http://wx.example.com", 0o600, 1000, True, []),
    ("http://127.0.0.1:8080", 0o600, 1000, False, []),
    ("http://localhost/x", 0o600, 1000, False, []),
    ("http://[::1]", 0o600, 1000, False, []),
    ("http://127.0.0.1.example.com", 0o600, 1000, False, ["public_url"]),
    ("http://localhost.example.com", 0o600, 1000, False, ["public_url"]),
    ("http://wx.example.com", 0o644, 0, False, ["settings", "user", "public_url"]),
]


def unsafe(url, **safe):
    """Return settings with this public_url, in plain mode or in safe mode."""
    wechat = wxgpt.WeChatSettings(token="token", **safe)
    texts = wxgpt.read_texts({})
    return wxgpt.Config(public_url=url, wechat=wechat, assistants={}, texts=texts)


@pytest.mark.parametrize("url, mode, user, is_safe, warned", RISKS)
def test_what_lets_others_in_is_found(tmp_path, url, mode, user, is_safe, warned):
    """Each with a word on how to close it."""
    path = tmp_path / "wxgpt.toml"
    path.touch()
    path.chmod(mode)
    config = unsafe(url, **SAFE if is_safe else {})
    risks = list(wxgpt.find_risks(config, str(path), user))
    assert [place for place, _, _ in risks] == warned
    assert all(found and fix for _, found, fix in risks)


def test_a_credential_of_systemds_is_closed(tmp_path, monkeypatch):
    """Its mode shows an access list's mask; its folder lets in the service alone."""
    path = tmp_path / "wxgpt.toml"
    path.touch()
    path.chmod(0o440)
    config = unsafe("https://wx.example.com")
    assert len(list(wxgpt.find_risks(config, str(path), 1000))) == 1
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert list(wxgpt.find_risks(config, str(path), 1000)) == []


async def test_the_start_warns_of_what_lets_others_in(spawn, tmp_path):
    """One line each, which says how to close it; a server that is closed has none."""
    path = tmp_path / "wxgpt.toml"
    path.touch(0o644)
    _, process = await spawn(public_url="http://wx.test")
    lines = [line.split(" warning ")[1] for line in process.log if " warning " in line]
    closed = (
        f"settings: others on this machine can read {path}; better: chmod 600 {path}"
    )
    assert lines[0].strip() == closed
    assert lines[-1].startswith("public_url: http:// in 明文模式: ")
    assert len(lines) == (3 if os.geteuid() == 0 else 2)


def test_a_port_that_is_held_is_told_in_chinese(tmp_path):
    """As all that ends the start; the status is another one than for settings."""
    path = tmp_path / "wxgpt.toml"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        path.write_text(f"{GOOD}[server]\nport = {port}\n", "utf-8")
        ended = run("--config", path, "--lang", "zh", cwd=tmp_path)
    last = ended.stderr.splitlines()[-1]
    assert last == f"wxgpt: 127.0.0.1 的 {port} 端口用不了：已被占用"
    assert ended.returncode == 1

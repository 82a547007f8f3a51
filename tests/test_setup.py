"""`wxgpt.py setup`: from nothing to settings that serve, by questions or by options."""

import asyncio
import contextlib
import os
import pathlib
import re
import stat
import sys
import tomllib

import pytest

import wxgpt
from child import free_port
from conftest import ROOT, platform, run_command
from fake_openai import Script, fails
from owner.setup import (
    Setup,
    at_home,
    flat,
    make_aes_key,
    make_parser,
    put_settings,
    read_providers,
)
from typist import typing_at
from waiting import limit, within

URL = "https://wx.example.com"
APP_ID = "wx0123456789abcdef"
KEY = "sk-verySecret"


@pytest.fixture
def setup(upstream, tmp_path):
    """Run setup without a terminal; gives the exit status and what it printed."""

    async def start(*words, path=tmp_path / "wxgpt.toml", **changes):
        options = {"public-url": URL, "app-id": APP_ID, "provider": "other"}
        options |= {"base-url": upstream.base_url, "model": "m", "key": KEY}
        options |= {"proxy": "other"} | {
            k.replace("_", "-"): v for k, v in changes.items()
        }
        given = [f"--{k}={v}" for k, v in options.items() if v is not None]
        words = ("setup", *given, "--no-service", *words)
        return await run_command(path, *words, prefix=("setsid",))

    return start


def written(folder):
    """Return the settings that were written, flat."""
    return flat(tomllib.loads((folder / "wxgpt.toml").read_text("utf-8")))


async def test_options_alone_make_settings_that_serve(setup, upstream, tmp_path):
    """In safe mode, with a token and a key of their own, for the owner's eyes alone."""
    status, out, err = await setup("--no-check")
    assert (status, err) == (0, "")
    path = tmp_path / "wxgpt.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = wxgpt.load_config(path, {}, wxgpt.check_commands)
    assert config.public_url == URL and config.session.auto_open
    assert config.wechat.app_id == APP_ID and len(config.wechat.aes_key) == 43
    assert config.wechat.token.isalnum() and len(config.wechat.token) == 32
    assert config.assistants["chatgpt"].api_key == KEY
    assert len(upstream.requests) == 1 and "✓ assistant chatgpt: m, first word" in out
    assert KEY not in out


async def test_it_says_what_to_type_into_the_console(setup, tmp_path):
    """The values are those of the settings."""
    _, out, _ = await setup("--no-check")
    found = written(tmp_path)
    for value in (f"{URL}/wechat", found["wechat.token"], found["wechat.aes_key"]):
        assert value in out
    assert f"console/product/mp/{APP_ID}" in out and "安全模式" in out and "启用" in out
    head = (tmp_path / "wxgpt.toml").read_text("utf-8").splitlines()[0]
    assert head.startswith("# ") and head.endswith(f": {ROOT}/wxgpt.example.toml")


async def test_it_is_chinese(setup, monkeypatch):
    """As all that an owner reads."""
    monkeypatch.setenv("WXGPT_LANG", "zh")
    _, out, _ = await setup("--no-check", mode="plain", app_id=None)
    assert "写好了" in out and "启动：" in out and "明文模式" in out
    _, _, err = await setup("--no-check", public_url="wx.example.com")
    assert "要以 http:// 或 https:// 开头" in err


async def test_it_ends_in_check(setup):
    """Whose exit status is its own; what to type into the console is said once."""
    port = free_port()
    status, out, _ = await setup(port=port, public_url="https://wx.invalid")
    assert f"! port: {port} is free: wxgpt is not running" in out and status == 1
    assert out.count("EncodingAESKey    ") == 1


async def test_it_says_how_to_check_from_any_folder(setup, tmp_path, monkeypatch):
    """A line that can be copied, with the whole path of the settings."""
    monkeypatch.chdir(tmp_path)
    _, out, _ = await setup(path=pathlib.Path("wxgpt.toml"))
    [again] = re.findall(r"again at any time: (.+)\) …", out)
    assert (
        again
        == f"{sys.executable} {ROOT}/wxgpt.py check --config {tmp_path}/wxgpt.toml"
    )
    assert f"{ROOT}/wxgpt.py --config {tmp_path}/wxgpt.toml" in out


async def test_what_is_missing_without_a_terminal_is_named_at_once(setup, tmp_path):
    """And nothing is written."""
    nothing = dict.fromkeys(("public_url", "app_id", "provider", "base_url", "key"))
    status, out, err = await setup(**nothing)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert re.search(
        r"--public-url --app-id\|--mode=plain --provider --key$", err.strip()
    )
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "no scheme": (
        {"public_url": "wx.example.com"},
        "--public-url: it begins with http",
    ),
    "a port": ({"public_url": "http://wx.example.com:8080"}, "write no port"),
    "its own port": ({"public_url": "https://wx.example.com:443"}, "write no port"),
    "a path": ({"public_url": URL + "/wechat"}, "write the domain name only"),
    "an API's address with a blank": (
        {"provider": "other", "base_url": "https://api .cn/v1", "model": "m"},
        "--base-url: it is http:// or https:// and a domain name",
    ),
    "no host": ({"public_url": "https://"}, "and a domain name"),
    "loopback": ({"public_url": "http://127.0.0.1"}, "the internet does not reach it"),
    "at home": ({"public_url": "http://192.168.1.5"}, "does not reach it"),
    "a token with a hyphen": ({"token": "a-b-c"}, "letters and digits"),
    "the example's token": ({"token": "replaceThisToken"}, "your own"),
    "an account's name": ({"app_id": "gh_123"}, "--app-id: it is wx and 16"),
    "a short AES key": ({"aes_key": "abc"}, "43 letters and digits"),
    "nobody": ({"provider": "nobody"}, "--provider: one of OpenAI, DeepSeek"),
    "a key of two words": ({"key": "sk 1"}, "--key: it has no blanks"),
    "https without a proxy": ({"proxy": "none"}, "https needs nginx or Caddy"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_cannot_be_used_is_told(setup, tmp_path, name):
    """In one line, and nothing is written."""
    changes, words = WRONG[name]
    status, out, err = await setup(**changes)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert words in err and KEY not in err
    assert list(tmp_path.iterdir()) == []


async def test_a_key_that_is_refused_is_told(setup, upstream):
    """With the provider's own words, before anything depends on it."""
    upstream.will(fails(401))
    status, out, _ = await setup("--no-check")
    assert status == 0 and "✗ assistant chatgpt: key: " in out


async def test_the_key_is_not_tried_if_it_is_not_to_be(setup, upstream):
    """As where there is no network yet."""
    status, _, _ = await setup("--no-check", "--skip-test")
    assert status == 0 and upstream.requests == []


MINE = f"""\
# mine
public_url = "{URL}"
[wechat]
token = "oldToken"  # typed long ago
mute_guard = 7
[assistants.chatgpt]
api_key = "sk-old"
extra.thinking.type = "disabled"
[limits]
waiting = 9
"""


async def test_settings_that_are_there_are_not_changed_without_a_word(setup, tmp_path):
    """Without --yes nothing is written."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(MINE, "utf-8")
    status, _, err = await setup("--no-check")
    assert status == 2 and "--yes" in err and path.read_text("utf-8") == MINE


async def test_what_is_no_file_is_left_alone(setup, tmp_path):
    """A device as root would be replaced; here it is a pipe."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    status, out, err = await setup("--yes", path=path)
    assert (status, path.is_fifo()) == (2, True) and f"{path}: this is no file" in err


async def test_what_nobody_was_asked_about_stays(setup, tmp_path):
    """The token too; the old file is kept beside the new one."""
    path = tmp_path / "wxgpt.toml"
    path.write_text(MINE, "utf-8")
    assert (await setup("--no-check", "--yes", mode="plain", app_id=None))[0] == 0
    found = written(tmp_path)
    assert found["wechat.token"] == "oldToken" and found["limits.waiting"] == 9
    assert (
        found["wechat.mute_guard"] == 7 and found["assistants.chatgpt.api_key"] == KEY
    )
    assert "assistants.chatgpt.extra.thinking.type" not in found  # another provider's
    assert path.read_text("utf-8").startswith("# mine\n")
    assert (tmp_path / "wxgpt.toml.old").read_text("utf-8") == MINE


async def test_a_second_run_has_the_first_ones_answers(setup, tmp_path):
    """Nothing need be said again, and nothing changes."""
    await setup("--no-check")
    before = (tmp_path / "wxgpt.toml").read_text("utf-8")
    names = ("public_url", "app_id", "provider", "base_url", "model", "key", "proxy")
    status, out, err = await setup("--no-check", **dict.fromkeys(names))
    assert (status, err) == (0, "") and "nothing changes" in out
    assert (tmp_path / "wxgpt.toml").read_text("utf-8") == before


PROXIES = [("nginx", "http"), ("nginx", "https"), ("caddy", "http"), ("caddy", "https")]


@pytest.mark.parametrize("way, scheme", PROXIES)
async def test_the_proxys_block_is_written(setup, tmp_path, way, scheme):
    """With the name and the port of this server, and how to use it."""
    url = f"{scheme}://chat.example.org"
    _, out, _ = await setup("--no-check", proxy=way, port=8123, public_url=url)
    text = (tmp_path / f"wxgpt.{way}").read_text("utf-8")
    assert "chat.example.org" in text and "127.0.0.1:8123" in text
    assert "wx.example" not in text and ":8080" not in text
    assert ("443" in text or "http://" not in text) is (scheme == "https")
    assert f"apt install -y {way}" in out and str(tmp_path / f"wxgpt.{way}") in out


async def test_without_a_proxy_the_port_is_wechats(setup, tmp_path):
    """And listened on from outside."""
    await setup(
        "--no-check", "--skip-test", proxy="none", public_url="http://wx.example.com"
    )
    found = written(tmp_path)
    assert (found["server.host"], found["server.port"]) == ("0.0.0.0", 80)


async def test_it_waits_for_the_consoles_verification(setup, tmp_path):
    """It serves for that long, and says when it has come, and if the token is wrong."""
    port = free_port()
    options = {"port": port, "token": "tokenOfMine", "wait": 40}
    running = asyncio.create_task(setup("--no-check", **options))
    async with platform(port) as server:
        server.wechat.token = "tokenOfMine"
        async with limit(30, "a verification"):
            while True:
                try:
                    refused, _ = await server.wechat.verify(token="anotherToken")
                    status, echo = await server.wechat.verify("echo8765")
                    break
                except OSError:
                    await asyncio.sleep(0.1)
    assert (refused, status, echo) == (403, 200, "echo8765")
    status, out, _ = await within(60, "end of setup", running)
    assert status == 0 and "✓ verified" in out
    assert out.count("came with a wrong signature → the Token in the console must") == 1


@pytest.fixture
async def terminal(tmp_path):
    """Run setup at a terminal; gives who types."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*words, env=None):
            path = tmp_path / "wxgpt.toml"
            program = (sys.executable, str(ROOT / "wxgpt.py"), "setup")
            words = ("--config", str(path), "--no-service", *words)
            return await stack.enter_async_context(typing_at(*program, *words, env=env))

        yield start


async def test_questions_at_a_terminal(terminal, upstream, tmp_path):
    """A wrong answer is asked for again, and so is a key that is refused."""
    upstream.will(fails(401))
    typist = await terminal("--no-check")
    await typist.answer("address, as in", "wx.example.com\n")
    await typist.answer("it begins with http", f"{URL}/\n")
    await typist.answer("AppID (", f"{APP_ID}\n")
    await typist.answer("another one", "16\n")
    await typist.answer("address of the API", f"{upstream.base_url}\n")
    await typist.answer("name of the model: ", "m\n")
    await typist.answer("key (", "sk-wrong\n")
    await typist.answer("without /chatgpt first", "\n")
    await typist.answer("stands before wxgpt", "4\n")
    await typist.answer("another key", f"{KEY}\n")
    await typist.answer("assistant chatgpt: m, first word", "")
    await typist.answer("start wxgpt now", "n\n")
    assert await typist.ends() == 0 and KEY not in typist.all_shown
    found = written(tmp_path)
    assert found["public_url"] == URL and found["assistants.chatgpt.api_key"] == KEY
    assert found["session.auto_open"] and "server.port" not in found


async def test_who_knows_no_english_needs_none(terminal, upstream):
    """Neither for the questions nor for what check says of a server that is not up."""
    typist = await terminal(env=os.environ | {"WXGPT_LANG": "zh"})
    await typist.answer("网址，如 https://wx.example.com：", "wx.invalid\n")
    await typist.answer("要以 http:// 或 https:// 开头", "https://wx.invalid\n")
    await typist.answer("AppID（回车：先用明文模式）：", f"{APP_ID}\n")
    await typist.answer("编号：", "其他\n")
    await typist.answer("接口的地址，含版本号：", f"{upstream.base_url}\n")
    await typist.answer("模型名：", "m\n")
    await typist.answer("密钥（输入时不显示）：", f"{KEY}\n")
    await typist.answer("关注者直接发消息就能聊，不用先发 /chatgpt，好吗？", "\n")
    await typist.answer("编号 [1]：", "4\n")
    await typist.answer("现在就启动 wxgpt，等微信来验证吗？", "n\n")
    assert await typist.ends() == 1 and "这个域名解析不了" in typist.all_shown
    assert re.findall(r"[A-Za-z']+(?: [a-z']+){2,}", typist.all_shown) == []


async def test_a_slow_model_is_waited_for_aloud(monkeypatch, capsys, setup, upstream):
    """While its key is tried."""
    monkeypatch.setattr("owner.check.SILENT_SECONDS", 0.05)
    monkeypatch.chdir("/")
    options = make_parser().parse_args(["--no-service", "--config=/nowhere"])
    api = wxgpt.AssistantSettings(base_url=upstream.base_url, api_key=KEY, model="m")
    config = wxgpt.Config(
        public_url=URL,
        wechat=wxgpt.WeChatSettings(token="tokenOfMine"),
        assistants={"chatgpt": api},
        texts=wxgpt.read_texts({}),
    )
    gate, said = asyncio.Event(), ""
    upstream.will(Script([gate, "好"]))
    trying = asyncio.create_task(Setup(options).try_key(config))
    async with limit(30, "word of what it waits for"):
        while "… still waiting: one word of chatgpt's model" not in said:
            await asyncio.sleep(0.05)
            said += capsys.readouterr().out
    gate.set()
    assert await within(30, "end of the trial", trying)


STEPS = [
    "apt install -y nginx certbot python3-certbot-nginx",
    "certbot certonly --nginx -d wx.example.com",
    "cp -b FOLDER/wxgpt.nginx /etc/nginx/conf.d/wxgpt.conf",
    "nginx -t",
    "systemctl reload-or-restart nginx",
]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is asked: run the tests so")
@pytest.mark.parametrize("last", [5, 2])
async def test_the_proxy_is_put_in_place_if_the_owner_agrees(
    terminal, upstream, tmp_path, last
):
    """Command by command, up to one that fails."""
    (programs := tmp_path / "bin").mkdir()
    for name in {step.split()[0] for step in STEPS}:
        fails = STEPS[last - 1].split()[0] == name and last < len(STEPS)
        text = f'#!/bin/sh\necho "${{0##*/}} $*" >>{tmp_path}/ran\nexit {int(fails)}\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    options = f"--public-url={URL} --mode=plain --provider=other --model=m --key={KEY}"
    options += f" --base-url={upstream.base_url} --auto-open --proxy=nginx --no-check"
    path = f"{programs}:{os.environ['PATH']}"
    typist = await terminal(*options.split(), env=os.environ | {"PATH": path})
    await typist.answer("certbot asks in English", "")
    await typist.answer("run these now?", "\n")
    await typist.answer("start wxgpt now", "n\n")
    assert await typist.ends() == 0
    ran = (tmp_path / "ran").read_text("utf-8").replace(str(tmp_path), "FOLDER")
    assert ran.splitlines() == STEPS[:last]
    assert ("this failed" in typist.all_shown) is (last < len(STEPS))


async def test_a_provider_of_the_menu_brings_its_switch(setup, tmp_path):
    """Its address and model, too: nothing but the key is asked for."""
    options = {"provider": "DeepSeek", "base_url": None, "model": None}
    assert (await setup("--no-check", "--skip-test", **options))[0] == 0
    found = written(tmp_path)
    assert found["assistants.chatgpt.base_url"] == "https://api.deepseek.com"
    assert found["assistants.chatgpt.model"] == "deepseek-flash"
    assert found["assistants.chatgpt.extra.thinking.type"] == "disabled"


@pytest.mark.parametrize("question", ["address, as in", "AppID (", "number"])
async def test_it_can_be_left_in_the_middle(terminal, tmp_path, question):
    """By Ctrl-C; nothing is written, and it may be run again."""
    typist = await terminal()
    for asked, keys in {"address, as in": f"{URL}\n", "AppID (": "\n"}.items():
        if asked == question:
            break
        await typist.answer(asked, keys)
    await typist.answer(question, "\x03")
    assert await typist.ends("\x03") == 130
    assert list(tmp_path.iterdir()) == []


def test_the_menu_is_the_table_of_the_documents():
    """In its order, each with the recipe's switch for thinking."""
    found = {one.name: one for one in read_providers()}
    assert len(found) == 15 and list(found)[:2] == ["chatgpt", "deepseek"]
    assert found["deepseek"].title == "DeepSeek"
    assert found["deepseek"].extra == {"thinking": {"type": "disabled"}}
    assert found["chatgpt"].base_url == "https://api.openai.com/v1"
    assert not found["azure"].is_whole and found["ollama"].is_local


@pytest.mark.parametrize("name", ["wxgpt.service", "owner/wxgpt"])
def test_the_services_files_fit_where_the_program_lies(monkeypatch, name):
    """Also in a folder whose name begins as the usual one's."""
    home = "/opt/wxgpt-main"
    monkeypatch.setattr("owner.setup.ROOT", home)
    monkeypatch.setattr("sys.executable", f"{home}/.venv/bin/python")
    text = (ROOT / name).read_text("utf-8")
    assert f"{home}/.venv/bin/python " in at_home(text)
    assert at_home(text).replace(home, "/opt/wxgpt") == text


async def test_the_examples_own_words_are_no_answers(setup, tmp_path):
    """What nobody has filled in yet is asked for."""
    example = (ROOT / "wxgpt.example.toml").read_text("utf-8")
    (tmp_path / "wxgpt.toml").write_text(example, "utf-8")
    names = ("public_url", "app_id", "provider", "base_url", "model", "key")
    status, _, err = await setup("--mode=plain", **dict.fromkeys(names))
    assert status == 2 and err.strip().endswith(" --public-url --key")
    status, _, err = await setup("--mode=plain", key="sk-replace-this")
    assert status == 2 and "--key: the key your provider gave you" in err


def test_a_made_aes_key_is_one_of_wechats():
    """43 letters and digits, another one each time."""
    keys = {make_aes_key() for _ in range(20)}
    assert len(keys) == 20
    assert all(re.fullmatch("[A-Za-z0-9]{43}", key) for key in keys)


TEXTS = {  # settings, and what becomes of them with a = "x"; t.b = "y"
    "nothing": ("", 'a = "x"\nt.b = "y"\n'),
    "dotted": ('a = "1"\nt.b = "2"\n', 'a = "x"\nt.b = "y"\n'),
    "a table": ('a = "1"\n[t]\nb = "2"\n', 'a = "x"\n[t]\nb = "y"\n'),
    "an empty table": ("[t]\n[u]\nb = 1\n", 'a = "x"\n[t]\nb = "y"\n[u]\nb = 1\n'),
    "another's name": ("[u]\na = 1\n", 'a = "x"\nt.b = "y"\n[u]\na = 1\n'),
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_are_put_where_they_belong(name):
    """In place of the old one, in their table, or above all tables."""
    before, after = TEXTS[name]
    put = put_settings(before, {"a": "x", "t.b": "y"})
    assert tomllib.loads(put) == tomllib.loads(after)

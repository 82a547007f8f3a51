"""The database's file: full, locked, read-only, corrupt, too new, too old, copied."""

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
from unittest.mock import Mock

import pytest

import conftest
from conftest import ANN, BOB, LONG, Process, rows, run_command, said, shown, toml
from fake_openai import Script, says
from waiting import limit, within

ATTEMPT = 3.0  # seconds; a write waits two for a lock
POLITE = "服务器这会儿有点忙"


class FileLimit:
    """A disk on which no file may grow (RLIMIT_FSIZE of the process)."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def fill(self, process: Process) -> None:
        """Let every write fail."""
        limit = (0, resource.RLIM_INFINITY)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, limit)

    def free(self, process: Process) -> None:
        """Let writes succeed again."""
        limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, limit)


class SmallDisk:
    """A small tmpfs, filled up by a file of ours."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self, process: Process) -> None:
        """Leave no byte free."""
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as out:
            while out.write(bytes(4096)):
                pass

    def free(self, process: Process) -> None:
        """Make room again."""
        self.ballast.unlink()


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, tmp_path):
    """A disk that a test can fill."""
    if request.param == "limit":
        yield FileLimit(tmp_path)
        return
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no tmpfs can be mounted here: run the tests as root")
    yield SmallDisk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def start(spawn):
    """Start a server with patient attempts, and with Ann's open session."""

    async def begin(**changes):
        wechat = {"attempt_timeout": ATTEMPT}
        server, process = await spawn(wechat=wechat, **changes)
        server.wechat.attempt_timeout = ATTEMPT
        await server.ask("/chatgpt")
        return server, process

    return begin


@pytest.fixture
async def small(start, disk):
    """A server with its database on that disk."""
    server, process = await start(database={"path": str(disk.folder / "small.db")})
    yield server, process
    await process.kill()  # before the disk goes away


@contextlib.contextmanager
def locked(path):
    """Hold the write lock of a database."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


@pytest.fixture
def database(settings):
    """Where the settings say that the server stores."""
    return settings["database"]["path"]


@pytest.fixture
async def run(settings, tmp_path):
    """Start the server where it cannot serve; gives exit status and what it printed."""

    async def start(*prefix: str) -> tuple[int, str]:
        path = tmp_path / "wxgpt.toml"
        path.write_text(toml(settings), "utf-8")
        status, _, printed = await run_command(path, prefix=prefix)
        return status, printed

    return start


def is_refused(result: tuple[int, str], words: str) -> bool:
    """Say whether a start ended with status 1 and one line that has these words."""
    status, printed = result
    lines = [line for line in printed.split("\n") if line.startswith("wxgpt: ")]
    assert len(lines) == 1 and re.search(words, lines[0]), printed
    return status == 1


# A disk that is full


async def test_a_full_disk_costs_a_polite_word(disk, small, upstream):
    """No question is accepted that cannot be stored; later ones work again."""
    server, process = small
    disk.fill(process)
    assert (await server.ask("存不下的")).text.startswith(POLITE)
    assert not upstream.requests
    disk.free(process)
    assert (await server.ask("又存得下了")).text.startswith("你好！关于「又存得下了」")
    assert await process.end() == 0


async def test_on_a_full_disk_what_needs_no_storing_works(disk, small, upstream):
    """Help, later parts, pages and the health check are answered."""
    server, process = small
    upstream.will(says(LONG))
    seen = await server.ask("写长文")
    disk.fill(process)
    assert "/stop 结束对话" in (await server.ask("/help")).text
    assert (await server.wechat.tap(ANN, seen.taps[0])).text.startswith("第")
    status, page = await server.get(seen.links[0][1])
    assert status == 200 and "第59句" in page
    assert await server.get(server.url + "/healthz") == (200, '{"status": "ok"}')
    assert process.process.returncode is None


async def test_an_answer_survives_a_disk_that_fills_up_meanwhile(disk, small, upstream):
    """Its subscriber gets it at once, and it is stored when there is room again."""
    server, process = small
    gate = asyncio.Event()
    upstream.will(Script(["写了一半，", gate, "写完了。"]))
    asking = asyncio.create_task(server.ask("会写满吗"))
    await upstream.arrival("会写满吗")
    disk.fill(process)
    gate.set()
    assert (await asking).text.startswith("写了一半，写完了。")
    await process.says("not stored yet")
    disk.free(process)
    await process.says("done after")
    stored = rows(disk.folder / "small.db", "SELECT state, answer FROM turn")
    assert stored == [("done", "写了一半，写完了。")]


async def test_a_queue_goes_on_when_there_is_room_again(disk, small, upstream):
    """A question that waits behind one that cannot be stored is asked later."""
    server, process = small
    gate = asyncio.Event()
    upstream.will(Script([gate, "第一个答好了。"]))
    first = asyncio.create_task(server.ask("第一个"))
    await upstream.arrival("第一个")
    second = asyncio.create_task(server.ask("第二个"))
    await process.says("turn=2 ")
    disk.fill(process)
    gate.set()
    await process.says("not stored yet")
    disk.free(process)
    await upstream.arrival("第二个")
    assert "第一个答好了。" in str(upstream.requests[-1].messages)
    assert not (await first).faulty and not (await second).faulty


async def test_a_start_without_room_ends_with_one_line(run, database):
    """No file can be written: exit 1."""
    result = await run("prlimit", "--fsize=0")
    assert is_refused(result, re.escape(database))


# A database that another program locks


async def test_a_lock_costs_a_polite_word_or_nothing(start, database):
    """The question under the lock is answered somehow, the ones after it as ever."""
    server, process = await start()
    with locked(database):
        seen = await server.ask("锁着的时候")
    assert seen.text.startswith((POLITE, "你好！")) and not seen.faulty
    assert (await server.ask("锁开了")).text.startswith("你好！关于「锁开了」")
    assert await process.end() == 0


async def test_a_lock_shorter_than_the_patience_costs_nothing(start, database):
    """Released within two seconds, the lock is not noticed."""
    server, process = await start()
    with locked(database):
        asking = asyncio.create_task(server.ask("锁一会儿"))
        await asyncio.wait({asking}, timeout=0.5)
    assert (await asking).text.startswith("你好！关于「锁一会儿」")
    assert rows(database, "SELECT question, state FROM turn") == [("锁一会儿", "done")]


async def test_an_answer_that_ends_under_a_lock_is_stored_later(
    start, upstream, database
):
    """The end of an answer waits for the lock as long as it takes."""
    server, process = await start()
    gate = asyncio.Event()
    upstream.will(Script([gate, "锁着写完了。"]))
    asking = asyncio.create_task(server.ask("锁着写"))
    await upstream.arrival("锁着写")
    with locked(database):
        gate.set()
        assert (await asking).text.startswith("锁着写完了。")
        await process.says("not stored yet")
    await process.says("done after")
    assert rows(database, "SELECT state FROM turn") == [("done",)]


async def test_a_reply_that_cannot_be_stored_in_time_leaves_all_the_same(
    spawn, database
):
    """The log says so: a copy that comes after a crash may get another one."""
    server, process = await spawn(wechat={"attempt_timeout": 1.5})
    await server.ask("/chatgpt")
    server.wechat.attempt_timeout = 1.5
    with locked(database):
        assert "/stop 结束对话" in (await server.ask("/help")).text
        await process.says("before it was stored")


async def test_text_that_was_not_stored_under_a_lock_is_stored_later(
    start, upstream, database
):
    """Though the model says nothing more: what is written so far is tried again."""
    server, process = await start()
    said, gate = asyncio.Event(), asyncio.Event()
    upstream.will(Script([said, "写到这里。", gate]))
    asking = asyncio.create_task(server.ask("慢"))
    await upstream.arrival("慢")
    with locked(database):
        said.set()
        await process.says("text so far not stored")
    async with limit(30, "text so far in the database"):
        while rows(database, "SELECT answer FROM turn") != [("写到这里。",)]:
            await asyncio.sleep(0.1)
    gate.set()
    await asking


async def test_pages_are_read_under_a_lock(start, database):
    """A write that waits for the lock beside them fails; they are only late."""
    server, _ = await start()
    link = (await server.ask("/history")).links[0][1]
    health, found = f"{server.url}/healthz", set()
    with locked(database):
        writing = asyncio.create_task(server.ask("写不进去"))
        while not writing.done():
            getting = asyncio.gather(*map(server.get, (health, link, link)))
            pages = await within(30, "pages under a lock", getting)
            found |= {status for status, _ in pages}
    assert found == {200} and (await writing).text


REFUSE = """
    CREATE TRIGGER no_call BEFORE UPDATE OF asked ON turn
    BEGIN SELECT RAISE(ABORT, ''); END;
    CREATE TRIGGER no_end BEFORE UPDATE OF state ON turn WHEN NEW.question = '第二问'
    BEGIN SELECT RAISE(ABORT, ''); END;
"""


async def test_what_broke_off_is_read_until_its_end_is_stored(
    start, upstream, database
):
    """Its live page ends, though it was opened before the database took the end."""
    server, process = await start()
    gate = asyncio.Event()
    upstream.will(Script([gate, "一。"]))
    asking = [asyncio.create_task(server.ask("第一问"))]
    await upstream.arrival("第一问")
    asking += [asyncio.create_task(server.ask("第二问"))]
    query = "SELECT link_key FROM turn WHERE question = '第二问'"
    async with limit(30, "second question in the database"):
        while not (found := rows(database, query)):
            await asyncio.sleep(0.01)
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.executescript(REFUSE)
        gate.set()
        await process.says("not stored yet")
        opening = server.http.get(f"{server.url}/a/{found[0][0]}/events")
        page = await within(30, "live page", opening)
        db.executescript("DROP TRIGGER no_call; DROP TRIGGER no_end;")
    async with limit(30, "end of the live page"), page:
        assert "event: done" in await page.text()
    await within(30, "answers to both", asyncio.gather(*asking))


# Deletions that the database cannot do at once


NOTED, GONE = said("forget_noted"), shown("forgotten", tap="/chatgpt")


@pytest.mark.parametrize("line", ["null", "5", "[[1], 2, 3]", "[" * 99_999, '"abc"'])
async def test_a_list_of_deletions_that_others_wrote_ends_no_start(
    spawn, tmp_path, line
):
    """What is in it that can be read is done all the same."""
    database = tmp_path / "test.db"
    server, process = await spawn()
    await server.ask("/chatgpt")
    await process.end()
    due = f'{line}\n["{ANN}", "key", "reply"]\n'
    (tmp_path / "test.db-duty").write_text(due, "utf-8")
    await process.start()
    assert "Traceback" not in "".join(process.log)
    assert rows(database, "SELECT * FROM session") == []


def holds(database, *words: str) -> list[str]:
    """Say which words the database's files still hold, its list of deletions too."""
    paths = (f"{database}{end}" for end in ("", "-wal", "-duty"))
    held = b"".join(open(path, "rb").read() for path in paths if os.path.exists(path))
    return [word for word in words if word.encode() in held]


async def gone(database, *words: str) -> None:
    """Wait until none of the words is in the files."""
    async with limit(30, f"end of {words} in the files"):
        while holds(database, *words):
            await asyncio.sleep(0.05)


def confirm(server):
    """Make the push that confirms Ann's /forget."""
    return server.wechat.text(ANN, "确认删除")


@pytest.fixture
async def asked(start):
    """A server that holds a secret of Ann's, who has asked for deletion."""
    server, process = await start()
    await server.ask("秘密XYZZY")
    await server.ask("/forget")
    return server, process


async def test_a_deletion_under_a_lock_is_done_when_it_ends(asked, database):
    """The reply says that it is noted; a second later nothing is left in the files."""
    server, _ = asked
    with locked(database):
        assert (await server.wechat.deliver(confirm(server))).text.startswith(NOTED)
        assert holds(database, "XYZZY")
    await gone(database, "XYZZY", ANN)


async def test_a_deletion_that_is_due_outlives_kills(asked, database):
    """The processes after a kill do it, and a copy of the message learns that."""
    (server, process), push = asked, confirm(asked[0])
    with locked(database):
        await server.wechat.deliver(push)
        await process.kill()
        await process.start()  # cannot do it either
        assert (await server.wechat.deliver(push)).text.startswith(NOTED)
        await process.kill()
    assert holds(database, "XYZZY", ANN) == ["XYZZY", ANN]
    await process.start()
    assert holds(database, "XYZZY", ANN) == []
    assert (await server.wechat.deliver(push)).text == GONE


async def test_who_unfollows_under_a_lock_is_forgotten(start, upstream, database):
    """So is an answer that is being written: the call ends, none asks it again."""
    server, process = await start()
    upstream.will(Script(["写到这里XYZZY。", asyncio.Event()]))
    asking = asyncio.create_task(server.ask("慢问题"))
    call = await upstream.arrival("慢问题")
    with locked(database):
        await server.wechat.post(server.wechat.event(ANN, "unsubscribe"))
        await call.wait_over()
        assert "XYZZY" not in ((await asking).text or "")
        await process.kill()
    await process.start()
    assert holds(database, "慢问题", "XYZZY", ANN) == []
    assert call.outcome == "cut by client" and len(upstream.requests) == 1


async def test_a_message_meanwhile_begins_no_new_life(asked, upstream, database):
    """What comes before the deletion is done is not stored; what comes then stays."""
    server, process = asked
    with locked(database):
        await server.wechat.deliver(confirm(server))
        assert (await server.ask("/chatgpt 太早的")).text.startswith(NOTED)
    await gone(database, "XYZZY", "太早的", ANN)
    assert (await server.ask("/chatgpt 新生活")).text.startswith("你好！")
    await process.kill()
    await process.start()
    assert rows(database, "SELECT question FROM turn") == [("新生活",)]
    assert not upstream.asked("太早的")


async def test_pages_of_who_is_to_be_forgotten_are_unknown(asked, database):
    """Their links bring 404 though everything is still stored."""
    server, _ = asked
    link = (await server.ask("/history")).links[0][1]
    [(key,)] = rows(database, "SELECT link_key FROM turn")
    with locked(database):
        await server.wechat.deliver(confirm(server))
        for url in (link, f"{server.url}/a/{key}", f"{server.url}/a/{key}/events"):
            assert (await server.get(url))[0] == 404


async def test_a_deletion_on_a_full_disk_is_done_when_there_is_room(disk, small):
    """The reply says that it is noted; nothing is left when there is room again."""
    (server, process), path = small, disk.folder / "small.db"
    await server.ask("秘密XYZZY")
    await server.ask("/forget")
    disk.fill(process)
    assert (await server.wechat.deliver(confirm(server))).text.startswith(NOTED)
    disk.free(process)
    await gone(path, "XYZZY", ANN)


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
async def test_a_deletion_noted_on_a_full_disk_outlives_a_kill(disk, small):
    """There is room for the note on a disk that has none left."""
    (server, process), path = small, disk.folder / "small.db"
    await server.ask("秘密XYZZY")
    await server.ask("/forget")
    disk.fill(process)
    assert (await server.wechat.deliver(confirm(server))).text.startswith(NOTED)
    await process.kill()
    disk.free(process)
    await process.start()
    assert holds(path, "XYZZY", ANN) == []


async def test_a_start_takes_deleted_text_out_of_the_files(asked, database):
    """Killed while a reader kept the text in the WAL: the next start empties it."""
    server, process = asked
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM turn").fetchall()
        assert (await server.wechat.deliver(confirm(server))).text == GONE
        await process.kill()
        assert holds(database, "XYZZY")
        reader.execute("COMMIT")
        await process.start()
        assert holds(database, "XYZZY", ANN) == []


async def test_a_lost_confirmation_is_answered_again(asked, upstream, database):
    """A copy after a kill is no question, not even in a new session."""
    (server, process), push = asked, confirm(asked[0])
    assert (await server.wechat.deliver(push)).text == GONE
    await process.kill()
    await process.start()
    assert (await server.wechat.deliver(push)).text == GONE
    await server.ask("/chatgpt")
    assert (await server.wechat.deliver(push)).text == GONE
    assert not upstream.asked("确认删除")


@pytest.mark.parametrize("seed", range(6))
async def test_a_deletion_is_done_whenever_the_process_is_killed(asked, database, seed):
    """Locked or not, at a random moment: WeChat's copies find it done at last."""
    (server, process), chance = asked, random.Random(seed)
    with locked(database) if seed % 2 else contextlib.nullcontext():
        push = confirm(server)
        sending = asyncio.create_task(server.wechat.attempt(push))
        await asyncio.sleep(chance.uniform(0, 3.0 if seed % 2 else 0.03))
        await process.kill()
        await sending
    await process.start()
    assert (await server.wechat.deliver(push)).text == GONE
    await gone(database, "XYZZY", ANN)
    assert rows(database, "SELECT * FROM turn") == []


# Two processes


async def test_a_second_process_is_refused(spawn, settings, run, database):
    """One line, exit 1; the first serves on, and `stats` reads beside it."""
    server, _ = await spawn()
    await server.ask("/chatgpt 一问")
    began = asyncio.get_running_loop().time()
    assert is_refused(await run(), f"{re.escape(database)}: another wxgpt serves it")
    assert asyncio.get_running_loop().time() - began > 10  # it may be ending
    assert (await server.ask("再问")).text.startswith("你好！")


async def test_the_next_process_waits_for_the_one_that_ends(spawn, upstream):
    """Started while an answer has its four seconds to end, it serves after that."""
    server, process = await spawn(wechat={"attempt_timeout": 20})
    await server.ask("/chatgpt")
    upstream.will(Script([asyncio.Event()]), says("下一个进程答的。"))
    push = server.wechat.text(ANN, "慢问题")
    asking = asyncio.create_task(server.wechat.attempt(push))
    await upstream.arrival("慢问题")
    process.process.send_signal(signal.SIGTERM)
    await process.says("stopping")
    first, reader = process.process, process.reader
    await process.start()
    assert (await first.wait(), await asking) == (0, None)
    await reader
    seen = await server.wechat.attempt(push)
    assert seen.text.startswith("下一个进程答的。")


async def test_a_list_of_deletions_that_cannot_be_read_ends_the_start(run, database):
    """With one line: no thread keeps the process alive."""
    os.mkfifo(f"{database}-duty")
    assert is_refused(await run(), f"{database}-duty: Illegal seek")


async def test_where_no_lock_can_be_had_it_serves_with_a_warning(
    serve, monkeypatch, caplog
):
    """A file system without locks costs one line."""
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=error))
    server = await serve()
    assert said("greeting") in (await server.ask("/chatgpt")).text
    assert len([line for line in caplog.messages if "no lock" in line]) == 1


# Databases that cannot be used


def corrupt(path, how: str) -> bytes:
    """Make a database with some content, spoil it; return its bytes."""
    db = sqlite3.connect(path)
    db.executescript((conftest.ROOT / "schema.sql").read_text("utf-8"))
    insert = (
        "INSERT INTO session (openid, assistant, opened_at, last_at) VALUES (?,?,1,1)"
    )
    db.executemany(insert, [(f"o{n}", "chatgpt" * 50) for n in range(200)])
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    good = open(path, "rb").read()
    bad = {
        "text": "这不是数据库。\n".encode() * 100,
        "no header": bytes(100) + good[100:],
        "cut off": good[: len(good) // 2],
        "no schema": good[:100] + b"\xff" * 8000 + good[8100:],
        "torn pages": good[: len(good) // 2]
        + os.urandom(16384)
        + good[len(good) // 2 + 16384 :],
    }[how]
    open(path, "wb").write(bad)
    return bad


@pytest.mark.parametrize(
    "how", ["text", "no header", "cut off", "no schema", "torn pages"]
)
async def test_a_corrupt_database_is_left_alone(run, database, how):
    """One line, exit 1, the same bytes, so that the owner can rescue them."""
    before = corrupt(database, how)
    assert is_refused(await run(), re.escape(database))
    assert open(database, "rb").read() == before


def without_privilege() -> list[str]:
    """Return how to start a program that file modes bind although we are root."""
    if os.getuid():
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
@pytest.mark.parametrize("target", ["file", "folder"])
async def test_a_read_only_database_is_refused(
    run, settings, database, tmp_path, target
):
    """A file or folder that may not be written: one line, exit 1, the same bytes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    settings["database"]["path"] = path = str(folder / "test.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE something (id)")
    before = open(path, "rb").read()
    os.chmod(*((path, 0o400) if target == "file" else (folder, 0o500)))
    result = await run(*without_privilege())
    os.chmod(folder, 0o700)
    assert is_refused(result, re.escape(path))
    assert open(path, "rb").read() == before


async def test_a_folder_that_is_missing_is_named(run, settings, tmp_path):
    """The line says which file, and what is wrong."""
    settings["database"]["path"] = str(tmp_path / "nowhere" / "test.db")
    assert is_refused(await run(), "nowhere/test.db: No such file")


# Versions


def steps() -> int:
    """Return how many steps schema.sql has."""
    text = (conftest.ROOT / "schema.sql").read_text("utf-8")
    return len(re.findall(r"(?m)^-- step \d+$", text))


@pytest.fixture
def newer(tmp_path, monkeypatch):
    """Make the tests run a copy of the program with further steps in its schema."""

    def install(*added: str) -> None:
        folder = tmp_path / "newer"
        conftest.copy_server(folder)
        with (folder / "schema.sql").open("a", encoding="utf-8") as schema:
            for number, step in enumerate(added, steps() + 1):
                schema.write(f"\n-- step {number}\n{step}\n")
        monkeypatch.setattr(conftest, "ROOT", folder)

    return install


@pytest.fixture
async def used(spawn, database):
    """The path of a database with one answered question, whose server has stopped."""
    server, process = await spawn()
    await server.ask("/chatgpt 旧版本的问题")
    assert await process.end() == 0
    return database


ADD = "ALTER TABLE turn ADD COLUMN mood TEXT;\nUPDATE turn SET mood = 'good';"
BREAK = "ALTER TABLE turn ADD COLUMN worse TEXT;\nINSERT INTO nowhere VALUES (1);"


async def test_an_older_database_is_brought_up_to_date(used, newer, spawn):
    """The new step runs, what was stored stays, and the server works with it."""
    before, known = rows(used, "SELECT question, answer FROM turn"), steps()
    newer(ADD)
    server, process = await spawn()
    assert (await server.ask("新问题")).text.startswith("你好！")
    assert await process.end() == 0
    assert rows(used, "PRAGMA user_version") == [(known + 1,)]
    stored = rows(used, "SELECT question, answer, mood FROM turn")
    assert stored[0] == (*before[0], "good") and stored[1][0] == "新问题"


async def test_a_step_that_fails_leaves_the_version_before(used, newer, run):
    """Nothing of the broken step stays, nor is anything lost."""
    before, known = rows(used, "SELECT * FROM turn"), steps()
    newer(BREAK)
    assert is_refused(await run(), "nowhere")
    assert rows(used, "SELECT * FROM turn") == before
    assert rows(used, "PRAGMA user_version") == [(known,)]


async def test_every_step_has_its_own_transaction(used, newer, run):
    """The good step before a broken one stays."""
    known = steps()
    newer(ADD, BREAK)
    assert is_refused(await run(), "nowhere")
    assert rows(used, "SELECT mood FROM turn") == [("good",)]
    assert rows(used, "PRAGMA user_version") == [(known + 1,)]


async def test_a_statement_without_its_semicolon_is_not_left_out(used, newer, spawn):
    """The last one of a step is run all the same."""
    newer(ADD.removesuffix(";"))
    await spawn()
    assert rows(used, "SELECT mood FROM turn") == [("good",)]


async def test_a_newer_database_is_refused(used, run):
    """The line names both versions; the bytes stay."""
    with contextlib.closing(sqlite3.connect(used)) as db:
        db.execute("PRAGMA user_version = 99")
    before = open(used, "rb").read()
    assert is_refused(await run(), f"version 99.*knows up to {steps()}")
    assert open(used, "rb").read() == before


# Copies and modes


async def test_a_backup_taken_while_the_server_runs_restores(
    spawn, upstream, settings, database, tmp_path
):
    """The restored server knows what was said, and goes on with what was open."""
    server, process = await spawn(wechat={"attempt_timeout": 20})
    push = server.wechat.text(ANN, "/chatgpt 备份前的问题")
    seen = await server.wechat.deliver(push)
    upstream.will(Script([asyncio.Event()]))
    asking = asyncio.create_task(server.ask("/chatgpt 还没答的", BOB))
    await upstream.arrival("还没答的")
    backup = str(tmp_path / "backup.db")
    command = [*process.program, "backup", backup, "--config", str(process.path)]
    subprocess.run(command, check=True)  # as README.md says
    await process.kill()
    await asking
    server, process = await spawn(database={"path": backup})
    await process.says("done after")
    assert (await server.wechat.deliver(push)).body == seen.body
    query = "SELECT question, state FROM turn ORDER BY id"
    assert rows(backup, query) == [("备份前的问题", "done"), ("还没答的", "done")]
    assert rows(backup, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("existing", [False, True])
async def test_all_three_files_are_for_the_owner_alone(spawn, database, existing):
    """Also those of a database that somebody copied there with another mode."""
    if existing:
        sqlite3.connect(database).close()
        os.chmod(database, 0o644)
    server, _ = await spawn()
    await server.ask("/chatgpt")
    files = [database, database + "-wal", database + "-shm"]
    assert [stat.S_IMODE(os.stat(file).st_mode) for file in files] == [0o600] * 3

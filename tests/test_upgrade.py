"""A database of an older version is brought up to date with answers in mid-air."""

import contextlib
import re
import sqlite3
import time

import pytest

import wxgpt
from conftest import ANN, BOB, LONG, ROOT, TEXTS, shown
from fake_openai import says

SENT = "以前发过的第二段。"


def first_version(path):
    """Make a database as the first version left it when it was killed.

    One long answer has ended: of it the first reply and part 2 were sent, part 3 was
    offered. Another question was being answered: of it a part was sent, part 4 offered.
    A third one ended after an early reply that offered part 5, and was not read.
    Bob's session ran out, and what he wrote then was offered to be asked.
    """
    schema = (ROOT / "schema.sql").read_text("utf-8")
    [_, first, *_] = re.split(r"(?m)^-- step \d+$", schema)
    now = time.time()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(f"{first}; PRAGMA user_version = 1")
        db.execute(
            "INSERT INTO session (id, openid, assistant, opened_at, last_at)"
            " VALUES (1, ?, 'chatgpt', ?, ?)",
            (ANN, now, now),
        )
        db.execute(
            "INSERT INTO session (id, openid, assistant, opened_at, last_at, ended_at,"
            " lapsed_text) VALUES (2, ?, 'chatgpt', ?, ?, ?, '那蘸什么？')",
            (BOB, now - 900, now - 900, now - 60),
        )
        turn = (
            "INSERT INTO turn (id, session_id, openid, msg_key, link_key, question,"
            " answer, generation, state, asked, replied, created_at)"
            " VALUES (?, 1, ?, ?, ?, ?, ?, ?, ?, 1, 1, ?)"
        )
        done = (1, ANN, f"{ANN} 1", "one", "写完了的", LONG, 0, "done", now - 60)
        open_ = (2, ANN, f"{ANN} 2", "two", "没写完的", LONG[:900], 3, "open", now - 30)
        unread = (
            3,
            ANN,
            f"{ANN} 3",
            "three",
            "没读到的",
            "四十二。",
            0,
            "done",
            now - 20,
        )
        db.executemany(turn, (done, open_, unread))
        db.execute("UPDATE turn SET unread = 5 WHERE id = 3")
        db.executemany(
            "INSERT INTO part (openid, number, turn_id, start, generation, stop, reply,"
            " offered_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (ANN, 2, 1, 500, 0, 900, SENT, now),
                (ANN, 3, 1, 900, 0, None, None, now),
                (ANN, 4, 2, 700, 3, None, None, now),
                (ANN, 5, 3, 0, 0, None, None, now),
            ),
        )


@pytest.fixture
async def upgraded(spawn, upstream, settings):
    """The server of today on that database; the open question is asked again."""
    first_version(settings["database"]["path"])
    upstream.will(says("重新写的。" + LONG))
    server, _ = await spawn()
    await upstream.arrival("没写完的")
    return server


async def test_a_sent_part_stays_as_it_was_sent(upgraded):
    """A second tap on it brings the very text."""
    assert (await upgraded.ask("继续2")).text == SENT


async def test_an_unsent_part_begins_its_answer_once_more(upgraded):
    """Its offset counted in the Markdown, so it says nothing now; nothing is lost."""
    seen = await upgraded.ask("继续3")
    assert seen.text.startswith(LONG[:200])
    assert seen.taps[0].label == TEXTS.word_next  # which of how many is not known
    rest = await upgraded.wechat.tap(ANN, seen.taps[0])
    assert rest.text[:50] in LONG and rest.text[:50] not in seen.text


async def test_an_answer_in_mid_air_is_written_anew_and_read_from_its_start(upgraded):
    """The tap of the old version finds the new text."""
    seen = await upgraded.ask("继续4")
    assert "重新写的。第" in seen.text or seen.text.startswith("重新写的。")


async def test_an_answer_that_was_not_read_is_still_named(upgraded):
    """The first reply has a tap for it, the second has none."""
    seen = await upgraded.ask("/help")
    assert seen.taps[-1].content == "继续5"
    assert seen.text.endswith(shown("unread", question="没读到的", tap="看回答"))
    assert "没读到的" not in (await upgraded.ask("/help")).text
    assert (await upgraded.wechat.tap(ANN, seen.taps[-1])).text.startswith("四十二。")


async def test_what_came_after_a_lapse_can_still_be_asked(upgraded):
    """The tap of the old version's offer works."""
    seen = await upgraded.ask("接着问", BOB)
    assert seen.text.startswith("你好！关于「那蘸什么？」")


async def test_both_versions_end_in_the_same_schema(settings, tmp_path):
    """A new database runs the same steps."""
    old, new = settings["database"]["path"], str(tmp_path / "new.db")
    first_version(old)
    schemas = []
    for path in (old, new):
        async with wxgpt.open_store(path) as store:
            schemas.append(await store.rows("SELECT name, sql FROM sqlite_schema"))
    assert sorted(map(str, schemas[0])) == sorted(map(str, schemas[1]))

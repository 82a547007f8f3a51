"""How SQLite goes about each statement that wxgpt really sends: by an index, unsorted.

The statements are taken from the connection while the Store is used; EXPLAIN QUERY PLAN
then says whether a table that grows would be read from end to end, or rows be sorted.
"""

import asyncio
import datetime
import inspect
import re
import sqlite3
import threading
import time
from unittest.mock import Mock

import aiosqlite
import pytest

import wxgpt
from conftest import with_session
from waiting import within

ANN = "oAnn7Zt1BvK9mHdLr3PwYc8SgNf2"
GROWING = ("session", "turn", "reply", "part", "quota")
NOW = time.time()


@pytest.fixture
async def store(tmp_path):
    """A new database with one question."""
    async with wxgpt.open_store(str(tmp_path / "test.db")) as store:
        await store.start_session(ANN, "chatgpt", NOW)
        await store.add_turn(question(0), 12000, 100, 2000)
        yield store


def question(number=1, created_at=NOW):
    """Return a question that is not stored yet."""
    return wxgpt.Turn(
        id=0,
        session_id=1,
        openid=ANN,
        msg_key=f"{ANN} {number}",
        link_key=f"link{number}",
        question="今天吃什么？",
        pictures=None,
        created_at=created_at,
        asked=1,
        assistant="chatgpt",
    )


def reply(**values):
    """Return a decided reply."""
    return wxgpt.Reply("饺子", int(NOW), **values)


END = wxgpt.Ending("stop", "m", 1, 1)
OWN, PART = wxgpt.Part(0, 1), wxgpt.Part(1, 1, 0)

CALLS = {
    "search": lambda s: s.search(ANN, ["吃", "100%"], 2**62, 20),
    "turns_after": lambda s: s.turns_after(ANN, 0),
    "recall": lambda s: s.recall(f"{ANN} 1", ANN, NOW),
    "save_reply": lambda s: s.save_reply(f"{ANN} 1", ANN, reply(part=OWN, stop=2)),
    "save_reply with parts": lambda s: s.save_reply(
        f"{ANN} 1",
        ANN,
        reply(part=PART, stop=5, offered=wxgpt.Part(2, 1, 5), mentions=1),
    ),
    "mark_delivered": lambda s: s.mark_delivered(1, "2"),
    "mark_read": lambda s: s.mark_read(1),
    "start_session": lambda s: s.start_session(ANN, "chatgpt", NOW),
    "end_session": lambda s: s.end_session(1, NOW),
    "touch_session": lambda s: s.touch_session(1, NOW),
    "note": lambda s: s.note(ANN, told_at=NOW),
    "keep_lapsed_text": lambda s: s.keep_lapsed_text(1, "然后呢"),
    "add_turn": lambda s: s.add_turn(question(), 12000, 100, 2000),
    "questions_of_day": lambda s: s.questions_of_day(ANN, NOW),
    "count_asking": lambda s: s.count_asking(question(), 12000),
    "save_texts": lambda s: s.save_texts([question(1), question(2)]),
    "begin_anew": lambda s: s.begin_anew(1),
    "finish_turn": lambda s: s.finish_turn(question(), END),
    "turn": lambda s: s.turn(1),
    "turn_by_link": lambda s: s.turn_by_link("link1"),
    "open_turns": lambda s: s.open_turns(),
    "newest": lambda s: s.turns_of(ANN, 2**62, 1),
    "turns_of": lambda s: s.turns_of(ANN, 2**62, 51),
    "part": lambda s: s.part(ANN, 1),
    "unsent_part": lambda s: s.unsent_part(1),
    "next_unsent": lambda s: s.next_unsent(ANN, 1, NOW - 60),
    "next_unsent outside": lambda s: s.next_unsent(ANN, None, NOW - 60),
    "add_history_link": lambda s: s.add_history_link(ANN, NOW + 60),
    "history_owner": lambda s: s.history_owner("key"),
    "forget": lambda s: s.forget(ANN, f"{ANN} 1", "已全部删除。"),
    "prune": lambda s: s.prune(NOW, 3600, 30),
}


async def statements_of(store, call):
    """Return the statements that a call sends, with its values in them."""
    sent = []
    await store.db.set_trace_callback(sent.append)
    await call(store)
    await store.db.set_trace_callback(None)
    verbs = r"\s*(SELECT|INSERT|REPLACE|UPDATE|DELETE)\b"
    return [query for query in sent if re.match(verbs, query)]


def faults(plan):
    """Return the steps of a plan that take longer the more is stored."""
    scans = rf"SCAN ({'|'.join(GROWING)}|missed|open)\b(?! USING (COVERING )?INDEX)"
    return [step for step in plan if re.match(scans, step) or "TEMP B-TREE" in step]


async def until_delivered(database):
    """Wait until it is noted how each answer was delivered."""
    while database("SELECT 1 FROM turn WHERE delivered IS NULL"):
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", CALLS)
async def test_no_statement_reads_a_table_from_end_to_end_or_sorts(store, name):
    """Each statement finds its rows by an index and in the order it wants them."""
    sent = await statements_of(store, CALLS[name])
    assert sent
    for query in sent:
        plan = [row[-1] for row in await store.rows(f"EXPLAIN QUERY PLAN {query}")]
        assert not faults(plan), (query, plan)


async def test_whole_indexes_are_read_for_unfinished_turns_alone(store):
    """An index is read from end to end only if it holds no more than what goes on."""
    found = {}
    for name, call in CALLS.items():
        for query in await statements_of(store, call):
            plan = [row[-1] for row in await store.rows(f"EXPLAIN QUERY PLAN {query}")]
            found |= {s: name for s in plan if re.match("SCAN .* USING", s)}
    assert set(found) == {"SCAN turn USING INDEX turn_open_by_session"}


async def test_aiosqlite_runs_a_function_of_ours_in_its_thread(store):
    """`Batch.call` uses what aiosqlite does not promise: the inner call still works.

    If this fails after an upgrade of aiosqlite, `Batch.call` is the place to look at.
    """
    parameters = inspect.signature(aiosqlite.Connection._execute).parameters
    assert list(parameters) == ["self", "fn", "args", "kwargs"]

    def where(db, value):
        return type(db), threading.current_thread().name, value

    kind, thread, value = await store.batch.call(where, "given")
    assert kind is sqlite3.Connection and value == "given"
    assert thread != threading.current_thread().name


@pytest.mark.parametrize(
    ("utc", "day"),
    [
        ("2026-03-01T15:59:59+00:00", "2026-03-01"),
        ("2026-03-01T16:00:00+00:00", "2026-03-02"),
        ("2025-12-31T16:00:00+00:00", "2026-01-01"),
    ],
)
async def test_midnight_is_beijings(store, utc, day):
    """A question counts on the day that changes at 16:00 UTC, wherever it is served."""
    seconds = datetime.datetime.fromisoformat(utc).timestamp()
    await store.add_turn(question(created_at=seconds), 12000, 100, 2000)
    query = "SELECT DISTINCT day FROM quota WHERE day = :day"
    assert await store.rows(query, day=day) == [(day,)]
    assert await store.questions_of_day(ANN, seconds) == 1


async def test_a_short_question_takes_four_hops_to_the_database(
    serve, database, monkeypatch
):
    """What is known, the question, its end with the reply; and a note, if none follows."""
    monkeypatch.setattr(wxgpt, "SAVE_SECONDS", 3600)  # texts so far take hops, too
    server = await with_session(serve)
    batch = server.bot.store.batch
    await server.ask("在吗？")
    await within(10, "note of the delivery", until_delivered(database))
    monkeypatch.setattr(batch, "call", hops := Mock(wraps=batch.call))
    await server.ask("好吗？")
    await within(10, "note of the delivery", until_delivered(database))
    assert hops.call_count <= 4


async def test_a_commit_waits_for_the_disk(store):
    """A power failure takes nothing back that a reply has said: synchronous is FULL."""
    assert await store.rows("PRAGMA synchronous") == [(2,)]


async def test_a_statement_that_fails_costs_those_beside_it_nothing(store):
    """What waits shares one commit; when that fails, each is run for itself."""
    insert = "INSERT INTO forget_request VALUES (:who, :at)"
    busy = store.run([("SELECT 1", {})])  # so the others wait, and go together
    others = [
        store.run([(insert, {"who": who, "at": at})])
        for who, at in ((ANN, NOW), ("nobody", None), ("oBob", NOW))
    ]
    await busy
    ended = asyncio.gather(*others, return_exceptions=True)
    one, failed, two = await within(10, "end of three jobs", ended)
    assert (one, two) == ([[]], [[]]) and isinstance(failed, sqlite3.IntegrityError)
    for openid in (ANN, "oBob"):
        assert (await store.recall("", openid, NOW)).forget_asked_at == NOW

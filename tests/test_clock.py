"""Our clock jumps an hour: messages go on as if nothing was. Wrong at a start, it refuses.

The server runs under Debian's libfaketime; its clock follows a file that the tests write.
"""

import asyncio
import glob
import re
import time

import pytest

import wxgpt
from conftest import ANN, BOB, TEXTS, UNIT, said
from fake_openai import Script, says
from waiting import limit, within

HOUR, DAY = 3600, 86400
ATTEMPT = 3 * UNIT  # reading the time is slower under libfaketime
LIBRARY = next(iter(glob.glob("/usr/lib/*/faketime/libfaketime.so.1")), "")
with_faketime = pytest.mark.skipif(
    not LIBRARY, reason="no libfaketime: apt install faketime"
)
jumps = pytest.mark.parametrize("jump", [HOUR, -HOUR])


@pytest.fixture
def shift(tmp_path, monkeypatch):
    """Set how many seconds the clock of the server is off."""
    path = tmp_path / "shift"

    def change(seconds: int) -> None:
        new = path.with_name("shift.new")
        new.write_text(f"{seconds:+d}")
        new.rename(
            path
        )  # at once, since the server reads it at every look at its clock

    change(0)
    monkeypatch.setenv("LD_PRELOAD", LIBRARY)
    monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(path))
    monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
    monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")
    monkeypatch.setenv("NO_FAKE_STAT", "1")
    return change


@pytest.fixture
async def running(spawn, shift):
    """A server whose clock can be set, with Ann's open session."""
    server, process = await spawn(wechat={"attempt_timeout": ATTEMPT})
    server.wechat.attempt_timeout = ATTEMPT
    await server.ask("/chatgpt")
    return server, process


def warnings(process) -> list[str]:
    """Return what the log says about clocks."""
    return [line for line in process.log if "our clock" in line]


# Our clock


@with_faketime
@jumps
async def test_the_server_sees_the_jump(running, shift, jump):
    """The log's own time moves by an hour: the other tests here test something."""
    server, process = running
    shift(jump)
    await server.ask("/help")
    await process.says("command help")
    [line] = [line for line in process.log if "command help" in line]
    assert line.startswith(f"{time.localtime(time.time() + jump).tm_hour:02d}:")


@with_faketime
@jumps
async def test_pushes_stay_accepted_when_our_clock_jumps(running, shift, jump):
    """The clock of the start counts, too: nothing is refused, and nothing warned of."""
    server, process = running
    shift(jump)
    for n in range(5):
        assert not (await server.ask(f"/chatgpt 第{n}问")).faulty
    assert warnings(process) == []
    assert process.process.returncode is None


@with_faketime
@pytest.mark.parametrize("off", [-720, 720, -400 * DAY, 400 * DAY])
async def test_a_clock_that_is_wrong_at_the_start_refuses(running, shift, off):
    """All pushes get 403, and one line a minute says by how many seconds it is off."""
    server, process = running
    await process.kill()
    shift(off)
    await process.start()
    for n in range(5):
        assert await post(server, time.time(), f"/chatgpt 第{n}问") == 403
    await process.says("our clock")
    lines = warnings(process)
    assert 1 <= len(lines) <= 2  # a minute's turn
    said = int(re.search(r"our clock is ([+-]\d+) s off", lines[0])[1])
    assert abs(said - off) <= 5


@with_faketime
@pytest.mark.parametrize("off", [-480, 480])
async def test_a_clock_that_is_a_little_wrong_at_the_start_is_good(running, shift, off):
    """Within ten minutes every push is taken."""
    server, process = running
    await process.kill()
    shift(off)
    await process.start()
    assert not (await server.ask("/chatgpt 还在吗")).faulty
    assert warnings(process) == []


@with_faketime
@jumps
async def test_a_clock_that_is_put_right_lets_pushes_in_at_once(running, shift, jump):
    """No restart is needed when NTP comes late."""
    server, process = running
    await process.kill()
    shift(jump)
    await process.start()
    assert await post(server, time.time()) == 403
    shift(0)
    assert await post(server, time.time()) == 200


@with_faketime
@jumps
async def test_attempts_are_answered_across_a_jump(running, shift, upstream, jump):
    """A question whose attempts run when the clock jumps is answered on the third."""
    server, process = running
    gate = asyncio.Event()
    upstream.will(Script(["写到这里。", gate]))
    server.posted.clear()
    asking = asyncio.create_task(server.ask("跳的时候问的"))
    await within(30, "second attempt", server.nth_attempt(2).wait())
    shift(jump)
    seen = await asking
    assert seen.attempt == 3 and seen.text.startswith("写到这里。")
    gate.set()


@with_faketime
@jumps
async def test_the_third_attempt_is_not_taken_for_another(
    running, shift, upstream, jump
):
    """The loop's clock decides which chance is the last, so the jump ends no wait early."""
    server, process = running
    await asyncio.sleep(2 * ATTEMPT)  # right after a start CreateTime counts instead
    shift(jump)
    server.posted.clear()
    upstream.will(Script([server.nth_attempt(3), "等到第三次。"]))
    seen = await server.ask("/chatgpt 慢慢来")
    assert seen.attempt == 3 and seen.text.startswith("等到第三次。")


@with_faketime
@jumps
async def test_the_seconds_a_subscriber_reads_are_those_that_passed(
    running, shift, upstream, jump
):
    """A word of patience does not speak of an hour, nor of less than nothing."""
    server, process = running
    gate = asyncio.Event()
    upstream.will(Script([gate, "想好了。"]))
    asking = asyncio.create_task(server.ask("想多久"))
    await upstream.arrival("想多久")
    shift(jump)
    ages, text = (TEXTS.age_10, TEXTS.age_20, TEXTS.age_60), (await asking).text
    assert any(f"已经{age}了" in text for age in ages)
    gate.set()
    await process.says("done after")
    after = re.search(r"done after (-?[\d.]+) s", "".join(process.log))[1]
    assert 0 <= float(after) < 100


@with_faketime
@jumps
async def test_a_repeated_question_joins_across_a_jump(running, shift, upstream, jump):
    """The same text within a minute is one question, whatever the clock says."""
    server, process = running
    gate = asyncio.Event()
    upstream.will(Script([gate, "一次就够。"]))
    first = asyncio.create_task(server.ask("问两遍"))
    await upstream.arrival("问两遍")
    shift(jump)
    second = asyncio.create_task(server.ask("问两遍"))
    await server.ask("/help")  # taken up after what came before it
    gate.set()
    assert not (await first).faulty and not (await second).faulty
    assert len(upstream.requests) == 1


@with_faketime
@jumps
async def test_a_session_that_is_written_in_survives_the_jump(
    running, shift, upstream, jump
):
    """An unanswered question keeps its session open; the next one knows it."""
    server, process = running
    gate = asyncio.Event()
    upstream.will(Script([gate, "答案一。"]), says("答案二。"))
    first = asyncio.create_task(server.ask("问题一"))
    await upstream.arrival("问题一")
    shift(jump)
    second = asyncio.create_task(server.ask("问题二"))
    await process.says("turn=2 ")
    gate.set()
    await upstream.arrival("问题二")
    assert not (await first).faulty and not (await second).faulty
    assert "答案一。" in str(upstream.requests[-1].messages)


@with_faketime
@jumps
async def test_a_crash_and_a_jump_together_lose_nothing(running, shift, upstream, jump):
    """The next process asks again; the retry is answered once its clock is put right."""
    server, process = running
    upstream.will(Script([asyncio.Event()]), says("还是答了。"))
    push = server.wechat.text(ANN, "两难")
    assert await server.wechat.attempt(push, ATTEMPT / 2) is None
    await upstream.arrival("两难")
    await process.kill()
    shift(jump)
    await process.start()
    assert (await server.wechat.deliver(push)).reason == "given up: status 403"
    shift(0)
    is_young = jump < 0  # than the ten minutes within which a question is asked again
    await process.says("done after" if is_young else "failed given_up")
    seen = await server.wechat.deliver(push)
    assert seen.text.startswith("还是答了。" if is_young else "服务器中途重启")


@pytest.fixture
async def keeping(prune_often, spawn, shift):
    """A server that keeps exchanges for three days and holds one of Ann's of today."""
    server, process = await spawn(history={"keep_days": 3})
    await server.ask("/chatgpt 今天的")
    return server, process


@with_faketime
async def test_a_clock_that_jumps_deletes_only_what_is_due(keeping, shift, database):
    """400 days ahead: what is four days old goes, what is of today stays."""
    server, _ = keeping
    await server.ask("/chatgpt 四天前的", BOB)
    database("UPDATE turn SET created_at = created_at - 345600 WHERE openid = ?", BOB)
    shift(400 * 24 * HOUR)
    await server.ask("/help")
    async with limit(30, "end of the old exchange"):
        while database("SELECT 1 FROM turn WHERE openid = ?", BOB):
            await asyncio.sleep(0.05)
    assert database("SELECT question FROM turn") == [("今天的",)]


@with_faketime
async def test_a_start_with_a_wrong_clock_deletes_nothing(keeping, shift, database):
    """400 days ahead from the start, also once a push has told WeChat's time."""
    server, process = keeping
    await process.end()
    shift(400 * 24 * HOUR)
    await process.start()
    await asyncio.sleep(1)  # it looks five times a second
    await server.wechat.post(server.wechat.event(BOB, "view"))
    await asyncio.sleep(1)
    assert database("SELECT question FROM turn") == [("今天的",)]


# WeChat's timestamps


async def post(server, timestamp: object, text: str = "/help") -> int:
    """Post a push signed with this timestamp; return the status."""
    stamp = int(timestamp) if isinstance(timestamp, float) else timestamp
    push = server.wechat.text(BOB, text)
    response = await server.wechat.post(push, timestamp=stamp, timeout=10)
    return response.status


async def test_a_push_is_fresh_within_ten_minutes(spawn):
    """Before or behind our clock, whatever came before it."""
    server, _ = await spawn()
    now = time.time()
    for off in (0.0, -590.0, 590.0, 0.0):
        assert (off, await post(server, now + off)) == (off, 200)
    for off in (-620.0, 620.0, -HOUR, HOUR, -30 * DAY, 30 * DAY):
        assert (off, await post(server, now + off)) == (off, 403)


async def test_a_timestamp_has_ten_digits(spawn):
    """Rightly signed or not: any other arrangement of digits is none."""
    server, process = await spawn()
    now = str(int(time.time()))
    others = [f"0{now}", f"{now}0", now[:9], f" {now}", f"{now}.0", f"+{now}", "-1", ""]
    others += ["１" * 10, f"{now}\n", "9" * 99]
    for stamp in others:
        assert (stamp, await post(server, stamp)) == (stamp, 403)
    await process.says("our clock")
    assert len(warnings(process)) <= 2  # a minute's turn
    assert await post(server, now) == 200


async def test_a_restart_changes_nothing(spawn):
    """What is stale stays so, what is fresh stays so; nothing is kept about it."""
    server, process = await spawn()
    now = time.time()
    assert await post(server, now) == 200
    await process.kill()
    await process.start()
    assert await post(server, now - 620) == 403
    assert await post(server, now) == 200


@with_faketime
async def test_a_stale_signature_stays_stale_when_our_clock_jumps(running, shift):
    """Only what is near the jumped clock, or the one of the start, is taken."""
    server, _ = running
    now = time.time()
    shift(-HOUR)
    assert await post(server, now - HOUR) == 200  # near our clock as it is
    assert await post(server, now - 2 * HOUR) == 403
    assert await post(server, now - HOUR / 2) == 403
    assert await post(server, now) == 200


@pytest.mark.parametrize("jump", [-DAY, -HOUR, 0, HOUR, DAY])
def test_two_clocks_say_what_is_fresh(monkeypatch, jump):
    """Any clock within ten minutes will do; the warning names the nearer one's error."""
    monotonic, began, said = 5000.0, time.time(), []
    guard = wxgpt.ReplayGuard(lambda: monotonic, lambda words, *v: said.append(v))
    monotonic += 3000
    monkeypatch.setattr(time, "time", lambda: began + 3000 + jump)
    for true in (began + 3000, began + 3000 + jump):
        assert guard.is_fresh(str(int(true) + 599))
        assert guard.is_fresh(str(int(true) - 598))
    assert said == []
    least, most = sorted((0, jump))
    assert not guard.is_fresh(str(int(began + 3000 + most) + 620))
    assert not guard.is_fresh(str(int(began + 3000 + least) - 620))
    assert [round(seconds) for (seconds,) in said] == pytest.approx([-620, 620], abs=2)


async def test_a_push_that_met_nobody_for_long_is_answered_at_once(spawn, upstream):
    """Right after a start CreateTime says that WeChat will hardly come again."""
    server, _ = await spawn(wechat={"attempt_timeout": 2.0})
    gate = asyncio.Event()
    upstream.will(Script([gate]))
    old = int(time.time()) - 60
    push = server.wechat.text(ANN, "/chatgpt 等了一分钟", create_time=old)
    seen = await server.wechat.attempt(push, 10)
    assert said("thinking") in seen.text
    gate.set()

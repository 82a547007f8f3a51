"""Kill -9 at any moment: nothing accepted is lost, doubled or paid for twice.

A round is chosen by its seed: who asks what, and when the process dies. `--crash-rounds
100` plays the seeds 0 to 99, five at a time; a round that fails names its seed.
"""

import asyncio
import contextlib
import random
import shutil
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from conftest import TOKEN, UNIT, Process, free_port, toml
from fake_openai import FakeOpenAI, Script, split
from wechat import Push, Seen, WeChat

ATTEMPT = 2.5 * UNIT  # seconds
# After two attempts that a crash spoils WeChat has one or two left. The pause puts them
# behind 1.5 attempts even when the server reckons from CreateTime, a whole second.
PAUSE = 1 + ATTEMPT / 2
AT_ONCE = 5  # rounds in one test
SENTENCE = "春天来了，花都开了，鸟也叫了，人们走出门去看风景。"


def pytest_generate_tests(metafunc):
    """Make a test of every five seeds."""
    rounds = metafunc.config.getoption("crash_rounds")
    groups = [range(n, min(n + AT_ONCE, rounds)) for n in range(0, rounds, AT_ONCE)]
    metafunc.parametrize("seeds", groups, ids=[f"{g[0]}-{g[-1]}" for g in groups])


def answer_to(question: str) -> str:
    """Return what the model says to a question, the same at every asking."""
    sentences = 60 if question.endswith("长") else 3
    return "".join(f"{question}{n}：{SENTENCE}\n\n" for n in range(sentences)).strip()


def script_for(question: str) -> Script:
    """Return how the model says it: at once, late, or in pieces."""
    wait = random.Random(question).uniform(0, 1.5 * ATTEMPT)
    pieces = split(answer_to(question))
    if question.endswith("快"):
        return Script(pieces)
    return Script([wait / 2, *pieces[:2], wait / 2, *pieces[2:]])


class PatientWeChat(WeChat):
    """The platform, which does not burn its attempts within a second after a crash.

    After a reset it meets nobody; then it waits until the next process serves.
    """

    def __init__(self, port: int) -> None:
        url = f"http://127.0.0.1:{port}/wechat"
        super().__init__(url, TOKEN, attempt_timeout=ATTEMPT, refused_pause=PAUSE)
        self.gone, self.serving = asyncio.Event(), asyncio.Event()

    async def _request(self, *arguments):
        attempt = await super()._request(*arguments)
        if attempt.outcome == "reset":  # a dying process still takes connections
            await self.gone.wait()
        if attempt.outcome == "refused":
            await self.serving.wait()
        return attempt


@dataclass
class Round:
    """One server, its subscribers, and what became of their messages."""

    seed: int
    fake: FakeOpenAI
    wechat: PatientWeChat
    process: Process
    settings: dict
    lives: int = 0
    stored: list[set[str]] = field(
        default_factory=list
    )  # ended by the end of each life
    seen: list[tuple[Push, Seen]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)

    @property
    def database(self):
        """Return where the server stores."""
        return self.process.path.with_name("round.db")

    async def begin_life(self) -> None:
        """Start the process, with a key of its own so that its requests are known."""
        self.lives += 1
        key = {"base_url": self.fake.base_url, "api_key": f"sk-{self.lives}"}
        settings = self.settings | {"assistants": {"chatgpt": key}}
        self.process.path.write_text(toml(settings), "utf-8")
        await self.process.start()
        self.wechat.gone.clear()

    async def crash(self) -> None:
        """Kill the process; note which answers it had stored as ended."""
        self.wechat.serving.clear()
        await self.process.kill()
        self.wechat.gone.set()
        folder = self.database.with_name(f"life{self.lives}")
        folder.mkdir()
        for path in (self.database, self.database.with_name("round.db-wal")):
            shutil.copy(path, folder)  # read in a copy: reading recovers the file
        ended = rows(
            folder / "round.db", "SELECT question FROM turn WHERE state != 'open'"
        )
        self.stored.append({question for (question,) in ended})

    async def send(self, openid: str, text: str) -> Seen:
        """Let a subscriber write, and note what they saw."""
        push = self.wechat.text(openid, text)
        seen = await self.wechat.deliver(push)
        self.seen.append((push, seen))
        return seen

    async def ask(self, openid: str, kind: str, prefix: str = "") -> Seen:
        """Let a subscriber ask something that nobody asked before."""
        question = f"问{self.seed}-{len(self.questions)}{kind}"
        self.questions.append(question)
        return await self.send(openid, prefix + question)


def rows(path, query: str) -> list[tuple]:
    """Return the rows of a query."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


# Subscribers: what one of them does in a round


async def asks_one(round, openid):
    """Ask a quick question."""
    await round.send(openid, "/chatgpt")
    await round.ask(openid, "快")


async def asks_with_the_command(round, openid):
    """Open the session with a slow question, and ask for help meanwhile."""
    await asyncio.gather(
        round.ask(openid, "慢", "/chatgpt"), round.send(openid, "/help")
    )


async def asks_several(round, openid):
    """Ask three questions without waiting for the answers."""
    await round.send(openid, "/chatgpt")
    await asyncio.gather(*(round.ask(openid, kind) for kind in "慢快慢"))


async def reads_a_long_one(round, openid):
    """Ask for a long answer and tap for all of its parts."""
    seen = await round.ask(openid, "长", "/chatgpt ")
    while seen.taps and seen.taps[0].content.startswith("继续"):
        seen = await round.send(openid, seen.taps[0].content)


async def changes_the_subject(round, openid):
    """Ask, clear, ask again, look at the history."""
    await round.ask(openid, "快", "/chatgpt ")
    await round.send(openid, "/clear")
    await round.ask(openid, "慢")
    await round.send(openid, "/history")


async def meets_nobody(round, openid):
    """Write when the process is gone."""
    await round.process.process.wait()
    await round.ask(openid, "快", "/chatgpt ")


SUBSCRIBERS = [asks_one, asks_with_the_command, asks_several, reads_a_long_one]
SUBSCRIBERS += [changes_the_subject, meets_nobody]


async def live_through(round: Round) -> None:
    """Let subscribers ask, kill the process among it, once or twice, and start it again."""
    rng = random.Random(round.seed)
    await round.begin_life()
    round.wechat.serving.set()
    chosen = [*rng.sample(SUBSCRIBERS, 4), *rng.choices(SUBSCRIBERS, k=2)]
    asking = [
        asyncio.create_task(does(round, f"oSub{n}Zt1BvK9mHdLr3PwYc8SgNf2"))
        for n, does in enumerate(chosen)
    ]
    # Before any message can be at its third attempt: that one has no retry to be saved.
    await asyncio.sleep(rng.uniform(0, 1.8 * ATTEMPT))
    for _ in range(rng.choice((1, 1, 2))):
        await round.crash()
        await round.begin_life()
        await asyncio.sleep(rng.uniform(0, ATTEMPT / 4))
    round.wechat.serving.set()
    await asyncio.gather(*asking)


async def settle(round: Round) -> None:
    """Wait until no question is open."""
    async with asyncio.timeout(20 * ATTEMPT):
        while rows(round.database, "SELECT 1 FROM turn WHERE state = 'open'"):
            await asyncio.sleep(0.05)


async def check_replies(round: Round) -> None:
    """Each message got a reply, and a later copy of it gets the very same.

    Unless the reply left before a slow disk had it, which the log tells: then the copy
    may be decided anew.
    """
    early = [line for line in round.process.log if "before it was stored" in line]
    for push, seen in round.seen:
        assert seen.text and not seen.faulty and "有点忙" not in seen.text, (push, seen)
        if not any(f"msg={push.fields['MsgId']} " in line for line in early):
            again = await round.wechat.post(push, timeout=20)
            assert again.body == seen.body, (push, seen)


def check_store(round: Round) -> None:
    """Each question is stored once, answered whole, and counted as often as asked."""
    query = "SELECT question, state, answer, asked FROM turn ORDER BY question"
    turns = rows(round.database, query)
    assert [turn[0] for turn in turns] == sorted(round.questions)
    for question, state, answer, asked in turns:
        assert (state, answer) == ("done", answer_to(question)), question
        assert len(round.fake.asked(question)) <= asked <= round.lives, question
    assert rows(round.database, "PRAGMA integrity_check") == [("ok",)]


def check_fetches(round: Round) -> None:
    """No answer was fetched twice in one life, nor again once it was stored."""
    fetches: Counter[tuple[str, int]] = Counter()
    for asked in round.fake.requests:
        life = int(asked.headers["Authorization"].removeprefix("Bearer sk-"))
        fetches[asked.question, life] += 1
        before = round.stored[: life - 1]
        assert not any(asked.question in ended for ended in before), asked.question
    assert set(fetches.values()) <= {1}, fetches


async def play(seed: int, folder) -> None:
    """Play the round of a seed and check it."""
    folder.mkdir()
    settings: dict[str, Any] = {
        "public_url": "http://wx.example.com",
        "server": {"port": free_port()},
        "wechat": {"token": TOKEN, "attempt_timeout": ATTEMPT},
        "database": {"path": str(folder / "round.db")},
    }
    port = settings["server"]["port"]
    process = Process(folder / "wxgpt.toml", port)
    async with FakeOpenAI(script_for) as fake, PatientWeChat(port) as wechat:
        round = Round(seed, fake, wechat, process, settings)
        try:
            await live_through(round)
            await settle(round)
            await check_replies(round)
            assert await process.end() == 0
            check_store(round)
            check_fetches(round)
        except BaseException as error:
            error.add_note(f"seed {seed}\n{''.join(process.log)}")
            raise
        finally:
            await process.kill()


async def test_nothing_is_lost_when_the_process_is_killed(seeds, tmp_path):
    """Killed at a random moment: every question is stored once and answered."""
    rounds = (play(seed, tmp_path / str(seed)) for seed in seeds)
    results = await asyncio.gather(*rounds, return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed:
        raise BaseExceptionGroup("rounds that failed", failed)

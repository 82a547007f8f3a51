"""`wxgpt.py stats`: who asked how much; it only reads the database."""

import collections
import contextlib
import datetime
import json
import pathlib
import sqlite3
import statistics
import typing

from owner.layout import COLUMNS as SCREEN
from owner.layout import pad, width_of, wrap
from owner.service import missing
from owner.words import tell
from wxgpt import BEIJING, Config, clock, print_error

FAILED_STATES = ("failed", "broken", "blocked")
DELIVERED = ("1", "2", "3", "part", "page", "lost", "none")
LOST_SHARE = 0.01  # of all replies; a bad connection or a restart may explain fewer
MOST_DAYS = 36500  # that a date can go back
SLOWEST = 5  # questions are named
BUSIEST = 20  # subscribers have a row of their own
COLUMNS = ("asked", "failed", "in", "out", "median", "95%")
# How an answer was delivered, as people read it.
WAYS = {
    "1": "1st request",
    "2": "2nd",
    "3": "3rd",
    "part": "fetched by 继续",
    "page": "on a page",
    "lost": "lost",
    "none": "not fetched",
}
# Why an answer failed: the kinds of ChatError.
REASONS = {
    "slow": "too slow",
    "unreachable": "not reached",
    "busy": "overloaded",
    "setup": "key, balance or settings",
    "refused": "refused by the provider",
    "long": "too long for the model",
    "blind": "the model reads no pictures",
    "picture": "picture not fetched",
    "empty": "an empty answer",
    "broken": "broken off",
    "blocked": "a blocked word",
}


def is_model(told: str, name: str) -> bool:
    """Say whether a provider's name for what answered is that of a setting."""
    return bool(name) and told.startswith(name)


def writer_of(config: Config, row: sqlite3.Row) -> str:
    """Return the assistant whose model wrote an answer: the asked one or its fallback."""
    name, told = row["assistant"], row["model"] or ""
    one = config.assistants.get(name)
    other = config.assistants.get(one.fallback) if one else None
    if one is None or other is None or not is_model(told, other.model):
        return name
    # A name may begin with the other: the longer one that fits is meant.
    is_own = is_model(told, one.model) and len(one.model) >= len(other.model)
    return name if is_own else one.fallback


def is_failed(row: sqlite3.Row) -> bool:
    """Say whether there is no answer, or none that may be shown."""
    return row["state"] in FAILED_STATES


def is_by_fallback(config: Config, row: sqlite3.Row) -> bool:
    """Say whether there is an answer, written by another model than was asked."""
    return not is_failed(row) and writer_of(config, row) != row["assistant"]


def cost_of(config: Config, row: sqlite3.Row) -> float:
    """Return what an answer cost, by the prices of its assistant; 0 without prices."""
    one = config.assistants.get(writer_of(config, row))
    prices = (getattr(one, f"price_{way}", 0) for way in ("in", "out"))
    tokens = (row["tokens_in"] or 0, row["tokens_out"] or 0)
    return sum(p * t for p, t in zip(prices, tokens, strict=True)) / 1e6


def summarise(config: Config, rows: list[sqlite3.Row]) -> dict[str, object]:
    """Return the figures of some rows of the table turn."""
    written = [row["seconds"] for row in rows if not is_failed(row)]
    seconds = sorted(time for time in written if time is not None)
    ways = collections.Counter(row["delivered"] or "none" for row in rows)
    failures = [row for row in rows if is_failed(row)]
    return {
        "questions": len(rows),
        "calls": sum(row["calls"] or 0 for row in rows),
        "failures": len(failures),
        "fallback": sum(is_by_fallback(config, row) for row in rows),
        "tokens_in": sum(row["tokens_in"] or 0 for row in rows),
        "tokens_out": sum(row["tokens_out"] or 0 for row in rows),
        "cost": round(sum(cost_of(config, row) for row in rows), 6),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "p95_seconds": seconds[-(-95 * len(seconds) // 100) - 1] if seconds else None,
        "delivered": {way: ways[way] for way in DELIVERED},
    }


def busiest_first(groups: dict[str, list]) -> list[tuple[str, list]]:
    """Return groups of exchanges with their names, the largest first."""
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def slowest_of(rows: list[sqlite3.Row]) -> list[dict[str, object]]:
    """Return when the slowest questions were asked, and how long they took; no words."""
    timed = [row for row in rows if row["seconds"] is not None]
    timed.sort(key=lambda row: -row["seconds"])
    return [
        {
            "at": datetime.datetime.fromtimestamp(row["created_at"], BEIJING).isoformat(
                sep=" ", timespec="minutes"
            )[:16],
            "seconds": row["seconds"],
            "model": row["model"],
            "state": row["state"],
        }
        for row in timed[:SLOWEST]
    ]


def gather_stats(config: Config, days: int, is_full: bool) -> dict[str, object]:
    """Return the figures of the last Beijing days (0: of all) by day and subscriber."""
    path = pathlib.Path(config.database.path).absolute()
    with contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    ) as db:
        db.row_factory = sqlite3.Row
        query = """
            SELECT turn.openid, created_at, state, reason, model, calls, tokens_in,
                   tokens_out, seconds, delivered, assistant
            FROM turn JOIN session ON session.id = session_id
            WHERE created_at > ? ORDER BY created_at
        """
        today = datetime.datetime.now(BEIJING).replace(hour=0, minute=0, second=0)
        since = today - datetime.timedelta(days=days - 1)
        rows = db.execute(query, (since.timestamp() if days else 0,)).fetchall()
    by_day, by_openid = collections.defaultdict(list), collections.defaultdict(list)
    by_model = collections.defaultdict(list)
    for row in rows:
        by_day[clock(row["created_at"], "%Y-%m-%d")].append(row)
        by_openid[row["openid"]].append(row)
        by_model[row["model"] or "-"].append(row)  # none of them has answered
    failed = [row["reason"] or row["state"] for row in rows]
    failed = [r for r, row in zip(failed, rows, strict=True) if is_failed(row)]
    return {
        "days": [
            {"day": day} | summarise(config, rows) for day, rows in by_day.items()
        ],
        "subscribers": [
            {"openid": openid if is_full else openid[:8] + "…"}
            | summarise(config, rows)
            for openid, rows in busiest_first(by_openid)
        ],
        "models": [
            {"model": model} | summarise(config, rows)
            for model, rows in busiest_first(by_model)
        ],
        "total": summarise(config, rows),
        "reasons": dict(collections.Counter(failed).most_common()),
        "slowest": slowest_of(rows),
        "reply_margin": config.wechat.margin,
    }


def short(count: int) -> str:
    """Return a count of tokens in at most five characters."""
    if count < 100_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 10_000_000 else f"{count / 1e6:.0f}M"


def table_row(name: str, figures: dict[str, typing.Any], is_priced: bool) -> list[str]:
    """Return the cells of one row of a table."""
    cells = [name, *(str(figures[key]) for key in ("questions", "failures"))]
    cells += [short(figures[key]) for key in ("tokens_in", "tokens_out")]
    for key in ("median_seconds", "p95_seconds"):
        cells.append("-" if figures[key] is None else f"{figures[key]:.1f}s")
    return [*cells, f"{figures['cost']:.2f}"] if is_priced else cells


def cut(text: str, columns: int) -> str:
    """Return a text, or its beginning with … if it takes more columns."""
    if width_of(text) <= columns:
        return text
    while width_of(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def print_table(key: str, rows: list[dict], total: dict, note: str = "") -> None:
    """Print a table whose columns are as wide as their widest cell, and a note."""
    is_priced = total["cost"] > 0
    columns = [tell(text) for text in (key, *COLUMNS, *(["cost"] if is_priced else []))]
    table = [columns, *(table_row(row[key], row, is_priced) for row in rows)]
    table.append(table_row(tell("all"), total, is_priced))
    widths = [max(map(width_of, column)) for column in zip(*table, strict=True)]
    # A long name of a model is cut; whole openids and all figures have room.
    widths[0] = min(widths[0], SCREEN - sum(widths[1:]) - 2 * len(widths[1:]))
    for name, *cells in table:
        pairs = zip(cells, widths[1:], strict=True)
        right = (pad(cell, width, is_right=True) for cell, width in pairs)
        print(pad(cut(name, widths[0]), widths[0]), *right, sep="  ")
    print(f"{note}\n" if note else "")


def print_counts(title: str, counts: dict[str, int], names: dict[str, str]) -> None:
    """Print counts by name, each on one line with its name; none if there are none."""
    shown = [
        f"{tell(names.get(key, key))} {count}" for key, count in counts.items() if count
    ]
    if not shown:
        return
    line, comma = tell(title) + tell(": ") + shown[0], tell(", ")
    for item in shown[1:]:
        line += comma
        if width_of(line + item + comma.rstrip()) > SCREEN:
            print(line.rstrip())
            line = "  "
        line += item
    print(line)


def print_stats(stats: dict[str, typing.Any], is_full: bool = False) -> None:
    """Print the figures as tables for people."""
    total = stats["total"]
    questions = total["questions"]
    if not questions:
        print(tell("no questions in that time"))
        return
    print_table("day", stats["days"], total)
    people = stats["subscribers"] if is_full else stats["subscribers"][:BUSIEST]
    others = len(stats["subscribers"]) - len(people)
    note = tell("… and {others} more people: --full", others=others) if others else ""
    print_table("openid", people, total, note)
    print_table("model", stats["models"], total)
    print_counts("answers delivered", total["delivered"], WAYS)
    print_counts("failures", stats["reasons"], REASONS)
    if total["fallback"]:
        words = "the fallback wrote {count} of {answers} answers ({share:.1%})"
        count, answers = total["fallback"], questions - total["failures"]
        say_wrapped(words, count=count, answers=answers, share=count / answers)
    for one in stats["slowest"]:
        words = "slow: {at}, {seconds:.1f} s, {model}"
        model = cut(one["model"] or "-", SCREEN // 2)
        say_wrapped(words, at=one["at"], seconds=one["seconds"], model=model)
    lost = total["delivered"]["lost"]
    words = "reply_margin {margin:g} s is too small: raise it"
    if lost <= LOST_SHARE * questions:
        words = "reply_margin {margin:g} s fits"
    words = tell(words, margin=stats["reply_margin"])
    met = "{words}; {lost} of {questions} replies met a line that was gone"
    say_wrapped(met, words=words, lost=lost, questions=questions)


def say_wrapped(english: str, **values: object) -> None:
    """Print a line in the owner's language, within 80 columns."""
    print(wrap(tell(english, **values)))


def stats_command(config: Config, days: int, is_full: bool, as_json: bool) -> int:
    """Print who asked how much; return the exit status."""
    path, days = config.database.path, min(max(days, 0), MOST_DAYS)
    try:
        if why := missing(path):
            print_error(tell(why, path=path))
            return 1
        stats = gather_stats(config, days, is_full)
    except sqlite3.Error as error:
        if "no such table" in str(error):  # an empty file
            print_error(tell("{path}: wxgpt has not run yet", path=path))
            return 1
        print_error(tell("{path}: {why}", path=path, why=str(error)))
        return 1
    if as_json:
        print(json.dumps(stats, ensure_ascii=False, indent=2))
    else:
        print_stats(stats, is_full)
    return 0

"""`wxgpt.py stats`: who asked how much; it only reads the database."""

import collections
import contextlib
import datetime
import json
import pathlib
import sqlite3
import statistics
import sys
import typing

from wxgpt import BEIJING, Config, beijing_day

FAILED_STATES = ("failed", "broken", "blocked")
DELIVERED = ("1", "2", "3", "part", "page", "lost", "none")
LOST_SHARE = 0.01  # of all replies; a bad connection or a restart may explain fewer
COLUMNS = ("questions", "failures", "tokens in", "tokens out", "median", "p95")
WAYS = ("1st", "2nd", "3rd", "part", "page", "lost", "none")
LEGEND = """\
1st, 2nd, 3rd: which of WeChat's requests took the answer; part: 继续 fetched it; page:
it was read there; lost: WeChat had hung up; none: it failed, or nobody fetched it."""


def summarise(rows: list[sqlite3.Row]) -> dict[str, object]:
    """Return the figures of some rows of the table turn."""
    seconds = sorted(row["seconds"] for row in rows if row["seconds"] is not None)
    ways = collections.Counter(row["delivered"] or "none" for row in rows)
    failures = [row for row in rows if row["state"] in FAILED_STATES]
    return {
        "questions": len(rows),
        "calls": sum(row["calls"] or 0 for row in rows),
        "failures": len(failures),
        "tokens_in": sum(row["tokens_in"] or 0 for row in rows),
        "tokens_out": sum(row["tokens_out"] or 0 for row in rows),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "p95_seconds": seconds[-(-95 * len(seconds) // 100) - 1] if seconds else None,
        "delivered": {way: ways[way] for way in DELIVERED},
    }


def busiest_first(groups: dict[str, list]) -> list[tuple[str, list]]:
    """Return groups of exchanges with their names, the largest first."""
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def gather_stats(config: Config, days: int, is_full: bool) -> dict[str, object]:
    """Return the figures of the last Beijing days (0: of all) by day and subscriber."""
    path = pathlib.Path(config.database.path).absolute()
    with contextlib.closing(
        sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    ) as db:
        db.row_factory = sqlite3.Row
        query = """
            SELECT openid, created_at, state, model, calls, tokens_in, tokens_out,
                   seconds, delivered
            FROM turn WHERE created_at > ? ORDER BY created_at
        """
        today = datetime.datetime.now(BEIJING).replace(hour=0, minute=0, second=0)
        since = today - datetime.timedelta(days=days - 1)
        rows = db.execute(query, (since.timestamp() if days else 0,)).fetchall()
    by_day, by_openid = collections.defaultdict(list), collections.defaultdict(list)
    by_model = collections.defaultdict(list)
    for row in rows:
        by_day[beijing_day(row["created_at"])].append(row)
        by_openid[row["openid"]].append(row)
        by_model[row["model"] or "-"].append(row)  # none of them has answered
    return {
        "days": [{"day": day} | summarise(rows) for day, rows in by_day.items()],
        "subscribers": [
            {"openid": openid if is_full else openid[:8] + "…"} | summarise(rows)
            for openid, rows in busiest_first(by_openid)
        ],
        "models": [
            {"model": model} | summarise(rows)
            for model, rows in busiest_first(by_model)
        ],
        "total": summarise(rows),
        "reply_margin": config.wechat.margin,
    }


def table_row(name: str, figures: dict[str, typing.Any]) -> list[str]:
    """Return the cells of one row of a table."""
    cells = [name, *(str(figures[column.replace(" ", "_")]) for column in COLUMNS[:4])]
    for key in ("median_seconds", "p95_seconds"):
        cells.append("-" if figures[key] is None else f"{figures[key]:.1f} s")
    return cells + [
        str(count) if count else "-" for count in figures["delivered"].values()
    ]


def print_table(title: str, rows: list[dict], total: dict) -> None:
    """Print a table whose columns are as wide as their widest cell."""
    table = [[title, *COLUMNS, *WAYS]]
    table += [table_row(row[title], row) for row in rows]
    table.append(table_row("all", total))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        right = (c.rjust(width) for c, width in zip(cells, widths[1:], strict=True))
        print(name.ljust(widths[0]), *right, sep="  ")
    print()


def print_stats(stats: dict[str, typing.Any]) -> None:
    """Print the figures as tables for people."""
    total = stats["total"]
    if not total["questions"]:
        print("no questions in that time")
        return
    print_table("day", stats["days"], total)
    print_table("openid", stats["subscribers"], total)
    print_table("model", stats["models"], total)
    print(LEGEND)
    lost, questions = total["delivered"]["lost"], total["questions"]
    verdict = "fits" if lost <= LOST_SHARE * questions else "is too small: raise it"
    margin = f"reply_margin {stats['reply_margin']:g} s {verdict}"
    print(f"{margin}; {lost} of {questions} replies met a line that was gone")


def stats_command(config: Config, days: int, is_full: bool, as_json: bool) -> int:
    """Print who asked how much; return the exit status."""
    try:
        stats = gather_stats(config, days, is_full)
    except sqlite3.Error as error:
        print(f"wxgpt: database {config.database.path}: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(stats, ensure_ascii=False, indent=2))
    else:
        print_stats(stats)
    return 0

"""Votes in SQLite: each exactly once, whatever is sent twice, and there after a crash of the machine.

A vote carries a key that the page draws. One with a known key is a repetition of the same message and changes nothing. A
question has at most one standing vote of a rater: the first one to arrive. Taking back marks a vote, it deletes nothing.
"""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from t2irl.errors import DataError
from t2irl.preferences.record import Side

Answer = Literal["left", "right", "tie", "both_bad"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
Outcome = Literal["stored", "known", "taken"]
TABLES = """
CREATE TABLE IF NOT EXISTS raters (number INTEGER PRIMARY KEY, rater TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS votes (
  place INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, item TEXT NOT NULL, rater TEXT NOT NULL,
  answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'tie', 'both_bad')), "left" TEXT NOT NULL CHECK ("left" IN ('a', 'b')),
  ms INTEGER NOT NULL, created_at TEXT NOT NULL, revoked_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS standing ON votes (rater, item) WHERE revoked_at IS NULL;
"""


@dataclass(frozen=True)
class Vote:
    """A vote that stands."""

    key: str
    """Drawn by the page."""
    item: str
    """The question."""
    rater: str
    """Who answered."""
    answer: Answer
    """By side, as it was given."""
    left: Side
    """Which picture was on the left."""
    ms: int
    """From showing the pictures to the answer."""
    created_at: str
    """When it arrived, ISO 8601 with time zone."""


class VoteStore:
    """An open file of votes; may be used by several threads. Raises DataError for a file that is not one."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            # A vote that was acknowledged survives a power cut: write-ahead log, flushed at every commit.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(TABLES)
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be opened as a file of votes: {error}") from error

    def __enter__(self) -> VoteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._db.close()

    def number(self, rater: str) -> int:
        """A rater's number, from 0 in order of arrival; a new rater gets the next one."""
        with self._lock:
            self._db.execute(
                "INSERT INTO raters SELECT coalesce(max(number) + 1, 0), ? FROM raters "
                "WHERE NOT EXISTS (SELECT 1 FROM raters WHERE rater = ?) HAVING NOT EXISTS (SELECT 1 FROM raters WHERE rater = ?)",
                (rater, rater, rater),
            )
            return self._db.execute("SELECT number FROM raters WHERE rater = ?", (rater,)).fetchone()[0]

    def cast(self, vote: Vote) -> Outcome:
        """Store a vote: `known` if this very vote came before, `taken` if the rater has another standing one on the item."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                outcome = self._cast(vote)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return outcome

    def _cast(self, vote: Vote) -> Outcome:
        if self._db.execute("SELECT 1 FROM votes WHERE key = ?", (vote.key,)).fetchone():
            return "known"
        standing = "SELECT 1 FROM votes WHERE rater = ? AND item = ? AND revoked_at IS NULL"
        if self._db.execute(standing, (vote.rater, vote.item)).fetchone():
            return "taken"
        self._db.execute(
            'INSERT INTO votes (key, item, rater, answer, "left", ms, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)',
            (vote.key, vote.item, vote.rater, vote.answer, vote.left, vote.ms, vote.created_at),
        )
        return "stored"

    def revoke(self, rater: str, item: str) -> bool:
        """Take back a rater's standing vote on an item; whether there was one."""
        with self._lock:
            done = self._db.execute(
                "UPDATE votes SET revoked_at = ? WHERE rater = ? AND item = ? AND revoked_at IS NULL",
                (now(), rater, item),
            )
            return done.rowcount > 0

    def items_of(self, rater: str) -> list[str]:
        """Items that a rater has answered, in the order of the answers."""
        rows = self._rows("SELECT item FROM votes WHERE rater = ? AND revoked_at IS NULL ORDER BY place", (rater,))
        return [row[0] for row in rows]

    def counts(self) -> dict[str, int]:
        """Standing votes by item."""
        return dict(self._rows("SELECT item, count(*) FROM votes WHERE revoked_at IS NULL GROUP BY item"))

    def votes(self) -> list[Vote]:
        """Every standing vote, in the order in which they came."""
        columns = 'key, item, rater, answer, "left", ms, created_at'
        return [
            Vote(*row) for row in self._rows(f"SELECT {columns} FROM votes WHERE revoked_at IS NULL ORDER BY place")
        ]

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise DataError(f"{self.path}: cannot be read as a file of votes: {error}") from error


def now() -> str:
    """The time in UTC, as text."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")

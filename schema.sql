-- The database of wxgpt, as numbered migration steps: a new database runs them all, an
-- older one those above its PRAGMA user_version, each step in one transaction. A step
-- that has been released is never edited; a change is a new step at the end.
-- Times are Unix seconds.

-- step 1

CREATE TABLE session (
    id INTEGER PRIMARY KEY,
    openid TEXT NOT NULL,
    assistant TEXT NOT NULL,
    opened_at REAL NOT NULL,
    last_at REAL NOT NULL,      -- newest message or answer; the idle time counts from here
    ended_at REAL,              -- NULL: open, though it may have been idle for too long
    lapsed_text TEXT            -- newest text after it ran out, asked by 接着问
) STRICT;
CREATE UNIQUE INDEX session_open ON session (openid) WHERE ended_at IS NULL;
CREATE INDEX session_by_openid ON session (openid, id);
CREATE INDEX session_by_time ON session (opened_at);
CREATE TRIGGER session_opened BEFORE INSERT ON session BEGIN
    UPDATE session SET ended_at = NEW.opened_at
    WHERE openid = NEW.openid AND ended_at IS NULL;
END;

-- One question and its answer.
CREATE TABLE turn (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice: running tasks know it
    session_id INTEGER NOT NULL REFERENCES session ON DELETE CASCADE,
    openid TEXT NOT NULL,
    msg_key TEXT NOT NULL UNIQUE,           -- Message.key: a copy joins this turn
    link_key TEXT NOT NULL UNIQUE,          -- /a/KEY
    question TEXT NOT NULL,
    pictures TEXT,                          -- JSON list of URLs, NULL once answered
    answer TEXT NOT NULL DEFAULT '',        -- Markdown; text so far while state is open
    generation INTEGER NOT NULL DEFAULT 0,  -- which writing of the answer this text is
    state TEXT NOT NULL DEFAULT 'open',     -- open, done, cut, failed, broken, blocked, ended
    reason TEXT,                            -- why it failed: a kind of ChatError
    asked INTEGER NOT NULL DEFAULT 0,       -- times a process took it to the upstream
    replied INTEGER NOT NULL DEFAULT 0,     -- 1: a reply to its own message was decided
    unread INTEGER,                         -- part offered by an early reply, not seen yet
    delivered TEXT,                         -- '1' to '3': attempt; part, page: later; lost: its line was gone
    created_at REAL NOT NULL,
    finished_at REAL,
    model TEXT,
    tokens_in INTEGER,
    tokens_out INTEGER,
    seconds REAL,                           -- from accepting the question to the end
    first_seconds REAL,                     -- to the first visible text
    day TEXT,                               -- Beijing day that it counts on
    counted_as TEXT                         -- keyed hash of the openid, for quota
) STRICT;
CREATE INDEX turn_by_session ON turn (session_id, id);
CREATE INDEX turn_by_openid ON turn (openid, id);
CREATE INDEX turn_by_time ON turn (created_at);
CREATE INDEX turn_open ON turn (id) WHERE state = 'open';
CREATE INDEX turn_open_by_session ON turn (session_id) WHERE state = 'open';
CREATE INDEX turn_unread ON turn (openid, id) WHERE unread IS NOT NULL;

CREATE TRIGGER turn_asked AFTER INSERT ON turn BEGIN
    UPDATE session SET last_at = NEW.created_at, lapsed_text = NULL
    WHERE id = NEW.session_id;
END;
CREATE TRIGGER turn_counted AFTER INSERT ON turn WHEN NEW.day IS NOT NULL BEGIN
    INSERT INTO quota (day, who, questions) VALUES (NEW.day, NEW.counted_as, 1),
        (NEW.day, '', 1) ON CONFLICT DO UPDATE SET questions = questions + 1;
END;
CREATE TRIGGER turn_finished AFTER UPDATE OF finished_at ON turn BEGIN
    UPDATE session SET last_at = NEW.finished_at WHERE id = NEW.session_id;
END;

-- Questions of a Beijing day, of a subscriber or of all ('').
CREATE TABLE quota (
    day TEXT NOT NULL,
    who TEXT NOT NULL,
    questions INTEGER NOT NULL,
    PRIMARY KEY (day, who)
) STRICT, WITHOUT ROWID;

-- Pictures that wait for their question.
CREATE TABLE picture (
    id INTEGER PRIMARY KEY,
    openid TEXT NOT NULL,
    url TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT;
CREATE INDEX picture_by_openid ON picture (openid, id);
CREATE TRIGGER picture_kept AFTER INSERT ON picture BEGIN
    DELETE FROM picture WHERE openid = NEW.openid AND id NOT IN (
        SELECT id FROM picture WHERE openid = NEW.openid ORDER BY id DESC LIMIT 4);
END;
CREATE TRIGGER picture_asked AFTER INSERT ON turn WHEN NEW.pictures IS NOT NULL BEGIN
    DELETE FROM picture WHERE openid = NEW.openid;
END;

-- The parts of long answers, numbered for each subscriber: 继续N.
CREATE TABLE part (
    openid TEXT NOT NULL,
    number INTEGER NOT NULL,
    turn_id INTEGER NOT NULL REFERENCES turn ON DELETE CASCADE,
    start INTEGER NOT NULL,         -- offset, fixed when the part before was decided
    generation INTEGER NOT NULL,    -- the writing that start counts in
    stop INTEGER,                   -- NULL until it is sent
    reply TEXT,                     -- what was sent, so that a second tap brings the same
    offered_at REAL NOT NULL,
    PRIMARY KEY (openid, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX part_by_turn ON part (turn_id, number);

-- The decided reply of each message key, for copies that come later.
CREATE TABLE reply (
    key TEXT PRIMARY KEY,
    openid TEXT NOT NULL,
    content TEXT NOT NULL,
    created INTEGER NOT NULL,       -- CreateTime in the reply's XML
    turn_id INTEGER,                -- the question it answers, NULL for anything else
    delivered TEXT,                 -- attempt that took text of the answer, NULL: none did
    unread INTEGER                  -- part offered because the reply came early
) STRICT, WITHOUT ROWID;
CREATE INDEX reply_by_time ON reply (created);
CREATE INDEX reply_by_openid ON reply (openid);
CREATE TRIGGER turn_replied AFTER INSERT ON reply WHEN NEW.turn_id IS NOT NULL BEGIN
    UPDATE turn SET replied = 1, delivered = NEW.delivered, unread = NEW.unread
    WHERE id = NEW.turn_id;
END;

CREATE TABLE history_link (
    key TEXT PRIMARY KEY,
    openid TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX history_link_by_openid ON history_link (openid);
CREATE TRIGGER history_link_made BEFORE INSERT ON history_link BEGIN
    UPDATE history_link SET expires_at = min(expires_at, NEW.created_at)
    WHERE openid = NEW.openid;
END;

CREATE TABLE forget_request (
    openid TEXT PRIMARY KEY,
    asked_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- One row: what must outlive the process about the platform's clock.
CREATE TABLE platform (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    newest_push INTEGER NOT NULL,   -- newest timestamp of a signed push
    secret BLOB NOT NULL            -- keys the hashes in quota
) STRICT;
INSERT INTO platform (id, newest_push, secret) VALUES (1, 0, randomblob(32));

-- step 2

-- Parts are slices of the chat text, no longer of the Markdown, and offsets count in it;
-- only a crash writes an answer anew.

ALTER TABLE turn ADD COLUMN chat_chars INTEGER;     -- of an answer that did not end well
ALTER TABLE part ADD COLUMN is_anew INTEGER NOT NULL DEFAULT 0; -- 1: written again since
UPDATE part SET start = 0 WHERE reply IS NULL;      -- it counted in the Markdown
ALTER TABLE part DROP COLUMN generation;
ALTER TABLE turn DROP COLUMN generation;

-- step 3

-- An answer that is there but was not read is marked on the part that its early reply
-- offered, and how it was delivered is written once, when that is known.

ALTER TABLE part ADD COLUMN to_mention INTEGER NOT NULL DEFAULT 0; -- 1: to be named
UPDATE part SET to_mention = 1 WHERE EXISTS (
    SELECT 1 FROM turn WHERE turn.id = turn_id AND unread = number);
CREATE INDEX part_to_mention ON part (openid, number) WHERE to_mention = 1;
-- The tap that asks a failed question again was a part behind the answer's end.
DELETE FROM part WHERE reply IS NULL AND EXISTS (
    SELECT 1 FROM turn WHERE turn.id = turn_id AND state IN ('failed', 'broken')
    AND to_mention = 0 AND start > 0 AND start >= chat_chars);
CREATE TRIGGER part_sent AFTER UPDATE OF reply ON part BEGIN
    UPDATE turn SET replied = 1 WHERE id = NEW.turn_id;
    UPDATE part SET to_mention = 0 WHERE turn_id = NEW.turn_id AND to_mention = 1;
END;
CREATE TRIGGER part_made_and_sent AFTER INSERT ON part WHEN NEW.reply IS NOT NULL BEGIN
    UPDATE turn SET replied = 1 WHERE id = NEW.turn_id;
    UPDATE part SET to_mention = 0 WHERE turn_id = NEW.turn_id AND to_mention = 1;
END;
DROP TRIGGER turn_replied;
ALTER TABLE reply ADD COLUMN stop INTEGER NOT NULL DEFAULT 0;  -- where its text of the answer ends
UPDATE reply SET stop = 1 WHERE delivered IS NOT NULL;
ALTER TABLE reply DROP COLUMN delivered;
ALTER TABLE reply DROP COLUMN unread;
CREATE TRIGGER turn_replied AFTER INSERT ON reply WHEN NEW.turn_id IS NOT NULL BEGIN
    UPDATE turn SET replied = 1 WHERE id = NEW.turn_id;
END;
DROP INDEX turn_unread;
ALTER TABLE turn DROP COLUMN unread;
ALTER TABLE turn DROP COLUMN chat_chars;

-- A turn as the program reads it.
CREATE VIEW exchange AS
    SELECT turn.id, session_id, turn.openid, msg_key, link_key, question, pictures,
           created_at, asked, assistant, answer, state, reason, model
    FROM turn JOIN session ON session.id = session_id;

-- step 4

-- Calls to the upstream for a question: asked again and the fallback's included.
ALTER TABLE turn ADD COLUMN calls INTEGER;

-- step 5

-- Whether a push is fresh is known by the clock alone; the row keeps the secret.
ALTER TABLE platform DROP COLUMN newest_push;

-- step 6

-- What a subscriber was told once, and which answer they read.
CREATE TABLE subscriber (
    openid TEXT PRIMARY KEY,
    told_at REAL,           -- the privacy words were said, in the chat or on a page
    hinted_at REAL,         -- the newest hint outside a session
    shown_turn INTEGER      -- the answer shown last: 继续 goes on with it
) STRICT, WITHOUT ROWID;

ALTER TABLE part ADD COLUMN place INTEGER NOT NULL DEFAULT 0;  -- 2 of 5; 0: not known
-- In picture.url may be words, of an article or a place: they begin with a newline.
-- A session that ran out stays open until another one is opened or /stop is sent.
UPDATE session SET ended_at = NULL WHERE lapsed_text IS NOT NULL
    AND id = (SELECT max(id) FROM session AS newer WHERE newer.openid = session.openid);

-- step 7

-- Browsers that are signed in to their subscriber's own pages. The cookie itself is
-- nowhere but in the browser.
CREATE TABLE device (
    cookie_hash TEXT PRIMARY KEY,
    openid TEXT NOT NULL,
    expires_at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX device_by_openid ON device (openid);

-- step 8

-- Unfinished questions are found by the index with their sessions, too.
DROP INDEX turn_open;

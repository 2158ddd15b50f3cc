"""The schema, one step a version. A step that has been released is never edited; a change is a new step.

Ids of chunks are never used again (AUTOINCREMENT): caches outside the database key on them. A chunk has one or two
vectors, one for each view of it that was embedded: vector id = 2 × chunk id + view. Vectors stand in a table of their
own, so that reading texts does not page through them; the 48-byte sign codes of the coarse search in another, so that
reading all codes does not page through the vectors. Words are indexed from the chunks (FTS5 external content).
"""

M001_LIBRARY = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path TEXT NOT NULL UNIQUE,
    title TEXT NOT NULL,
    kind TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    recipe TEXT NOT NULL,
    chunks INTEGER NOT NULL,
    vectors INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    added_at REAL NOT NULL
) STRICT;

CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    document_id INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,
    heading TEXT NOT NULL,
    page INTEGER,
    start INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    text TEXT NOT NULL,
    UNIQUE (document_id, ordinal)
) STRICT;

CREATE TABLE vectors (id INTEGER PRIMARY KEY, embedding BLOB NOT NULL) STRICT;
CREATE TABLE codes (id INTEGER PRIMARY KEY, code BLOB NOT NULL) STRICT;
CREATE TRIGGER vectors_go_with_chunk AFTER DELETE ON chunks BEGIN
    DELETE FROM vectors WHERE id IN (2 * old.id, 2 * old.id + 1);
    DELETE FROM codes WHERE id IN (2 * old.id, 2 * old.id + 1);
END;

CREATE VIRTUAL TABLE words USING fts5 (
    heading, text, content = 'chunks', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
INSERT INTO words (words, rank) VALUES ('secure-delete', 1);
CREATE TRIGGER words_insert AFTER INSERT ON chunks BEGIN
    INSERT INTO words (rowid, heading, text) VALUES (new.id, new.heading, new.text);
END;
CREATE TRIGGER words_delete AFTER DELETE ON chunks BEGIN
    INSERT INTO words (words, rowid, heading, text) VALUES ('delete', old.id, old.heading, old.text);
END;
"""

M002_JOURNAL = """
CREATE TABLE questions (
    id TEXT PRIMARY KEY,
    asked_at REAL NOT NULL,
    question TEXT NOT NULL,
    search_query TEXT NOT NULL,
    answer TEXT NOT NULL,
    finish_reason TEXT NOT NULL,
    model TEXT NOT NULL,
    plan TEXT NOT NULL,
    citations TEXT NOT NULL,
    usage TEXT NOT NULL,
    timings TEXT NOT NULL
) STRICT;
CREATE INDEX questions_by_time ON questions (asked_at);

CREATE TABLE question_passages (
    question_id TEXT NOT NULL REFERENCES questions (id) ON DELETE CASCADE,
    rank INTEGER NOT NULL,
    chunk_id INTEGER NOT NULL,
    document_id INTEGER NOT NULL,
    score REAL NOT NULL,
    similarity REAL,
    PRIMARY KEY (question_id, rank)
) STRICT;
CREATE INDEX question_passages_by_document ON question_passages (document_id);

CREATE TABLE feedback (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    question_id TEXT NOT NULL REFERENCES questions (id) ON DELETE CASCADE,
    given_at REAL NOT NULL,
    score REAL NOT NULL,
    comment TEXT NOT NULL
) STRICT;
CREATE INDEX feedback_by_question ON feedback (question_id);

-- What was asked about a document is as private as the document: it goes when the document goes.
CREATE TRIGGER questions_go_with_document AFTER DELETE ON documents BEGIN
    DELETE FROM questions
    WHERE id IN (SELECT question_id FROM question_passages WHERE document_id = old.id);
END;
"""

M003_KV = """
-- One row for each KV file. `uses` and `priority` are the eviction policy's.
CREATE TABLE kv_files (
    key TEXT PRIMARY KEY CHECK (length(key) = 64 AND key NOT GLOB '*[^0-9a-f]*'),
    chunk_id INTEGER NOT NULL,
    generation TEXT NOT NULL,
    space TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    uses INTEGER NOT NULL,
    priority REAL NOT NULL
) STRICT;
CREATE INDEX kv_files_by_chunk ON kv_files (chunk_id);

-- Files to be unlinked. A row that goes leaves its key here in the same transaction: whatever happens before the file
-- is unlinked, it is not forgotten.
CREATE TABLE kv_removed (key TEXT PRIMARY KEY) STRICT;
CREATE TRIGGER kv_files_are_queued AFTER DELETE ON kv_files BEGIN
    INSERT INTO kv_removed VALUES (old.key) ON CONFLICT DO NOTHING;
END;
CREATE TRIGGER kv_files_go_with_chunk AFTER DELETE ON chunks BEGIN
    DELETE FROM kv_files WHERE chunk_id = old.id;
END;

CREATE TABLE kv_audits (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    question_id TEXT NOT NULL REFERENCES questions (id) ON DELETE CASCADE,
    audited_at REAL NOT NULL,
    model TEXT NOT NULL,
    link_tokens INTEGER NOT NULL,
    kl REAL NOT NULL,
    agreement REAL NOT NULL
) STRICT;
CREATE INDEX kv_audits_by_question ON kv_audits (question_id);
CREATE INDEX kv_audits_by_model ON kv_audits (model, link_tokens);

-- What was called prefill is now one of several ways to compute.
UPDATE questions SET plan = replace(plan, '"how":"prefill"', '"how":"recompute"');
"""

M004_REEMBEDDING = """
-- Vectors of another embedding model on their way into the library; empty when none are being computed.
CREATE TABLE new_vectors (
    id INTEGER PRIMARY KEY,
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE,
    embedding BLOB NOT NULL,
    code BLOB NOT NULL
) STRICT;
CREATE INDEX new_vectors_by_chunk ON new_vectors (chunk_id);
"""

M005_LEARNING = """
-- Clusters of passages that are asked for together. Members may be in several.
CREATE TABLE clusters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    weight REAL NOT NULL,
    created_at REAL NOT NULL,
    changed_at REAL NOT NULL,
    trained_at REAL,
    failure TEXT NOT NULL
) STRICT;
CREATE TABLE cluster_members (
    cluster_id INTEGER NOT NULL REFERENCES clusters (id) ON DELETE CASCADE,
    chunk_id INTEGER NOT NULL,
    PRIMARY KEY (cluster_id, chunk_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX cluster_members_by_chunk ON cluster_members (chunk_id);

-- Questions to learn from. tokens: int32 of the teacher's answer with its end; top_ids int32 and top_logprobs float16:
-- the 16 likeliest tokens at each of them; vector: float16 of the question. All little-endian, NULL until taught.
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL CHECK (kind IN ('logged', 'study')),
    question TEXT NOT NULL,
    question_id TEXT UNIQUE REFERENCES questions (id) ON DELETE CASCADE,
    made_at REAL NOT NULL,
    held_out INTEGER NOT NULL,
    model TEXT NOT NULL,
    refused INTEGER NOT NULL,
    answer TEXT,
    tokens BLOB,
    top_ids BLOB,
    top_logprobs BLOB,
    vector BLOB
) STRICT;
CREATE TABLE item_chunks (
    item_id INTEGER NOT NULL REFERENCES items (id) ON DELETE CASCADE,
    rank INTEGER NOT NULL,
    chunk_id INTEGER NOT NULL,
    PRIMARY KEY (item_id, rank)
) STRICT, WITHOUT ROWID;
CREATE INDEX item_chunks_by_chunk ON item_chunks (chunk_id);
-- How many study questions were asked for about a passage, so that none is asked for twice.
CREATE TABLE studied (chunk_id INTEGER NOT NULL, model TEXT NOT NULL, asked INTEGER NOT NULL,
    PRIMARY KEY (chunk_id, model)) STRICT, WITHOUT ROWID;

-- The registry. id: sha256 of the file `adapters/<id>.gguf`; recipe and gate are JSON.
CREATE TABLE adapters (
    id TEXT PRIMARY KEY CHECK (length(id) = 64 AND id NOT GLOB '*[^0-9a-f]*'),
    cluster_id INTEGER,
    bytes INTEGER NOT NULL,
    base TEXT NOT NULL,
    layout INTEGER NOT NULL,
    recipe TEXT NOT NULL,
    gate TEXT,
    state TEXT NOT NULL CHECK (state IN ('ready', 'disabled', 'failed')),
    reason TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    made_at REAL NOT NULL
) STRICT;
CREATE TABLE adapter_members (
    adapter_id TEXT NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    chunk_id INTEGER NOT NULL,
    PRIMARY KEY (adapter_id, chunk_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX adapter_members_by_chunk ON adapter_members (chunk_id);
-- The questions that it was trained on, and how it did where it was examined (NULL: it was not). vector: float16.
CREATE TABLE adapter_questions (
    adapter_id TEXT NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    question TEXT NOT NULL,
    vector BLOB NOT NULL,
    f1 REAL,
    PRIMARY KEY (adapter_id, question)
) STRICT, WITHOUT ROWID;

-- Files to be unlinked, as with kv_removed.
CREATE TABLE adapters_removed (id TEXT PRIMARY KEY) STRICT;
CREATE TRIGGER adapters_are_queued AFTER DELETE ON adapters BEGIN
    INSERT INTO adapters_removed VALUES (old.id) ON CONFLICT DO NOTHING;
END;

-- What was learned from a passage goes when the passage goes: it can be read out of the weights.
CREATE TRIGGER learning_goes_with_chunk AFTER DELETE ON chunks BEGIN
    DELETE FROM adapters WHERE id IN (SELECT adapter_id FROM adapter_members WHERE chunk_id = old.id);
    DELETE FROM items WHERE id IN (SELECT item_id FROM item_chunks WHERE chunk_id = old.id);
    DELETE FROM studied WHERE chunk_id = old.id;
    UPDATE clusters SET changed_at = unixepoch('subsec'), trained_at = NULL, failure = ''
    WHERE id IN (SELECT cluster_id FROM cluster_members WHERE chunk_id = old.id);
    DELETE FROM cluster_members WHERE chunk_id = old.id;
    DELETE FROM clusters WHERE id NOT IN (SELECT cluster_id FROM cluster_members);
END;
"""

M006_ROUTING = """
-- How a question was routed: its arms with their contexts (float64, little-endian), so that the journal alone can make
-- the router's state anew. space: what the contexts were made with; adapter '' is plain retrieval. wait, here, away:
-- seconds of waiting as it was, with the adapter resident, and when it must be loaded first.
CREATE TABLE routes (
    question_id TEXT PRIMARY KEY REFERENCES questions (id) ON DELETE CASCADE,
    clock INTEGER NOT NULL,
    space TEXT NOT NULL,
    chosen TEXT NOT NULL,
    explored INTEGER NOT NULL
) STRICT;
CREATE INDEX routes_by_clock ON routes (clock, question_id);
CREATE TABLE route_arms (
    question_id TEXT NOT NULL REFERENCES routes (question_id) ON DELETE CASCADE,
    adapter TEXT NOT NULL,
    context BLOB NOT NULL,
    mean REAL NOT NULL,
    width REAL NOT NULL,
    wait REAL NOT NULL,
    here REAL NOT NULL,
    away REAL NOT NULL,
    probability REAL NOT NULL,
    resident INTEGER NOT NULL,
    PRIMARY KEY (question_id, adapter)
) STRICT, WITHOUT ROWID;

-- What answers were worth. One of each source for a question and an arm counts; when it is given again, the last.
CREATE TABLE rewards (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    question_id TEXT NOT NULL REFERENCES routes (question_id) ON DELETE CASCADE,
    adapter TEXT NOT NULL,
    clock INTEGER NOT NULL,
    given_at REAL NOT NULL,
    score REAL NOT NULL,
    weight REAL NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('feedback', 'review', 'trial'))
) STRICT;
CREATE INDEX rewards_by_question ON rewards (question_id);

-- When an arm began (rewards given until then): its exam is learned from at that moment. last_reward: id of the last
-- reward before that; those until then no longer count.
CREATE TABLE arms (
    adapter TEXT PRIMARY KEY REFERENCES adapters (id) ON DELETE CASCADE,
    clock INTEGER NOT NULL,
    last_reward INTEGER NOT NULL
) STRICT;

-- Exams ask held-out questions too; what they said of those is learned from as well.
ALTER TABLE adapter_questions ADD COLUMN held_out INTEGER NOT NULL DEFAULT 0;
"""

MIGRATIONS: tuple[str, ...] = (M001_LIBRARY, M002_JOURNAL, M003_KV, M004_REEMBEDDING, M005_LEARNING, M006_ROUTING)

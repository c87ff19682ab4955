"""Tables of the ledger, and how older ones become them."""

from typing import Final

_PAST: Final = (
    # Steps that a return has undone: older generations still hold them.
    """CREATE TABLE undone (
        job_id TEXT NOT NULL,
        step_index INTEGER NOT NULL,
        sample_id TEXT NOT NULL,
        version INTEGER PRIMARY KEY,
        loss REAL NOT NULL)""",
    # The weights of `version` are those of `after`.
    "CREATE TABLE returns (version INTEGER PRIMARY KEY, after INTEGER NOT NULL)",
    # All that is left of a sample that must never be learned again.
    "CREATE TABLE forgotten (id TEXT PRIMARY KEY, job_id TEXT NOT NULL, created REAL NOT NULL)",
    """CREATE VIEW made AS
        SELECT job_id, step_index, sample_id, version, loss FROM steps
        UNION ALL SELECT job_id, step_index, sample_id, version, loss FROM undone""",
)
SCHEMA: Final = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        created REAL NOT NULL,
        state TEXT NOT NULL,
        config TEXT NOT NULL,
        num_samples INTEGER NOT NULL,
        epochs INTEGER NOT NULL,
        version_before INTEGER,
        version_after INTEGER,
        error TEXT,
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        furthest_step INTEGER NOT NULL DEFAULT 0,
        num_ends INTEGER NOT NULL DEFAULT 0,
        round_id TEXT,
        has_passed INTEGER NOT NULL DEFAULT 0,
        again_until INTEGER,
        again_as TEXT,
        trace TEXT)""",
    """CREATE TABLE samples (
        id TEXT PRIMARY KEY,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        position INTEGER NOT NULL,
        source TEXT,
        weight REAL NOT NULL,
        context_ids TEXT NOT NULL,
        continuation_ids TEXT NOT NULL,
        content_hash TEXT NOT NULL,
        created REAL NOT NULL,
        state TEXT NOT NULL,
        rejected_ids TEXT NOT NULL DEFAULT '[]',
        teacher_context_ids TEXT NOT NULL DEFAULT '[]',
        UNIQUE (job_id, position))""",
    # UNIQUE: a version names one state of the weights, so it is the result of one step.
    """CREATE TABLE steps (
        job_id TEXT NOT NULL REFERENCES jobs (id),
        step_index INTEGER NOT NULL,
        sample_id TEXT NOT NULL REFERENCES samples (id),
        version INTEGER NOT NULL UNIQUE,
        loss REAL NOT NULL,
        seconds REAL NOT NULL,
        PRIMARY KEY (job_id, step_index)) WITHOUT ROWID""",
    "CREATE TABLE cell (key TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    *_PAST,
    "CREATE INDEX jobs_by_state ON jobs (state)",
    "CREATE INDEX samples_by_state ON samples (state)",
    "INSERT INTO cell VALUES ('version_high_water', 0)",
    "INSERT INTO cell VALUES ('undone_until', 0)",
)

MIGRATIONS: Final = {
    1: (
        "ALTER TABLE samples ADD COLUMN rejected_ids TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE samples ADD COLUMN teacher_context_ids TEXT NOT NULL DEFAULT '[]'",
    ),
    2: (
        "ALTER TABLE jobs ADD COLUMN furthest_step INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN num_ends INTEGER NOT NULL DEFAULT 0",
    ),
    3: ("INSERT INTO cell VALUES ('undone_until', 0)",),
    4: (
        "ALTER TABLE jobs ADD COLUMN round_id TEXT",
        "ALTER TABLE jobs ADD COLUMN has_passed INTEGER NOT NULL DEFAULT 0",
    ),
    5: (
        "ALTER TABLE jobs ADD COLUMN again_until INTEGER",
        "ALTER TABLE jobs ADD COLUMN again_as TEXT",
        *_PAST,
    ),
    6: ("ALTER TABLE jobs ADD COLUMN trace TEXT",),
}
"""What makes a ledger of an older format one of the next."""

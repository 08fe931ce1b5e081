"""The tables of the label store, their version, and the way from an older version to this one."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

VERSION = 2

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),  # person | simulated | imported
    sa.Column("name", sa.String, nullable=False),
    sa.Column("role", sa.String, nullable=False, default="annotator"),  # annotator | lead
    sa.Column("password", sa.String),  # scrypt; only people have one
    sa.Column("active", sa.Boolean, nullable=False, default=True),
    sa.Column("session", sa.Integer, nullable=False, default=0),  # raised to end all logins
    sa.Column("created", sa.Float, nullable=False),
    sa.UniqueConstraint("kind", "name"),
    sqlite_autoincrement=True,  # the id of a forgotten person is never given to another
)
login_failures = sa.Table(
    "login_failures",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("last", sa.Float, nullable=False),
)
queues = sa.Table(
    "queues",
    metadata,
    # the rank step of one round, or a standing queue: EXTRA, WRITE
    sa.Column("step", sa.String, primary_key=True),
    sa.Column("by", sa.String, nullable=False),  # people | simulated
    sa.Column("overlap", sa.Integer, nullable=False),
    sa.Column("minimum", sa.Integer),
    sa.Column("lease_minutes", sa.Integer, nullable=False),
    sa.Column("open", sa.Boolean, nullable=False),  # closed once its rankings are exported
    # nobody is handed anything, nothing can be changed; what comes in still is kept as late
    sa.Column("frozen", sa.Boolean, nullable=False, default=False, server_default=sa.false()),
    # share of the prompts handed out that are known answers, and the annotator's own from before
    sa.Column("gold_rate", sa.Float, nullable=False, default=0.0, server_default="0"),
    sa.Column("repeat_rate", sa.Float, nullable=False, default=0.0, server_default="0"),
)
tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.String, primary_key=True),  # see `task_id`
    # rank | write (no responses: a person writes one) | gold (the order is known) | repeat (a
    # person's own task again, for them alone) | judge (answers of models that are evaluated)
    sa.Column("kind", sa.String, nullable=False, default="rank", server_default="rank"),
    sa.Column("step", sa.String),  # the queue it waits in; null for imported, gold and repeat
    sa.Column("round", sa.Integer, nullable=False),
    # samples digest, `import`, `hand`, `chat` or `evaluation`
    sa.Column("origin", sa.String, nullable=False),
    sa.Column("active", sa.Boolean, nullable=False),  # false: the samples have changed since
    sa.Column("split", sa.String, nullable=False),  # of the prompt: train | validation | test
    sa.Column("prompt_id", sa.String, nullable=False),
    sa.Column("messages", sa.Text, nullable=False),
    sa.Column("responses", sa.Text, nullable=False),  # texts, in the order of their ids
    sa.Column("gold", sa.Text),  # ranks by place in `responses`, of a gold task
    sa.Column("for_user", sa.Integer),  # of a repeat
    sa.Column("repeat_of", sa.String),  # of a repeat: the task that was ranked before
    # by place in `responses`, a list of the models that wrote it; never shown to annotators
    sa.Column("models", sa.Text),
    # what the import noticed, for the lead: a list of sentences
    sa.Column("warnings", sa.Text),
    # which to label first, and how probable it was that this prompt was chosen at all
    sa.Column("priority", sa.Float, nullable=False, default=0.0, server_default="0"),
    sa.Column("selection_probability", sa.Float),
    # a fixed random place in the queue: ordering by it needs an index, not a sort
    sa.Column("lot", sa.Integer, nullable=False, default=0, server_default="0"),
    # places that people have filled for good (ranked or found unrankable, not late): kept here, so
    # that the next task is found by an index however many rankings there are
    sa.Column("filled", sa.Integer, nullable=False, default=0, server_default="0"),
)
assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("token", sa.String, nullable=False, unique=True),
    sa.Column("display_order", sa.Text, nullable=False),  # shown place -> place in task.responses
    # leased | ranked | late (ranked, but others had filled the prompt) | skipped (by me, others
    # may do it) | unrankable (nobody can: it fills a place)
    sa.Column("state", sa.String, nullable=False),
    sa.Column("leased", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("draft", sa.Text),  # a Form, by shown place; older drafts are lists of ranks
    sa.Column("draft_revision", sa.Integer, nullable=False, default=0),
    sa.Column("reopened", sa.Float),  # when its owner took it up again to change it
    sa.UniqueConstraint("task_id", "user_id"),
)
rankings = sa.Table(
    "rankings",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("assignment_id", sa.ForeignKey("assignments.id"), nullable=False),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("status", sa.String, nullable=False),  # ranked | skipped | all_bad | written
    sa.Column("ranks", sa.Text),  # by place in task.responses; 1 is best, equal numbers are ties
    sa.Column("reason", sa.String),  # of a skip
    sa.Column("late", sa.Boolean, nullable=False, default=False),
    sa.Column("source", sa.String, nullable=False),  # app | simulated | import:<layout>
    sa.Column("by_hand", sa.Boolean, nullable=False, default=False),  # `prefline labels import`
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("superseded_by", sa.String),
    # what else the person said; marks are by place in task.responses
    sa.Column("all_bad", sa.Boolean, nullable=False, default=False, server_default=sa.false()),
    sa.Column("marks", sa.Text),  # [{"score": 1..7 or null, "flags": [..]}, ..]
    sa.Column("comment", sa.Text),
    sa.Column("confidence", sa.Integer),  # 1..3
    sa.Column("ideal", sa.Text),  # the answer this person would have given
    sa.Column("active_seconds", sa.Float),  # with the page in front and the hands moving
    sa.Column("guidelines", sa.Integer),  # the version that was in force
    sa.Column("submission", sa.String),  # made by the browser: the same one again is a replay
    sa.UniqueConstraint("assignment_id", "revision"),
)
guidelines = sa.Table(
    "guidelines",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("user_id", sa.Integer),
    sa.Column("created", sa.Float, nullable=False),
)
# no foreign key and no name: an event outlives the person it speaks of
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("user_id", sa.Integer),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("task_id", sa.String),
    sa.Column("detail", sa.Text, nullable=False),
)

_QUEUE_INDEX = sa.Index(
    "ix_tasks_queue",
    *(tasks.c.step, tasks.c.kind, tasks.c.active),
    *(tasks.c.filled.desc(), tasks.c.priority.desc(), tasks.c.lot),
)
_LEASE_INDEX = sa.Index("ix_assignments_lease", assignments.c.state, assignments.c.expires)
# a person's own work, of which there may be very much: what they have begun, their last answers
_OWN_INDEX = sa.Index(
    "ix_assignments_own", assignments.c.user_id, assignments.c.state, assignments.c.leased
)
_REOPENED_INDEX = sa.Index("ix_assignments_reopened", assignments.c.user_id, assignments.c.reopened)
_RECENT_INDEX = sa.Index("ix_rankings_recent", rankings.c.user_id, rankings.c.created)
# an export goes through the prompts in the order of their ids, and must not sort all texts for it
_PROMPT_INDEX = sa.Index("ix_tasks_prompt", tasks.c.prompt_id, tasks.c.id)
_INDEXES = (_PROMPT_INDEX, _QUEUE_INDEX, _LEASE_INDEX, _OWN_INDEX, _REOPENED_INDEX, _RECENT_INDEX)

_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER IF NOT EXISTS events_no_update BEFORE UPDATE ON events"
        " BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
        "CREATE TRIGGER IF NOT EXISTS events_no_delete BEFORE DELETE ON events"
        " BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
    ),
    "postgresql": (
        # version 1 had rules, which drop a change without a word
        "DROP RULE IF EXISTS events_no_update ON events",
        "DROP RULE IF EXISTS events_no_delete ON events",
        "CREATE OR REPLACE FUNCTION events_append_only() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE integrity_constraint_violation USING MESSAGE ="
        " 'events are append-only'; END $$",
        "DROP TRIGGER IF EXISTS events_append_only ON events",
        "CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events"
        " FOR EACH STATEMENT EXECUTE FUNCTION events_append_only()",
    ),
}


def create(tx: Connection) -> None:
    """All tables of the current version, where they are not there yet."""
    metadata.create_all(tx)
    for statement in _APPEND_ONLY[tx.dialect.name]:
        tx.exec_driver_sql(statement)


def migrate(tx: Connection, version: int) -> None:
    """From `version` to VERSION, forward only, in one transaction of the caller.

    Versions only ever add: tables, columns that may be empty or have a default, and indexes.
    """
    there = sa.inspect(tx)
    old = {name: {c["name"] for c in there.get_columns(name)} for name in there.get_table_names()}
    for table in metadata.sorted_tables:
        for column in table.columns:
            if table.name in old and column.name not in old[table.name]:
                words = sa.schema.CreateColumn(column).compile(dialect=tx.dialect)
                tx.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {words}")
    create(tx)
    for index in _INDEXES:
        index.create(tx, checkfirst=True)
    if version < 2:
        _fill_version_2(tx)
    tx.execute(sa.update(meta).where(meta.c.key == "schema").values(value=str(VERSION)))


def lot(task: str) -> int:
    """A place in the queue that nobody chose: the first 28 bits of the task's id, which is a hash."""
    return int(task[:7], 16)


def _fill_version_2(tx: Connection) -> None:
    count_filled(tx)
    rows = [
        {"task": task, "place": lot(task)} for task in tx.execute(sa.select(tasks.c.id)).scalars()
    ]
    if rows:
        update = sa.update(tasks).where(tasks.c.id == sa.bindparam("task"))
        tx.execute(update.values(lot=sa.bindparam("place")), rows)


def count_filled(tx: Connection, *where: sa.ColumnElement[bool]) -> None:
    """Count `tasks.filled` again, for all tasks or those that fit `where`."""
    filled = (
        sa.select(sa.func.count())
        .select_from(assignments.join(users))
        .where(assignments.c.task_id == tasks.c.id, users.c.kind == "person")
        .where(assignments.c.state.in_(("ranked", "unrankable")))
        .scalar_subquery()
    )
    tx.execute(sa.update(tasks).where(*where).values(filled=filled))

"""The tables. A change of them is a new file in `migrations/versions/` too.

Texts from requests and models may hold any character. Columns of such texts are JSON, in which
every character is escaped: PostgreSQL's text takes no NUL, and SQLite's no lone surrogate.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(256), nullable=False),  # whose job it is; "": nobody in particular
    Column("base", String(256), nullable=False),  # what a server needs to run it; "": nobody does
    Column("created", String(32), nullable=False),  # UTC, ISO 8601 in one length: it sorts
    Column("status", String(16), nullable=False),
    Column("request", JSON, nullable=False),  # as its client sees it
    Column("spec", JSON, nullable=False),  # from which a server runs it
    Column("num_done", Integer, nullable=False),
    Column("num_items", Integer, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("result", Text),  # JSON, as it is sent
    Column("ended", Double),  # by `now_s`
    Column("num_attempts", Integer, nullable=False),  # claims since the last finished item
    Column("lease", String(64)),  # names the server that runs it, and its claim
    Column("leased_until", Double),  # by `now_s`
    Column("settings", JSON, nullable=False, server_default="{}"),  # of the request, for lists
    Index("jobs_by_owner", "owner", "created"),
    Index("jobs_by_status", "status", "created"),
)

outcomes = Table(
    "outcomes",  # of the items of jobs that have not ended
    metadata,
    Column("job", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("outcome", JSON, nullable=False),
)

question_sets = Table(
    "question_sets",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(256), nullable=False),  # "": everyone may ask it
    Column("name", String(64), nullable=False),
    Column("digest", String(80), nullable=False),  # "" while it arrives
    Column("num_items", Integer, nullable=False),
    Column("is_complete", Boolean, nullable=False),  # only then anyone sees it
    Column("arriving_until", Double),  # by `now_s`; afterwards its sender has gone
    Index("question_sets_by_name", "owner", "name"),
)

questions = Table(
    "questions",
    metadata,
    Column(
        "question_set",
        String(32),
        ForeignKey("question_sets.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("position", Integer, primary_key=True),
    Column("question", JSON, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    # SQLite counts rows by themselves only in a column of this type.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("time", String(32), nullable=False),  # UTC, ISO 8601 in one length: it sorts
    Column("who", String(256), nullable=False),  # name of the key
    Column("tenant", String(256), nullable=False),  # "": the key has none
    Column("what", String(64), nullable=False),  # the act, as a verb
    Column("object", JSON(none_as_null=True)),  # the name as it was sent
    Column("version", Text),
    Column("digest", String(80)),
    Column("result", String(64), nullable=False),  # "done", or the code of an error
    Column("reason", JSON(none_as_null=True)),  # the error in words
    Column("request_id", String(64)),
    Index("audit_by_time", "time"),
)

usage = Table(
    "usage",  # sums; a server adds what it has counted since it last did
    metadata,
    Column("day", String(10), primary_key=True),  # UTC, ISO 8601: it sorts
    Column("key", String(256), primary_key=True),  # its name; "": none was asked for
    Column("task", String(64), primary_key=True),  # "": the base model
    Column("task_digest", String(80), primary_key=True),  # "": the base model
    Column("crma", Boolean, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
)

usage_writers = Table(
    "usage_writers",  # so that a server whose commit got no answer does not add twice
    metadata,
    Column("server", String(32), primary_key=True),
    Column("num_writes", BigInteger, nullable=False),
    Column("day", String(10), nullable=False),  # of its last write
)

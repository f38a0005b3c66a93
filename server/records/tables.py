"""The tables. A change of them is a new file in `migrations/versions/` too.

Texts from requests and models may hold any character. Columns of such texts are JSON, in which
every character is escaped: PostgreSQL's text takes no NUL, and SQLite's no lone surrogate.
"""

from sqlalchemy import (
    JSON,
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

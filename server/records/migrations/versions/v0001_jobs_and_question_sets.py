"""Jobs with the outcomes of their items, and question sets with their questions."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    _jobs()
    _question_sets()


def _jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("base", sa.String(256), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("num_done", sa.Integer, nullable=False),
        sa.Column("num_items", sa.Integer, nullable=False),
        sa.Column("error", sa.JSON),
        sa.Column("result", sa.Text),
        sa.Column("ended", sa.Double),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("lease", sa.String(64)),
        sa.Column("leased_until", sa.Double),
    )
    op.create_index("jobs_by_owner", "jobs", ["owner", "created"])
    op.create_index("jobs_by_status", "jobs", ["status", "created"])
    op.create_table(
        "outcomes",
        sa.Column("job", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE")),
        sa.Column("position", sa.Integer),
        sa.Column("outcome", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("job", "position"),
    )


def _question_sets() -> None:
    op.create_table(
        "question_sets",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(256), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("num_items", sa.Integer, nullable=False),
        sa.Column("is_complete", sa.Boolean, nullable=False),
        sa.Column("arriving_until", sa.Double),
    )
    op.create_index("question_sets_by_name", "question_sets", ["owner", "name"])
    op.create_table(
        "questions",
        sa.Column(
            "question_set", sa.String(32), sa.ForeignKey("question_sets.id", ondelete="CASCADE")
        ),
        sa.Column("position", sa.Integer),
        sa.Column("question", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("question_set", "position"),
    )

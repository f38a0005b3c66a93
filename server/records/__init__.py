"""Records: background jobs and uploaded question sets, in SQLite or PostgreSQL.

This room knows tables and transactions. It knows no HTTP, no engine, and not what a job computes.
"""

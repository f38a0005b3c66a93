"""Records: background jobs, question sets, acts of administrators, and usage: SQLite or PostgreSQL.

This room knows tables and transactions. It knows no HTTP, no engine, and not what a job computes.
"""

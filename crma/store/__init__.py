"""The adapter store: publishing, verifying and choosing adapters, in files that never change."""

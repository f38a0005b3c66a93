"""Task data: built-in domains made from pinned sources, and the user's own JSON Lines."""

"""Models: loaded, checked, adapted, and sharded over ranks."""

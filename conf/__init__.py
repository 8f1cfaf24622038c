"""Settings: the typed schema, and the YAML groups that say what differs from it."""

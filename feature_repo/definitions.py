"""Entities, views, services and sources for the `feast` command. What they are is said once, in `recsys.features.definitions`; nothing is computed here."""
from recsys.features.store import objects

globals().update(objects())

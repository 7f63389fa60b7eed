"""Captioned pictures: procedural scenes, where a user's own come from, and the cache of what was encoded once."""

"""Shards -> samples -> batches.  Imports nothing of ours."""

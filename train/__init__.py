"""Batches -> named losses -> steps.  Imports `data.batch` and `model`."""

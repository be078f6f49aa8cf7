"""Tensors in, tensors out.  Imports `data.batch` and nothing else of ours."""

"""Talking to a trained model: one session for terminal, web page and REST."""

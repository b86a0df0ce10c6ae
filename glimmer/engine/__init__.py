"""Requests in, tokens out. engine.py:step is the whole story; start there."""

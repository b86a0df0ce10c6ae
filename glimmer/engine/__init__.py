"""Requests in, tokens out. Engine.step in engine.py is one step from beginning to end; start there."""

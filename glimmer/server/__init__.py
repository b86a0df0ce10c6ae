"""`glimmer serve`: the HTTP process, the engine process, and what goes between them. See docs/serving.md."""

"""Text to token ids and back, chat messages to prompts. Imports no torch, no engine and no model."""

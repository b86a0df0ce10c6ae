"""The scribe's room: text to token ids and back, messages to prompts. It knows no tensor, no engine and no model."""

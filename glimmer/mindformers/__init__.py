"""What users of MindSpore Transformers (MindFormers) find again: its keys, and its launcher."""

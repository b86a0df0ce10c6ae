"""EngineLoad: how much an engine has to do, and has done. Not here: who counts (llm.py), and who is told (server/)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has to do: answers that are computed and that wait, and blocks of the cache; and sums since it
    began: preemptions, steps in which drafts of an answer were checked, these drafts, and those that were accepted,
    also by their place. tokens_per_step: that a step brings to an answer; draft_gain: how much faster drafts make the
    engine just now, as far as is known. disk_...: what has come of kv_cache_dir (engine/disk_cache.py:DiskStats)."""

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    preemptions: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_by_place: tuple[int, ...]
    tokens_per_step: float
    draft_gain: float
    disk_hit_tokens: int
    disk_read_bytes: int
    disk_written_bytes: int
    disk_stored_bytes: int
    disk_damaged_files: int
    disk_dropped_pages: int

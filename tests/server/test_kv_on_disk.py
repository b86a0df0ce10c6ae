"""The KV cache on disk behind the server: what a request finds there, and what another's salt keeps from it."""

import pytest

from glimmer import LLM, SamplingParams
from glimmer.cli.demo import default_model
from tests.servers import Server

IDS = list(range(300, 700))


@pytest.mark.slow
def test_salts_keep_prefixes_apart_on_disk(tmp_path):
    """Written offline with a salt, read by a server for requests with the same one only, and by nobody else."""
    settings = dict(max_model_len=1024, max_num_seqs=16, threads=1, kv_cache_memory_bytes=64 << 20)
    odd = "\ud800"  # no text, but a salt like any other
    with LLM(str(default_model("a test")), kv_cache_dir=tmp_path, **settings) as llm:
        asked = [{"prompt_token_ids": IDS, "cache_salt": salt} for salt in ("mine", odd)]
        for _ in range(2):
            outputs = llm.generate(asked, SamplingParams(max_tokens=1))
        assert [output.num_cached_tokens for output in outputs] == [384, 384]
        others = [{"prompt_token_ids": IDS}, {"prompt_token_ids": IDS, "cache_salt": "yours"}]
        for output in llm.generate(others, SamplingParams(max_tokens=1)):
            assert output.num_cached_tokens == 0
    with Server("--kv-cache-dir", str(tmp_path)) as server:
        cached = {}
        for salt in ("mine and more", "mine", "m", ""):
            body = {"prompt": [*IDS, 5], "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
            answer = server.post("/v1/completions", body | {"model": "any"}).json()
            cached[salt] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == {"mine and more": 0, "mine": 384, "m": 0, "": 384}, "what had no salt was written too"

"""Engine: requests in, tokens out, any number at once. `step` is the whole story of one step.

All ranks of a group run the same engine on the same requests; they decide alike, and rank 0's tokens count.
Token ids only: text, stop strings and prompts as strings live upstairs (llm.py).
"""

from dataclasses import replace
from typing import Any

from glimmer.config import EngineConfig
from glimmer.engine.blocks import Blocks
from glimmer.engine.sampler import Sampler
from glimmer.engine.scheduler import Scheduler
from glimmer.engine.sequence import Output, Request, SamplerOutput, Sequence
from glimmer.errors import RequestError
from glimmer.parallel import Group


class Engine:
    """runner: what computes a step (engine/runner.py, or a scripted one in tests): batch(step), forward(batch), room.
    vocab_size: ids that a prompt may hold; sampling_vocab_size: ids that may be sampled, from 0 on."""

    def __init__(self, config: EngineConfig, runner: Any, group: Group, vocab_size: int, sampling_vocab_size: int):
        self.runner, self.group, self.vocab_size = runner, group, vocab_size
        self.max_model_len = runner.kv_cache_config.max_model_len
        blocks = Blocks(runner.kv_cache_config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(blocks, config.max_num_batched_tokens, config.max_num_seqs)
        self.sampler = Sampler(sampling_vocab_size)

    @property
    def busy(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def check(self, request: Request) -> None:
        """RequestError, with the field's name, if this engine cannot serve the request."""
        length, params = len(request.prompt_token_ids), request.params
        if length == 0:
            raise RequestError("prompt", "an empty prompt", "at least one token", "give the model a text to continue")
        if length >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"a prompt of {length} tokens",
                f"at most {self.max_model_len - 1}: the context of {self.max_model_len} tokens holds prompt and answer",
                "shorten the prompt, or raise max_model_len if model and memory allow it",
            )
        for field, ids in (
            ("prompt", request.prompt_token_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            limit = self.sampler.sampling_vocab_size if field == "logit_bias" else self.vocab_size
            if ids and not 0 <= min(ids) <= max(ids) < limit:
                found = f"token id {min(ids) if min(ids) < 0 else max(ids)} in {field}"
                raise RequestError(field, found, f"ids from 0 to {limit - 1}", "remove that id")

    def add(self, request: Request) -> None:
        """Queue a request; RequestError as `check`."""
        self.check(request)
        limit = self.max_model_len
        if request.params.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + request.params.max_tokens)
        self.scheduler.add(Sequence(request, limit))

    def abort(self, request_id: str) -> bool:
        """Forget a request, whatever its state; False if it is not here any more. Nothing is said about it again."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Advance every running sequence by one step; return what became known."""
        step = self.scheduler.schedule()  # who computes which tokens
        if not step.chunks:
            return []
        batch = self.runner.batch(step)  # the same, as tensors
        logits = self.runner.forward(batch)  # the model
        outputs = self.sampler.sample(logits, step)  # one new token for each sequence that is up to date
        return self.scheduler.update(step, self._agree(outputs))  # blocks, stops, outputs

    def _agree(self, outputs: list[SamplerOutput]) -> list[SamplerOutput]:
        """Rank 0's tokens are everybody's, should the last bit of a float differ somewhere."""
        if self.group.size == 1:
            return outputs
        agreed = self.group.broadcast([(c.token, c.problem) for c in outputs])
        return [replace(c, token=token, problem=problem) for c, (token, problem) in zip(outputs, agreed)]

"""A user's script, run by torchrun in test_parallel.py: answers some prompts and writes what this rank got as JSON.

usage: answer.py MODEL OUT [die RANK]
"""

import json
import os
import signal
import sys

from glimmer import LLM, SamplingParams
from glimmer.errors import GlimmerError

model, out, *die = sys.argv[1:]
size = int(os.environ.get("WORLD_SIZE", "1"))
try:
    llm = LLM(model, dtype="float32", tensor_parallel_size=size, max_model_len=256, max_num_batched_tokens=24)
    if die and llm.rank == int(die[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    prompts = ["hello", "请介绍一下北京", {"prompt_token_ids": list(range(3, 60))}]
    outs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1))
    outs += llm.generate("draw", SamplingParams(temperature=1, top_p=0.9, max_tokens=16, ignore_eos=True))
except GlimmerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
found = [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].finish_reason) for o in outs]
logprobs = [[p[t].logprob for p, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)] for o in outs[:3]]
with open(f"{out}.{llm.rank}", "w") as file:
    json.dump({"found": found, "logprobs": logprobs}, file)
llm.close()

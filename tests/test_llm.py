"""LLM from the outside: every form of prompt, every way to end an answer; all at once, in pieces, side by side."""

import asyncio
import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from glimmer import LLM, SamplingParams, config
from glimmer import device as devices
from glimmer.config import EngineConfig
from glimmer.engine import loop
from glimmer.errors import CheckpointError, ConfigError, EngineError, RequestError, shown

EOS, USER = 256, 263  # <|endoftext|>, <|user|>
LETTERS = {i: 40.0 for i in range(ord("a"), ord("z") + 1)}  # answers of letters, that text can be compared


def greedy(max_tokens: int = 12, **params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **params})


def spelt(max_tokens: int = 12, **params) -> SamplingParams:
    return greedy(max_tokens, **{"logit_bias": LETTERS, **params})


@pytest.fixture(scope="module")
def llm(checkpoint, engine) -> LLM:
    return engine(checkpoint())


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm):
    """After every test, whatever it aborted: no request, no answer, every block free, no thread for long."""
    yield
    if (thread := llm._loop._thread) is not None:
        thread.join(10)
    assert not llm._engine.busy and llm._loop.idle and not llm._loop._answers and llm._loop._thread is None
    assert llm._engine.scheduler.blocks.free == llm._engine.scheduler.blocks.count


def answer(llm: LLM, prompt, params: SamplingParams) -> list[int]:
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def test_more_threads_than_the_machine_has(llm, checkpoint, engine, caplog):
    """As many as there are compute, and a warning says so."""
    many = engine(checkpoint(), threads=1000)
    assert many._runner.backend.threads == devices.available_cpus()
    assert answer(many, "good day", greedy()) == answer(llm, "good day", greedy())
    assert "threads=1000, but this process may use" in caplog.text


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_forms_of_a_prompt(llm):
    ids = llm.tokenizer.encode("good day", add_special_tokens=True)
    given = {"prompt": "x", "prompt_token_ids": tuple(ids)}
    forms = ["good day", {"prompt": "good day"}, {"prompt_token_ids": ids}, given]
    together = llm.generate(forms, greedy())
    assert [o.prompt for o in together] == ["good day", "good day", None, "x"]
    for form, output in zip(forms, together):
        assert output.prompt_token_ids == ids and output.error is None and output.prompt_logprobs is None
        assert [o.index for o in output.outputs] == [0]
        assert output.outputs[0].token_ids == together[0].outputs[0].token_ids == answer(llm, form, greedy())
    assert llm.generate([]) == [] and llm.generate([], []) == []


def test_a_cache_of_codes_changes_little_and_nothing_else(checkpoint, engine, llm):
    """Log-probabilities move by the codes' rounding; chunks and prefixes found in the cache give the same answer."""
    codes = engine(checkpoint(), kv_cache_dtype="int8")
    ids = [5 + 11 * i % 200 for i in range(100)]
    asked = lambda llm: llm.generate({"prompt_token_ids": ids}, greedy(24, logprobs=1, prompt_logprobs=1))[0]
    plain, coded = asked(llm), asked(codes)
    found = [[place[token].logprob for token, place in zip(ids[1:], o.prompt_logprobs[1:])] for o in (plain, coded)]
    off = statistics.median(abs(a - b) for a, b in zip(*found))  # where a token chooses another expert, it is more
    assert 0 < off < 0.1
    first = answer(codes, {"prompt_token_ids": ids}, greedy(24))
    assert first == coded.outputs[0].token_ids == answer(codes, {"prompt_token_ids": ids}, greedy(24))
    assert answer(engine(checkpoint(), kv_cache_dtype="int8", max_num_batched_tokens=7), {"prompt_token_ids": ids},
                  greedy(24)) == first  # fmt: skip


def test_text_is_what_the_ids_decode_to(llm):
    for prompt in ("a", "日本語", "def f(x):\n    return x"):
        output = llm.generate(prompt, greedy(40))[0].outputs[0]
        assert output.text == llm.tokenizer.decode(output.token_ids)
        output = llm.generate(prompt, greedy(40, skip_special_tokens=False))[0].outputs[0]
        assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=False)


def test_special_tokens_in_an_answer(llm):
    params = dict(logit_bias={USER: 100.0}, max_tokens=2, ignore_eos=True)
    assert llm.generate("x", greedy(**params))[0].outputs[0].text == ""
    assert llm.generate("x", greedy(**params, skip_special_tokens=False))[0].outputs[0].text == "<|user|>" * 2


@pytest.mark.parametrize(
    "prompts, params, field",
    [
        (5, None, "prompt"),
        (None, None, "prompt"),
        (b"bytes", None, "prompt"),
        ([[1, 2], [b"x"]], None, "prompt_token_ids"),
        ([1, "x"], None, "prompt"),
        ([b"x"], None, "prompt"),
        ("x", {"temperature": 0}, "sampling_params"),
        ("x", 5, "sampling_params"),
        ("x", "greedy", "sampling_params"),
        (["x"], [{"temperature": 0}], "sampling_params"),
        ("x", [None], "sampling_params"),
    ],
    ids=str,
)
def test_wrong_types_are_refused_in_three_parts(prompts, params, field, llm):
    with pytest.raises(RequestError) as error:
        llm.generate(prompts, params)
    assert error.value.field == field and error.value.found and error.value.expected and error.value.todo


@pytest.mark.parametrize(
    "messages", [5, None, "hi", b"hi", {}, [], [5], ["hi"], [[]], [[5]], {"role": "user"}], ids=str
)
def test_wrong_types_of_messages(messages, llm):
    with pytest.raises(RequestError) as error:
        llm.chat(messages)
    assert error.value.field.startswith("messages") and error.value.expected and error.value.todo


def test_token_ids_without_a_dictionary_are_a_prompt(llm):
    """As in vLLM: a list of ids is one prompt, a list of such lists several."""
    of = lambda prompts: [output.outputs[0].token_ids for output in llm.generate(prompts, greedy(4))]
    expected = of([{"prompt_token_ids": [72, 105]}, {"prompt_token_ids": [72]}])
    assert of([[72, 105], (72,)]) == expected and of([72, 105]) == expected[:1]
    assert [piece.token_ids for piece in llm.stream([72], greedy(1))] == [tuple(expected[1][:1])]


def test_parameters_are_assigned_to_as_in_scripts_of_vllm(llm):
    """A call takes a copy: what is assigned later changes nothing; what cannot be served is refused by the call."""
    params = llm.get_default_sampling_params()
    params.temperature, params.min_tokens, params.max_tokens, params.stop = 0, 20, 24, "never"
    pieces = llm.stream("x", params)
    first = next(pieces)
    params.max_tokens = 1
    answered = [id for piece in (first, *pieces) for id in piece.token_ids]
    assert answered == llm.generate("x", greedy(24, min_tokens=20))[0].outputs[0].token_ids
    with pytest.raises(RequestError) as error:
        llm.generate("x", params)
    assert error.value.field == "min_tokens" and "max_tokens=1" in error.value.found
    params.min_tokens, params.temperature = 0, "hot"
    with pytest.raises(RequestError, match="temperature='hot'"):
        llm.chat([{"role": "user", "content": "Hi"}], params)
    with pytest.raises(AttributeError, match="max_token"):
        params.max_token = 5


def test_parameters_of_a_call(llm):
    """What vLLM's generate and chat take is accepted where it changes nothing."""
    assert llm.generate("x", greedy(2), lora_request=None, priority=None)[0].error is None
    hello = [{"role": "user", "content": "Hi"}]
    assert llm.chat(hello, greedy(2), chat_template_content_format="auto")[0].error is None
    for name, value, word in (("lora_request", 5, "cannot honour"), ("use_tdqm", True, "did you mean 'use_tqdm'")):
        for call in (lambda **more: llm.generate("x", **more), lambda **more: llm.chat(hello, **more)):
            with pytest.raises(RequestError, match=word) as error:
                call(**{name: value})
            assert error.value.field == name


def test_a_bar(llm, capsys):
    llm.generate(["a", "b"], greedy(2))
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], greedy(2), use_tqdm=True)
    assert "2/2" in capsys.readouterr().err
    made = []

    class Bar:
        def __init__(self, **named):
            made.append(named)

        def update(self, count):
            made.append(count)

        def close(self):
            made.append("closed")

    llm.chat([{"role": "user", "content": "Hi"}], greedy(2), use_tqdm=Bar)
    assert made[0]["total"] == 1 and made[1:] == [1, "closed"]


def test_what_an_output_says_of_itself(llm):
    before = time.time()
    first, second = (llm.generate("q" * 100, greedy(3, logprobs=1))[0] for _ in range(2))
    assert first.request_id != second.request_id and first.finished and first.outputs[0].finished()
    assert second.num_cached_tokens == 96 and first.num_cached_tokens in (0, 96)
    metrics = second.metrics
    assert before <= metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time <= time.time()
    answer = first.outputs[0]
    chosen = [place[id].logprob for id, place in zip(answer.token_ids, answer.logprobs)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    assert llm.generate("x", greedy(2))[0].outputs[0].cumulative_logprob is None


def test_allowed_and_bad_words(llm):
    letters = greedy(20, allowed_token_ids=[97, 98, 99])
    text = llm.generate("x", letters)[0].outputs[0].text
    assert len(text) == 20 and set(text) <= set("abc")
    for word in {text[0], text[:3], text[5:7], "zzz"}:
        other = llm.generate("x", dataclasses.replace(letters, bad_words=[word]))[0].outputs[0].text
        assert word not in other and (other == text) == (word not in text)
    with pytest.raises(RequestError) as error:
        llm.generate("x", greedy(allowed_token_ids=[292]))
    assert error.value.field == "allowed_token_ids"
    none = llm.generate(["x", "y"], [greedy(allowed_token_ids=[97], bad_words=["a"]), greedy(3)])
    assert "no token may come" in none[0].error.found and none[1].error is None


def test_tokens_only(llm):
    output = llm.generate("x", spelt(5, detokenize=False, logprobs=1))[0].outputs[0]
    assert output.text == "" and output.token_ids == answer(llm, "x", spelt(5))
    assert output.logprobs[0][output.token_ids[0]].decoded_token is None


def test_truncated_prompts(llm):
    ids = [5 + i % 200 for i in range(600)]
    for keep, left in ((3, ids[-3:]), (-1, ids[-511:])):
        output = llm.generate({"prompt_token_ids": ids}, greedy(1, truncate_prompt_tokens=keep))[0]
        assert output.prompt_token_ids == left
    text = llm.generate("x" * 20_000 + "yz", greedy(1, truncate_prompt_tokens=2))[0]
    assert text.prompt_token_ids == [ord("y"), ord("z")]


def test_log_probabilities_of_the_whole_vocabulary_are_counted(llm):
    output = llm.generate("xy", greedy(1, logprobs=-1, prompt_logprobs=-1))[0]
    assert len(output.outputs[0].logprobs[0]) == len(output.prompt_logprobs[1]) == 320
    with pytest.raises(RequestError, match="log-probabilities") as error:
        llm.generate("x", greedy(None, n=4096, logprobs=-1))
    assert error.value.field == "logprobs"


@pytest.mark.parametrize(
    "prompt, field",
    [
        ({"prompt": 5, "prompt_token_ids": [1]}, "prompt"),
        ({"prompt_token_ids": [10**5000]}, "prompt"),
        ({"prompt_token_ids": [1], "multi_modal_data": {}}, "prompt"),
        ({"prompt_token_ids": [1], "cache_salt": 5}, "cache_salt"),
        (" " * 12_000_000, "prompt"),
        ("x" * 2**25, "prompt"),
        ("", "prompt"),
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        (5.5, "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        (b"bytes", "prompt"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt"),
        ({"prompt_token_ids": [320]}, "prompt"),
        ({"prompt_token_ids": [1] * 512}, "prompt"),
        ("\ud83d", "text"),
    ],
    ids=lambda value: str(shown(value))[:40],
)
def test_prompts_that_are_refused(prompt, field, llm):
    for refuse in (lambda: llm.generate([prompt], greedy()), lambda: llm.stream(prompt, greedy())):
        with pytest.raises(RequestError) as error:
            refuse()
        assert error.value.field == field and error.value.found and error.value.expected and error.value.todo


def test_ids_beyond_the_vocabulary_in_parameters(llm):
    for params, field in ((dict(logit_bias={292: 1}), "logit_bias"), (dict(stop_token_ids=[320]), "stop_token_ids")):
        with pytest.raises(RequestError) as error:
            llm.generate("x", greedy(**params))
        assert error.value.field == field
    assert llm.generate("x", greedy(logit_bias={291: -5}, stop_token_ids=[319]))[0].error is None


def test_one_refused_prompt_refuses_all_before_anything_is_computed(llm):
    finished = []
    with pytest.raises(RequestError, match="prompt 1: an empty prompt"):
        llm.generate(["fine", "", "fine"], greedy(), on_finish=lambda i, o: finished.append(i))
    assert finished == []


def test_errors_return(llm):
    finished = {}
    prompts = ["fine", "", {"prompt_token_ids": [999]}, "fine too"]
    outputs = llm.generate(prompts, greedy(), errors="return", on_finish=finished.__setitem__)
    assert [o.error is None for o in outputs] == [True, False, False, True]
    assert isinstance(outputs[1].error, RequestError) and "empty prompt" in str(outputs[1].error)
    assert "token id 999" in str(outputs[2].error) and outputs[2].outputs == []
    assert (outputs[1].prompt, outputs[2].prompt) == ("", None)
    assert outputs[3].outputs[0].token_ids == answer(llm, "fine too", greedy())
    assert finished == dict(enumerate(outputs))
    with pytest.raises(ConfigError, match="errors='ignore'"):
        llm.generate("x", errors="ignore")


def test_parameters_for_all_or_for_each(llm):
    outputs = llm.generate(["a", "a", "b"], [greedy(1), greedy(3), greedy(2)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 3, 2]
    with pytest.raises(RequestError, match="2 sampling_params for 1 prompts"):
        llm.generate("a", [greedy(), greedy()])


def test_defaults_come_from_the_checkpoint(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(), tmp_path / "copy")
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.7, "top_p": 0.95}))
    llm = LLM(str(directory), max_model_len=64, max_num_seqs=2)
    assert llm.default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.95)
    assert llm.eos_token_ids == (EOS, USER, 265) and llm.max_model_len == 64
    assert (llm.rank, llm.size) == (0, 1) and llm.peak_memory() > 1 << 20
    assert len(llm.generate("a")[0].outputs[0].token_ids) <= 16
    llm.close()


def test_parameters_are_the_engine_s_fields_and_defaults():
    parameters = dict(inspect.signature(LLM).parameters)
    for name in ("on_load", "group", "unknown"):
        del parameters[name]
    hints = inspect.get_annotations(LLM.__init__)
    for field in dataclasses.fields(EngineConfig):
        parameter = parameters.pop(field.name)
        missing = field.default is dataclasses.MISSING
        assert parameter.default == (inspect.Parameter.empty if missing else field.default), field.name
        assert hints[field.name] == field.type, field.name
    assert not parameters


def test_parameters_of_vllm(checkpoint, caplog):
    """Those that change nothing are accepted and named once; others are refused in three parts."""
    llm = LLM(
        str(checkpoint()),
        max_model_len=64,
        max_num_seqs=2,
        dtype=torch.bfloat16,
        tokenizer=str(checkpoint()),
        tokenizer_mode="auto",
        trust_remote_code=True,
        enforce_eager=True,
        disable_log_stats=True,
        swap_space=4,
        cpu_offload_gb=0,
        pipeline_parallel_size=1,
        speculative_config=None,
        hf_overrides={},
        revision=None,
        download_dir="/tmp",
        seed=None,
        block_size=None,
        enable_prefix_caching=None,
        worker_cls="auto",
        use_v2_block_manager=True,
    )
    said = [record.message for record in caplog.records if "change nothing here" in record.message]
    assert len(said) == 1 and "trust_remote_code" in said[0] and "own code is never run" in said[0]
    assert llm.config.dtype == "bfloat16"
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("good day")) == "good day"
    assert llm.get_default_sampling_params() == llm.default_sampling_params()
    assert (llm.config.seed, llm.config.block_size, llm.config.enable_prefix_caching) == (0, 16, True)
    with pytest.raises(RequestError, match=r"prompt_token_ids=\[\[5\]\], which generate cannot honour"):
        llm.generate(prompt_token_ids=[[5]], sampling_params=greedy(1))
    with pytest.raises(RequestError, match="prompts of type NoneType"):
        llm.generate()
    for name in ("beam_search", "embed", "llm_engine"):
        assert not hasattr(llm, name)
        with pytest.raises(ConfigError, match=f"LLM has no {name}") as error:
            getattr(llm, name)
        assert error.value.todo
    with pytest.raises(AttributeError, match="no attribute 'colour'") as other:
        getattr(llm, "col" + "our")
    assert not isinstance(other.value, ConfigError)
    llm.shutdown()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")


@pytest.mark.parametrize(
    "name, value",
    [
        ("pipeline_parallel_size", 2),
        ("cpu_offload_gb", 10),
        ("speculative_config", {"method": "eagle3"}),
        ("hf_overrides", {"rope_theta": 1}),
        ("tokenizer", "/elsewhere"),
        ("tokenizer_mode", "mistral"),
        ("revision", "abc"),
        ("load_format", "gguf"),
        ("dtype", "half"),
        ("dtype", torch.float16),
        ("enable_lora", True),
        ("dtype", 5),
        ("dtype", 10**5000),
        ("device", 5),
        ("backend", 10**5000),
        ("group_size", 10**5000),
        ("quantization", [10**5000]),
        ("enable_prefix_caching", 10**5000),
        ("max_model_len", 10**400),
        ("seed", 10**5000),
    ],
    ids=lambda value: shown(value)[:40],
)
def test_parameters_of_vllm_that_would_change_answers_are_refused(name, value, checkpoint):
    with pytest.raises(ConfigError) as error:
        LLM(str(checkpoint()), **{name: value})
    assert error.value.found.startswith(name) and error.value.expected and error.value.todo


@pytest.mark.parametrize("model", [None, 5, 10**5000, ["a"]], ids=shown)
def test_a_model_is_a_path(model):
    with pytest.raises(ConfigError, match="model="):
        LLM(model)


def test_an_unknown_parameter_is_refused_with_a_near_name():
    for name, near in (("max_model_length", "did you mean 'max_model_len'?"), ("colour", "leave colour out")):
        with pytest.raises(ConfigError, match=f"no parameter '{name}'") as error:
            LLM("/nowhere", **{name: 5})
        assert error.value.todo == near and "max_num_seqs" in error.value.expected


def test_a_closed_llm_says_so(checkpoint):
    with LLM(str(checkpoint()), max_model_len=64, max_num_seqs=2) as llm:
        assert answer(llm, "x", greedy(3))
        half_read = llm.stream("x", greedy(50))
        next(half_read)
    with pytest.raises(EngineError, match="closed"):
        list(half_read)
    for ask in (lambda: llm.generate("x"), lambda: list(llm.stream("x")), lambda: asyncio.run(collect(llm, "x", None))):
        with pytest.raises(EngineError, match="closed"):
            ask()
    llm.close()


# ---- chat ----------------------------------------------------------------------------------------------------------


def test_chat(llm):
    hello, more = (
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        ],
    )
    single, (first, second) = llm.chat(hello, greedy()), llm.chat([hello, more], greedy())
    assert single[0].prompt == first.prompt == llm.chat_template.render(hello)
    assert second.prompt == llm.chat_template.render(more)
    assert first.prompt_token_ids[:2] == [llm.tokenizer.token_to_id(t) for t in ("[gMASK]", "<sop>")]
    assert first.prompt_token_ids.count(USER) == 1 and second.prompt_token_ids.count(USER) == 2
    assert single[0].outputs[0].token_ids == first.outputs[0].token_ids
    assert answer(llm, {"prompt_token_ids": second.prompt_token_ids}, greedy()) == second.outputs[0].token_ids


def test_chat_with_tools_and_without_thinking(llm):
    hello = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    output = llm.chat(hello, greedy(), tools=tools, chat_template_kwargs={"enable_thinking": False})[0]
    assert '"name": "weather"' in output.prompt and "/nothink" in output.prompt
    assert output.prompt == llm.chat_template.render(hello, tools=tools, enable_thinking=False)
    assert llm.chat(hello, greedy())[0].prompt != output.prompt


def test_chat_refuses_what_generate_would(llm):
    with pytest.raises(RequestError) as error:
        llm.chat([{"role": "nobody", "content": "x"}])
    assert error.value.field == "messages[0].role"
    with pytest.raises(RequestError) as error:
        llm.chat([{"role": "user", "content": "x" * 600}])
    assert error.value.field == "prompt" and "at most 511" in error.value.expected


def test_chat_reports_a_conversation_that_cannot_be_rendered_in_its_place(llm):
    fine, odd = [{"role": "user", "content": "Hi"}], [{"role": "nobody", "content": "x"}]
    long, finished = [{"role": "user", "content": "x" * 600}], {}
    outputs = llm.chat([fine, odd, long, fine], greedy(), errors="return", on_finish=finished.__setitem__)
    assert [o.error is None for o in outputs] == [True, False, False, True] and finished == dict(enumerate(outputs))
    assert (outputs[1].error.field, outputs[2].error.field) == ("messages[0].role", "prompt")
    assert outputs[0].outputs[0].token_ids == outputs[3].outputs[0].token_ids != []
    with pytest.raises(RequestError, match="conversation 1: ") as error:
        llm.chat([fine, odd], greedy())
    assert error.value.field == "messages[0].role"


def test_an_answer_in_a_conversation_is_as_long_as_the_context(llm):
    hello = [{"role": "user", "content": "Hi"}]
    output = llm.chat(hello)[0]
    answer = output.outputs[0]
    ended = answer.finish_reason == "stop" or len(answer.token_ids) == 512 - len(output.prompt_token_ids)
    assert ended and len(answer.token_ids) != 16
    assert len(llm.generate("x")[0].outputs[0].token_ids) <= 16


def test_stream_chat(llm):
    hello = [{"role": "user", "content": "Hi"}]
    whole = llm.chat(hello, spelt(9), chat_template_kwargs={"enable_thinking": False})[0].outputs[0]
    pieces = llm.stream_chat(hello, spelt(9), chat_template_kwargs={"enable_thinking": False})
    assert joined(pieces) == (whole.text, whole.token_ids, whole.finish_reason)
    with pytest.raises(RequestError, match="no parameter 'temperature'"):
        llm.stream_chat(hello, temperature=0)

    async def read() -> list:
        return [
            piece async for piece in llm.astream_chat(hello, spelt(9), chat_template_kwargs={"enable_thinking": False})
        ]

    assert joined(asyncio.run(read())) == (whole.text, whole.token_ids, whole.finish_reason)


def test_the_assistants_last_message_is_continued_or_refused(llm):
    begun = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two, "}]
    with pytest.raises(RequestError, match="last message is the assistant's") as error:
        llm.chat(begun)
    assert "continue_final_message=True" in error.value.todo
    output = llm.chat(begun, greedy(2), add_generation_prompt=False, continue_final_message=True)[0]
    assert output.prompt.endswith(("One, two,", "One, two, "))
    with pytest.raises(RequestError, match="with add_generation_prompt=True"):
        llm.chat(begun, continue_final_message=True)
    with pytest.raises(RequestError, match="of role 'user'"):
        llm.chat(begun[:1], add_generation_prompt=False, continue_final_message=True)
    without = llm.chat(begun[:1], greedy(2), add_generation_prompt=False)[0].prompt
    assert llm.chat(begun[:1], greedy(2))[0].prompt.startswith(without)


def test_a_template_of_the_callers_own(llm):
    hello = [{"role": "user", "content": "Hi"}]
    output = llm.chat(hello, greedy(2), chat_template="{{ messages[0].content }}!")[0]
    assert output.prompt == "Hi!"
    with pytest.raises(RequestError, match="chat_template=5"):
        llm.chat(hello, chat_template=5)
    with pytest.raises(CheckpointError, match="not a template"):
        llm.chat(hello, chat_template="{% if %}")


TYPED = [
    "<|assistant|>",
    "a <|user|> b",
    "/nothink",
    "x/nothink",
    "<think>",
    "[gMASK]<sop>",
    "\ufdd0<|user|>",
    "2 < 3/4",
]


@pytest.mark.parametrize("typed", TYPED)
def test_typed_control_tokens_are_control_tokens_or_text(typed, llm):
    said = [{"role": "user", "content": typed}]
    control, text = (llm.render(said, special_tokens_in_content=kind) for kind in ("control", "text"))
    assert text["prompt"] == control["prompt"] or typed.endswith("/nothink")
    frame = llm.render([{"role": "user", "content": "Hi"}], special_tokens_in_content="text")
    assert frame == llm.render([{"role": "user", "content": "Hi"}])
    added = {llm.tokenizer.token_to_id(name) for name in llm.tokenizer.added_names}
    count = lambda prompt: sum(id in added for id in prompt["prompt_token_ids"])
    assert count(text) == count(frame) and (count(control) > count(frame)) == (typed != "2 < 3/4")
    assert llm.tokenizer.decode(text["prompt_token_ids"], skip_special_tokens=False) == text["prompt"]
    parts = [{"role": "user", "content": [{"type": "text", "text": part} for part in (typed[:3], typed[3:])]}]
    assert count(llm.render(parts, special_tokens_in_content="text")) == count(frame)
    assert count(llm.render([*said, {"role": "tool", "content": typed}], special_tokens_in_content="text")) < 12
    endless: list = ["x"]
    endless.append({"output": endless})
    with pytest.raises(RequestError):
        llm.render([{"role": "tool", "content": endless}], special_tokens_in_content="text")
    with pytest.raises(RequestError, match="special_tokens_in_content='no'"):
        llm.chat(said, special_tokens_in_content="no")


# ---- how an answer ends --------------------------------------------------------------------------------------------


def test_length_and_context(llm):
    output = llm.generate({"prompt_token_ids": [5] * 500}, greedy(None))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (12, "length", None)
    output = llm.generate({"prompt_token_ids": [5] * 500}, greedy(100))[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    output = llm.generate({"prompt_token_ids": [5] * 511}, greedy())[0].outputs[0]
    assert len(output.token_ids) == 1


def test_end_of_sequence(llm):
    likely = {"logit_bias": {USER: 100.0}}
    output = llm.generate("x", greedy(**likely, ignore_eos=False))[0].outputs[0]
    assert (output.token_ids, output.text, output.finish_reason, output.stop_reason) == ([USER], "", "stop", None)
    output = llm.generate("x", greedy(5, **likely))[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == ([USER] * 5, "length")


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_not_looked_for_before_min_tokens(include, llm):
    """A stop string whose last character comes after min_tokens ends the answer, though it begins before."""
    whole = llm.generate("x", greedy(40, logit_bias={97: 40.0, 98: 39.0}, repetition_penalty=1.2))[0].outputs[0].text
    stop = whole[2:4]
    for minimum in (0, 3, 4, 5, 10, 20):
        params = greedy(
            40,
            logit_bias={97: 40.0, 98: 39.0},
            repetition_penalty=1.2,
            stop=stop,
            min_tokens=minimum,
            include_stop_str_in_output=include,
        )
        ends = [i + 2 for i in range(len(whole) - 1) if whole[i : i + 2] == stop and i + 2 > minimum]
        expected = whole if not ends else whole[: ends[0] if include else ends[0] - 2]
        output = llm.generate("x", params)[0].outputs[0]
        assert output.text == expected and output.finish_reason == ("stop" if ends else "length")
        assert len(output.token_ids) == (ends[0] if ends else 40)
        assert joined(llm.stream("x", params)) == (output.text, output.token_ids, output.finish_reason)


@pytest.mark.parametrize("temperature", [0, 1])
def test_min_tokens(temperature, llm):
    params = dict(logit_bias={USER: 100.0, 100: 90.0}, ignore_eos=False, min_tokens=4, temperature=temperature)
    output = llm.generate("x", greedy(**params))[0].outputs[0]
    assert output.token_ids == [100] * 4 + [USER] and output.text == "dddd"
    output = llm.generate("x", greedy(**params | {"stop_token_ids": [100]}))[0].outputs[0]
    assert 100 not in output.token_ids[:4] and USER not in output.token_ids[:4]  # neither eos nor stop ids come before
    assert output.token_ids[4:] == [USER]


def test_stop_token_ids(llm):
    whole = llm.generate("x", spelt())[0].outputs[0]
    third = whole.token_ids[2]
    end = whole.token_ids.index(third) + 1
    output = llm.generate("x", spelt(stop_token_ids=[third, 300]))[0].outputs[0]
    assert output.token_ids == whole.token_ids[:end] and output.text == whole.text[: end - 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", third)
    output = llm.generate("x", spelt(stop_token_ids=[third], include_stop_str_in_output=True))[0].outputs[0]
    assert output.text == whole.text[:end]


def test_stop_strings(llm):
    whole = llm.generate("x", spelt(30))[0].outputs[0]
    assert whole.text.isalpha() and len(whole.text) == 30
    for a, b in ((0, 1), (3, 5), (10, 14), (25, 30)):
        stop = whole.text[a:b]
        end = whole.text.index(stop) + len(stop)
        output = llm.generate("x", spelt(30, stop=["?!", stop]))[0].outputs[0]
        assert output.text == whole.text[: end - len(stop)] and output.token_ids == whole.token_ids[:end]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        output = llm.generate("x", spelt(30, stop=stop, include_stop_str_in_output=True))[0].outputs[0]
        assert output.text == whole.text[:end]


def test_a_stop_string_ends_one_of_many(llm):
    whole = llm.generate("x", spelt(30))[0].outputs[0]
    stopped, other = llm.generate(["x", "x"], [spelt(30, stop=whole.text[5:7]), spelt(30)])
    assert other.outputs[0] == whole and len(stopped.outputs[0].token_ids) == whole.text.index(whole.text[5:7]) + 2


def test_logit_bias_forbids_and_forces(llm):
    output = llm.generate("x", greedy(logit_bias={7: 1e6}))[0].outputs[0]
    assert output.token_ids == [7] * 12
    usual = answer(llm, "x", greedy())
    assert usual[0] not in answer(llm, "x", greedy(logit_bias={usual[0]: -1e6}))


# ---- several answers, and chance -----------------------------------------------------------------------------------


CHANCE = dict(temperature=1.0, max_tokens=10, ignore_eos=True)


def test_n_answers(llm):
    output = llm.generate("x", SamplingParams(n=4, seed=1, **CHANCE))[0]
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4
    assert output.outputs[0].token_ids == answer(llm, "x", SamplingParams(seed=1, **CHANCE))
    same = llm.generate("x", greedy(n=3))[0]
    assert len({tuple(o.token_ids) for o in same.outputs}) == 1


def test_n_answers_with_log_probabilities_of_one_prompt(llm):
    output = llm.generate("xyz", greedy(3, n=2, logprobs=0, prompt_logprobs=0))[0]
    assert len(output.prompt_logprobs) == 3 and all(len(o.logprobs) == 3 for o in output.outputs)


def test_a_seed_decides_whatever_runs_beside(llm, checkpoint, engine):
    params = SamplingParams(seed=7, top_p=0.9, **CHANCE)
    alone = answer(llm, "once upon", params)
    for place in (0, 4, 9):
        prompts = [f"neighbour {i}" for i in range(10)]
        each = [SamplingParams(seed=i, **CHANCE | {"max_tokens": 3 + i}) for i in range(10)]
        prompts[place], each[place] = "once upon", params
        assert llm.generate(prompts, each)[place].outputs[0].token_ids == alone
    assert answer(engine(checkpoint(), max_num_batched_tokens=5), "once upon", params) == alone
    assert answer(llm, "once upon", SamplingParams(seed=8, top_p=0.9, **CHANCE)) != alone


def test_without_a_seed_the_engine_s_decides(checkpoint):
    """Runs repeat each other, requests of one run do not."""
    runs = []
    for seed in (0, 0, 1):
        llm = LLM(str(checkpoint()), seed=seed, max_model_len=64, max_num_seqs=4, dtype="float32")
        runs.append([o.outputs[0].token_ids for o in llm.generate(["x", "x"], SamplingParams(**CHANCE))])
    assert runs[0] == runs[1] != runs[2] and runs[0][0] != runs[0][1]


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs(llm):
    output = llm.generate("x", SamplingParams(logprobs=2, seed=3, **CHANCE))[0].outputs[0]
    assert len(output.logprobs) == len(output.token_ids) == 10
    for id, found in zip(output.token_ids, output.logprobs):
        assert id in found and len(found) in (2, 3) and {1, 2} <= {f.rank for f in found.values()}
        assert all(f.logprob <= 0 for f in found.values())
        for i, f in found.items():
            assert f.decoded_token == (llm.tokenizer.decode([i], False) if i < 292 else "")
        ranked = sorted(found.values(), key=lambda f: f.rank)
        assert ranked == sorted(found.values(), key=lambda f: -f.logprob)
    assert any(found[id].rank > 2 for id, found in zip(output.token_ids, output.logprobs)), "chance chose the likeliest"


def test_logprobs_are_of_the_raw_logits(llm):
    """Biases and penalties change what is chosen, not what is reported."""
    biased = llm.generate("x", greedy(1, logit_bias={7: 1e6}, logprobs=1))[0].outputs[0].logprobs[0]
    plain = llm.generate("x", greedy(1, logprobs=320))[0].outputs[0].logprobs[0]
    assert biased[7].logprob == pytest.approx(plain[7].logprob) and biased[7].rank == plain[7].rank > 1
    assert sum(math.exp(f.logprob) for f in plain.values()) == pytest.approx(1, abs=1e-4)


def test_prompt_logprobs(llm):
    output = llm.generate("some words", greedy(3, prompt_logprobs=1))[0]
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 10
    for id, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]):
        assert id in found and {f.rank for f in found.values()} == {1, found[id].rank}
    assert llm.generate("s", greedy(1, prompt_logprobs=1))[0].prompt_logprobs == [None]


@pytest.mark.parametrize("settings", [{}, dict(max_num_batched_tokens=7), dict(block_size=2, max_num_batched_tokens=3)])
def test_prompt_logprobs_do_not_depend_on_chunks_or_earlier_requests(settings, llm, checkpoint, engine):
    prompt = "a somewhat longer prompt, that is cut into pieces" * 4
    expected = llm.generate(prompt, greedy(2, prompt_logprobs=2))[0].prompt_logprobs
    other = engine(checkpoint(), **settings)
    other.generate(prompt, greedy())  # its blocks are known now
    found = other.generate([prompt, "short"], greedy(2, prompt_logprobs=2))[0].prompt_logprobs
    assert len(found) == len(expected) == len(prompt)
    for a, b in zip(found[1:], expected[1:]):
        assert {i: f.logprob for i, f in a.items()} == pytest.approx({i: f.logprob for i, f in b.items()}, abs=1e-4)


# ---- the padding of the vocabulary ---------------------------------------------------------------------------------


def test_padding_is_never_sampled(checkpoint, tmp_path):
    """The model wants nothing but rows 292 to 319, which no token stands for."""
    directory = shutil.copytree(checkpoint(index=False), tmp_path / "copy")
    tensors = load_file(directory / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[292:] = torch.cat([head[:14], -head[:14]]) * 5  # one of each pair is large, whatever the hidden state
    save_file(tensors, directory / "model.safetensors")
    llm = LLM(str(directory), dtype="float32", max_model_len=128, max_num_seqs=16)
    prompt = {"prompt_token_ids": list(range(64))}
    wanted = llm.generate(prompt, greedy(1, prompt_logprobs=1))[0].prompt_logprobs[1:]
    likeliest = [id for found in wanted for id, f in found.items() if f.rank == 1]
    assert min(likeliest) >= 292, "the head was meant to want padding only"
    for params in (
        dict(temperature=0),
        {},
        dict(temperature=50.0),
        dict(top_k=3),
        dict(top_p=0.5),
        dict(min_p=0.5),
        dict(min_tokens=20),
        dict(repetition_penalty=1.5),
        dict(logit_bias={3: 1.0}, ignore_eos=True),
    ):
        output = llm.generate(prompt, SamplingParams(max_tokens=20, n=2, seed=1, logprobs=1, **params))[0]
        for o in output.outputs:
            assert set(o.token_ids) <= set(range(292)), params
            assert all(f.decoded_token == "" for found in o.logprobs for id, f in found.items() if id >= 292)
    ids_only = LLM(str(directory), max_model_len=128, max_num_seqs=2, skip_tokenizer_init=True)
    assert max(answer(ids_only, prompt, greedy())) >= 292  # nobody says where the vocabulary ends


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="ids up to 291, the model's vocab_size is 290"):
        LLM(str(checkpoint(vocab_size=290)), max_model_len=64)


def test_without_a_tokenizer(checkpoint, engine):
    bare = engine(checkpoint(), skip_tokenizer_init=True)
    output = bare.generate({"prompt_token_ids": [104, 105]}, greedy(logprobs=1))[0].outputs[0]
    assert output.text == "" and len(output.token_ids) == 12
    assert output.logprobs[0][output.token_ids[0]].decoded_token is None
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        bare.generate("text")


# ---- order and progress --------------------------------------------------------------------------------------------


def test_on_finish_comes_in_the_order_of_finishing(llm):
    order, seen = [], {}

    def on_finish(index, output):
        order.append(index)
        seen[index] = [o.finish_reason for o in output.outputs]

    lengths = [9, 2, 5, 2, 14]
    outputs = llm.generate(["a", "b", "c", "d", "e"], [greedy(n, n=2) for n in lengths], on_finish=on_finish)
    assert order == [1, 3, 2, 0, 4]
    assert all(reasons == ["length"] * 2 for reasons in seen.values())
    assert [len(o.outputs[1].token_ids) for o in outputs] == lengths


def test_on_step_counts_every_token(llm):
    steps = []
    llm.generate(["a", "b"], [greedy(3, n=2), greedy(5)], on_step=steps.append)
    assert sum(steps) == 11 and len(steps) == 5


def test_an_exception_in_a_callback_leaves_nothing_running(llm):
    def fail(index, output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(["a", "b"], [greedy(1), greedy(100)], on_finish=fail)
    assert not llm._engine.busy


@pytest.mark.parametrize("stored", [{}, {"dtype": "float32"}, {"fp8": True}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_load_counts_bytes_of_memory(stored, dtype, checkpoint):
    calls = []
    LLM(str(checkpoint(**stored)), dtype=dtype, on_load=lambda *call: calls.append(call), max_model_len=64)
    done, totals = zip(*calls)
    assert list(done) == sorted(done) and set(totals) == {done[-1]} and done[0] < done[-1]
    assert 0.9 * totals[0] < done[-2] < totals[0], "neither done long before the end nor in one leap to it"


# ---- piece by piece ------------------------------------------------------------------------------------------------


def joined(pieces) -> tuple[str, list[int], str | None]:
    pieces = list(pieces)
    return "".join(p.text for p in pieces), [t for p in pieces for t in p.token_ids], pieces[-1].finish_reason


@pytest.mark.parametrize("params", [greedy(20), spelt(20), SamplingParams(seed=4, **CHANCE), greedy(1)], ids=str)
def test_stream_is_generate_in_pieces(params, llm):
    whole = llm.generate("some prompt", params)[0].outputs[0]
    pieces = list(llm.stream("some prompt", params))
    assert joined(pieces) == (whole.text, whole.token_ids, whole.finish_reason)
    assert all(len(p.token_ids) == 1 and p.finish_reason is None for p in pieces[:-1])


def test_stream_with_a_stop_string(llm):
    whole = llm.generate("x", spelt(20))[0].outputs[0]
    stop = whole.text[8:11]
    pieces = list(llm.stream("x", spelt(20, stop=stop)))
    text, ids, reason = joined(pieces)
    assert (text, reason, pieces[-1].stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)
    assert len(ids) == whole.text.index(stop) + 3


def test_stream_of_several_answers(llm):
    params = SamplingParams(n=3, seed=4, **CHANCE)
    whole = llm.generate("x", params)[0].outputs
    pieces = list(llm.stream("x", params))
    for o in whole:
        assert joined(p for p in pieces if p.index == o.index) == (o.text, o.token_ids, "length")


def test_streams_read_in_turn(llm):
    expected = [llm.generate(p, greedy(8))[0].outputs[0].token_ids for p in "abc"]
    streams = [llm.stream(p, greedy(8)) for p in "abc"]
    found = [[], [], []]
    for _ in range(8):
        for stream, ids in zip(streams, found):
            ids += next(stream).token_ids
    assert found == expected and all(next(stream, None) is None for stream in streams)


def test_generate_while_a_stream_is_half_read(llm):
    expected = answer(llm, "a", greedy(30))
    stream = llm.stream("a", greedy(30))
    ids = [*next(stream).token_ids]
    assert answer(llm, "b", greedy(5)) == answer(llm, "b", greedy(5))
    for piece in stream:
        ids += piece.token_ids
    assert ids == expected


@pytest.mark.parametrize("read", [0, 1, 5])
def test_closing_a_stream_aborts_it(read, llm):
    stream, other = llm.stream("a", greedy(300, n=2)), llm.stream("b", greedy(6))
    for _ in range(read):
        next(stream)
    stream.close()
    assert not llm._engine.busy
    assert joined(other)[1] == answer(llm, "b", greedy(6))


def test_leaving_a_loop_aborts_the_stream(llm):
    for i, _ in enumerate(llm.stream("a", greedy(400))):
        if i == 3:
            break
    assert not llm._engine.busy


# ---- whoever asks, and whatever happens to him -----------------------------------------------------------------------


def test_any_number_of_threads_may_call(llm):
    """The answers are those of a single caller, for generate, chat and stream beside each other."""
    words = ["once", "upon", "a time", "there", "was", "a king"]
    params = [greedy(6), SamplingParams(seed=3, **CHANCE), spelt(9, n=2), greedy(5, logprobs=1, prompt_logprobs=1)]
    conversation = [{"role": "user", "content": "Hi"}]

    def everything(i: int) -> list:
        outputs = llm.generate([words[i % 6], words[(i + 1) % 6]], params[i % 4])
        outputs += llm.chat(conversation, params[(i + 1) % 4])
        pieces = [piece for piece in llm.stream(words[i % 6], params[i % 4]) if piece.index == 0]
        return [[(o.token_ids, o.text, o.finish_reason) for o in output.outputs] for output in outputs] + [
            joined(pieces)
        ]

    expected = [everything(i) for i in range(12)]
    found: dict[tuple[int, int], list] = {}

    def caller(number: int) -> None:
        for i in range(number, number + 12, 2):
            found[number, i] = everything(i % 12)

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 8 * 6
    assert all(answers == expected[i % 12] for (_, i), answers in found.items())


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_an_interrupt_leaves_the_llm_as_it_was(llm, way, monkeypatch):
    """Ctrl-C at any moment: the next call is answered as if nothing had been."""
    monkeypatch.setattr(loop, "LEAVE", 60.0)  # for the end of a step, which here is short
    expected = answer(llm, "after", greedy(5))

    def long() -> None:
        if way == "generate":
            llm.generate(["a", "b", "c"], greedy(450, n=2))
        else:
            for _ in llm.stream("a", greedy(450)):
                pass

    for i in range(12):
        timer = threading.Timer(0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            long()
            timer.join(20)
            time.sleep(1)
        assert not llm._engine.busy and answer(llm, "after", greedy(5)) == expected


@pytest.mark.parametrize("callback", ["on_step", "on_finish"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_what_a_callback_raises_is_raised_to_its_caller_only(llm, callback, error):
    expected = answer(llm, "other", greedy(40))
    found = []
    other = threading.Thread(target=lambda: found.append(answer(llm, "other", greedy(40))))
    other.start()

    def fail(*_):
        raise error

    with pytest.raises(error):
        llm.generate(["a", "b"], [greedy(1), greedy(300)], **{callback: fail})
    other.join(60)
    assert found == [expected]


def test_asking_within_on_step_is_refused_and_not_waited_for(llm):
    with pytest.raises(EngineError, match="within on_step"):
        llm.generate("a", greedy(3), on_step=lambda new: llm.generate("b", greedy(3)))
    again = []
    llm.generate("a", greedy(3), on_finish=lambda i, output: again.append(answer(llm, "b", greedy(3))))
    assert again == [answer(llm, "b", greedy(3))]


def test_closing_within_on_step_is_refused_and_nothing_is_closed(llm):
    with pytest.raises(EngineError, match="within on_step"):
        llm.generate("a", greedy(3), on_step=lambda new: llm.close())
    assert answer(llm, "b", greedy(3))


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_is_refused_and_not_waited_for(llm, busy):
    """Just after a call, its thread lingers; within one, it computes."""
    expected, pieces = answer(llm, "a", greedy(3)), llm.stream("a", greedy(300))
    if busy:
        next(pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, about forks of processes with threads
        child = os.fork()
    if child == 0:
        refused = 0
        for ask in (lambda: llm.generate("a"), lambda: list(llm.stream("a")), lambda: list(pieces)):
            try:
                ask()
            except EngineError as error:
                refused += "forked" in error.found
        llm.close()
        os._exit(0 if refused == 3 else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        assert time.monotonic() < deadline, "the child waits for a thread that it does not have"
        time.sleep(0.01)
    pieces.close()
    assert ended[1] == 0 and answer(llm, "a", greedy(3)) == expected


@pytest.mark.parametrize(
    "params, field",
    [(dict(n=10**6), "n"), (dict(seed=10**5000), "seed"), (dict(seed=-(10**60)), "seed")],
    ids=["n", "seed", "-seed"],
)
def test_what_would_take_all_memory_is_refused(llm, params, field):
    with pytest.raises(RequestError) as error:
        llm.generate("x", greedy(**params))
    assert error.value.field == field and len(str(error.value)) < 300
    assert len(llm.generate("x", greedy(2, n=100, seed=2**100))[0].outputs) == 100


def test_a_huge_top_k_is_no_limit(llm):
    huge, none = (SamplingParams(seed=3, top_k=k, **CHANCE) for k in (2**31 - 1, 320))
    assert answer(llm, "x", huge) == answer(llm, "x", none)
    with pytest.raises(RequestError, match="top_k=a number of 1329 bits"):
        SamplingParams(top_k=10**400)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")], ids=repr)
def test_a_step_without_memory_ends_its_own_sequences(llm, monkeypatch, error):
    forward = llm._runner.forward

    def failing(batch):
        monkeypatch.setattr(llm._runner, "forward", forward)
        raise error

    monkeypatch.setattr(llm._runner, "forward", failing)
    output = llm.generate("a", greedy(4))[0]
    assert output.outputs[0].finish_reason == "error" and "if memory is short" in output.error.todo
    assert llm.generate("a", greedy(4))[0].error is None


@pytest.mark.slow
def test_hundreds_of_bad_requests_harm_nobody(llm):
    """They end in an error of ours or are served; good requests beside them get what they get alone."""
    numbers = [10**400, -(10**400), 10**5000, 2**63, 1e300, float("nan"), float("inf"), -1, 0, None, "5", [], True, 5]
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    odd = [{i: v} for v in numbers for i in (5, 10**400)] + [[v] for v in numbers] + ["", "\ud800", [""], {"a": "b"}]
    bad = [{name: value} for name in names for value in (*numbers, *odd) if name not in ("max_tokens", "n")]
    bad += [{"n": value} for value in numbers] + [{"allowed_token_ids": [5], "bad_words": ["\x05"], "min_tokens": 2}]
    prompts = [" " * 12_000_000, "\ud800", "", None, 5.5, b"x", ["1"], {"prompt_token_ids": [10**400]}, "x" * 10**6]
    expected = {word: answer(llm, word, greedy(6)) for word in ("one", "two", "three")}
    found, harmed = [], []

    def good(stop: threading.Event) -> None:
        while not stop.is_set():
            for word, ids in expected.items():
                (found if answer(llm, word, greedy(6)) == ids else harmed).append(word)

    stop = threading.Event()
    threads = [threading.Thread(target=good, args=(stop,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 120
    try:
        for params in bad:
            assert time.monotonic() < deadline
            try:
                llm.generate("x", SamplingParams(**{"temperature": 1.0, "max_tokens": 2, **params}))
            except RequestError as error:
                assert len(str(error)) < 1000 and error.expected and error.todo
        for prompt in prompts:
            for ask in (lambda p: llm.generate([p], greedy(2)), lambda p: list(llm.stream(p, greedy(2)))):
                with pytest.raises(RequestError):
                    ask(prompt)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert len(bad) > 400 and len(found) > 5 and not harmed


def test_one_failing_request_among_many(llm, monkeypatch):
    """What cannot be sampled ends that answer, whoever asked for it, and nobody else's."""
    monkeypatch.setattr(config, "_biases", lambda given: given or {})  # past every check
    bad = SamplingParams(temperature=1.0, max_tokens=8, logit_bias={5: "much"})
    one, two, three = llm.generate(["a", "b", "c"], [greedy(8), bad, greedy(8)])
    assert [o.outputs[0].finish_reason for o in (one, two, three)] == ["length", "error", "length"]
    assert isinstance(two.error, EngineError) and "sampling failed" in two.error.found and one.error is None
    assert three.outputs[0].token_ids == answer(llm, "c", greedy(8))
    with pytest.raises(EngineError, match="sampling failed"):
        list(llm.stream("b", bad))


# ---- asyncio -------------------------------------------------------------------------------------------------------


async def collect(llm, prompt, params):
    return joined([piece async for piece in llm.astream(prompt, params)])


def test_many_at_once_are_as_each_alone(llm):
    prompts = [f"prompt {i} " * (1 + i % 4) for i in range(24)]
    params = [spelt(4 + i % 9, temperature=i % 2, seed=i) for i in range(24)]
    alone = [joined(llm.stream(prompt, p)) for prompt, p in zip(prompts, params)]

    async def all_of_them():
        async def late(i):
            await asyncio.sleep(0.002 * (i % 7))
            return await collect(llm, prompts[i], params[i])

        return await asyncio.gather(*map(late, range(24)))

    assert asyncio.run(all_of_them()) == alone


def test_several_answers_of_one_coroutine(llm):
    params = SamplingParams(n=3, seed=4, **CHANCE)
    expected = {o.index: o.token_ids for o in llm.generate("x", params)[0].outputs}

    async def read():
        found = {0: [], 1: [], 2: []}
        async for piece in llm.astream("x", params):
            found[piece.index] += piece.token_ids
        return found

    assert asyncio.run(read()) == expected


def test_cancelling_one_leaves_the_others(llm):
    expected = joined(llm.stream("survivor", spelt(60)))

    async def run():
        victims = [asyncio.create_task(collect(llm, f"victim {i}", greedy(450))) for i in range(4)]
        survivor = asyncio.create_task(collect(llm, "survivor", spelt(60)))
        await asyncio.sleep(0.02)
        for victim in victims:
            victim.cancel()
        gathered = await asyncio.gather(*victims, return_exceptions=True)
        return gathered, await survivor

    gathered, survivor = asyncio.run(run())
    assert all(isinstance(victim, asyncio.CancelledError) for victim in gathered)
    assert survivor == expected


def test_leaving_an_async_loop_aborts(llm):
    async def run():
        pieces = llm.astream("x", greedy(450))
        async for _ in pieces:
            break
        await pieces.aclose()
        thread = llm._loop._thread
        while thread is not None and thread.is_alive():
            await asyncio.sleep(0.01)
        return llm._engine.busy

    assert asyncio.run(asyncio.wait_for(run(), 20)) is False


def test_a_refused_or_failing_coroutine_does_not_hurt_the_others(llm):
    expected = joined(llm.stream("x", spelt(40)))

    async def fails():
        async for _ in llm.astream("y", greedy(300)):
            raise ZeroDivisionError

    async def run():
        return await asyncio.gather(
            collect(llm, "x", spelt(40)),
            collect(llm, "", greedy()),
            fails(),
            collect(llm, {"prompt_token_ids": [999]}, greedy()),
            return_exceptions=True,
        )

    fine, empty, failed, unknown = asyncio.run(run())
    assert fine == expected and isinstance(failed, ZeroDivisionError)
    assert isinstance(empty, RequestError) and isinstance(unknown, RequestError)


def test_the_engine_s_failure_is_everybody_s(llm, monkeypatch):
    """A step that cannot be computed is heard of by all who wait; the next request is served again."""
    forward, failed = llm._runner.forward, []

    def failing(batch):
        if len(batch.seq_lens) == 3 and not failed:  # once all three are being answered
            failed.append(batch)
            raise EngineError("the device is gone", "a device", "find it")
        return forward(batch)

    monkeypatch.setattr(llm._runner, "forward", failing)

    async def run():
        first = await asyncio.gather(*(collect(llm, p, greedy(50)) for p in "abc"), return_exceptions=True)
        return first, await collect(llm, "a", greedy(5))

    first, second = asyncio.run(run())
    assert all(isinstance(outcome, EngineError) for outcome in first)
    assert second[1] == answer(llm, "a", greedy(5))


def test_an_event_loop_that_is_closed_takes_its_own_requests_only(llm):
    expected = answer(llm, "x", greedy(60))
    loop = asyncio.new_event_loop()
    pieces = llm.astream("gone", greedy(450))
    loop.run_until_complete(anext(pieces))
    found = []
    other = threading.Thread(target=lambda: found.append(answer(llm, "x", greedy(60))))
    other.start()
    loop.close()
    other.join(60)
    assert found == [expected]
    deadline = time.monotonic() + 20
    while llm._engine.busy:
        assert time.monotonic() < deadline, "the request of a closed loop goes on"
        time.sleep(0.01)
    with pytest.raises(StopIteration):
        pieces.aclose().send(None)


def test_coroutines_and_generate_take_turns(llm):
    """Right after the last coroutine's answer, and even while some are still waiting."""
    expected = answer(llm, "x", greedy(5))
    for _ in range(20):
        assert asyncio.run(collect(llm, "x", greedy(5)))[1] == answer(llm, "x", greedy(5)) == expected

    async def run():
        half_read = llm.stream("z", greedy(9))
        ids = [*next(half_read).token_ids]
        waiting = [asyncio.create_task(collect(llm, p, greedy(40))) for p in "abc"]
        await asyncio.sleep(0.01)
        now = answer(llm, "x", greedy(5))
        ids += [t for piece in half_read for t in piece.token_ids]
        return now, ids, [found[1] for found in await asyncio.gather(*waiting)]

    now, ids, waited = asyncio.run(run())
    assert now == expected and ids == answer(llm, "z", greedy(9))
    assert waited == [answer(llm, p, greedy(40)) for p in "abc"]


def test_the_thread_ends_when_nobody_waits(llm):
    asyncio.run(collect(llm, "x", greedy(5)))
    (thread := llm._loop._thread) and thread.join(10)
    assert "glimmer-engine" not in {thread.name for thread in threading.enumerate()}

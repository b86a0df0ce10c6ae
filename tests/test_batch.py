"""Batch: what a step is told, in one tensor in the host's memory and in one upload on a device."""

import torch

from glimmer.batch import TENSORS, Batch

TENSOR_VALUES = {
    "tokens": [5, 6, 7, 9],
    "positions": [0, 1, 2, 17],
    "slot_mapping": [32, 33, 34, 17],
    "block_tables": [[2, 0], [3, 1]],
    "logits_indices": [2, 3],
    "query_start_loc": [0, 3, 4],
    "seq_lens": [3, 18],
}


def batch() -> Batch:
    values = TENSOR_VALUES | {"block_tables": [[2], [3, 1]], "query_lens": [3, 1]}
    del values["query_start_loc"]
    return Batch.of(**values)


def test_sequences_of_different_lengths():
    made = batch()
    assert {name: getattr(made, name).tolist() for name in TENSORS} == TENSOR_VALUES
    assert made.num_sequences == 2 and all(getattr(made, name).dtype == torch.int64 for name in TENSORS)
    assert made.query_start_loc_cpu is made.query_start_loc and made.seq_lens_cpu is made.seq_lens


def test_a_step_without_logits_and_without_tokens_of_one_more():
    made = Batch.of([1], [0], [0], [[4]], [], [1], [1])
    assert made.logits_indices.shape == (0,) and made.block_tables.tolist() == [[4]]


def test_one_upload_brings_everything_to_the_device_and_loop_bounds_stay_in_the_host_s_memory():
    made = batch()
    there = made.to(torch.device("meta"))
    storages = {getattr(there, name).untyped_storage()._cdata for name in TENSORS}
    assert len(storages) == 1 and there.tokens.is_meta and there.block_tables.shape == (2, 2)
    assert there.seq_lens_cpu is made.seq_lens_cpu and there.query_start_loc_cpu.tolist() == [0, 3, 4]
    assert made.to(torch.device("cpu")) is made


def test_more_columns_for_sequences_that_will_grow():
    made = batch().widened(5)
    assert made.block_tables.tolist() == [[2, 0, 0, 0, 0], [3, 1, 0, 0, 0]]
    assert {name: getattr(made, name).tolist() for name in TENSORS if name != "block_tables"} == {
        name: values for name, values in TENSOR_VALUES.items() if name != "block_tables"
    }
    made.seq_lens.add_(1)
    assert made.seq_lens_cpu.tolist() == [4, 19], "in the host's memory both are one tensor"
    there = batch().to(torch.device("meta")).widened(5)
    assert there.block_tables.shape == (2, 5) and there.seq_lens_cpu.tolist() == [3, 18]

// The two ops that multiply by weights: linear and experts (MoE). Not here: the loops (kernels.inc), layouts (packed.h), and
// how experts come into memory (store.h).
#pragma once

#include "packed.h"
#include "store.h"

namespace glimmer {

// All rows are contiguous. y (rows, n) = x (rows, k) @ w.T + bias; bias (n) float32 or null. y may have another type than x.
void linear(Values x, long rows, const Packed& w, const float* bias, Values y);

// y (rows, H) float32 = sum over j of scores[:, j] * down(swiglu(gate_up(x))) of expert ids[:, j], in the order of the
// experts' numbers. gate_up: two parts. Throws std::invalid_argument if an id is none of the experts.
void experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, const Packed& gate_up, const Packed& down,
             float* y);

// The same for a layer of a store, bit by bit: those that are there are computed while the others are read. Many experts are
// taken in waves, one of which is read while another is computed. Throws UnreadError.
void stored_experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, ExpertStore& store, int layer,
                    float* y);

// Begins to read what stored_experts will want for these ids.
void fetch_experts(const int64_t* ids, long count, ExpertStore& store, int layer);

}  // namespace glimmer

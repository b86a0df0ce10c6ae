// The two ops that multiply by weights: linear and experts (MoE). Not here: the loops (kernels.inc), layouts (packed.h).
#pragma once

#include "packed.h"

namespace glimmer {

// All rows are contiguous. y (rows, n) = x (rows, k) @ w.T + bias; bias (n) float32 or null. y may have another type than x.
void linear(Values x, long rows, const Packed& w, const float* bias, Values y);

// y (rows, H) float32 = sum over j of scores[:, j] * down(swiglu(gate_up(x))) of expert ids[:, j], in the order of the
// experts' numbers. gate_up: two parts. Throws std::invalid_argument if an id is none of the experts.
void experts(Values x, long rows, const int64_t* ids, const float* scores, int top_k, const Packed& gate_up, const Packed& down,
             float* y);

}  // namespace glimmer

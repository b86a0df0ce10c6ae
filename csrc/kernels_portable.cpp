// The loops in the vector instructions that every processor of the architecture has: SSE2, NEON.
#define LANES 4
#if defined(__aarch64__)
#define ROWS 3  // 32 registers
#else
#define ROWS 1
#endif
#include "kernels.inc"

namespace glimmer {
// clang-format off
const Kernels portable = {"portable", ROWS, nullptr, nullptr, f32, f32_bf16, bf16, fp8, int8, int4, load_bf16, to_bf16, to_fp8,
                          to_int8, swiglu, finish, gated, add, peak_flops_bf16, peak_flops_int8, read, attention_by_vectors,
                          small_loops};
// clang-format on
}  // namespace glimmer

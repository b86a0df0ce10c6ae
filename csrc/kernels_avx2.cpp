// The loops in AVX2 with FMA: bf16 is converted to float32 on the fly.
#define LANES 8
#define ROWS 3
#include "kernels.inc"

namespace glimmer {
// clang-format off
const Kernels avx2 = {"avx2", ROWS, nullptr, nullptr, f32, f32_bf16, bf16, fp8, int8, int4, load_bf16, to_bf16, to_fp8, to_int8,
                      swiglu, finish, gated, add, peak_flops_bf16, peak_flops_int8, read, attention_by_vectors, small_loops};
// clang-format on
}  // namespace glimmer

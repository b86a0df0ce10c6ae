// The loops in AVX-512 with BF16, VNNI and VBMI: Zen 4 and later, Sapphire Rapids and later.
#define LANES 16
#define ROWS 12
#include "kernels.inc"

namespace glimmer {
// clang-format off
const Kernels avx512 = {"avx512", ROWS, nullptr, nullptr, f32, f32_bf16, bf16, fp8, int8, int4, load_bf16, to_bf16, to_fp8,
                        to_int8, swiglu, finish, gated, add, peak_flops_bf16, peak_flops_int8, read, attention_by_vectors,
                        small_loops};
// clang-format on
}  // namespace glimmer

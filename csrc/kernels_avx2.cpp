// The loops in AVX2 with FMA: bf16 is widened to float32 on the way.
#define LANES 8
#define ROWS 3
#include "kernels.inc"

namespace glimmer {
const Kernels avx2 = {"avx2", ROWS, nullptr, nullptr, f32, f32_bf16, bf16, fp8, int8, int4, load_bf16, to_bf16, to_fp8,
                      to_int8, swiglu, finish, gated, add, burn_bf16, burn_int8, read, attention_by_vectors, small_loops};
}

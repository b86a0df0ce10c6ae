// bf16 and fp8 use AMX tiles for every number of rows: tiles have their own order of summation, so another loop would give
// other bits for a few rows of the same matrix. int8 sums are integers, the same in any order: tiles are used from a few rows
// on.
#define LANES 16
#define ROWS 14
#include "kernels.inc"

namespace glimmer {
namespace {

// Tiles 0..3 are sums (two blocks of rows x two halves of the panel), 4 and 5 rows of a, 6 and 7 the panel's halves.
void load_tile_config() {
    alignas(64) static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}
void release_tiles() { _tile_release(); }

// A stretch of the inner dimension: its part of a panel stays in the L1 cache while block after block of rows is multiplied by
// it. The partial sums are in c meanwhile, which holds a tile's float32 or int32 exactly.
constexpr int STEPS = 16;  // pairs of tiles in a stretch, side by side in the panel's rows of 128 bytes: 32 KB

// c (16, 32), or (32, 32) if TWO, = or += rows of a times `steps` pairs of tiles. Before each step `lines` lines of the
// stream are fetched.
#define GLIMMER_TILES(NAME, DOT)                                                                                          \
    template <bool TWO>                                                                                                   \
    inline void NAME(const char* a, long stride, const char* panel, int steps, float* c, bool more, const Stream& stream, \
                     const char* ahead, int lines) {                                                                      \
        if (more) {                                                                                                       \
            _tile_loadd(0, c, 128);                                                                                       \
            _tile_loadd(1, c + 16, 128);                                                                                  \
            if (TWO) _tile_loadd(2, c + 512, 128);                                                                        \
            if (TWO) _tile_loadd(3, c + 528, 128);                                                                        \
        } else {                                                                                                          \
            _tile_zero(0);                                                                                                \
            _tile_zero(1);                                                                                                \
            if (TWO) _tile_zero(2);                                                                                       \
            if (TWO) _tile_zero(3);                                                                                       \
        }                                                                                                                 \
        for (int i = 0; i < steps; i++, a += 64, panel += 2048, ahead += 64 * lines) {                                    \
            stream.fetch(ahead, lines);                                                                                   \
            _tile_loadd(6, panel, 128);                                                                                   \
            _tile_loadd(7, panel + 64, 128);                                                                              \
            _tile_loadd(4, a, stride);                                                                                    \
            DOT(0, 4, 6);                                                                                                 \
            DOT(1, 4, 7);                                                                                                 \
            if (TWO) {                                                                                                    \
                _tile_loadd(5, a + 16 * stride, stride);                                                                  \
                DOT(2, 5, 6);                                                                                             \
                DOT(3, 5, 7);                                                                                             \
            }                                                                                                             \
        }                                                                                                                 \
        _tile_stored(0, c, 128);                                                                                          \
        _tile_stored(1, c + 16, 128);                                                                                     \
        if (TWO) _tile_stored(2, c + 512, 128);                                                                           \
        if (TWO) _tile_stored(3, c + 528, 128);                                                                           \
    }                                                                                                                     \
    /* All m rows by one stretch. `bytes`: what the stretch takes up in the stream, fetched in equal parts. */            \
    inline void NAME(const char* a, long stride, int m, const char* panel, int steps, float* c, bool more,                \
                     const Stream& stream, const char* at, int bytes) {                                                   \
        const int blocks = (m + 31) / 32, lines = (bytes / 64 + blocks * steps - 1) / (blocks * steps);                   \
        for (int r = 0; r < m; r += 32, a += 32 * stride, c += 1024, at += 64 * lines * steps) {                          \
            if (m - r > 16) NAME<true>(a, stride, panel, steps, c, more, stream, at, lines);                              \
            else NAME<false>(a, stride, panel, steps, c, more, stream, at, lines);                                        \
        }                                                                                                                 \
    }
GLIMMER_TILES(tiles_bf16, _tile_dpbf16ps)
GLIMMER_TILES(tiles_int8, _tile_dpbsud)
#undef GLIMMER_TILES

void bf16_tiles(const uint16_t* a, long lda, int m, const uint16_t* panel, int k, float* c, const void* next) {
    const int all = padded(Kind::bf16, k) / 32;
    const Stream stream(panel, (size_t)all * 2048, next);
    for (int i = 0; i < all; i += STEPS) {
        const char* p = (const char*)panel + i * 2048;
        int steps = all - i < STEPS ? all - i : STEPS;
        tiles_bf16((const char*)(a + i * 32), lda * 2, m, p, steps, c, i > 0, stream, p, steps * 2048);
    }
}

void fp8_tiles(const uint16_t* a, long lda, int m, const uint8_t* panel, int k, float* c, const void* next) {
    const Fp8 fp8;
    const int all = padded(Kind::fp8, k) / 32;
    const Stream stream(panel, (size_t)all * 1024, next);
    alignas(64) uint16_t panel_bf16[STEPS * 1024];
    for (int i = 0; i < all; i += STEPS) {
        const uint8_t* p = panel + i * 1024;
        int steps = all - i < STEPS ? all - i : STEPS;
        for (int j = 0; j < steps * 16; j++) {
            vi w[NV];
            fp8.row(p + j * 64, w);
            for (int v = 0; v < NV; v++) store(panel_bf16 + j * 64 + 2 * v * LANES, w[v]);
        }
        tiles_bf16((const char*)(a + i * 32), lda * 2, m, (const char*)panel_bf16, steps, c, i > 0, stream, (const char*)p,
                   steps * 1024);
    }
}

constexpr int MAX_VECTOR_ROWS = 4;  // up to this many rows vectors are as fast as tiles, which always compute 16 rows

void int8_tiles(const int8_t* a, long lda, int m, const uint8_t* panel, int k, const float* sums, float* c, const void* next) {
    if (m <= MAX_VECTOR_ROWS) return int8(a, lda, m, panel, k, sums, c, next);
    const int all = padded(Kind::int8, k) / 64;
    const Stream stream(panel, (size_t)all * 2048, next);
    for (int i = 0; i < all; i += STEPS) {
        const char* p = (const char*)panel + i * 2048;
        int steps = all - i < STEPS ? all - i : STEPS;
        tiles_int8((const char*)(a + i * 64), lda, m, p, steps, c, i > 0, stream, p, steps * 2048);
    }
    for (int r = 0; r < m; r++)
        for (int v = 0; v < NV; v++) {
            float* p = c + r * PANEL + v * LANES;
            store(p, to_float(load<vi>(p) - splat(128 * (int32_t)sums[r])));
        }
}

// The products of attention, for every number of rows, too. c and a have space for whole tiles.
struct Tiles {
    static bool serves(int width) { return width % 32 == 0; }
    template <bool MORE>
    static void times(const uint16_t* a, long lda, int m, const uint16_t* w0, const uint16_t* w1, long stride, int k, float* c,
                      long ldc, const Prefetch* prefetch) {
        for (; m > 16; m -= 32, a += 32 * lda, c += 32 * ldc, prefetch = nullptr)
            block<MORE, true>(a, lda, w0, w1, stride, k, c, ldc, prefetch);
        if (m > 0) block<MORE, false>(a, lda, w0, w1, stride, k, c, ldc, prefetch);
    }
    template <bool MORE, bool TWO>
    static void block(const uint16_t* a, long lda, const uint16_t* w0, const uint16_t* w1, long stride, int k, float* c,
                      long ldc, const Prefetch* prefetch) {
        if (MORE) {
            _tile_loadd(0, c, ldc * 4);
            _tile_loadd(1, c + 16, ldc * 4);
            if (TWO) _tile_loadd(2, c + 16 * ldc, ldc * 4);
            if (TWO) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if (TWO) _tile_zero(2);
            if (TWO) _tile_zero(3);
        }
        for (int i = 0; i < k; i += 32, w0 += 16 * stride, w1 += 16 * stride) {
            for (int j = 0; prefetch && j < 16; j++) prefetch->fetch(i / 2 + j);
            _tile_loadd(6, w0, stride * 2);
            _tile_loadd(7, w1, stride * 2);
            _tile_loadd(4, a + i, lda * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (TWO) {
                _tile_loadd(5, a + 16 * lda + i, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c, ldc * 4);
        _tile_stored(1, c + 16, ldc * 4);
        if (TWO) _tile_stored(2, c + 16 * ldc, ldc * 4);
        if (TWO) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
    }
};
constexpr AttentionLoops attention_by_tiles = {attend<Tiles>, work, merge, finish_row};

double peak_flops_bf16_tiles(long rounds) {
    for (long i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return (double)rounds * 4 * 16 * 16 * 32 * 2;
}

double peak_flops_int8_tiles(long rounds) {
    for (long i = 0; i < rounds; i++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    return (double)rounds * 4 * 16 * 16 * 64 * 2;
}

}  // namespace

// clang-format off
const Kernels amx = {"amx", 32, load_tile_config, release_tiles, f32, f32_bf16, bf16_tiles, fp8_tiles, int8_tiles, int4, load_bf16,
                     to_bf16, to_fp8, to_int8, swiglu, finish, gated, add, peak_flops_bf16_tiles, peak_flops_int8_tiles, read,
                     attention_by_tiles, small_loops};
// clang-format on

}  // namespace glimmer

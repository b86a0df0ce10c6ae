// bf16 and fp8 by AMX tiles, at every number of rows: the tile's order of summation is its own, so no other loop may serve
// a few rows of the same matrix. int8 is summed in integers, where any order gives the same: tiles from a few rows on.
#define LANES 16
#define ROWS 14
#include "kernels.inc"

namespace glimmer {
namespace {

// Tiles 0..3 are sums (two blocks of rows x two halves of the panel), 4 and 5 rows of a, 6 and 7 the panel's halves.
void enter() {
    alignas(64) static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}
void leave() { _tile_release(); }

// c (16, 32), or (32, 32) if TWO, = a times a panel of `steps` pairs of tiles, which lie side by side in its rows of 128 bytes.
#ifndef FETCH
#define FETCH 4096
#define HINT 3
#endif
#define GLIMMER_TILES(NAME, DOT)                                                           \
    template <bool TWO, bool FEW>                                                          \
    inline void NAME(const char* a, long stride, const char* panel, int steps, char* c) {  \
        _tile_zero(0);                                                                     \
        _tile_zero(1);                                                                     \
        if (TWO) _tile_zero(2);                                                            \
        if (TWO) _tile_zero(3);                                                            \
        for (int i = 0; i < steps; i++, a += 64, panel += 2048) {                          \
            if (FEW)                                                                       \
                if (FETCH) for (int j = 0; j < 2048; j += 64) __builtin_prefetch(panel + FETCH + j, 0, HINT);   \
            _tile_loadd(6, panel, 128);                                                    \
            _tile_loadd(7, panel + 64, 128);                                               \
            _tile_loadd(4, a, stride);                                                     \
            DOT(0, 4, 6);                                                                  \
            DOT(1, 4, 7);                                                                  \
            if (TWO) {                                                                     \
                _tile_loadd(5, a + 16 * stride, stride);                                   \
                DOT(2, 5, 6);                                                              \
                DOT(3, 5, 7);                                                              \
            }                                                                              \
        }                                                                                  \
        _tile_stored(0, c, 128);                                                           \
        _tile_stored(1, c + 64, 128);                                                      \
        if (TWO) _tile_stored(2, c + 2048, 128);                                           \
        if (TWO) _tile_stored(3, c + 2048 + 64, 128);                                      \
    }
GLIMMER_TILES(tiles_bf16, _tile_dpbf16ps)
GLIMMER_TILES(tiles_int8, _tile_dpbsud)
#undef GLIMMER_TILES

// Rows beyond m are computed, from whatever lies behind a, and not kept.
template <class F> inline void over_tiles(int m, float* c, F f) {
    alignas(64) float sums[32 * PANEL];
    for (int r = 0; r < m; r += 32) {
        int n = m - r < 32 ? m - r : 32;
        bool whole = n == 32 || n == 16;
        f(r, n > 16, whole ? c + r * PANEL : sums);
        if (!whole) memcpy(c + r * PANEL, sums, (size_t)n * PANEL * 4);
    }
}

void bf16_tiles(const uint16_t* a, long lda, int m, const uint16_t* panel, int k, float* c) {
    over_tiles(m, c, [=](int r, bool two, float* sums) {
        auto tiles = two ? (r ? tiles_bf16<true, false> : tiles_bf16<true, true>) : r ? tiles_bf16<false, false> : tiles_bf16<false, true>;
        tiles((const char*)(a + r * lda), lda * 2, (const char*)panel, padded(Kind::bf16, k) / 32, (char*)sums);
    });
}

void fp8_tiles(const uint16_t* a, long lda, int m, const uint8_t* panel, int k, float* c) {
    // A stretch of the panel is widened once for all rows; sums are carried from stretch to stretch in float32, which
    // tiles hold exactly.
    const Fp8 fp8;
    constexpr int STRETCH = 256;
    alignas(64) uint16_t wide[STRETCH * PANEL];
    alignas(64) float sums[32 * PANEL];
    for (int first = 0; first < padded(Kind::fp8, k); first += STRETCH) {
        int n = padded(Kind::fp8, k) - first < STRETCH ? padded(Kind::fp8, k) - first : STRETCH;
        const uint8_t* p = panel + (size_t)first * PANEL;
        for (int i = 0; i < n / 2; i++, p += 2 * PANEL) {
            vi w[NV];
            if (m < 5) __builtin_prefetch((const char*)p + AHEAD);
            fp8.row(p, w);
            for (int v = 0; v < NV; v++) store(wide + i * 2 * PANEL + 2 * v * LANES, w[v]);
        }
        for (int r = 0; r < m; r += 32) {
            int rows = m - r < 32 ? m - r : 32;
            float* out = c + r * PANEL;
            if (first) memcpy(sums, out, (size_t)rows * PANEL * 4);
            const char* x = (const char*)(a + r * lda + first);
            for (int half = 0; half < (rows + 15) / 16; half++, x += 32 * lda) {
                if (first) _tile_loadd(0, sums + half * 16 * PANEL, 128);
                else _tile_zero(0);
                if (first) _tile_loadd(1, sums + half * 16 * PANEL + 16, 128);
                else _tile_zero(1);
                for (int i = 0; i < n / 32; i++) {
                    _tile_loadd(4, x + 64 * i, lda * 2);
                    _tile_loadd(6, wide + i * 1024, 128);
                    _tile_loadd(7, wide + i * 1024 + 32, 128);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                }
                _tile_stored(0, sums + half * 16 * PANEL, 128);
                _tile_stored(1, sums + half * 16 * PANEL + 16, 128);
            }
            memcpy(out, sums, (size_t)rows * PANEL * 4);
        }
    }
}

constexpr int FEW = 4;  // up to so many rows vectors are as quick as tiles, and need no sixteen

void int8_tiles(const int8_t* a, long lda, int m, const uint8_t* panel, int k, const int32_t* sums, float* c) {
    if (m <= FEW) return int8(a, lda, m, panel, k, sums, c);
    over_tiles(m, c, [=](int r, bool two, float* out) {
        auto tiles = two ? (r ? tiles_int8<true, false> : tiles_int8<true, true>) : r ? tiles_int8<false, false> : tiles_int8<false, true>;
        tiles((const char*)(a + r * lda), lda, (const char*)panel, padded(Kind::int8, k) / 64, (char*)out);
        for (int i = 0; i < 32 && r + i < m; i++)
            for (int v = 0; v < NV; v++) {
                float* p = out + i * PANEL + v * LANES;
                store(p, to_float(load<vi>(p) - splat(128 * sums[r + i])));
            }
    });
}

double burn_bf16_tiles(long rounds) {
    for (long i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return (double)rounds * 4 * 16 * 16 * 32 * 2;
}

double burn_int8_tiles(long rounds) {
    for (long i = 0; i < rounds; i++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    return (double)rounds * 4 * 16 * 16 * 64 * 2;
}

}  // namespace

const Kernels amx = {"amx", 32, enter, leave, f32, bf16_tiles, fp8_tiles, int8_tiles, int4, load_bf16, to_bf16, to_fp8,
                     to_int8, finish, swiglu, add, burn_bf16_tiles, burn_int8_tiles, read};

}  // namespace glimmer

// Rotary positions for queries and keys; see kernels/rotary.py for the equations.
#include "simd.h"

namespace {

constexpr int64_t SMALL = 16384;  // elements below which waking the other threads costs more

// Rotate one head of 2 `half` elements; `back` is the transposed map.
template <bool back, class T, class U>
inline void head(const T* x, const U* cos, const U* sin, T* y, int64_t half) {
    for (int64_t i = 0; i < half; i += W) {
        int n = int(half - i < W ? half - i : W);
        auto get = [n](auto* p) { return n == W ? load(p) : load(p, n); };
        vf x1 = get(x + i), x2 = get(x + half + i);
        vf c1 = get(cos + i), c2 = get(cos + half + i);
        vf s1 = get(sin + i), s2 = get(sin + half + i);
        vf y1 = back ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1;
        vf y2 = back ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2;
        if (n == W)
            store(y + i, y1), store(y + half + i, y2);
        else
            store(y + i, y1, n), store(y + half + i, y2, n);
    }
}

// Strides are in elements, of rows and heads.
template <bool back, class T, class U>
void rotate(const T* q, const T* k, const U* cos, const U* sin, T* out_q, T* out_k, int64_t rows,
            int64_t heads_q, int64_t heads_k, int64_t d, int64_t row_q, int64_t head_q,
            int64_t row_k, int64_t head_k, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * (heads_q + heads_k) * d > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        const U *c = cos + t * d, *s = sin + t * d;
        for (int64_t h = 0; h < heads_q; h++)
            head<back>(q + t * row_q + h * head_q, c, s, out_q + (t * heads_q + h) * d, d / 2);
        for (int64_t h = 0; h < heads_k; h++)
            head<back>(k + t * row_k + h * head_k, c, s, out_k + (t * heads_k + h) * d, d / 2);
    }
}

}  // namespace

#define ROTARY_ONE(name, back, T, U)                                                              \
    EXPORT(name)(const T* q, const T* k, const U* cos, const U* sin, T* out_q, T* out_k,          \
                 int64_t rows, int64_t heads_q, int64_t heads_k, int64_t d, int64_t row_q,        \
                 int64_t head_q, int64_t row_k, int64_t head_k, int64_t threads) {                \
        rotate<back>(q, k, cos, sin, out_q, out_k, rows, heads_q, heads_k, d, row_q, head_q,      \
                     row_k, head_k, threads);                                                     \
    }
// <dtype of q and k>, and _f32 where cos and sin are fp32 beside them.
#define ROTARY(suffix, T, U)                       \
    ROTARY_ONE(rotary_##suffix, false, T, U)       \
    ROTARY_ONE(rotary_backward_##suffix, true, T, U)
ROTARY(f32, float, float)
ROTARY(bf16, bf16, bf16)
ROTARY(bf16_f32, bf16, float)

// Dropout with counted random words; see kernels/dropout.py for the counters.
#include "simd.h"

namespace {

constexpr int64_t SMALL = 16384;  // elements below which waking the other threads costs more
constexpr int L = W / 2;          // blocks of four elements in a vector of 64-bit lanes
constexpr int STREAMS = 2;        // vectors in flight: a multiplication takes five cycles

typedef uint64_t vq __attribute__((vector_size(W * 4)));

// Low 32 bits of each lane times m, in 64 bits.
inline vq multiply(vq x, vq m) {
#ifdef __AVX512F__
    return (vq)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)m);  // GCC warns of the plain form
#else
    return (vq)_mm256_mul_epu32((__m256i)x, (__m256i)m);
#endif
}

// Philox-4x32-10. Counters lie in the low halves of 64-bit lanes and the high halves hold what is
// left of products: multiplications do not read them, so nothing is masked before the end.
inline void philox(uint64_t key, vq (&c)[4][STREAMS]) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    const vq m0 = vq{} + 0xD2511F53u, m1 = vq{} + 0xCD9E8D57u;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int s = 0; s < STREAMS; s++) {
            vq p0 = multiply(c[0][s], m0), p1 = multiply(c[2][s], m1);
            c[0][s] = (p1 >> 32) ^ c[1][s] ^ k0;
            c[1][s] = p1;
            c[2][s] = (p0 >> 32) ^ c[3][s] ^ k1;
            c[3][s] = p0;
        }
}

// Words of 2 W consecutive elements, from L blocks.
inline void in_order(vq w0, vq w1, vq w2, vq w3, vu& first, vu& second) {
    const vq low = vq{} + 0xffffffffu;
    vq a = (w0 & low) | (w1 << 32), b = (w2 & low) | (w3 << 32);
#ifdef __AVX512F__
    first = (vu)__builtin_shuffle(a, b, vq{0, 8, 1, 9, 2, 10, 3, 11});
    second = (vu)__builtin_shuffle(a, b, vq{4, 12, 5, 13, 6, 14, 7, 15});
#else
    first = (vu)__builtin_shuffle(a, b, vq{0, 4, 1, 5});
    second = (vu)__builtin_shuffle(a, b, vq{2, 6, 3, 7});
#endif
}

template <class T>
inline void keep(const T* x, T* y, vu word, uint32_t threshold, float scale, int64_t left) {
    if (left >= W) {
        vf v = load(x) / scale;
        store(y, word >= threshold ? v : splat(0.f));
    } else if (left > 0) {
        vf v = load(x, int(left)) / scale;
        store(y, word >= threshold ? v : splat(0.f), int(left));
    }
}

template <class T>
void dropout(const T* x, const int64_t* counters, T* y, uint64_t key, int64_t module, double p,
             int64_t rows, int64_t features, int64_t threads) {
    int64_t blocks = (features + 3) / 4;
    uint32_t threshold = uint32_t(p * 4294967296.0);
    float scale = float(1 - p);
    vq lane;
    for (int i = 0; i < L; i++) lane[i] = i;
#pragma omp parallel for num_threads(threads) if (rows * features > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        const int64_t* at = counters + t * 4;
        const T* in = x + t * features;
        T* out = y + t * features;
        if (at[0] < 0) {  // padding
            std::memset(out, 0, features * sizeof(T));
            continue;
        }
        for (int64_t j = 0; j < blocks; j += L * STREAMS) {
            vq c[4][STREAMS];
            for (int s = 0; s < STREAMS; s++) {
                c[0][s] = lane + uint64_t(at[0] * blocks + j + s * L);
                c[1][s] = vq{} + uint64_t(at[1] | module);
                c[2][s] = vq{} + uint64_t(at[2]);
                c[3][s] = vq{} + uint64_t(at[3]);
            }
            philox(key, c);
            for (int s = 0; s < STREAMS; s++) {
                int64_t first = (j + s * L) * 4;
                vu word[2];
                in_order(c[0][s], c[1][s], c[2][s], c[3][s], word[0], word[1]);
                for (int half = 0; half < 2; half++, first += W)
                    keep(in + first, out + first, word[half], threshold, scale, features - first);
            }
        }
    }
}

}  // namespace

#define DROPOUT(suffix, T)                                                                        \
    EXPORT(dropout_##suffix)(const T* x, const int64_t* counters, T* y, int64_t key,              \
                             int64_t module, double p, int64_t rows, int64_t features,            \
                             int64_t threads) {                                                   \
        dropout(x, counters, y, uint64_t(key), module, p, rows, features, threads);               \
    }
DROPOUT(f32, float)
DROPOUT(bf16, bf16)

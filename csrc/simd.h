// Vectors of floats in three widths of one code: every file of csrc/ is compiled once for each
// instruction set, with FEDSIM_ISA naming it. Functions are exported as <name>_<isa>.
//
// A call passes tensors as pointers, integers as int64_t, numbers as double, and the number of
// threads last. Results never depend on the number of threads: work is cut by data alone.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>
#include <immintrin.h>
#include <omp.h>

#define FEDSIM_CAT2(a, b) a##_##b
#define FEDSIM_CAT(a, b) FEDSIM_CAT2(a, b)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void FEDSIM_CAT(name, FEDSIM_ISA)

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // floats in a vector
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vfu __attribute__((vector_size(W * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vhu __attribute__((vector_size(W * 2), aligned(2)));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t round_bf16(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { p->bits = round_bf16(x); }

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
inline vf load(const bf16* p) {
    vu u = __builtin_convertvector(*reinterpret_cast<const vhu*>(p), vu) << 16;
    return (vf)u;
}
inline void store(float* p, vf x) { *reinterpret_cast<vfu*>(p) = x; }
inline void store(bf16* p, vf x) {
#ifdef __AVX512BF16__
    // The instruction takes denormal numbers for 0, unlike torch and `round_bf16`.
    if (!_mm512_fpclass_ps_mask((__m512)x, 0x20)) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
        return;
    }
#endif
    vu u = (vu)x;
    vu even = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu nan = (u >> 16) | 0x40u;
    vu r = ((u & 0x7fffffffu) > 0x7f800000u) ? nan : even;
    *reinterpret_cast<vhu*>(p) = __builtin_convertvector(r, vh);
}

// The first n < W elements; the others are zero, or left alone in memory.
template <class T>
inline vf load(const T* p, int n) {
    float t[W] = {};
    for (int i = 0; i < n; i++) t[i] = to_float(p[i]);
    return load(t);
}
template <class T>
inline void store(T* p, vf x, int n) {
    float t[W];
    store(t, x);
    for (int i = 0; i < n; i++) put(p + i, t[i]);
}

// A fixed tree, whatever the width: halves are added until one number is left.
inline float sum(vf x) {
    float t[W];
    store(t, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
}
inline float highest(vf x) {
    float t[W];
    store(t, x);
    float m = t[0];
    for (int i = 1; i < W; i++) m = t[i] > m ? t[i] : m;
    return m;
}
inline vf larger(vf a, vf b) { return a > b ? a : b; }

// e^x, error below 2 units in the last place; 0 below -87.3, NaN stays NaN.
// Cody and Waite reduction, the Cephes polynomial.
inline vf vexp(vf x) {
    vf clipped = x > 88.3f ? splat(88.3f) : x;
    clipped = clipped < -87.3f ? splat(-87.3f) : clipped;
    vf n = clipped * 1.44269504088896341f;
    n = __builtin_convertvector(__builtin_convertvector(n + (n < 0.f ? splat(-.5f) : splat(.5f)), vi), vf);
    vf r = clipped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf y = p * (vf)power;
    y = x < -87.3f ? splat(0.f) : y;
    y = x > 88.7f ? splat(INFINITY) : y;
    return x != x ? x : y;
}

// tanh x, error below 3 units in the last place: the Cephes polynomial near 0, where
// 1 - 2 / (e^2x + 1) cancels.
inline vf vtanh(vf x) {
    vf a = x < 0.f ? -x : x;
    vf far = 1.f - 2.f / (vexp(2.f * a) + 1.f);
    vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    vf near = p * z * x + x;
    return a < 0.625f ? near : (x < 0.f ? -far : far);
}

}  // namespace

// The one product that everything small is made of: a few rows times a narrow panel.
//
//     acc[m][v] += sum_k left(m, k) right(k, v)
//
// in units: a unit is one float, or two bf16 neighbours along k that the processor multiplies and
// adds in fp32 with one instruction. Each element is one chain over k, so a row's bits depend
// neither on the rows beside it nor on where the panel lies.
#pragma once
#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

struct Single {  // one k per unit
    typedef float unit;
    static constexpr int K = 1;
    static inline vf madd(vf acc, const unit* left, const unit* right) {
        return acc + *left * load(right);
    }
};

#ifdef __AVX512BF16__
struct Pair {  // two k per unit
    typedef uint32_t unit;
    static constexpr int K = 2;
    static inline vf madd(vf acc, const unit* left, const unit* right) {
        __m512i l = _mm512_set1_epi32(int(*left));
        __m512i r = _mm512_loadu_si512(right);
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)l, (__m512bh)r);
    }
};
#endif

// The unit that multiplies elements of type T: bf16 in pairs where the processor can.
template <class T>
struct UnitOf {
    typedef Single type;
};
#ifdef __AVX512BF16__
template <>
struct UnitOf<bf16> {
    typedef Pair type;
};
#endif

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int round_up(int a, int b) { return ceil_div(a, b) * b; }

inline void put_unit(float* p, float x, float) { *p = x; }
inline void put_unit(uint32_t* p, float x, float y) {
    *p = uint32_t(round_bf16(x)) | uint32_t(round_bf16(y)) << 16;
}

// Scratch that keeps its memory between calls of a thread: fresh pages cost more than the work.
template <class T, int id>
inline T* scratch(size_t n) {
    static thread_local std::vector<T> buffer;
    if (buffer.size() < n) buffer.resize(n);
    return buffer.data();
}

template <class U, int MR, int NV>
inline __attribute__((always_inline)) void panel(int units, const typename U::unit* left,
                                                 int64_t row, int64_t step,
                                                 const typename U::unit* right, int64_t stride,
                                                 vf (&acc)[MR][NV]) {
    for (int k = 0; k < units; k++) {
        const typename U::unit* l = left + k * step;
        const typename U::unit* r = right + k * stride;
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) acc[m][v] = U::madd(acc[m][v], l + m * row, r + v * W);
    }
}

#ifdef __AVX512F__
constexpr int ROWS = 8, VECS = 2;  // 16 of 32 registers accumulate
#else
constexpr int ROWS = 6, VECS = 2;  // 12 of 16: 3.0 x a loop over adapters instead of 2.3
#endif

template <class U, int MR, int NV, class Sink>
inline void block_at(int units, const typename U::unit* left, int64_t row, int64_t step,
                     const typename U::unit* right, int64_t stride, int m, int n, Sink&& sink) {
    vf acc[MR][NV] = {};
    panel<U, MR, NV>(units, left + m * row, row, step, right + n, stride, acc);
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < NV; v++) sink(m + i, n + v * W, acc[i][v]);
}

template <class U, int NV, class Sink>
inline void column(int rows, int units, const typename U::unit* left, int64_t row, int64_t step,
                   const typename U::unit* right, int64_t stride, int n, Sink&& sink) {
    int m = 0;
    for (; m + ROWS <= rows; m += ROWS)
        block_at<U, ROWS, NV>(units, left, row, step, right, stride, m, n, sink);
    for (; m + 2 <= rows; m += 2)
        block_at<U, 2, NV>(units, left, row, step, right, stride, m, n, sink);
    if (m < rows) block_at<U, 1, NV>(units, left, row, step, right, stride, m, n, sink);
}

// All rows x columns of a product; sink(m, n, vector) receives columns n .. n + W of row m.
// `right` has round_up(columns, W) columns, `stride` units apart from one k to the next.
template <class U, class Sink>
inline void product(int rows, int columns, int units, const typename U::unit* left, int64_t row,
                    int64_t step, const typename U::unit* right, int64_t stride, Sink&& sink) {
    int n = 0;
    for (; n + VECS * W <= round_up(columns, W); n += VECS * W)
        column<U, VECS>(rows, units, left, row, step, right, stride, n, sink);
    if (n < columns) column<U, 1>(rows, units, left, row, step, right, stride, n, sink);
}

// One row of units from neighbouring columns of one or two rows of a matrix.
template <class T>
inline void unit_row(float* out, const T* a, const T*, int columns) {
    int n = 0;
    for (; n + W <= columns; n += W) store(out + n, load(a + n));
    for (; n < columns; n++) out[n] = to_float(a[n]);
}
#ifdef __AVX512BF16__
inline vu bits(const bf16* p) {
    return __builtin_convertvector(*reinterpret_cast<const vhu*>(p), vu);
}
inline vu bits(const float* p) {  // denormals become 0, as in the product itself
    return __builtin_convertvector((vh)_mm512_cvtneps_pbh((__m512)load(p)), vu);
}
template <class T>
inline void unit_row(uint32_t* out, const T* a, const T* b, int columns) {
    int n = 0;
    for (; n + W <= columns; n += W) {
        vu pair = bits(a + n);
        if (b) pair |= bits(b + n) << 16;
        std::memcpy(out + n, &pair, sizeof pair);
    }
    for (; n < columns; n++) put_unit(out + n, to_float(a[n]), b ? to_float(b[n]) : 0.f);
}
#endif

// Units [ceil(k / K)][round_up(columns, W)] of a matrix whose element (k, n) is at p[k * kstep + n * nstep].
template <class U, class T>
inline void pack_right(typename U::unit* out, const T* p, int k, int columns, int64_t kstep,
                       int64_t nstep) {
    int wide = round_up(columns, W);
    for (int i = 0; i < ceil_div(k, U::K); i++) {
        const T* a = p + int64_t(i) * U::K * kstep;
        bool second = U::K == 2 && i * 2 + 1 < k;
        typename U::unit* o = out + int64_t(i) * wide;
        if (nstep == 1)
            unit_row(o, a, second ? a + kstep : nullptr, columns);
        else
            for (int n = 0; n < columns; n++)
                put_unit(o + n, to_float(a[n * nstep]),
                         second ? to_float(a[n * nstep + kstep]) : 0.f);
        for (int n = columns; n < wide; n++) put_unit(o + n, 0.f, 0.f);
    }
}

// Units of rows that are multiplied from the left: [rows][ceil(k / K)].
template <class U, class T>
inline void pack_left(typename U::unit* out, const T* p, int rows, int k, int64_t row) {
    int units = ceil_div(k, U::K);
    for (int m = 0; m < rows; m++)
        for (int i = 0; i < units; i++) {
            const T* a = p + m * row + i * U::K;
            put_unit(out + int64_t(m) * units + i, to_float(a[0]),
                     U::K == 2 && i * 2 + 1 < k ? to_float(a[1]) : 0.f);
        }
}

// Rows as units without a copy where memory already holds them: floats, or an even number of bf16.
template <class U>
inline bool in_place(float, int) { return U::K == 1; }
template <class U>
inline bool in_place(bf16, int k) { return U::K == 2 && k % 2 == 0; }

}  // namespace

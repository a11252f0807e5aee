// silu(gate) up over the rows of (T, 2F) = gate | up; see kernels/swiglu.py for the equations.
#include "simd.h"

namespace {

constexpr int64_t SMALL = 16384;  // elements below which waking the other threads costs more

// Calls body(row, column, elements) for each vector of each row, the last one of a row shorter.
template <class Body>
inline void each_vector(int64_t rows, int64_t f, int64_t threads, Body body) {
#pragma omp parallel for num_threads(threads) if (rows * f > SMALL)
    for (int64_t t = 0; t < rows; t++)
        for (int64_t i = 0; i < f; i += W) body(t, i, int(f - i < W ? f - i : W));
}

template <class T>
inline vf get(const T* p, int n) {
    return n == W ? load(p) : load(p, n);
}
template <class T>
inline void set(T* p, vf x, int n) {
    n == W ? store(p, x) : store(p, x, n);
}

template <class T>
void forward(const T* y, T* out, int64_t rows, int64_t f, int64_t threads) {
    each_vector(rows, f, threads, [=](int64_t t, int64_t i, int n) {
        vf gate = get(y + t * 2 * f + i, n), up = get(y + t * 2 * f + f + i, n);
        set(out + t * f + i, gate / (1.f + vexp(-gate)) * up, n);
    });
}

template <class T>
void backward(const T* g, const T* y, T* gy, int64_t rows, int64_t f, int64_t threads) {
    each_vector(rows, f, threads, [=](int64_t t, int64_t i, int n) {
        int64_t at = t * 2 * f + i;
        vf grad = get(g + t * f + i, n), gate = get(y + at, n), up = get(y + at + f, n);
        vf s = 1.f / (1.f + vexp(-gate));
        set(gy + at, grad * up * s * (1.f + gate * (1.f - s)), n);
        set(gy + at + f, grad * gate * s, n);
    });
}

}  // namespace

#define SWIGLU(suffix, T)                                                                          \
    EXPORT(swiglu_##suffix)(const T* y, T* out, int64_t rows, int64_t f, int64_t threads) {        \
        forward(y, out, rows, f, threads);                                                         \
    }                                                                                              \
    EXPORT(swiglu_backward_##suffix)(const T* g, const T* y, T* gy, int64_t rows, int64_t f,       \
                                     int64_t threads) {                                            \
        backward(g, y, gy, rows, f, threads);                                                      \
    }
SWIGLU(f32, float)
SWIGLU(bf16, bf16)

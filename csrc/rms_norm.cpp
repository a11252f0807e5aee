// RMS norm over the rows of (T, D), fp32 inside; see kernels/rms_norm.py for the equations.
#include "simd.h"

namespace {

constexpr int64_t SMALL = 16384;  // elements below which waking the other threads costs more

template <class T, class U>
void forward(const T* x, const U* weight, T* y, float* rstd, double eps, int64_t rows, int64_t d,
             int64_t threads) {
    int64_t whole = d / W * W;
    int tail = int(d - whole);
#pragma omp parallel for num_threads(threads) if (rows * d > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        const T* in = x + t * d;
        T* out = y + t * d;
        vf squares = {};
        for (int64_t i = 0; i < whole; i += W) {
            vf v = load(in + i);
            squares += v * v;
        }
        if (tail) {
            vf v = load(in + whole, tail);
            squares += v * v;
        }
        float r = 1.f / std::sqrt(sum(squares) / float(d) + float(eps));
        rstd[t] = r;
        for (int64_t i = 0; i < whole; i += W) store(out + i, load(in + i) * r * load(weight + i));
        if (tail)
            store(out + whole, load(in + whole, tail) * r * load(weight + whole, tail), tail);
    }
}

// gx = r (g w - x r^2 mean(g w x))
template <class T, class U>
void backward(const T* g, const T* x, const U* weight, const float* rstd, T* gx, int64_t rows,
              int64_t d, int64_t threads) {
    int64_t whole = d / W * W;
    int tail = int(d - whole);
#pragma omp parallel for num_threads(threads) if (rows * d > SMALL)
    for (int64_t t = 0; t < rows; t++) {
        const T *gt = g + t * d, *in = x + t * d;
        T* out = gx + t * d;
        vf dots = {};
        for (int64_t i = 0; i < whole; i += W)
            dots += load(gt + i) * load(weight + i) * load(in + i);
        if (tail)
            dots += load(gt + whole, tail) * load(weight + whole, tail) * load(in + whole, tail);
        float r = rstd[t], back = sum(dots) / float(d) * r * r;
        for (int64_t i = 0; i < whole; i += W)
            store(out + i, (load(gt + i) * load(weight + i) - load(in + i) * back) * r);
        if (tail) {
            vf gw = load(gt + whole, tail) * load(weight + whole, tail);
            store(out + whole, (gw - load(in + whole, tail) * back) * r, tail);
        }
    }
}

}  // namespace

// <dtype of x and y>, and _f32 where the weight is fp32 beside them.
#define RMS_NORM(suffix, T, U)                                                                     \
    EXPORT(rms_norm_##suffix)(const T* x, const U* weight, T* y, float* rstd, double eps,          \
                              int64_t rows, int64_t d, int64_t threads) {                          \
        forward(x, weight, y, rstd, eps, rows, d, threads);                                        \
    }                                                                                              \
    EXPORT(rms_norm_backward_##suffix)(const T* g, const T* x, const U* weight, const float* rstd, \
                                       T* gx, int64_t rows, int64_t d, int64_t threads) {          \
        backward(g, x, weight, rstd, gx, rows, d, threads);                                        \
    }
RMS_NORM(f32, float, float)
RMS_NORM(bf16, bf16, bf16)
RMS_NORM(bf16_f32, bf16, float)

// Token loss and its gradient over rows of logits, in place; see kernels/linear_xent.py.
//
// Two passes over a row: blocks that stay in L1 give the largest value and the sum of exponentials,
// then every element becomes its gradient.
#include "simd.h"

namespace {

constexpr int64_t SMALL = 16384;  // elements below which waking the other threads costs more
constexpr int64_t BLOCK = 2048;   // elements of fp32 held between the two loops of the first pass

struct Head {
    float inverse, softcap;  // 1 / divide, c or 0

    // s of raw logits; `slope` becomes ds/dz.
    inline vf operator()(vf z, vf& slope) const {
        z *= inverse;
        slope = splat(inverse);
        if (softcap == 0.f) return z;
        vf t = vtanh(z / softcap);
        slope *= 1.f - t * t;
        return softcap * t;
    }
};

// log sum exp over a row as its largest value and the sum relative to it.
template <class T>
void reduce(const T* z, const Head& head, int64_t v, float* top, double* total) {
    alignas(64) float s[BLOCK + W];
    float m = -INFINITY;
    double sums = 0;
    for (int64_t first = 0; first < v; first += BLOCK) {
        int64_t n = v - first < BLOCK ? v - first : BLOCK;
        vf slope, peak = splat(-INFINITY);
        for (int64_t i = 0; i < n; i += W) {
            vf x;
            if (n - i >= W) {
                x = head(load(z + first + i), slope);
            } else {  // e^-inf adds nothing
                x = head(load(z + first + i, int(n - i)), slope);
                for (int64_t j = n - i; j < W; j++) x[j] = -INFINITY;
            }
            store(s + i, x);
            peak = larger(x, peak);
        }
        float higher = highest(peak) > m ? highest(peak) : m;
        vf part = {};
        for (int64_t i = 0; i < n; i += W) part += vexp(load(s + i) - higher);
        sums = sums * std::exp(double(m) - higher) + sum(part);
        m = higher;
    }
    *top = m;
    *total = sums;
}

template <class T>
void differentiate(T* z, const Head& head, int64_t v, float top, float factor, float weight,
                   int64_t target) {
    vf slope;
    float s = head(load(z + target, 1), slope)[0];
    // The element of the target is read before and written after the others.
    float own = (std::exp(s - top) * factor - weight) * slope[0];
    for (int64_t i = 0; i + W <= v; i += W) {
        vf x = head(load(z + i), slope);
        store(z + i, vexp(x - top) * factor * slope);
    }
    if (int k = int(v % W)) {
        int64_t i = v - k;
        vf x = head(load(z + i, k), slope);
        store(z + i, vexp(x - top) * factor * slope, k);
    }
    put(z + target, own);
}

template <class T>
void softmax_xent(T* z, const int64_t* targets, const float* weight, float* nll, double divide,
                  double softcap, int64_t rows, int64_t v, int64_t threads) {
    Head head{float(1 / divide), float(softcap)};
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (rows * v > SMALL)
    for (int64_t j = 0; j < rows; j++) {
        T* row = z + j * v;
        if (weight[j] == 0.f) {  // whatever the row holds
            nll[j] = 0.f;
            std::memset(row, 0, v * sizeof(T));
            continue;
        }
        float top;
        double total;
        reduce(row, head, v, &top, &total);
        vf slope;
        float s = head(load(row + targets[j], 1), slope)[0];
        nll[j] = float(weight[j] * (std::log(total) + top - s));
        differentiate(row, head, v, top, float(weight[j] / total), weight[j], targets[j]);
    }
}

}  // namespace

#define SOFTMAX_XENT(suffix, T)                                                                   \
    EXPORT(softmax_xent_##suffix)(T* z, const int64_t* targets, const float* weight, float* nll,  \
                                  double divide, double softcap, int64_t rows, int64_t v,         \
                                  int64_t threads) {                                              \
        softmax_xent(z, targets, weight, nll, divide, softcap, rows, v, threads);                 \
    }
SOFTMAX_XENT(f32, float)
SOFTMAX_XENT(bf16, bf16)

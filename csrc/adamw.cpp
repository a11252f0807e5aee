// AdamW over the rows of (K, P) matrices; see kernels/adamw.py for the equations. One pass reads
// row and grad for their norm and largest value, one pass streams the update.
#include "simd.h"
#include <vector>

// torch rounds after every operation. With fused ones, ten steps end 3.6e-7 from its AdamW in norm,
// without them 0.9e-7; the pass waits for memory either way.
#pragma GCC optimize("fp-contract=off")

namespace {

// Elements of one piece of work: a single row keeps every core busy, and the order of sums
// depends on the row alone.
constexpr int64_t BLOCK = 16384;

inline int64_t blocks(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }
inline int64_t length(int64_t block, int64_t columns) {
    int64_t left = columns - block * BLOCK;
    return left < BLOCK ? left : BLOCK;
}

// |x| as integers are ordered like the numbers, and NaN lies above infinity.
inline vi magnitude(vf x) { return (vi)x & 0x7fffffff; }
inline vi larger(vi a, vi b) { return a > b ? a : b; }

// Of this file alone, and so is the vector of it: instances that the objects of several instruction
// sets share would be linked from any one of them.
struct Part {
    float square;
    int32_t peak;
};

Part measure(const float* row, const float* grad, int64_t n) {
    vf s[4] = {};
    vi top = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int j = 0; j < 4; j++) {
            vf g = load(grad + i + j * W);
            s[j] += g * g;
            top = larger(top, magnitude(load(row + i + j * W)));
        }
    for (; i < n; i += W) {
        int k = int(n - i < W ? n - i : W);
        vf g = load(grad + i, k);
        s[0] += g * g;
        top = larger(top, magnitude(load(row + i, k)));
    }
    Part out{sum((s[0] + s[1]) + (s[2] + s[3])), 0};
    for (int j = 0; j < W; j++) out.peak = top[j] > out.peak ? top[j] : out.peak;
    return out;
}

inline vf square_root(vf x) {
#ifdef __AVX512F__
    return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // GCC warns of the plain form
#else
    return (vf)_mm256_sqrt_ps((__m256)x);
#endif
}

struct Step {
    float clip, lr, inverse1, inverse2, take1, keep2, take2, eps, decay;

    void operator()(vf& x, vf g, vf& m, vf& v, vf rate) const {
        g *= clip;
        m += take1 * (g - m);
        v = v * keep2 + take2 * (g * g);
        // The ratio first: it is bounded (kernels/adamw.py), while rate x m could overflow.
        vf ratio = m * inverse1 / (inverse2 * square_root(v) + eps);
        x = x * (1.f - rate * decay) - rate * ratio;
    }
};

void update(const Step& step, float* row, const float* grad, float* m, float* v,
            const float* scale, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf x = load(row + i), a = load(m + i), b = load(v + i);
        step(x, load(grad + i), a, b, scale ? step.lr * load(scale + i) : splat(step.lr));
        store(row + i, x), store(m + i, a), store(v + i, b);
    }
    if (int k = int(n - i)) {
        vf x = load(row + i, k), a = load(m + i, k), b = load(v + i, k);
        step(x, load(grad + i, k), a, b, scale ? step.lr * load(scale + i, k) : splat(step.lr));
        store(row + i, x, k), store(m + i, a, k), store(v + i, b, k);
    }
}

}  // namespace

// square, peak: (K,) sum of grad^2 and max |row|; zero where a row is not active.
EXPORT(adamw_measure)(const float* row, const float* grad, const uint8_t* active, float* square,
                      float* peak, int64_t rows, int64_t columns, int64_t row_stride,
                      int64_t grad_stride, int64_t threads) {
    int64_t each = blocks(columns), work = rows * each;
    std::vector<Part> parts(work);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (work > 1)
    for (int64_t w = 0; w < work; w++) {
        int64_t k = w / each, first = w % each * BLOCK;
        if (active[k])
            parts[w] = measure(row + k * row_stride + first, grad + k * grad_stride + first,
                               length(w % each, columns));
    }
    for (int64_t k = 0; k < rows; k++) {
        double total = 0;
        int32_t top = 0;
        for (int64_t w = k * each; w < (k + 1) * each; w++) {
            total += parts[w].square;
            top = parts[w].peak > top ? parts[w].peak : top;
        }
        square[k] = float(total);
        std::memcpy(peak + k, &top, 4);
    }
}

// take: which rows to update; clip, lr, inverse1 = 1 / (1 - b1^n), inverse2 = 1 / sqrt(1 - b2^n):
// (K,). scale: (P,) or null. Strides in the order row, grad, m, v.
EXPORT(adamw_update)(float* row, const float* grad, float* m, float* v, const uint8_t* take,
                     const float* clip, const float* lr, const float* inverse1,
                     const float* inverse2, const float* scale, double beta1, double beta2,
                     double eps, double weight_decay, int64_t rows, int64_t columns,
                     int64_t row_stride, int64_t grad_stride, int64_t m_stride, int64_t v_stride,
                     int64_t threads) {
    int64_t each = blocks(columns), work = rows * each;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (work > 1)
    for (int64_t w = 0; w < work; w++) {
        int64_t k = w / each, first = w % each * BLOCK;
        if (!take[k]) continue;
        Step step{clip[k], lr[k], inverse1[k], inverse2[k], float(1 - beta1), float(beta2),
                  float(1 - beta2), float(eps), float(weight_decay)};
        update(step, row + k * row_stride + first, grad + k * grad_stride + first,
               m + k * m_stride + first, v + k * v_stride + first, scale ? scale + first : nullptr,
               length(w % each, columns));
    }
}

// total += sum_k weights[k] (rows[k] - start) in fp64, k ascending; see kernels/reduce.py.
#include "simd.h"

namespace {

constexpr int64_t BLOCK = 1024;  // columns whose sums stay in L1 while the rows stream past

void add(double* total, const float* row, const float* start, double weight, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        total[i] += weight * (start ? double(row[i]) - start[i] : double(row[i]));
}

}  // namespace

EXPORT(weighted_rows)(double* total, const float* rows, const float* start, const double* weights,
                      int64_t count, int64_t columns, int64_t stride, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (count * columns > 16 * BLOCK)
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t n = columns - first < BLOCK ? columns - first : BLOCK;
        for (int64_t k = 0; k < count; k++)
            if (weights[k] != 0)  // such a row may hold NaN
                add(total + first, rows + k * stride + first, start ? start + first : nullptr,
                    weights[k], n);
    }
}

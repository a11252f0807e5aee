// total += sum_k weights[k] (rows[k] - start) in fp64, k ascending; see kernels/reduce.py.
#include <vector>

#include "simd.h"

namespace {

// Columns whose sums stay in L2 while the rows stream past: 32 KB of a row at a time lets the
// prefetcher run, and eight rows share one pass over the sums (0.84 of copy bandwidth; 0.3 before).
constexpr int64_t BLOCK = 8192;

struct Row {
    const float* values;
    double weight;
};

template <int N, bool START>
void add(double* __restrict total, const Row* rows, const float* start, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; i++) {
        double sum = total[i], base = START ? double(start[i]) : 0.;
#pragma GCC unroll 8
        for (int k = 0; k < N; k++) sum += rows[k].weight * (double(rows[k].values[i]) - base);
        total[i] = sum;
    }
}

template <bool START>
void block(double* total, const std::vector<Row>& rows, const float* start, int64_t first,
           int64_t n) {
    size_t k = 0;
    for (; k + 8 <= rows.size(); k += 8) add<8, START>(total, &rows[k], start, first, n);
    for (; k < rows.size(); k++) add<1, START>(total, &rows[k], start, first, n);
}

}  // namespace

EXPORT(weighted_rows)(double* total, const float* rows, const float* start, const double* weights,
                      int64_t count, int64_t columns, int64_t stride, int64_t threads) {
    std::vector<Row> some;
    for (int64_t k = 0; k < count; k++)  // a row of weight 0 may hold NaN
        if (weights[k] != 0) some.push_back({rows + k * stride, weights[k]});
#pragma omp parallel for num_threads(threads) if (count * columns > 16 * BLOCK)
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t n = columns - first < BLOCK ? columns - first : BLOCK;
        if (start) block<true>(total, some, start, first, n);
        else block<false>(total, some, start, first, n);
    }
}

// Grouped LoRA over the packed rows of one pass; kernels/grouped_lora.py has the equations.
//
// Tasks are blocks of rows of one span (forward, dx) or blocks of columns of one slot (dA, dB), so
// no two tasks write the same element and no sum depends on the number of threads.
#include "panel.h"

namespace {

constexpr int BLOCK = 64;  // rows of a task
constexpr int TILE = 64;   // columns of a gradient task
constexpr int DEPTH = 256; // rows summed at once in a gradient task: its panel stays in L2

struct Span {
    int32_t slot, start, end, rank;
};

struct Site {
    int64_t in, out, modules, R;  // I, sum of widths, n, R
    const int64_t *columns, *widths;
    int64_t stride_a, stride_b;  // floats from one slot's factors to the next
    int rank(const Span& s) const { return s.rank ? s.rank : int(R); }
};

struct Job {
    int span, row;
};

inline std::vector<Job> row_blocks(const Span* spans, int64_t count) {
    std::vector<Job> jobs;
    for (int s = 0; s < count; s++)
        for (int t = spans[s].start; t < spans[s].end; t += BLOCK) jobs.push_back({s, t});
    return jobs;
}

// The first span of each slot: where its factors are packed. Spans of a slot are adjacent.
inline std::vector<int> first_spans(const Span* spans, int64_t count) {
    std::vector<int> first;
    for (int s = 0; s < count; s++)
        if (!s || spans[s].slot != spans[s - 1].slot) first.push_back(s);
    return first;
}

inline std::vector<int> owner(const Span* spans, int64_t count) {
    std::vector<int> of;
    int k = -1;
    for (int s = 0; s < count; s++) {
        if (!s || spans[s].slot != spans[s - 1].slot) k++;
        of.push_back(k);
    }
    return of;
}

template <class U, class T>
const typename U::unit* left_units(typename U::unit* room, const T* p, int rows, int k, int64_t row,
                                   int64_t* stride) {
    if (in_place<U>(T{}, k) && row % U::K == 0) {
        *stride = row / U::K;
        return reinterpret_cast<const typename U::unit*>(p);
    }
    pack_left<U>(room, p, rows, k, row);
    *stride = ceil_div(k, U::K);
    return room;
}

template <class T>
void forward(T* y, int64_t row_y, const T* x, const float* a, const float* b, const float* scale,
             float* h, const Span* spans, int64_t count, const Site site, int threads) {
    typedef typename UnitOf<T>::type U;
    typedef typename U::unit unit;
    int I = int(site.in), n = int(site.modules), R = int(site.R);
    int ui = ceil_div(I, U::K), ur = ceil_div(R, U::K), wide = round_up(n * R, W);
    int64_t wide_out = 0;
    for (int m = 0; m < n; m++) wide_out += round_up(int(site.widths[m]), W);
    auto first = first_spans(spans, count);
    auto of = owner(spans, count);
    int64_t size_a = int64_t(ui) * wide, size_b = ur * wide_out;
    unit* packed = scratch<unit, 0>(first.size() * (size_a + size_b));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < int64_t(first.size()) * (n + 1); i++) {
        const Span& s = spans[first[i / (n + 1)]];
        unit* room = packed + i / (n + 1) * (size_a + size_b);
        int r = site.rank(s), m = int(i % (n + 1));
        if (m == n) {  // all A of the site; ranks beyond the slot's own are left out
            const float* from = a + s.slot * site.stride_a;
            for (int j = 0; j < n && r < R; j++)
                for (int k = 0; k < ui; k++)
                    std::memset(room + int64_t(k) * wide + j * R + r, 0, sizeof(unit) * (R - r));
            for (int k = 0; k < ui; k++) {
                unit* o = room + int64_t(k) * wide;
                bool second = U::K == 2 && 2 * k + 1 < I;
                for (int j = 0; j < n; j++)
                    for (int q = 0; q < r; q++) {
                        const float* f = from + int64_t(j * R + q) * I + k * U::K;
                        put_unit(o + j * R + q, f[0], second ? f[1] : 0.f);
                    }
                for (int q = n * R; q < wide; q++) o[q] = 0;
            }
        } else {
            int64_t before = 0, packed_before = 0;
            for (int j = 0; j < m; j++) {
                before += site.widths[j];
                packed_before += round_up(int(site.widths[j]), W);
            }
            pack_right<U>(room + size_a + ur * packed_before,
                          b + s.slot * site.stride_b + before * R, r, int(site.widths[m]), 1, R);
        }
    }
    auto jobs = row_blocks(spans, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t j = 0; j < int64_t(jobs.size()); j++) {
        const Span& s = spans[jobs[j].span];
        int t = jobs[j].row, rows = std::min(BLOCK, s.end - t), r = site.rank(s);
        const unit* fa = packed + of[jobs[j].span] * (size_a + size_b);
        const unit* fb = fa + size_a;
        unit* room = scratch<unit, 1>(size_t(BLOCK) * (ui + ur));
        int64_t stride;
        const unit* left = left_units<U>(room, x + int64_t(t) * I, rows, I, I, &stride);
        float* out = h + int64_t(t) * n * R;
        product<U>(rows, n * R, ui, left, stride, 1, fa, wide, [&](int m, int c, vf acc) {
            if (c + W <= n * R) store(out + int64_t(m) * n * R + c, acc);
            else store(out + int64_t(m) * n * R + c, acc, n * R - c);
        });
        unit* hs = room + size_t(BLOCK) * ui;
        float by = scale[s.slot];
        for (int mod = 0; mod < n; mod++) {
            int units = ceil_div(r, U::K), width = int(site.widths[mod]);
            for (int m = 0; m < rows; m++)
                for (int k = 0; k < units; k++) {
                    const float* f = out + int64_t(m) * n * R + mod * R + k * U::K;
                    put_unit(hs + int64_t(m) * units + k, f[0] * by,
                             U::K == 2 && 2 * k + 1 < r ? f[1] * by : 0.f);
                }
            T* to = y + int64_t(t) * row_y + site.columns[mod];
            product<U>(rows, width, units, hs, units, 1, fb, round_up(width, W),
                       [&](int m, int c, vf acc) {
                           T* p = to + m * row_y + c;
                           if (c + W <= width) store(p, load(p) + acc);
                           else store(p, load(p, width - c) + acc, width - c);
                       });
            fb += int64_t(ur) * round_up(width, W);
        }
    }
}

// grad[out_row(j)][c] += sum_t p[t][j] q[t][c] over the rows of each span, span by span.
// p: (rows, n R) fp32, already scaled; q: T, row stride row_q. `add(j, c, vector, n)` writes.
template <class U, class T, class Add>
void outer(const Span* spans, int from, int to, const float* p, int64_t row_p, int ranks,
           const T* q, int64_t row_q, int columns, Add&& add) {
    typedef typename U::unit unit;
    int wide = round_up(columns, W);
    unit* left = scratch<unit, 2>(size_t(DEPTH) * ranks);
    unit* right = scratch<unit, 3>(size_t(DEPTH) * wide);
    float* total = scratch<float, 4>(size_t(ranks) * wide);
    for (int s = from; s < to; s++) {
        std::fill(total, total + size_t(ranks) * wide, 0.f);
        for (int t = spans[s].start; t < spans[s].end; t += DEPTH) {
            int depth = std::min(DEPTH, spans[s].end - t), units = ceil_div(depth, U::K);
            for (int k = 0; k < units; k++) {
                const float* f = p + (t + int64_t(k) * U::K) * row_p;
                bool second = U::K == 2 && 2 * k + 1 < depth;
                for (int j = 0; j < ranks; j++)
                    put_unit(left + int64_t(k) * ranks + j, f[j], second ? f[row_p + j] : 0.f);
            }
            pack_right<U>(right, q + int64_t(t) * row_q, depth, columns, row_q, 1);
            product<U>(ranks, columns, units, left, 1, ranks, right, wide,
                       [&](int j, int c, vf acc) {
                           float* o = total + int64_t(j) * wide + c;
                           store(o, load(o) + acc);
                       });
        }
        add(total, wide);
    }
}

template <class T>
void backward(const T* g, int64_t row_g, const T* x, const float* h, const float* a,
              const float* b, const float* scale, float* grad_a, float* grad_b, T* grad_x,
              const Span* spans, int64_t count, const Site site, int64_t total_rows, int threads) {
    typedef typename UnitOf<T>::type U;
    typedef typename U::unit unit;
    int I = int(site.in), n = int(site.modules), R = int(site.R), nR = n * R;
    int wide_r = round_up(R, W), ur = ceil_div(R, U::K), wide_i = round_up(I, W);
    int64_t size_b = 0;
    for (int m = 0; m < n; m++) size_b += int64_t(ceil_div(int(site.widths[m]), U::K)) * wide_r;
    int64_t size_a = int64_t(n) * ur * wide_i, each = size_a + size_b;
    auto first = first_spans(spans, count);
    auto of = owner(spans, count);
    unit* packed = scratch<unit, 5>(first.size() * each);
    float* u = scratch<float, 6>(size_t(total_rows) * nR);   // scale B^T g
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < int64_t(first.size()) * n; i++) {
        const Span& s = spans[first[i / n]];
        unit* room = packed + i / n * each;
        int r = site.rank(s), m = int(i % n);
        int64_t before = 0, packed_before = 0;
        for (int j = 0; j < m; j++) {
            before += site.widths[j];
            packed_before += int64_t(ceil_div(int(site.widths[j]), U::K)) * wide_r;
        }
        int width = int(site.widths[m]);
        const float* from = b + s.slot * site.stride_b + before * R;
        unit* to = room + size_a + packed_before;
        for (int k = 0; k < ceil_div(width, U::K); k++)
            for (int j = 0; j < wide_r; j++) {
                const float* f = from + int64_t(k) * U::K * R + j;
                bool second = U::K == 2 && 2 * k + 1 < width;
                put_unit(to + int64_t(k) * wide_r + j, j < r ? f[0] : 0.f,
                         j < r && second ? f[R] : 0.f);
            }
        if (grad_x)
            pack_right<U>(room + int64_t(m) * ur * wide_i,
                          a + s.slot * site.stride_a + int64_t(m) * R * I, r, I, I, 1);
    }
    auto jobs = row_blocks(spans, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t j = 0; j < int64_t(jobs.size()); j++) {
        const Span& s = spans[jobs[j].span];
        int t = jobs[j].row, rows = std::min(BLOCK, s.end - t), r = site.rank(s);
        const unit* fa = packed + of[jobs[j].span] * each;
        const unit* fb = fa + size_a;
        float by = scale[s.slot];
        float* out = u + int64_t(t) * nR;
        int most = 0;
        for (int m = 0; m < n; m++) most = std::max(most, int(site.widths[m]));
        unit* room = scratch<unit, 7>(size_t(BLOCK) * (ceil_div(most, U::K) + n * ur));
        unit* us = room + size_t(BLOCK) * ceil_div(most, U::K);
        for (int mod = 0; mod < n; mod++) {
            int width = int(site.widths[mod]), units = ceil_div(width, U::K);
            int64_t stride;
            const T* from = g + int64_t(t) * row_g + site.columns[mod];
            const unit* left = site.columns[mod] % U::K
                ? (pack_left<U>(room, from, rows, width, row_g), stride = units, room)
                : left_units<U>(room, from, rows, width, row_g, &stride);
            product<U>(rows, R, units, left, stride, 1, fb, wide_r, [&](int m, int c, vf acc) {
                float* p = out + int64_t(m) * nR + mod * R + c;
                if (c + W <= R) store(p, acc * by);
                else store(p, acc * by, R - c);
            });
            fb += int64_t(units) * wide_r;
        }
        if (!grad_x) continue;
        T* to = grad_x + int64_t(t) * I;
        for (int mod = 0; mod < n; mod++) {
            int units = ceil_div(r, U::K);
            for (int m = 0; m < rows; m++)
                for (int k = 0; k < units; k++) {
                    const float* f = out + int64_t(m) * nR + mod * R + k * U::K;
                    put_unit(us + (int64_t(m) * n + mod) * ur + k, f[0],
                             U::K == 2 && 2 * k + 1 < r ? f[1] : 0.f);
                }
            for (int m = 0; m < rows; m++)
                for (int k = units; k < ur; k++) us[(int64_t(m) * n + mod) * ur + k] = 0;
        }
        // Units of a module beyond the slot's rank meet factors that were never packed: one
        // product per module where ranks are cut, one for all modules where they are not.
        int together = r == R ? n : 1;
        for (int mod = 0; mod < n; mod += together)
            product<U>(rows, I, together == 1 ? ceil_div(r, U::K) : n * ur, us + mod * ur, n * ur, 1,
                       fa + int64_t(mod) * ur * wide_i, wide_i, [&](int m, int c, vf acc) {
                           T* p = to + int64_t(m) * I + c;
                           if (c + W <= I) store(p, load(p) + acc);
                           else store(p, load(p, I - c) + acc, I - c);
                       });
    }
    // Gradients: one task per slot and block of columns, first of x, then of each module of g.
    std::vector<int> blocks{ceil_div(I, TILE)};
    for (int m = 0; m < n; m++) blocks.push_back(ceil_div(int(site.widths[m]), TILE));
    int per_slot = 0;
    for (int k : blocks) per_slot += k;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < int64_t(first.size()) * per_slot; i++) {
        int k = int(i / per_slot), block = int(i % per_slot), part = 0;
        while (block >= blocks[part]) block -= blocks[part++];
        int from = first[k], to = k + 1 < int(first.size()) ? first[k + 1] : int(count);
        const Span& s = spans[from];
        int c0 = block * TILE;
        if (part == 0) {
            float* out = grad_a + s.slot * site.stride_a;
            int wide = std::min(TILE, I - c0), r = site.rank(s);
            outer<U>(spans, from, to, u, nR, nR, x + c0, I, wide, [&](const float* sum, int row) {
                for (int m = 0; m < n; m++)
                    for (int q = 0; q < r; q++) {
                        float* o = out + int64_t(m * R + q) * I + c0;
                        const float* p = sum + int64_t(m * R + q) * row;
                        for (int c = 0; c < wide; c++) o[c] += p[c];
                    }
            });
        } else {
            int m = part - 1, r = site.rank(s), width = int(site.widths[m]);
            int64_t before = 0;
            for (int q = 0; q < m; q++) before += site.widths[q];
            float* out = grad_b + s.slot * site.stride_b + (before + c0) * R;
            int wide = std::min(TILE, width - c0);
            float by = scale[s.slot];
            outer<U>(spans, from, to, h + m * R, nR, r, g + site.columns[m] + c0, row_g, wide,
                     [&](const float* sum, int row) {
                         for (int c = 0; c < wide; c++)
                             for (int q = 0; q < r; q++)
                                 out[int64_t(c) * R + q] += by * sum[int64_t(q) * row + c];
                     });
        }
    }
}

Site site_of(int64_t in, int64_t modules, int64_t rank, const int64_t* columns,
             const int64_t* widths, int64_t stride_a, int64_t stride_b) {
    Site s{in, 0, modules, rank, columns, widths, stride_a, stride_b};
    for (int64_t m = 0; m < modules; m++) s.out += widths[m];
    return s;
}

}  // namespace

#define FORWARD(name, T)                                                                          \
    EXPORT(name)(void* y, int64_t row_y, void* x, void* a, void* b, void* scale, void* h,         \
                 void* spans, int64_t count, int64_t in, int64_t modules, int64_t rank,           \
                 void* columns, void* widths, int64_t stride_a, int64_t stride_b,                 \
                 int64_t threads) {                                                               \
        forward<T>((T*)y, row_y, (const T*)x, (const float*)a, (const float*)b,                   \
                   (const float*)scale, (float*)h, (const Span*)spans, count,                     \
                   site_of(in, modules, rank, (const int64_t*)columns, (const int64_t*)widths,    \
                           stride_a, stride_b),                                                   \
                   int(threads));                                                                 \
    }
FORWARD(grouped_lora_f32, float)
FORWARD(grouped_lora_bf16, bf16)

#define BACKWARD(name, T)                                                                         \
    EXPORT(name)(void* g, int64_t row_g, void* x, void* h, void* a, void* b, void* scale,         \
                 void* grad_a, void* grad_b, void* grad_x, void* spans, int64_t count,            \
                 int64_t rows, int64_t in, int64_t modules, int64_t rank, void* columns,          \
                 void* widths, int64_t stride_a, int64_t stride_b, int64_t threads) {             \
        backward<T>((const T*)g, row_g, (const T*)x, (const float*)h, (const float*)a,            \
                    (const float*)b, (const float*)scale, (float*)grad_a, (float*)grad_b,         \
                    (T*)grad_x, (const Span*)spans, count,                                        \
                    site_of(in, modules, rank, (const int64_t*)columns, (const int64_t*)widths,   \
                            stride_a, stride_b),                                                  \
                    rows, int(threads));                                                          \
    }
BACKWARD(grouped_lora_backward_f32, float)
BACKWARD(grouped_lora_backward_bf16, bf16)

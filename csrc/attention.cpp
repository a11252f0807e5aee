// Causal attention inside packed sequences; kernels/packed_attention.py has the equations.
//
// A task is one sequence (forward) or one family of sequences with a common ancestor (backward)
// and one key head; nothing is shared between tasks, and every sum runs in the order of rows.
// All products are in fp32, bf16 inputs included.
#include "panel.h"

namespace {

constexpr int QUERIES = 128;  // rows of scores held at once: 128 x 512 keys are 256 KB

struct Sequence {
    int32_t start, length, parent, before;
};

struct Heads {
    int64_t queries, keys, size;       // Hq, Hkv, D
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
    float scale, softcap;
    int64_t window;
};

// Rows of T as fp32 [rows][wide], times `by`; columns beyond D are zero.
template <class T>
void rows_of(float* out, const T* p, int rows, int size, int wide, int64_t row, float by = 1.f) {
    for (int m = 0; m < rows; m++)
        for (int c = 0; c < wide; c += W) {
            const T* from = p + m * row + c;
            vf x = c + W <= size ? load(from) : load(from, std::max(0, size - c));
            store(out + int64_t(m) * wide + c, x * by);
        }
}

// [size][wide]: transposed from [rows][stride], zero beyond `rows`.
void transpose(float* out, const float* p, int rows, int size, int64_t stride, int wide) {
    for (int c = 0; c < size; c++)
        for (int m = 0; m < wide; m++)
            out[int64_t(c) * wide + m] = m < rows ? p[m * stride + c] : 0.f;
}

// The keys (or values) that a sequence sees, oldest ancestor first: [before + length][wide].
template <class T>
void gather(float* out, const T* p, const Sequence* all, int i, int size, int wide, int64_t row) {
    for (int s = i; s >= 0; s = all[s].parent)
        rows_of(out + int64_t(all[s].before) * wide, p + all[s].start * row, all[s].length, size,
                wide, row);
}

// Scores of rows [first, first + rows) of a sequence against its keys, capped, -inf where unseen.
// Columns beyond a block's last visible key are never computed, and never read.
void scores(float* s, const float* q, const float* kt, int rows, int first, int before, int seen,
            int wide_d, int size, const Heads& h) {
    int wide = round_up(seen, W);
    for (int m = 0; m < rows; m += ROWS) {
        int some = std::min(ROWS, rows - m), limit = std::min(seen, before + first + m + some);
        product<Single>(some, limit, size, q + int64_t(m) * wide_d, wide_d, 1, kt, wide,
                        [&](int r, int c, vf x) {
                            if (h.softcap > 0.f) x = vtanh(x / h.softcap) * h.softcap;
                            store(s + int64_t(m + r) * wide + c, x);
                        });
        for (int r = m; r < m + some; r++) {
            int at = before + first + r;
            for (int c = at + 1; c < round_up(limit, W); c++) s[int64_t(r) * wide + c] = -INFINITY;
            for (int64_t c = 0; h.window && c <= at - h.window; c++) s[r * wide + c] = -INFINITY;
        }
    }
}

// exp(s - max) in place; returns the sum. `limit` is a multiple of W, unseen scores are -inf.
inline float softmax(float* s, int limit, float* max) {
    vf top = splat(-INFINITY), total = splat(0.f);
    for (int c = 0; c < limit; c += W) top = larger(top, load(s + c));
    float most = highest(top);
    for (int c = 0; c < limit; c += W) {
        vf e = vexp(load(s + c) - most);
        store(s + c, e);
        total += e;
    }
    if (max) *max = most;
    return sum(total);
}

template <class T>
void forward(const T* q, const T* k, const T* v, T* o, float* lse, const Sequence* all,
             int64_t count, const Heads h, int threads) {
    int size = int(h.size), wide_d = round_up(size, W), group = int(h.queries / h.keys);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < count * h.keys; task++) {
        const Sequence& seq = all[task / h.keys];
        int64_t head = task % h.keys;
        int seen = seq.before + seq.length, wide = round_up(seen, W);
        float* keys = scratch<float, 0>(size_t(seen) * wide_d);
        float* values = scratch<float, 1>(size_t(seen) * wide_d);
        float* kt = scratch<float, 2>(size_t(size) * wide);
        float* s = scratch<float, 3>(size_t(QUERIES) * wide);
        float* qs = scratch<float, 4>(size_t(QUERIES) * wide_d);
        gather(keys, k + head * h.k_head, all, int(task / h.keys), size, wide_d, h.k_row);
        gather(values, v + head * h.v_head, all, int(task / h.keys), size, wide_d, h.v_row);
        transpose(kt, keys, seen, size, wide_d, wide);
        for (int g = 0; g < group; g++) {
            int64_t head_q = head * group + g;
            for (int first = 0; first < seq.length; first += QUERIES) {
                int rows = std::min(QUERIES, seq.length - first);
                int64_t row0 = seq.start + first;
                rows_of(qs, q + row0 * h.q_row + head_q * h.q_head, rows, size, wide_d, h.q_row,
                        h.scale);
                scores(s, qs, kt, rows, first, seq.before, seen, wide_d, size, h);
                float inverse[QUERIES];
                for (int r = 0; r < rows; r++) {
                    float most, norm = softmax(s + int64_t(r) * wide,
                                               round_up(seq.before + first + r + 1, W), &most);
                    inverse[r] = 1.f / norm;
                    lse[(row0 + r) * h.queries + head_q] = most + std::log(norm);
                }
                for (int m = 0; m < rows; m += ROWS) {
                    int some = std::min(ROWS, rows - m);
                    int limit = std::min(seen, seq.before + first + m + some);
                    for (int r = m; r < m + some; r++)  // a block's rows end at its last one's keys
                        for (int c = round_up(seq.before + first + r + 1, W); c < limit; c++)
                            s[int64_t(r) * wide + c] = 0.f;
                    product<Single>(some, size, limit, s + int64_t(m) * wide, wide, 1, values,
                                    wide_d, [&](int r, int c, vf x) {
                                        T* to = o + ((row0 + m + r) * h.queries + head_q) * size + c;
                                        x *= inverse[m + r];
                                        if (c + W <= size) store(to, x);
                                        else store(to, x, size - c);
                                    });
                }
            }
        }
    }
}

// One sequence of one key head in the backward: its keys and values, and room for a block of rows.
struct Pass {
    int seen, wide, size, wide_d;
    float *keys, *values, *kt, *vt;  // [seen][wide_d] and [size][wide]
    float *p, *ds, *slope;           // [QUERIES][wide], [QUERIES][wide], [wide]
    float *qs, *gs;                  // [QUERIES][wide_d]
};

template <class T>
Pass open(const T* k, const T* v, const Sequence* all, int i, const Heads& h) {
    Pass a;
    a.size = int(h.size), a.wide_d = round_up(a.size, W);
    a.seen = all[i].before + all[i].length, a.wide = round_up(a.seen, W);
    size_t own = size_t(a.seen) * a.wide_d, across = size_t(a.size) * a.wide;
    size_t block = size_t(QUERIES) * a.wide, rows = size_t(QUERIES) * a.wide_d;
    a.keys = scratch<float, 0>(own), a.values = scratch<float, 1>(own);
    a.kt = scratch<float, 2>(across), a.vt = scratch<float, 7>(across);
    a.p = scratch<float, 3>(block), a.ds = scratch<float, 8>(block);
    a.slope = scratch<float, 10>(size_t(a.wide));
    a.qs = scratch<float, 4>(rows), a.gs = scratch<float, 9>(rows);
    gather(a.keys, k, all, i, a.size, a.wide_d, h.k_row);
    gather(a.values, v, all, i, a.size, a.wide_d, h.v_row);
    transpose(a.kt, a.keys, a.seen, a.size, a.wide_d, a.wide);
    transpose(a.vt, a.values, a.seen, a.size, a.wide_d, a.wide);
    return a;
}

// One row: scores become probabilities p, and dp becomes ds = p (dp - sum p dp) cap'(s).
void row_backward(const Pass& a, int r, int limit, float softcap) {
    float *p = a.p + int64_t(r) * a.wide, *ds = a.ds + int64_t(r) * a.wide;
    if (softcap > 0.f)  // cap' = 1 - (s / c)^2; 0 where unseen
        for (int c = 0; c < limit; c += W) {
            vf s = load(p + c), ratio = s / softcap;
            store(a.slope + c, s > -INFINITY ? 1.f - ratio * ratio : splat(0.f));
        }
    float inverse = 1.f / softmax(p, limit, nullptr);
    vf dot = splat(0.f);
    for (int c = 0; c < limit; c += W) {
        vf e = load(p + c) * inverse;
        store(p + c, e);
        dot += e * load(ds + c);
    }
    float delta = sum(dot);
    for (int c = 0; c < limit; c += W) {
        vf d = load(p + c) * (load(ds + c) - delta);
        store(ds + c, softcap > 0.f ? d * load(a.slope + c) : d);
    }
}

// p and ds of `rows` rows from `first` on, and their dq; `gq` is the first row's, `row` apart.
template <class T>
void queries_backward(const Pass& a, int rows, int first, int before, T* gq, int64_t row,
                      const Heads& h) {
    scores(a.p, a.qs, a.kt, rows, first, before, a.seen, a.wide_d, a.size, h);
    int at = before + first, end = round_up(std::min(a.seen, at + rows), W);
    for (int m = 0; m < rows; m += ROWS) {
        int some = std::min(ROWS, rows - m), limit = std::min(a.seen, at + m + some);
        float* ds = a.ds + int64_t(m) * a.wide;
        product<Single>(some, limit, a.size, a.gs + int64_t(m) * a.wide_d, a.wide_d, 1, a.vt,
                        a.wide,
                        [&](int r, int c, vf x) { store(ds + int64_t(r) * a.wide + c, x); });
        int own = round_up(limit, W);
        for (int r = m; r < m + some; r++) {
            row_backward(a, r, own, h.softcap);
            for (int c = own; c < end; c++) a.p[r * a.wide + c] = a.ds[r * a.wide + c] = 0.f;
        }
        product<Single>(some, a.size, limit, ds, a.wide, 1, a.keys, a.wide_d,
                        [&](int r, int c, vf x) {
                            T* to = gq + (m + r) * row + c;
                            x *= h.scale;
                            if (c + W <= a.size) store(to, x);
                            else store(to, x, a.size - c);
                        });
    }
}

// dk += ds^T q and dv += p^T g of the keys that a block of rows sees, each to its ancestor's place.
void keys_backward(const Pass& a, const Sequence* all, int i, const std::vector<int>& offset,
                   int rows, int first, float* sum_k, float* sum_v) {
    int at = all[i].before + first, end = std::min(a.seen, at + rows);
    for (int s = i; s >= 0; s = all[s].parent) {
        int base = all[s].before;
        for (int j = 0; j < all[s].length && base + j < end; j += ROWS) {
            int some = std::min({ROWS, all[s].length - j, end - base - j});
            int from = std::max(0, base + j - at);  // earlier rows do not see it
            if (from >= rows) break;
            int64_t here = int64_t(from) * a.wide + base + j, q = int64_t(from) * a.wide_d;
            int64_t to = int64_t(offset[s] + j) * a.wide_d;
            auto add = [&](const float* left, const float* right, float* total) {
                product<Single>(some, a.size, rows - from, left + here, 1, a.wide, right + q,
                                a.wide_d, [&](int r, int c, vf x) {
                                    float* t = total + to + int64_t(r) * a.wide_d + c;
                                    store(t, load(t) + x);
                                });
            };
            add(a.ds, a.qs, sum_k);
            add(a.p, a.gs, sum_v);
        }
    }
}

// Sequences by their common ancestor, and where each one's rows lie among its family's.
struct Families {
    std::vector<std::vector<int>> members;
    std::vector<int> offset, tokens;

    Families(const Sequence* all, int64_t count) : offset(count) {
        std::vector<int> of(count);
        for (int i = 0; i < count; i++) {
            if (all[i].parent < 0) {
                of[i] = int(members.size());
                members.push_back({});
                tokens.push_back(0);
            } else {
                of[i] = of[all[i].parent];
            }
            members[of[i]].push_back(i);
            offset[i] = tokens[of[i]];
            tokens[of[i]] += all[i].length;
        }
    }
};

// gk and gv rows of a family are summed in fp32 scratch, sequence by sequence, then rounded once.
template <class T>
void backward(const T* g, const T* q, const T* k, const T* v, T* gq, T* gk, T* gv,
              const Sequence* all, int64_t count, const Heads h, int threads) {
    int size = int(h.size), wide_d = round_up(size, W), group = int(h.queries / h.keys);
    int64_t row = h.queries * size;
    Families families(all, count);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < int64_t(families.members.size()) * h.keys; task++) {
        const std::vector<int>& members = families.members[task / h.keys];
        int64_t head = task % h.keys;
        size_t total = size_t(families.tokens[task / h.keys]) * wide_d;
        float *sum_k = scratch<float, 5>(total), *sum_v = scratch<float, 6>(total);
        std::fill(sum_k, sum_k + total, 0.f);
        std::fill(sum_v, sum_v + total, 0.f);
        for (int i : members) {
            const Sequence& seq = all[i];
            Pass a = open(k + head * h.k_head, v + head * h.v_head, all, i, h);
            for (int64_t head_q = head * group; head_q < (head + 1) * group; head_q++)
                for (int first = 0; first < seq.length; first += QUERIES) {
                    int rows = std::min(QUERIES, seq.length - first);
                    int64_t row0 = seq.start + first, out = row0 * row + head_q * size;
                    rows_of(a.qs, q + row0 * h.q_row + head_q * h.q_head, rows, size, wide_d,
                            h.q_row, h.scale);
                    rows_of(a.gs, g + out, rows, size, wide_d, row);
                    queries_backward(a, rows, first, seq.before, gq + out, row, h);
                    keys_backward(a, all, i, families.offset, rows, first, sum_k, sum_v);
                }
        }
        for (int i : members)
            for (int r = 0; r < all[i].length; r++) {
                int64_t to = ((all[i].start + r) * h.keys + head) * size;
                int64_t from = int64_t(families.offset[i] + r) * wide_d;
                for (int c = 0; c < size; c += W) {
                    store(gk + to + c, load(sum_k + from + c), std::min(W, size - c));
                    store(gv + to + c, load(sum_v + from + c), std::min(W, size - c));
                }
            }
    }
}

}  // namespace

#define ATTENTION(suffix, T)                                                                      \
    EXPORT(packed_attention_##suffix)(void* q, void* k, void* v, void* o, void* lse,              \
                                      void* sequences, int64_t count, int64_t hq, int64_t hkv,    \
                                      int64_t d, int64_t q_row, int64_t q_head, int64_t k_row,    \
                                      int64_t k_head, int64_t v_row, int64_t v_head,              \
                                      double scale, double softcap, int64_t window,               \
                                      int64_t threads) {                                          \
        Heads h{hq, hkv, d, q_row, q_head, k_row, k_head, v_row, v_head,                          \
                float(scale), float(softcap), window};                                            \
        forward((const T*)q, (const T*)k, (const T*)v, (T*)o, (float*)lse,                        \
                (const Sequence*)sequences, count, h, int(threads));                              \
    }                                                                                             \
    EXPORT(packed_attention_backward_##suffix)(                                                   \
        void* g, void* q, void* k, void* v, void* gq, void* gk, void* gv,                         \
        void* sequences, int64_t count, int64_t hq, int64_t hkv, int64_t d, int64_t q_row,        \
        int64_t q_head, int64_t k_row, int64_t k_head, int64_t v_row, int64_t v_head,             \
        double scale, double softcap, int64_t window, int64_t threads) {                          \
        Heads h{hq, hkv, d, q_row, q_head, k_row, k_head, v_row, v_head,                          \
                float(scale), float(softcap), window};                                            \
        backward((const T*)g, (const T*)q, (const T*)k, (const T*)v, (T*)gq, (T*)gk, (T*)gv,      \
                 (const Sequence*)sequences, count, h, int(threads));                                                                   \
    }
ATTENTION(f32, float)
ATTENTION(bf16, bf16)

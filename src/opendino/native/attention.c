// SPDX-License-Identifier: Apache-2.0
// Softmax attention of bf16 tokens and its gradients on processors with AVX-512 bf16 products, and the addition of a
// branch to the residual stream together with the LayerNorm that follows it.
//
// Shapes: B images, N tokens, H heads of 64, D = 64·H.
//
// Attention of one head: K is laid out once so that 16 keys stand side by side for each pair of dimensions, V so that
// each dimension stands beside that of the next key; both are what the bf16 product reads. Then, for QUERIES queries at a
// time, scores against all keys go to a buffer that stays in the first cache, become probabilities there, and weigh V.
// Products and sums are fp32; probabilities are rounded to bf16 for the second product, as a bf16 softmax would give.
//
// Gradients, with P the probabilities, s the scale, δ = Σ dO·O of each query (Dao et al. 2022, appendix B.4):
//   dS = P·(dO·Vᵀ − δ)·s    dQ = dS·K    dK = dSᵀ·Q    dV = Pᵀ·dO
// P is made again from the logarithm of each query's sum. Rows of dS are made for a few queries to give their dQ, and once
// more for a few keys to give their dK and dV: two products more than keeping dS, and nothing to turn round or to keep.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 64
#define QUERIES 6

static inline float from_bf16(uint16_t x) {
    union { uint32_t i; float f; } u = {(uint32_t)x << 16};
    return u.f;
}

static inline uint16_t to_bf16(float x) {  // to the nearest, ties to even; NaN stays NaN
    union { float f; uint32_t i; } u = {x};
    if (x != x) return 0x7fc0;
    return (uint16_t)((u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16);
}

// Adds a branch (bf16) to the residual stream (fp32), in place, and gives the LayerNorm of the sum in bf16.
// branch may be NULL: then only the LayerNorm.
void add_and_normalize(float *stream, const uint16_t *branch, const float *weight, const float *bias, uint16_t *normal,
                       int64_t rows, int64_t dim, float eps) {
    for (int64_t r = 0; r < rows; r++) {
        float *x = stream + r * dim;
        float sum = 0, squares = 0;
        if (branch) {
            const uint16_t *y = branch + r * dim;
            for (int64_t i = 0; i < dim; i++) {
                float v = x[i] + from_bf16(y[i]);
                x[i] = v;
                sum += v;
            }
        } else {
            for (int64_t i = 0; i < dim; i++) sum += x[i];
        }
        float mean = sum / (float)dim;
        for (int64_t i = 0; i < dim; i++) squares += (x[i] - mean) * (x[i] - mean);
        float factor = 1.0f / sqrtf(squares / (float)dim + eps);
        uint16_t *out = normal + r * dim;
        for (int64_t i = 0; i < dim; i++) out[i] = to_bf16((x[i] - mean) * factor * weight[i] + bias[i]);
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

int attention_bf16_supported(void) { return 1; }

static inline __m512 bf16_product(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// Turns 16 rows of 16 numbers (32 bits) round; `step` is the distance of rows in the target, in numbers.
static inline void transpose16(const __m512i *rows, uint32_t *out, int64_t step) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + i * step, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
        _mm512_storeu_si512(out + (i + 8) * step, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    }
}

// Keys of one head as [block of 16 keys][pair of dimensions][key][2]; missing keys are 0.
static void pack_keys(const uint16_t *keys, int64_t stride, int64_t n, uint32_t *packed) {
    for (int64_t first = 0; first < n; first += 16) {
        for (int half = 0; half < 2; half++) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = first + i < n ? _mm512_loadu_si512(keys + (first + i) * stride + 32 * half)
                                        : _mm512_setzero_si512();
            transpose16(rows, packed + first * 32 + half * 256, 16);
        }
    }
}

// Values of one head as [pair of keys][dimension][2]; missing keys are 0.
static void pack_values(const uint16_t *values, int64_t stride, int64_t n, int64_t padded, uint32_t *packed) {
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++) {
        order[0][i] = (uint16_t)(i / 2 + (i % 2 ? 32 : 0));
        order[1][i] = (uint16_t)(i / 2 + 16 + (i % 2 ? 32 : 0));
    }
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]), zero = _mm512_setzero_si512();
    for (int64_t k = 0; k < padded; k += 2) {
        for (int half = 0; half < 2; half++) {
            __m512i one = k < n ? _mm512_loadu_si512(values + k * stride + 32 * half) : zero;
            __m512i two = k + 1 < n ? _mm512_loadu_si512(values + (k + 1) * stride + 32 * half) : zero;
            uint32_t *out = packed + k * 32 + 32 * half;
            _mm512_storeu_si512(out, _mm512_permutex2var_epi16(one, low, two));
            _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(one, high, two));
        }
    }
}

// Scores of QUERIES queries against `blocks` blocks of 16 keys, and the largest so far of each query.
#define SCORES(BLOCKS)                                                                                       \
    static inline void scores_##BLOCKS(const uint16_t *const *queries, const uint32_t *keys, float *scores,  \
                                       int64_t padded, __m512 *largest, __mmask16 there) {                   \
        __m512 sums[QUERIES][BLOCKS];                                                                        \
        for (int q = 0; q < QUERIES; q++)                                                                    \
            for (int b = 0; b < BLOCKS; b++) sums[q][b] = _mm512_setzero_ps();                               \
        for (int d = 0; d < HEAD / 2; d++) {                                                                 \
            __m512i k[BLOCKS];                                                                               \
            for (int b = 0; b < BLOCKS; b++) k[b] = _mm512_loadu_si512(keys + b * 512 + d * 16);             \
            for (int q = 0; q < QUERIES; q++) {                                                              \
                int32_t pair;                                                                                \
                memcpy(&pair, queries[q] + 2 * d, 4);                                                        \
                __m512i both = _mm512_set1_epi32(pair);                                                      \
                for (int b = 0; b < BLOCKS; b++) sums[q][b] = bf16_product(sums[q][b], both, k[b]);          \
            }                                                                                                \
        }                                                                                                    \
        for (int q = 0; q < QUERIES; q++)                                                                    \
            for (int b = 0; b < BLOCKS; b++) {                                                               \
                __m512 s = sums[q][b];                                                                       \
                if (b == BLOCKS - 1) s = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, s);            \
                _mm512_storeu_ps(scores + q * padded + 16 * b, s);                                           \
                largest[q] = _mm512_max_ps(largest[q], s);                                                   \
            }                                                                                                \
    }
SCORES(1)
SCORES(2)
SCORES(3)
SCORES(4)

// 2^x for x ≤ 0, to a relative error of 3e-6 and exact for 0: a polynomial of what x is above the integer below it, and
// that integer as the exponent. 0 for -INFINITY, whose part above is 0.
static inline __m512 power_of_two(__m512 x) {
    __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0.0134266857f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.0522424728f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.241280213f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.693044841f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

// One row of scores to probabilities without their divisor, bf16; gives the divisor: the sum of what was rounded.
static inline float probabilities(const float *scores, int64_t padded, __m512 largest, float factor, uint16_t *out) {
    __m512 scale = _mm512_set1_ps(factor);
    __m512 shift = _mm512_set1_ps(-factor * _mm512_reduce_max_ps(largest));
    __m512i ones = _mm512_set1_epi16(0x3f80);
    __m512 sum = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 32 <= padded; k += 32) {
        __m512 p = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + k), scale, shift));
        __m512 next = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + k + 16), scale, shift));
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(next, p);
        _mm512_storeu_si512(out + k, rounded);
        sum = bf16_product(sum, rounded, ones);
    }
    if (k < padded) {
        __m512 p = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + k), scale, shift));
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(p);
        _mm256_storeu_si256((__m256i *)(out + k), rounded);
        sum = bf16_product(sum, _mm512_zextsi256_si512(rounded), ones);
    }
    return _mm512_reduce_add_ps(sum);
}

// Weighs the values: QUERIES rows of 64.
static inline void weigh(const uint16_t *weights, int64_t padded, const uint32_t *values, int64_t n, const float *sums,
                         uint16_t *const *out) {
    __m512 total[QUERIES][4];
    for (int q = 0; q < QUERIES; q++)
        for (int v = 0; v < 4; v++) total[q][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 2) {
        __m512i value[4];
        for (int v = 0; v < 4; v++) value[v] = _mm512_loadu_si512(values + k * 32 + 16 * v);
        for (int q = 0; q < QUERIES; q++) {
            int32_t pair;
            memcpy(&pair, weights + q * padded + k, 4);
            __m512i both = _mm512_set1_epi32(pair);
            for (int v = 0; v < 4; v++) total[q][v] = bf16_product(total[q][v], both, value[v]);
        }
    }
    for (int q = 0; q < QUERIES; q++) {
        __m512 share = _mm512_set1_ps(1.0f / sums[q]);
        for (int v = 0; v < 4; v++)
            _mm256_storeu_si256((__m256i *)(out[q] + 16 * v),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(total[q][v], share)));
    }
}

typedef struct {
    uint32_t *keys, *values;
    float *scores;
    uint16_t *weights;
} Scratch;

#define LOG2E 1.44269504f

// Scores of QUERIES rows against all `blocks` blocks of packed keys; `last` says which keys of the last block there are.
static inline void all_scores(const uint16_t *const *queries, const uint32_t *keys, float *scores, int64_t blocks,
                              __m512 *largest, __mmask16 last) {
    int64_t padded = 16 * blocks;
    for (int64_t b = 0; b < blocks;) {
        int64_t left = blocks - b;
        __mmask16 there = left <= 4 ? last : 0xffff;
        if (left >= 4) scores_4(queries, keys + b * 512, scores + 16 * b, padded, largest, there), b += 4;
        else if (left == 3) scores_3(queries, keys + b * 512, scores + 16 * b, padded, largest, there), b += 3;
        else if (left == 2) scores_2(queries, keys + b * 512, scores + 16 * b, padded, largest, there), b += 2;
        else scores_1(queries, keys + b * 512, scores + 16 * b, padded, largest, there), b += 1;
    }
}

// QUERIES rows of 64 from row `first` of n with distance `stride`; past the end the last one again.
static inline void rows_from(const uint16_t *at, int64_t stride, int64_t first, int64_t n, const uint16_t **rows) {
    for (int q = 0; q < QUERIES; q++) rows[q] = at + (first + q < n ? first + q : n - 1) * stride;
}

// The same for results; past the end they go nowhere.
static inline void results_to(uint16_t *at, int64_t stride, int64_t first, int64_t n, uint16_t *nowhere,
                              uint16_t **rows) {
    for (int q = 0; q < QUERIES; q++) rows[q] = first + q < n ? at + (first + q) * stride : nowhere;
}

#define FETCHED_TOKENS 512  // whose queries, keys and values stay in the second cache beside what is worked on

// Has the queries, keys and values of QUERIES tokens of one head brought to the second cache.
static inline void fetch(const uint16_t *qkv, int64_t step, int64_t first, int64_t n) {
    for (int64_t row = first; row < first + QUERIES && row < n; row++)
        for (int part = 0; part < 3; part++) {
            const char *at = (const char *)(qkv + (3 * row + part) * step);
            _mm_prefetch(at, _MM_HINT_T1);
            _mm_prefetch(at + HEAD, _MM_HINT_T1);  // the second half: HEAD numbers are 2·HEAD bytes
        }
}

// `following`: the head that comes next, or NULL. `logs`: where the natural logarithm of the sum of exp(scores) of each
// query goes, or NULL.
static void attend(const uint16_t *qkv, const uint16_t *following, uint16_t *out, float *logs, int64_t n, int64_t heads,
                   float scale, Scratch s) {
    int64_t stride = 3 * heads * HEAD, step = heads * HEAD, padded = (n + 15) / 16 * 16, blocks = padded / 16;
    pack_keys(qkv + step, stride, n, s.keys);
    pack_values(qkv + 2 * step, stride, n, padded, s.values);
    __mmask16 last = (__mmask16)(0xffff >> (padded - n));
    uint16_t nowhere[HEAD];
    for (int64_t first = 0; first < n; first += QUERIES) {
        const uint16_t *queries[QUERIES];
        uint16_t *results[QUERIES];
        __m512 largest[QUERIES];
        rows_from(qkv, stride, first, n, queries);
        results_to(out, step, first, n, nowhere, results);
        for (int q = 0; q < QUERIES; q++) largest[q] = _mm512_set1_ps(-INFINITY);
        if (following && n <= FETCHED_TOKENS) fetch(following, step, first, n);
        all_scores(queries, s.keys, s.scores, blocks, largest, last);
        float sums[QUERIES];
        for (int q = 0; q < QUERIES; q++) {
            sums[q] = probabilities(s.scores + q * padded, padded, largest[q], scale * LOG2E, s.weights + q * padded);
            if (logs && first + q < n) logs[first + q] = scale * _mm512_reduce_max_ps(largest[q]) + logf(sums[q]);
        }
        weigh(s.weights, padded, s.values, n, sums, results);
    }
}

// Scores and dO·Vᵀ of one row become P and dS, bf16. `logs` and `deltas` hold one number for each lane when `by_lane`,
// else the one number of the row. Lanes that are not `there` in the last block become 0.
static inline void gradients(const float *scores, const float *dp, int64_t padded, __mmask16 last, float scale,
                             const float *logs, const float *deltas, int by_lane, uint16_t *p_out, uint16_t *ds_out) {
    __m512 factor = _mm512_set1_ps(scale * LOG2E), s = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < padded; k += 16) {
        __mmask16 there = k + 16 == padded ? last : 0xffff;
        __m512 log = by_lane ? _mm512_loadu_ps(logs + k) : _mm512_set1_ps(*logs);
        __m512 delta = by_lane ? _mm512_loadu_ps(deltas + k) : _mm512_set1_ps(*deltas);
        __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + k), factor, _mm512_mul_ps(log, _mm512_set1_ps(LOG2E)));
        __m512 p = _mm512_maskz_mov_ps(there, power_of_two(_mm512_min_ps(x, _mm512_setzero_ps())));
        __m512 ds = _mm512_maskz_mul_ps(there, _mm512_mul_ps(p, s), _mm512_sub_ps(_mm512_loadu_ps(dp + k), delta));
        if (p_out) _mm256_storeu_si256((__m256i *)(p_out + k), (__m256i)_mm512_cvtneps_pbh(p));
        _mm256_storeu_si256((__m256i *)(ds_out + k), (__m256i)_mm512_cvtneps_pbh(ds));
    }
}

typedef struct {
    uint32_t *keys, *values, *first, *second;  // packed
    float *scores, *dp, *logs, *deltas;
    uint16_t *p, *ds;
} GradientScratch;

static void differentiate(const uint16_t *qkv, const uint16_t *out, const float *logs, const uint16_t *dout,
                          uint16_t *dqkv, int64_t n, int64_t heads, float scale, GradientScratch s) {
    int64_t stride = 3 * heads * HEAD, step = heads * HEAD, padded = (n + 15) / 16 * 16, blocks = padded / 16;
    const uint16_t *key = qkv + step, *value = qkv + 2 * step;
    const float ones[QUERIES] = {1, 1, 1, 1, 1, 1};
    __mmask16 last = (__mmask16)(0xffff >> (padded - n));
    __m512 unused[QUERIES];
    uint16_t nowhere[HEAD];
    const uint16_t *rows[QUERIES], *others[QUERIES];
    uint16_t *results[QUERIES];
    for (int q = 0; q < QUERIES; q++) unused[q] = _mm512_setzero_ps();
    memset(s.logs, 0, padded * sizeof(float));
    memset(s.deltas, 0, padded * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        s.logs[i] = logs[i];
        for (int d = 0; d < HEAD; d++) s.deltas[i] += from_bf16(out[i * step + d]) * from_bf16(dout[i * step + d]);
    }
    // dQ, a few queries at a time against all keys
    pack_keys(key, stride, n, s.keys);
    pack_keys(value, stride, n, s.values);
    pack_values(key, stride, n, padded, s.first);
    for (int64_t first = 0; first < n; first += QUERIES) {
        rows_from(qkv, stride, first, n, rows);
        rows_from(dout, step, first, n, others);
        all_scores(rows, s.keys, s.scores, blocks, unused, last);
        all_scores(others, s.values, s.dp, blocks, unused, last);
        for (int q = 0; q < QUERIES; q++) {
            int64_t row = first + q < n ? first + q : n - 1;
            gradients(s.scores + q * padded, s.dp + q * padded, padded, last, scale, s.logs + row, s.deltas + row, 0,
                      NULL, s.ds + q * padded);
        }
        results_to(dqkv, stride, first, n, nowhere, results);
        weigh(s.ds, padded, s.first, n, ones, results);
    }
    // dK and dV, a few keys at a time against all queries
    pack_keys(qkv, stride, n, s.keys);
    pack_keys(dout, step, n, s.values);
    pack_values(qkv, stride, n, padded, s.first);
    pack_values(dout, step, n, padded, s.second);
    for (int64_t first = 0; first < n; first += QUERIES) {
        rows_from(key, stride, first, n, rows);
        rows_from(value, stride, first, n, others);
        all_scores(rows, s.keys, s.scores, blocks, unused, last);
        all_scores(others, s.values, s.dp, blocks, unused, last);
        for (int q = 0; q < QUERIES; q++)
            gradients(s.scores + q * padded, s.dp + q * padded, padded, last, scale, s.logs, s.deltas, 1,
                      s.p + q * padded, s.ds + q * padded);
        results_to(dqkv + step, stride, first, n, nowhere, results);
        weigh(s.ds, padded, s.first, n, ones, results);
        results_to(dqkv + 2 * step, stride, first, n, nowhere, results);
        weigh(s.p, padded, s.second, n, ones, results);
    }
}

// qkv (B, N, 3, H, 64) → out (B, N, H, 64), both bf16 without gaps, and where `logs` is not NULL the logarithms that the
// gradients need, (B, H, N) fp32. Threads that share a call take heads by `next`, which begins at 0. Gives 1 when there
// is no memory.
int attention_bf16(const uint16_t *qkv, uint16_t *out, float *logs, int64_t images, int64_t n, int64_t heads,
                   float scale, atomic_long *next) {
    int64_t padded = (n + 15) / 16 * 16;
    size_t bytes = (size_t)padded * (2 * HEAD * 2 + QUERIES * 6) + 4 * 64;
    char *memory = malloc(bytes);
    if (!memory) return 1;
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    Scratch s;
    s.keys = (uint32_t *)at;
    s.values = (uint32_t *)(at += padded * HEAD * 2);
    s.scores = (float *)(at += padded * HEAD * 2);
    s.weights = (uint16_t *)(at + padded * QUERIES * 4);
    for (;;) {
        int64_t i = atomic_fetch_add(next, 1);
        if (i >= images * heads) break;
        int64_t image = i / heads, head = i % heads, after = i + 1;
        const uint16_t *following = qkv + after / heads * n * 3 * heads * HEAD + after % heads * HEAD;
        attend(qkv + image * n * 3 * heads * HEAD + head * HEAD, after < images * heads ? following : NULL,
               out + image * n * heads * HEAD + head * HEAD, logs ? logs + i * n : NULL, n, heads, scale, s);
    }
    free(memory);
    return 0;
}

// From what `attention_bf16` took and gave and the gradient of `out`, the gradient of qkv.
int attention_bf16_backward(const uint16_t *qkv, const uint16_t *out, const float *logs, const uint16_t *dout,
                            uint16_t *dqkv, int64_t images, int64_t n, int64_t heads, float scale, atomic_long *next) {
    int64_t padded = (n + 15) / 16 * 16;
    size_t bytes = (size_t)padded * (4 * HEAD * 2 + QUERIES * 12 + 8) + 64;
    char *memory = malloc(bytes);
    if (!memory) return 1;
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    GradientScratch s;
    s.keys = (uint32_t *)at;
    s.values = (uint32_t *)(at += padded * HEAD * 2);
    s.first = (uint32_t *)(at += padded * HEAD * 2);
    s.second = (uint32_t *)(at += padded * HEAD * 2);
    s.scores = (float *)(at += padded * HEAD * 2);
    s.dp = (float *)(at += padded * QUERIES * 4);
    s.logs = (float *)(at += padded * QUERIES * 4);
    s.deltas = (float *)(at += padded * 4);
    s.p = (uint16_t *)(at += padded * 4);
    s.ds = (uint16_t *)(at + padded * QUERIES * 2);
    for (;;) {
        int64_t i = atomic_fetch_add(next, 1);
        if (i >= images * heads) break;
        int64_t image = i / heads, head = i % heads;
        int64_t inputs = image * n * 3 * heads * HEAD + head * HEAD, outputs = image * n * heads * HEAD + head * HEAD;
        differentiate(qkv + inputs, out + outputs, logs + i * n, dout + outputs, dqkv + inputs, n, heads, scale, s);
    }
    free(memory);
    return 0;
}

#else

int attention_bf16_supported(void) { return 0; }

int attention_bf16(const uint16_t *qkv, uint16_t *out, float *logs, int64_t images, int64_t n, int64_t heads,
                   float scale, atomic_long *next) {
    (void)qkv, (void)out, (void)logs, (void)images, (void)n, (void)heads, (void)scale, (void)next;
    return 2;
}

int attention_bf16_backward(const uint16_t *qkv, const uint16_t *out, const float *logs, const uint16_t *dout,
                            uint16_t *dqkv, int64_t images, int64_t n, int64_t heads, float scale, atomic_long *next) {
    (void)logs, (void)dout, (void)dqkv;
    return attention_bf16(qkv, (uint16_t *)out, NULL, images, n, heads, scale, next);
}

#endif

// SPDX-License-Identifier: Apache-2.0
// Softmax attention of bf16 tokens on processors with AVX-512 bf16 products, and the addition of a branch to the
// residual stream together with the LayerNorm that follows it.
//
// Shapes: B images, N tokens, H heads of 64, D = 64·H.
//
// Attention of one head: K is laid out once so that 16 keys stand side by side for each pair of dimensions, V so that
// each dimension stands beside that of the next key; both are what the bf16 product reads. Then, for QUERIES queries at a
// time, scores against all keys go to a buffer that stays in the first cache, become probabilities there, and weigh V.
// Products and sums are fp32; probabilities are rounded to bf16 for the second product, as a bf16 softmax would give.

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
// branch may be NULL: then only the LayerNorm. Rows that one call of several threads takes come from `next`.
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

// 2^x for x ≤ 0, to a relative error of 4e-6: a polynomial on [-1/2, 1/2] and the exponent.
static inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-127.0f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00961813f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.05550411f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.24022651f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.69314718f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// One row of scores to probabilities without their divisor, bf16; gives the divisor.
static inline float probabilities(const float *scores, int64_t padded, __m512 largest, float factor, uint16_t *out) {
    __m512 scale = _mm512_set1_ps(factor);
    __m512 shift = _mm512_set1_ps(-factor * _mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < padded; k += 16) {
        __m512 p = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + k), scale, shift));
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(p);
        _mm256_storeu_si256((__m256i *)(out + k), rounded);
        sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
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

static void attend(const uint16_t *qkv, uint16_t *out, int64_t n, int64_t heads, float scale, Scratch s) {
    int64_t stride = 3 * heads * HEAD, step = heads * HEAD, padded = (n + 15) / 16 * 16, blocks = padded / 16;
    pack_keys(qkv + step, stride, n, s.keys);
    pack_values(qkv + 2 * step, stride, n, padded, s.values);
    __mmask16 last = (__mmask16)(0xffff >> (padded - n));
    uint16_t unused[HEAD];
    for (int64_t first = 0; first < n; first += QUERIES) {
        const uint16_t *queries[QUERIES];
        uint16_t *results[QUERIES];
        __m512 largest[QUERIES];
        for (int q = 0; q < QUERIES; q++) {  // past the end: once more the last query, into nowhere
            int64_t row = first + q < n ? first + q : n - 1;
            queries[q] = qkv + row * stride;
            results[q] = first + q < n ? out + row * step : unused;
            largest[q] = _mm512_set1_ps(-INFINITY);
        }
        for (int64_t b = 0; b < blocks;) {
            int64_t left = blocks - b;
            const uint32_t *keys = s.keys + b * 512;
            float *scores = s.scores + 16 * b;
            __mmask16 there = left <= 4 ? last : 0xffff;
            if (left >= 4) scores_4(queries, keys, scores, padded, largest, there), b += 4;
            else if (left == 3) scores_3(queries, keys, scores, padded, largest, there), b += 3;
            else if (left == 2) scores_2(queries, keys, scores, padded, largest, there), b += 2;
            else scores_1(queries, keys, scores, padded, largest, there), b += 1;
        }
        float sums[QUERIES];
        for (int q = 0; q < QUERIES; q++)
            sums[q] = probabilities(s.scores + q * padded, padded, largest[q], scale * 1.44269504f,
                                    s.weights + q * padded);
        weigh(s.weights, padded, s.values, n, sums, results);
    }
}

// qkv (B, N, 3, H, 64) → out (B, N, H, 64), both bf16 without gaps. Threads that share a call take heads by `next`,
// which begins at 0. Gives 1 when there is no memory.
int attention_bf16(const uint16_t *qkv, uint16_t *out, int64_t images, int64_t n, int64_t heads, float scale,
                   atomic_long *next) {
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
        int64_t image = i / heads, head = i % heads;
        attend(qkv + image * n * 3 * heads * HEAD + head * HEAD, out + image * n * heads * HEAD + head * HEAD, n, heads,
               scale, s);
    }
    free(memory);
    return 0;
}

#else

int attention_bf16_supported(void) { return 0; }

int attention_bf16(const uint16_t *qkv, uint16_t *out, int64_t images, int64_t n, int64_t heads, float scale,
                   atomic_long *next) {
    (void)qkv, (void)out, (void)images, (void)n, (void)heads, (void)scale, (void)next;
    return 2;
}

#endif

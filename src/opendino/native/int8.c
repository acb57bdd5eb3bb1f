// SPDX-License-Identifier: Apache-2.0
// The feed-forward of a block in int8 on processors with AVX-512 VNNI: W2·act(W1·x + b1) + b2, added to the residual
// stream, from one end to the other for a few tokens at a time, so that their hidden layer never leaves the cache.
//
// Weights are signed, with one scale w for each output. Activations are unsigned, with the lowest value and a scale of
// each token, found from the token itself: x ≈ low + s·q. So an output is s·w·Σ q·W + low·w·ΣW + b, where the sum over
// 8-bit numbers is exact in 32 bits.
//
// Weights lie as [panel of PANEL outputs][4 inputs][output][input], activations of ROWS tokens as
// [4 inputs][token][input]: one instruction multiplies 4 inputs with the weights of 16 outputs and adds.

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 12   // tokens whose sums, for one panel, are in registers
#define TILES 4   // groups of ROWS that use a panel while it lies in the cache
#define BLOCK (ROWS * TILES)
#define PANEL 32

typedef struct {
    const int8_t *weight;
    const float *scale, *sum, *bias;  // by output: w, w·ΣW, b; missing outputs repeat the last
    int64_t inputs, outputs;          // as they lie in memory: a multiple of 4, and of PANEL
} Linear;

typedef struct {
    const uint16_t *x;                // bf16 (images, tokens, in)
    float *stream;                    // fp32 (images, tokens, out), added to
    uint8_t *coarse;                  // (images, tokens): 1 where nothing was added, as 8 bits are too few; see `most`
    int64_t images, tokens, skipped;  // the first tokens of an image that are left alone
    int64_t in, out;
    int64_t gated;                    // a panel of the first layer is 16 gates and their 16 values: silu(gate)·value
    float most;                       // rounding noise of a token's activations, in parts of their root mean square
    Linear first, second;
    atomic_long *next;                // threads that share a call take blocks by it; it begins at 0
} FeedForward;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>

int int8_supported(void) { return 1; }

typedef struct {
    uint8_t *input, *hidden;     // 8-bit activations of a block
    float *values;               // fp32 hidden layer of a block
    float *row;                  // one token
    float low[BLOCK], step[BLOCK];
    __m512 lowest[BLOCK], highest[BLOCK];
} Scratch;

// sum + Σ of 4 unsigned by 4 signed bytes. As assembly, because gcc 12 copies the sums of its own intrinsic to and fro.
static inline __m512i bytes_product(__m512i sum, __m512i a, __m512i b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// Sums of ROWS tokens for one panel.
static inline void products(const uint8_t *x, const int8_t *w, int64_t inputs, __m512i sums[ROWS][2]) {
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < inputs; k += 4, x += 4 * ROWS, w += 4 * PANEL) {
        __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
        for (int r = 0; r < ROWS; r++) {
            int32_t four;
            memcpy(&four, x + 4 * r, 4);
            __m512i all = _mm512_set1_epi32(four);
            sums[r][0] = bytes_product(sums[r][0], all, left);
            sums[r][1] = bytes_product(sums[r][1], all, right);
        }
    }
}

// Outputs from sums: 16 of one token.
static inline __m512 output(__m512i sum, const Linear *l, int64_t column, __m512 low, __m512 step) {
    __m512 factor = _mm512_mul_ps(step, _mm512_loadu_ps(l->scale + column));
    __m512 rest = _mm512_fmadd_ps(low, _mm512_loadu_ps(l->sum + column), _mm512_loadu_ps(l->bias + column));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, rest);
}

// y·Φ(y), to 1e-5·max(1, |y|): Φ by an odd polynomial up to 4.2.
static inline __m512 gelu(__m512 y) {
    static const float factors[9] = {0.398883004f, -0.0663183838f, 0.0098045419f, -0.00110648634f, 9.3295432e-05f,
                                     -5.63585276e-06f, 2.27274686e-07f, -5.41653649e-09f, 5.72237976e-11f};
    __m512 x = _mm512_range_ps(y, _mm512_set1_ps(4.2f), 2);  // the smaller in size, with the sign of y
    __m512 square = _mm512_mul_ps(x, x), p = _mm512_set1_ps(factors[8]);
    for (int i = 7; i >= 0; i--) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(factors[i]));
    return _mm512_mul_ps(y, _mm512_fmadd_ps(p, x, _mm512_set1_ps(0.5f)));
}

// y / (1 + exp(-y)), to a relative 1e-5: 2^x by a polynomial on [-1/2, 1/2] and the exponent.
static inline __m512 silu(__m512 y) {
    __m512 x = _mm512_mul_ps(y, _mm512_set1_ps(-1.44269504f));
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.0f)), _mm512_set1_ps(126.0f));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole), one = _mm512_set1_ps(1.0f), p = _mm512_set1_ps(0.00961813f);
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.05550411f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.24022651f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.69314718f));
    p = _mm512_fmadd_ps(p, part, one);
    return _mm512_div_ps(y, _mm512_add_ps(one, _mm512_scalef_ps(p, whole)));
}

// One token of `n` values (a multiple of 4; memory up to a multiple of 16) to 8 bits. `out` is its place in a group.
// Says whether a few large values leave the others with noise above `most`: uniform, so step/√12.
static inline int quantise(const float *row, int64_t n, __m512 lowest, __m512 highest, uint8_t *out, float *low,
                           float *step, float most) {
    float a = _mm512_reduce_min_ps(lowest), range = _mm512_reduce_max_ps(highest) - a;
    *low = a;
    *step = range / 255.0f;
    __m512 factor = _mm512_set1_ps(range > 0 ? 255.0f / range : 0.0f), start = _mm512_set1_ps(a);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) {
        __m512 x = _mm512_loadu_ps(row + k);
        squares = _mm512_fmadd_ps(x, x, squares);
        x = _mm512_mul_ps(_mm512_sub_ps(x, start), factor);
        __m512i q = _mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512());
        int32_t fours[4];
        _mm_storeu_si128((__m128i *)fours, _mm512_cvtusepi32_epi8(q));
        for (int i = 0; i < 4 && k + 4 * i < n; i++) memcpy(out + (k + 4 * i) * ROWS, fours + i, 4);
    }
    return *step * *step / 12 * (float)n > most * most * _mm512_reduce_add_ps(squares);
}

static inline int input_row(const FeedForward *job, int64_t token, uint8_t *out, int i, Scratch *s) {
    int64_t in = job->in;
    const uint16_t *x = job->x + token * in;
    __m512 lowest = _mm512_set1_ps(INFINITY), highest = _mm512_set1_ps(-INFINITY);
    for (int64_t k = 0; k < in; k += 16) {
        __mmask16 there = in - k >= 16 ? 0xffff : (__mmask16)((1 << (in - k)) - 1);
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x + k));
        __m512 y = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
        _mm512_storeu_ps(s->row + k, y);
        lowest = _mm512_mask_min_ps(lowest, there, lowest, y);
        highest = _mm512_mask_max_ps(highest, there, highest, y);
    }
    return quantise(s->row, job->first.inputs, lowest, highest, out, s->low + i, s->step + i, job->most);
}

// One panel of the first layer for one group of tokens, into s->values.
static inline void hidden_tile(const FeedForward *job, int64_t panel, int tile, Scratch *s) {
    const Linear *l = &job->first;
    __m512i sums[ROWS][2];
    products(s->input + tile * ROWS * l->inputs, l->weight + panel * PANEL * l->inputs, l->inputs, sums);
    int64_t width = job->second.inputs, column = panel * PANEL;
    for (int r = 0; r < ROWS; r++) {
        int i = tile * ROWS + r;
        __m512 low = _mm512_set1_ps(s->low[i]), step = _mm512_set1_ps(s->step[i]);
        __m512 a = output(sums[r][0], l, column, low, step), b = output(sums[r][1], l, column + 16, low, step);
        __m512 lowest = s->lowest[i], highest = s->highest[i];
        if (job->gated) {
            a = _mm512_mul_ps(silu(a), b);
            _mm512_storeu_ps(s->values + i * width + column / 2, a);
        } else {
            a = gelu(a);
            b = gelu(b);
            _mm512_storeu_ps(s->values + i * width + column, a);
            _mm512_storeu_ps(s->values + i * width + column + 16, b);
            lowest = _mm512_min_ps(lowest, b);
            highest = _mm512_max_ps(highest, b);
        }
        s->lowest[i] = _mm512_min_ps(lowest, a);
        s->highest[i] = _mm512_max_ps(highest, a);
    }
}

// One panel of the second layer for one group of tokens, added to the stream.
static inline void output_tile(const FeedForward *job, int64_t panel, int tile, float *const *rows, const Scratch *s) {
    const Linear *l = &job->second;
    __m512i sums[ROWS][2];
    products(s->hidden + tile * ROWS * l->inputs, l->weight + panel * PANEL * l->inputs, l->inputs, sums);
    for (int r = 0; r < ROWS; r++) {
        int i = tile * ROWS + r;
        if (!rows[i]) continue;
        __m512 low = _mm512_set1_ps(s->low[i]), step = _mm512_set1_ps(s->step[i]);
        for (int half = 0; half < 2; half++) {
            int64_t column = panel * PANEL + 16 * half, left = job->out - column;
            if (left <= 0) continue;
            __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1 << left) - 1);
            __m512 y = output(sums[r][half], l, column, low, step);
            y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, rows[i] + column));
            _mm512_mask_storeu_ps(rows[i] + column, there, y);
        }
    }
}

// Tokens `from` to `to`, counted without the skipped ones, at most BLOCK of them.
static void feed_block(const FeedForward *job, int64_t from, int64_t to, Scratch *s) {
    int64_t taken = job->tokens - job->skipped, inputs = job->first.inputs, hidden = job->second.inputs;
    int tiles = (int)((to - from + ROWS - 1) / ROWS);
    float *rows[BLOCK];
    uint8_t *coarse[BLOCK];
    for (int i = 0; i < tiles * ROWS; i++) {
        int64_t j = from + i < to ? from + i : to - 1;  // past the end the last one again; its result goes nowhere
        int64_t token = j / taken * job->tokens + job->skipped + j % taken;
        rows[i] = from + i < to ? job->stream + token * job->out : NULL;
        uint8_t *place = s->input + i / ROWS * ROWS * inputs + i % ROWS * 4;
        coarse[i] = job->coarse + token;
        if (input_row(job, token, place, i, s)) *coarse[i] = 1;
        s->lowest[i] = _mm512_set1_ps(INFINITY);
        s->highest[i] = _mm512_set1_ps(-INFINITY);
    }
    for (int64_t panel = 0; panel < job->first.outputs / PANEL; panel++)
        for (int tile = 0; tile < tiles; tile++) hidden_tile(job, panel, tile, s);
    for (int i = 0; i < tiles * ROWS; i++) {
        uint8_t *place = s->hidden + i / ROWS * ROWS * hidden + i % ROWS * 4;
        if (quantise(s->values + i * hidden, hidden, s->lowest[i], s->highest[i], place, s->low + i, s->step + i,
                     job->most))
            *coarse[i] = 1;
        if (*coarse[i]) rows[i] = NULL;
    }
    for (int64_t panel = 0; panel < job->second.outputs / PANEL; panel++)
        for (int tile = 0; tile < tiles; tile++) output_tile(job, panel, tile, rows, s);
}

static int64_t in_lines(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

// Gives 1 when there is no memory.
int feed_forward_int8(const FeedForward *job) {
    int64_t inputs = job->first.inputs, hidden = job->second.inputs;
    int64_t sizes[4] = {in_lines(sizeof(Scratch)), in_lines(BLOCK * inputs), in_lines(BLOCK * hidden),
                        in_lines((inputs + 16) * 4)};
    char *memory = malloc(sizes[0] + sizes[1] + sizes[2] + sizes[3] + BLOCK * hidden * 4 + 64);
    if (!memory) return 1;
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    Scratch *s = (Scratch *)at;
    s->input = (uint8_t *)(at += sizes[0]);
    s->hidden = (uint8_t *)(at += sizes[1]);
    s->row = (float *)(at += sizes[2]);
    s->values = (float *)(at + sizes[3]);
    memset(s->row, 0, sizes[3]);
    int64_t total = job->images * (job->tokens - job->skipped);
    for (;;) {
        int64_t from = BLOCK * (int64_t)atomic_fetch_add(job->next, 1);
        if (from >= total) break;
        feed_block(job, from, from + BLOCK < total ? from + BLOCK : total, s);
    }
    free(memory);
    return 0;
}

#else

int int8_supported(void) { return 0; }

int feed_forward_int8(const FeedForward *job) {
    (void)job;
    return 2;
}

#endif

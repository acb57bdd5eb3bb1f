// SPDX-License-Identifier: Apache-2.0
// Rectangles of an 8-bit image, resized to squares by bicubic weights with antialias, flipped where asked for.
//
// Along the rows first, rounded and cut off to 8 bits, and then along the columns: what Pillow and torch do, whose
// results these are but for rounding. The image is laid out once with its columns as rows; there the same weights serve
// a run of neighbouring bytes, and so do they after turning the half-done crop back.

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bytes){__VA_ARGS__})
#endif

typedef struct {
    const uint8_t *image;  // (height, width, channels)
    int64_t height, width, channels, n;
    const int32_t *boxes;  // (n, 6): top, left, height, width, flip, side of the crop
    uint8_t *const *out;   // n places of (channels, side, side)
} Job;

// Which input values make each output value along one axis: as many weights as the widest needs, from `first` on.
typedef struct {
    int taps;
    int32_t *first;
    float *weights;
} Axis;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static int round_up(int value) { return (value + LANES - 1) / LANES * LANES; }

// --- 16 × 16 bytes with rows and columns exchanged -------------------------------------------------------------------

static void exchange(const uint8_t *from, ptrdiff_t stride, uint8_t *to, ptrdiff_t to_stride) {
    Bytes a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++) memcpy(&a[i], from + i * stride, LANES);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < LANES / 2; i++) {
            b[2 * i] = SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < LANES; i++) memcpy(to + i * to_stride, &a[i], LANES);
}

// The same for a block at the edge of an image, of which only so many rows and columns may be read.
static void exchange_edge(const uint8_t *from, ptrdiff_t stride, int rows, int columns, uint8_t *to) {
    uint8_t block[LANES * LANES] = {0};
    for (int i = 0; i < rows; i++) memcpy(block + i * LANES, from + i * stride, columns);
    exchange(block, LANES, to, LANES);
}

// Lay the image out in bands of LANES rows: (channels, bands, width, LANES).
static void lay_out(const Job *job, uint8_t *bands) {
    const int height = job->height, bytes = job->width * job->channels, channels = job->channels;
    const size_t band = (size_t)job->width * LANES, plane = band * (round_up(height) / LANES);
    for (int y = 0; y < height; y += LANES, bands += band)
        for (int i = 0; i < bytes; i += LANES) {
            uint8_t block[LANES * LANES];
            const uint8_t *from = job->image + y * bytes + i;
            int rows = height - y < LANES ? height - y : LANES, columns = bytes - i < LANES ? bytes - i : LANES;
            if (rows == LANES && columns == LANES) exchange(from, bytes, block, LANES);
            else exchange_edge(from, bytes, rows, columns, block);
            for (int k = 0, c = i % channels, x = i / channels; k < columns; k++, c++) {
                if (c == channels) c = 0, x++;
                memcpy(bands + c * plane + (size_t)x * LANES, block + k * LANES, LANES);
            }
        }
}

// --- weights ---------------------------------------------------------------------------------------------------------

// Keys' cubic with a = -1/2.
static inline float cubic(float t) {
    t = t < 0 ? -t : t;
    float near = (1.5f * t - 2.5f) * t * t + 1, far = ((-0.5f * t + 2.5f) * t - 4) * t + 2;
    return t < 1 ? near : t < 2 ? far : 0;
}

static double width_of_support(int from, int to) {
    double scale = (double)from / to;
    return 2 * (scale < 1 ? 1 : scale);
}

static int most_taps(int from, int to) {
    double width = 2 * width_of_support(from, to);
    int taps = (int)width + (width > (int)width);
    return taps < from ? taps : from;
}

static void find_weights(int from, int to, int flip, Axis *axis) {
    const double scale = (double)from / to, support = width_of_support(from, to);
    const float narrow = (float)(2 / support);
    const int taps = axis->taps = most_taps(from, to);
    for (int i = 0; i < to; i++) {
        double centre = (i + 0.5) * scale;
        int first = centre < support - 0.5 ? 0 : (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        last = last < from ? last : from;
        int start = first < from - taps ? first : from - taps;  // no input value past the last is touched
        float offset = (float)(start - centre + 0.5), sum = 0;
        float *weights = axis->weights + (size_t)(flip ? to - 1 - i : i) * taps;
        for (int k = 0; k < taps; k++) {
            float weight = cubic((offset + k) * narrow);
            weights[k] = k < first - start || k >= last - start ? 0 : weight;
        }
        for (int k = 0; k < taps; k++) sum += weights[k];
        for (int k = 0; k < taps; k++) weights[k] *= 1 / sum;
        axis->first[flip ? to - 1 - i : i] = start;
    }
}

// --- one crop --------------------------------------------------------------------------------------------------------

static void widen(const uint8_t *restrict from, float *restrict to, int count) {
    for (int i = 0; i < count; i++) to[i] = from[i];
}

static void round_off(const float *restrict from, uint8_t *restrict to, int count) {
    for (int i = 0; i < count; i++) {
        int value = (int)(from[i] + 0.5f);  // towards 0, which differs from down only where it is cut off
        value = value < 0 ? 0 : value;
        to[i] = value > 255 ? 255 : value;
    }
}

// Weigh runs of LANES values that lie `stride` apart.
static inline void weigh(const float *from, ptrdiff_t stride, const float *weights, int taps, float *to) {
    Floats sum = *(const Floats *)from * weights[0];
    for (int k = 1; k < taps; k++) sum += *(const Floats *)(from + k * stride) * weights[k];
    *(Floats *)to = sum;
}

typedef struct {
    uint8_t *bands;  // the image, laid out
    float *wide;     // LANES rows of one channel of a box, a column after the other
    float *sums;     // the same resized, or one row of the result
    uint8_t *narrow; // in 8 bits
    uint8_t *turned; // rows as rows again
    float *half;     // one channel, resized along the rows
    Axis across, down;
} Space;

// `band` is where the columns of the box begin in its first band, and `skip` how many rows of it are above the box.
static void resize_channel(const uint8_t *band, size_t band_size, int skip, const int32_t *box, const Space *space,
                           uint8_t *out) {
    const Axis *across = &space->across, *down = &space->down;
    const int height = box[2], width = box[3], side = box[5], padded = round_up(side);
    for (int y = 0; y < skip + height; y += LANES, band += band_size) {
        widen(band, space->wide, width * LANES);
        for (int x = 0; x < side; x++)
            weigh(space->wide + across->first[x] * LANES, LANES, across->weights + (size_t)x * across->taps, across->taps,
                  space->sums + x * LANES);
        round_off(space->sums, space->narrow, side * LANES);
        for (int x = 0; x < side; x += LANES)
            exchange(space->narrow + x * LANES, LANES, space->turned + x, padded);
        widen(space->turned, space->half + (size_t)y * padded, LANES * padded);
    }
    for (int y = 0; y < side; y++) {
        const float *from = space->half + (size_t)(skip + down->first[y]) * padded;
        for (int x = 0; x < side; x += LANES)
            weigh(from + x, padded, down->weights + (size_t)y * down->taps, down->taps, space->sums + x);
        round_off(space->sums, out + (size_t)y * side, side);
    }
}

static void resize_box(const Job *job, const int32_t *box, Space *space, uint8_t *out) {
    const int top = box[0], left = box[1], height = box[2], width = box[3], flip = box[4], side = box[5];
    const size_t band = (size_t)job->width * LANES, plane = band * (round_up(job->height) / LANES);
    find_weights(width, side, flip, &space->across);
    find_weights(height, side, 0, &space->down);
    for (int c = 0; c < job->channels; c++)
        resize_channel(space->bands + c * plane + top / LANES * band + left * LANES, band, top % LANES, box, space,
                       out + (size_t)c * side * side);
}

// Cut all boxes of one image. Gives 0, or 1 when there is no memory.
static int cut_image(const Job *job) {
    size_t half = 0, wide = 0, side = 0, weights = 0;
    for (int i = 0; i < job->n; i++) {
        const int32_t *box = job->boxes + 6 * i;
        int across = most_taps(box[3], box[5]), down = most_taps(box[2], box[5]), padded = round_up(box[5]);
        half = larger(half, (size_t)(round_up(box[2]) + LANES) * padded);
        wide = larger(wide, (size_t)box[3] * LANES);
        side = larger(side, padded);
        weights = larger(weights, (size_t)padded * (across > down ? across : down));
    }
    const size_t image = (size_t)round_up(job->height) * job->width * job->channels;
    const size_t floats = half + wide + side * LANES + 2 * weights, bytes = 4 * (floats + 2 * side) + image + 2 * side * LANES;
    float *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) return 1;
    Space space = {.half = memory, .wide = memory + half};
    space.sums = space.wide + wide;
    space.across.weights = space.sums + side * LANES;
    space.down.weights = space.across.weights + weights;
    space.across.first = (int32_t *)(space.down.weights + weights);
    space.down.first = space.across.first + side;
    space.bands = (uint8_t *)(space.down.first + side);
    space.narrow = space.bands + image;
    space.turned = space.narrow + side * LANES;
    lay_out(job, space.bands);
    for (int i = 0; i < job->n; i++) resize_box(job, job->boxes + 6 * i, &space, job->out[i]);
    free(memory);
    return 0;
}

// Cut the boxes of one image after the other until none is left; several threads may share the images, `next` being the
// first that none has taken yet. Gives 0, or 1 when there is no memory.
int cut_crops(const Job *jobs, int64_t images, int32_t *next) {
    for (;;) {
        int image = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (image >= images) return 0;
        if (cut_image(jobs + image)) return 1;
    }
}

// SPDX-License-Identifier: Apache-2.0
// Colours of crops: jitter, grey, blur, solarize and normalisation of one crop after the other, each while it lies in
// the cache. opendino/pretrain/photometric.py says what every operation means and has the same in torch's operations.

#include <stdint.h>
#include <stdlib.h>

#define CHUNK 1024  // pixels that go through the operations of single pixels together: 12 KiB in three channels
#define PAD 16      // keeps the channels of a chunk from lying a power of two apart
#define MAX_REACH 4 // pixels on either side of a blur's middle

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };

typedef struct {
    const void *crops;    // (n, channels, height, width), uint8 or float32 in 0–255
    float *out;           // the same shape
    int64_t n, channels, height, width, is_float;
    const int8_t *steps;  // (n, 4) operations of the jitter in their order, -1 for none
    const float *factors; // (n, 4)
    const uint8_t *grey, *solarize;   // (n,)
    const float *kernels;             // (n, MAX_REACH + 1) weights of the blur from its middle outwards
    const int32_t *reaches;           // (n,) weights beside the middle that count, 0 for no blur
    const float *scale, *shift;       // (channels,)
    int32_t *next;                    // first crop that no thread has taken yet
} Job;

typedef float Chunk[3][CHUNK + PAD];

static inline float clamp(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static inline float luma(float r, float g, float b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }

// --- operations of single pixels, in place ---------------------------------------------------------------------------

static void scale_and_shift(float *restrict x, int count, float factor, float shift) {
    for (int i = 0; i < count; i++) x[i] = clamp(x[i] * factor + shift, 0, 1);
}

static void saturate(Chunk x, int count, float factor) {
    float *restrict r = x[0], *restrict g = x[1], *restrict b = x[2];
    for (int i = 0; i < count; i++) {
        float grey = (1 - factor) * luma(r[i], g[i], b[i]);
        r[i] = clamp(grey + factor * r[i], 0, 1);
        g[i] = clamp(grey + factor * g[i], 0, 1);
        b[i] = clamp(grey + factor * b[i], 0, 1);
    }
}

// At most one sixth of a turn; photometric.adjust_hue_ says why this is the hue. Where two channels are equal the third
// is the lightest or darkest, and the clamp gives its value whatever the sign.
static void turn_hue(Chunk x, int count, float sixths) {
    float *restrict r = x[0], *restrict g = x[1], *restrict b = x[2];
    for (int i = 0; i < count; i++) {
        float low = r[i] < g[i] ? r[i] : g[i], high = r[i] < g[i] ? g[i] : r[i];
        low = b[i] < low ? b[i] : low;
        high = b[i] > high ? b[i] : high;
        float minus_mid = low + high - r[i] - g[i] - b[i], swing = (high - low) * sixths;
        float red = 2 * r[i] + minus_mid - (g[i] > b[i] ? swing : -swing);
        float green = 2 * g[i] + minus_mid - (b[i] > r[i] ? swing : -swing);
        float blue = 2 * b[i] + minus_mid - (r[i] > g[i] ? swing : -swing);
        r[i] = clamp(red, low, high);
        g[i] = clamp(green, low, high);
        b[i] = clamp(blue, low, high);
    }
}

static void to_grey(Chunk x, int count) {
    for (int i = 0; i < count; i++) x[0][i] = luma(x[0][i], x[1][i], x[2][i]);
}

static double grey_sum(Chunk x, int planes, int count) {
    float sum = 0;
    if (planes == 3)
        for (int i = 0; i < count; i++) sum += luma(x[0][i], x[1][i], x[2][i]);
    else
        for (int i = 0; i < count; i++) sum += x[0][i];
    return sum;
}

static void jitter(Chunk x, int planes, int count, const int8_t *steps, int from, int to, const float *factors,
                   float mean) {
    for (int place = from; place < to; place++) {
        int step = steps[place];
        float factor = step < 0 ? 0 : factors[step];
        if (step == BRIGHTNESS || step == CONTRAST) {
            float shift = step == CONTRAST ? (1 - factor) * mean : 0;
            for (int c = 0; c < planes; c++) scale_and_shift(x[c], count, factor, shift);
        } else if (step == SATURATION) {
            saturate(x, count, factor);
        } else if (step == HUE) {
            float sixths = 6 * factor, size = sixths < 0 ? -sixths : sixths;
            int turns = size <= 1 ? 1 : size <= 2 ? 2 : 3;
            for (int k = 0; k < turns; k++) turn_hue(x, count, sixths / turns);
        }
    }
}

// --- one crop --------------------------------------------------------------------------------------------------------

static void load(const Job *job, size_t at, int count, float *restrict x) {
    const float step = 1.0f / 255;
    if (job->is_float) {
        const float *restrict from = (const float *)job->crops + at;
        for (int i = 0; i < count; i++) x[i] = from[i] * step;
    } else {
        const uint8_t *restrict from = (const uint8_t *)job->crops + at;
        for (int i = 0; i < count; i++) x[i] = from[i] * step;
    }
}

static void copy(const float *restrict from, float *restrict to, int count) {
    for (int i = 0; i < count; i++) to[i] = from[i];
}

static void finish(const float *restrict x, float *restrict out, int count, int solarize, float scale, float shift) {
    if (solarize)
        for (int i = 0; i < count; i++) out[i] = (x[i] < 1 - x[i] ? x[i] : 1 - x[i]) * scale + shift;
    else
        for (int i = 0; i < count; i++) out[i] = x[i] * scale + shift;
}

// Give the middle values and the pairs at the same distance from them, weighed. A constant reach unrolls the pairs.
static inline __attribute__((always_inline)) void sum_of_pairs(const float *restrict middle, const float *const *low,
                                                               const float *const *high, const float *weights,
                                                               float *restrict out, int count, const int reach) {
    for (int i = 0; i < count; i++) {
        float sum = weights[0] * middle[i];
        for (int d = 1; d <= reach; d++) sum += weights[d] * (low[d][i] + high[d][i]);
        out[i] = sum;
    }
}

static void weigh(const float *middle, const float *const *low, const float *const *high, const float *weights,
                  float *out, int count, int reach) {
    switch (reach) {
    case 1: sum_of_pairs(middle, low, high, weights, out, count, 1); break;
    case 2: sum_of_pairs(middle, low, high, weights, out, count, 2); break;
    case 3: sum_of_pairs(middle, low, high, weights, out, count, 3); break;
    default: sum_of_pairs(middle, low, high, weights, out, count, MAX_REACH);
    }
}

static int reflect(int at, int size) {
    at = at < 0 ? -at : at;
    return at < size ? at : 2 * (size - 1) - at;
}

// Blur one channel row by row and finish it into `copies` channels of the result, of which it may be the first. A row
// is blurred along its length into a ring of as many rows as the kernel has, and those are summed.
static void blur(const Job *job, int crop, int channel, int copies, float *scratch) {
    const int height = job->height, width = job->width, reach = job->reaches[crop], rows = 2 * reach + 1;
    const size_t pixels = (size_t)height * width;
    const float *weights = job->kernels + crop * (MAX_REACH + 1);
    float *out = job->out + ((size_t)crop * job->channels + channel) * pixels;
    float *padded = scratch + MAX_REACH, *blurred = padded + width + MAX_REACH, *ring = blurred + width;
    const float *low[MAX_REACH + 1], *high[MAX_REACH + 1];
    for (int y = 0; y < height + reach; y++) {
        if (y < height) {
            copy(out + (size_t)y * width, padded, width);
            for (int d = 1; d <= reach; d++) {
                padded[-d] = padded[d];
                padded[width - 1 + d] = padded[width - 1 - d];
                low[d] = padded - d;
                high[d] = padded + d;
            }
            weigh(padded, low, high, weights, ring + (size_t)(y % rows) * width, width, reach);
        }
        int done = y - reach;
        if (done < 0) continue;
        for (int d = 1; d <= reach; d++) {
            low[d] = ring + (size_t)(reflect(done - d, height) % rows) * width;
            high[d] = ring + (size_t)(reflect(done + d, height) % rows) * width;
        }
        weigh(ring + (size_t)(done % rows) * width, low, high, weights, blurred, width, reach);
        for (int c = 0; c < copies; c++)
            finish(blurred, out + c * pixels + (size_t)done * width, width, job->solarize[crop],
                   job->scale[channel + c], job->shift[channel + c]);
    }
}

static void colour(const Job *job, int crop, float *scratch) {
    const size_t pixels = (size_t)job->height * job->width, first = (size_t)crop * job->channels * pixels;
    const int planes = job->channels == 3 ? 3 : 1, groups = job->channels / planes;
    const int grey = planes == 3 && job->grey[crop], kept = grey ? 1 : planes, copies = grey ? 3 : 1;
    const int8_t *steps = job->steps + 4 * crop;
    const float *factors = job->factors + 4 * crop;
    float *out = job->out + first, mean = 0;
    Chunk x;
    int contrast = 0;
    while (contrast < 4 && steps[contrast] != CONTRAST) contrast++;
    const int stored = contrast > 0 && contrast < 4;  // whether the first pass leaves its result for the second
    if (contrast < 4) {
        double sum = 0;
        for (int group = 0; group < groups; group++)
            for (size_t at = 0; at < pixels; at += CHUNK) {
                int count = pixels - at < CHUNK ? (int)(pixels - at) : CHUNK;
                for (int c = 0; c < planes; c++) load(job, first + (group + c) * pixels + at, count, x[c]);
                jitter(x, planes, count, steps, 0, contrast, factors, 0);
                sum += grey_sum(x, planes, count);
                for (int c = 0; stored && c < planes; c++) copy(x[c], out + (group + c) * pixels + at, count);
            }
        mean = (float)(sum / ((double)pixels * groups));
    }
    for (int group = 0; group < groups; group++) {
        for (size_t at = 0; at < pixels; at += CHUNK) {
            int count = pixels - at < CHUNK ? (int)(pixels - at) : CHUNK;
            for (int c = 0; c < planes; c++) {
                size_t place = (group + c) * pixels + at;
                if (stored) copy(out + place, x[c], count);
                else load(job, first + place, count, x[c]);
            }
            jitter(x, planes, count, steps, stored ? contrast : 0, 4, factors, mean);
            if (grey) to_grey(x, count);
            for (int c = 0; c < planes; c++) {
                const int channel = group + c;
                float *to = out + channel * pixels + at;
                if (!job->reaches[crop])
                    finish(x[grey ? 0 : c], to, count, job->solarize[crop], job->scale[channel], job->shift[channel]);
                else if (c < kept)
                    copy(x[c], to, count);
            }
        }
        for (int c = 0; job->reaches[crop] && c < kept; c++) blur(job, crop, group + c, copies, scratch);
    }
}

// Colour crops until none is left; several threads may share a job. Gives 0, or 1 when there is no memory.
int colour_crops(const Job *job) {
    float *scratch = malloc(sizeof(float) * (2 * MAX_REACH + (2 + 2 * MAX_REACH + 1) * (size_t)job->width));
    if (!scratch) return 1;
    for (;;) {
        int crop = __atomic_fetch_add(job->next, 1, __ATOMIC_RELAXED);
        if (crop >= job->n) break;
        colour(job, crop, scratch);
    }
    free(scratch);
    return 0;
}

/* Log-mel features: see log_mel.h.

   The real transform of 512 samples is a complex one of 256, of the samples in pairs, whose halves are then separated
   (Press et al., Numerical Recipes, "FFT of Real Functions"). */
#include "log_mel.h"

#if __STDC_HOSTED__
#include <string.h>
#else /* as every compiler expects them */
void *memcpy(void *to, const void *from, size_t count);
void *memmove(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
#endif

enum {
    WINDOW = DT_LOG_MEL_WINDOW,
    HOP = DT_LOG_MEL_HOP,
    FFT = DT_LOG_MEL_FFT,
    HALF = FFT / 2,
    QUARTER = FFT / 4,
    BANDS = DT_LOG_MEL_BANDS
};

static const float FLOOR = 1e-6f; /* added to the power of a band */

/* Corners are evenly spaced in mel(f) = 2595 log10(1 + f / 700): 1 + f / 700 grows by a constant factor, the 41st root of
   (1 + 8000 / 700) / (1 + 20 / 700). */
static const double FIRST = 1.0 + 20.0 / 700.0, FACTOR = 1.0626611389995068;

/* Store sin(2 pi i / period) for i = 0 .. count - 1, each from the one before by a rotation in double precision. */
static void sines(float *table, int count, int period) {
    const double angle = 6.283185307179586477 / period, square = angle * angle;
    /* the first terms of both series: the next ones are below 1e-17 at the periods used here */
    const double s = angle * (1 - square / 6 * (1 - square / 20 * (1 - square / 42)));
    const double c = 1 - square / 2 * (1 - square / 12 * (1 - square / 30 * (1 - square / 56)));
    double sine = 0, cosine = 1;
    for (int i = 0; i < count; i++) {
        const double next = sine * c + cosine * s;
        cosine = cosine * c - sine * s;
        table[i] = (float)sine;
        sine = next;
    }
}

/* The natural logarithm of a positive normal number: x = m 2^e with m between sqrt(1/2) and sqrt(2), and
   log m = 2 artanh(s) with s = (m - 1) / (m + 1), whose series is cut off below 1e-9. No libm is needed. */
static float logarithm(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int32_t exponent = (int32_t)((bits - 0x3f3504f3u + (127u << 23)) >> 23) - 127; /* 0x3f3504f3: sqrt(1/2) */
    bits -= (uint32_t)exponent << 23;
    memcpy(&x, &bits, sizeof x);
    const float s = (x - 1) / (x + 1), square = s * s;
    const float series = square * (1 / 3.f + square * (1 / 5.f + square * (1 / 7.f + square * (1 / 9.f))));
    return (float)exponent * 0.693147181f + 2 * (s + s * series);
}

void dt_log_mel_init(dt_log_mel *features) {
    sines(features->sine, FFT - QUARTER + 1, FFT);
    sines(features->window, WINDOW / 2 + 1, 2 * WINDOW); /* .5 - .5 cos(x) is the square of sin(x / 2) */
    for (int i = 0; i <= WINDOW / 2; i++) features->window[i] *= features->window[i];

    const double width = (double)DT_LOG_MEL_RATE / FFT; /* Hz of a bin */
    double ratio = FIRST;
    int bin = 0;
    memset(features->rise, 0, sizeof features->rise);
    while (bin * width < 700 * (ratio - 1)) bin++;
    features->corner[0] = (uint16_t)bin;
    for (int corner = 1; corner < BANDS + 2; corner++) {
        const double low = 700 * (ratio - 1), high = 700 * (ratio * FACTOR - 1);
        /* the last corner is the last bin, whose weight is 0: rounding must not matter */
        for (; bin < HALF && bin * width < high; bin++) {
            features->rise[bin] = (float)((bin * width - low) / (high - low));
        }
        features->corner[corner] = (uint16_t)bin;
        ratio *= FACTOR;
    }
    dt_log_mel_reset(features);
}

void dt_log_mel_reset(dt_log_mel *features) {
    features->filled = 0;
}

/* Transform HALF complex numbers in place. */
static void transform(float *z, const float *sine) {
    const float *cosine = sine + QUARTER;
    for (int i = 1, j = 0; i < HALF; i++) { /* bit reversal: j is i with its bits in reverse order */
        int bit = HALF / 2;
        for (; j & bit; bit /= 2) j ^= bit;
        j ^= bit;
        if (i < j) {
            const float re = z[2 * i], im = z[2 * i + 1];
            z[2 * i] = z[2 * j], z[2 * i + 1] = z[2 * j + 1];
            z[2 * j] = re, z[2 * j + 1] = im;
        }
    }
    for (int size = 1; size < HALF; size *= 2) {
        const int step = HALF / size; /* in the table, of exp(-i pi / size) */
        for (int first = 0; first < HALF; first += 2 * size) {
            float *low = z + 2 * first, *high = low + 2 * size;
            for (int k = 0; k < size; k++) {
                const float c = cosine[k * step], s = sine[k * step];
                const float re = high[2 * k] * c + high[2 * k + 1] * s;
                const float im = high[2 * k + 1] * c - high[2 * k] * s;
                high[2 * k] = low[2 * k] - re, high[2 * k + 1] = low[2 * k + 1] - im;
                low[2 * k] += re, low[2 * k + 1] += im;
            }
        }
    }
}

/* The power of bin k of the real transform, from the complex one. */
static float power(const float *z, const float *sine, int k) {
    const float c = sine[QUARTER + k], s = sine[k];
    const float *a = z + 2 * (k % HALF), *b = z + 2 * ((HALF - k) % HALF);
    const float even_re = .5f * (a[0] + b[0]), even_im = .5f * (a[1] - b[1]);
    const float odd_re = .5f * (a[1] + b[1]), odd_im = .5f * (b[0] - a[0]);
    const float re = even_re + odd_re * c + odd_im * s, im = even_im + odd_im * c - odd_re * s;
    return re * re + im * im;
}

/* Compute the features of the complete frame. */
static void compute(dt_log_mel *features, float *frame) {
    float *work = features->work;
    for (int i = 0; i < WINDOW; i++) {
        work[i] = features->samples[i] * features->window[i <= WINDOW / 2 ? i : WINDOW - i];
    }
    memset(work + WINDOW, 0, (FFT - WINDOW) * sizeof *work);
    transform(work, features->sine);

    float falls = 0; /* what the bins before have in the band whose triangle falls now */
    for (int band = -1; band < BANDS; band++) {
        float fall = 0, rise = 0;
        for (int k = features->corner[band + 1]; k < features->corner[band + 2]; k++) {
            const float p = power(work, features->sine, k);
            rise += features->rise[k] * p;
            fall += (1 - features->rise[k]) * p;
        }
        if (band >= 0) frame[band] = logarithm(falls + fall + FLOOR);
        falls = rise;
    }
}

int dt_log_mel_next(dt_log_mel *features, const float **samples, size_t *count, float *frame) {
    const size_t missing = WINDOW - features->filled, taken = *count < missing ? *count : missing;
    if (taken) memcpy(features->samples + features->filled, *samples, taken * sizeof(float));
    features->filled += taken;
    *count -= taken;
    if (taken) *samples += taken;
    if (features->filled < WINDOW) return 0;
    compute(features, frame);
    memmove(features->samples, features->samples + HOP, (WINDOW - HOP) * sizeof(float));
    features->filled = WINDOW - HOP;
    return 1;
}

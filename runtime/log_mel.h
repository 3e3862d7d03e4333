/* Log-mel features of speech: 40 numbers every 10 ms, from samples that arrive in pieces of any length.

   The definition, which this code repeats in float32: deepthin/lab/tasks/log_mel.py. Frames of 25 ms are multiplied by a
   Hann window; the power spectrum of 512 points is summed in 40 triangles from 20 Hz to 8 kHz, evenly spaced in mel; the
   feature is log(x + 1e-6).

   No heap, no global variables: all memory is the caller's struct. Tables are computed by dt_log_mel_init, so that they
   take no flash.

       static dt_log_mel features;
       float frame[DT_LOG_MEL_BANDS];
       dt_log_mel_init(&features);
       ...
       while (dt_log_mel_next(&features, &samples, &count, frame)) use(frame);
*/
#ifndef DT_LOG_MEL_H
#define DT_LOG_MEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DT_LOG_MEL_RATE = 16000, /* samples per second */
    DT_LOG_MEL_WINDOW = 400, /* samples of a frame */
    DT_LOG_MEL_HOP = 160,    /* samples from one frame to the next */
    DT_LOG_MEL_FFT = 512,    /* points of the spectrum */
    DT_LOG_MEL_BANDS = 40    /* features of a frame */
};

/* Tables, the samples of the frame under way, and working memory: 7,108 bytes where a size_t has 4. */
typedef struct {
    size_t filled;                                   /* samples of the frame so far */
    float samples[DT_LOG_MEL_WINDOW];                /* of the frame */
    float work[DT_LOG_MEL_FFT];                      /* the spectrum: real and imaginary parts in turn */
    float window[DT_LOG_MEL_WINDOW / 2 + 1];         /* the rising half of the window */
    float sine[DT_LOG_MEL_FFT * 3 / 4 + 1];          /* sin(2 pi i / 512); the cosine begins at a quarter */
    float rise[DT_LOG_MEL_FFT / 2 + 1];              /* of each bin: its weight in the triangle that rises there */
    uint16_t corner[DT_LOG_MEL_BANDS + 2];           /* the first bin at or above each corner */
} dt_log_mel;

/* Compute the tables, and forget all samples. */
void dt_log_mel_init(dt_log_mel *features);

/* Forget all samples: the next one begins a recording. */
void dt_log_mel_reset(dt_log_mel *features);

/* Take samples until a frame is complete.

   samples: where the samples are, between -1 and 1 at 16 kHz; moved on past those that were taken.
   count: how many there are; lowered by those that were taken.
   frame: gets DT_LOG_MEL_BANDS features.

   Returns 1 if the frame is complete: there may be more in the samples that are left. 0 if all samples were taken. n samples, in
   pieces of any lengths, have 1 + (n - 400) / 160 frames, rounded down. */
int dt_log_mel_next(dt_log_mel *features, const float **samples, size_t *count, float *frame);

#ifdef __cplusplus
}
#endif
#endif

/* Samples in, probabilities of words out: features, network and running mean, 10 ms at a time, without a heap.

   The network keeps its state between frames. Everything is in the caller's memory: of the model file, and of a run. */
#include "dt.h"
#include "log_mel.h"

#include <math.h>
#include <stdint.h>

enum { CLASSES = 8 }; /* at most */

typedef struct {
    dt_log_mel features;
    dt_model network;
    void *arena;
    uint32_t classes;
    float frame[DT_LOG_MEL_BANDS];
    float scores[CLASSES];
    float means[CLASSES]; /* of probabilities, with weight .1 for each new frame */
} spotter;

static spotter s;
static float samples[4096]; /* of one call of spotter_push */

#define EXPORT(name) __attribute__((export_name(#name)))

/* The first address behind all data: the model file lies there, and behind it the network's arena. */
extern unsigned char __heap_base;

static unsigned char *aligned(unsigned char *address)
{
    return (unsigned char *)(((uintptr_t)address + 15) & ~(uintptr_t)15);
}

/* Make room for a model file; the caller writes it there, then calls spotter_open. */
EXPORT(spotter_file) unsigned char *spotter_file(uint32_t bytes)
{
    unsigned char *file = aligned(&__heap_base);
    const uint32_t end = (uint32_t)(uintptr_t)file + bytes, pages = __builtin_wasm_memory_size(0);
    if (end > pages << 16 && __builtin_wasm_memory_grow(0, ((end - (pages << 16)) >> 16) + 1) == SIZE_MAX) return 0;
    return file;
}

EXPORT(spotter_reset) void spotter_reset(void)
{
    dt_log_mel_reset(&s.features);
    dt_reset(&s.network, s.arena);
    for (uint32_t i = 0; i < CLASSES; i++) s.means[i] = 0;
}

/* Check the file that lies where spotter_file said. Returns the number of classes, or minus an error of dt.h. */
EXPORT(spotter_open) int spotter_open(uint32_t bytes)
{
    unsigned char *file = aligned(&__heap_base);
    const int error = dt_open(&s.network, file, bytes);
    if (error) return -error;
    s.classes = dt_output_floats(&s.network, 0);
    if (dt_input_floats(&s.network, 0) != DT_LOG_MEL_BANDS || s.classes > CLASSES) return -DT_E_FORMAT;
    s.arena = aligned(file + bytes);
    if (!spotter_file((uint32_t)((unsigned char *)s.arena - file) + (uint32_t)dt_arena_bytes(&s.network))) return -100;
    dt_log_mel_init(&s.features);
    spotter_reset();
    return (int)s.classes;
}

EXPORT(spotter_samples) float *spotter_samples(void) { return samples; }
EXPORT(spotter_means) float *spotter_means(void) { return s.means; }

/* Take samples from spotter_samples() until a frame is complete. Returns how many were taken, minus 1 - that if the frame
   was completed: the means are then new. */
EXPORT(spotter_push) int spotter_push(uint32_t first, uint32_t count)
{
    const float *at = samples + first;
    size_t left = count;
    const int complete = dt_log_mel_next(&s.features, &at, &left, s.frame);
    const int taken = (int)(count - left);
    if (!complete) return taken;

    const void *inputs[1] = {s.frame};
    float *outputs[1] = {s.scores};
    dt_run(&s.network, inputs, outputs, s.arena);
    float largest = s.scores[0], sum = 0;
    for (uint32_t i = 1; i < s.classes; i++) largest = fmaxf(largest, s.scores[i]);
    for (uint32_t i = 0; i < s.classes; i++) sum += s.scores[i] = expf(s.scores[i] - largest);
    for (uint32_t i = 0; i < s.classes; i++) s.means[i] += .1f * (s.scores[i] / sum - s.means[i]);
    return -1 - taken;
}

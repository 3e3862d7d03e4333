/* Samples in, probabilities of words out: features, network and running mean, 10 ms at a time. The network keeps its state
 * between frames. The network's memory and calls: runtime/dt_wasm.c. */
#include "dt.h"
#include "log_mel.h"

enum { SAMPLES = 4096, CLASSES = 16 }; /* at most */

/* dt_wasm.c */
const void *wasm_input(uint32_t index);
float *wasm_output(uint32_t index);
uint32_t wasm_floats(uint32_t is_output, uint32_t index);
void wasm_reset(void);
void wasm_run(void);

static dt_log_mel features;
static float samples[SAMPLES];
static float means[CLASSES]; /* of probabilities, with weight .1 for each new frame */

float *spotter_samples(void) { return samples; }
float *spotter_means(void) { return means; }

void spotter_reset(void) {
    dt_log_mel_reset(&features);
    wasm_reset();
    for (uint32_t i = 0; i < CLASSES; i++) means[i] = 0;
}

/* After wasm_open. Returns the number of classes; 0 if the network does not take one frame at a time. */
uint32_t spotter_open(void) {
    const uint32_t classes = wasm_floats(1, 0);
    if (wasm_floats(0, 0) != DT_LOG_MEL_BANDS || classes > CLASSES) return 0;
    dt_log_mel_init(&features);
    spotter_reset();
    return classes;
}

/* Take samples until a frame is complete: `count` of them, from samples[first] on. Returns how many were taken; minus that,
 * if a frame was completed: the means are then new. */
int spotter_push(uint32_t first, uint32_t count) {
    const float *at = samples + first;
    size_t left = count;
    float *frame = (float *)wasm_input(0); /* const to those who only read it */
    const int complete = dt_log_mel_next(&features, &at, &left, frame), taken = (int)(count - left);
    if (!complete) return taken;

    const uint32_t classes = wasm_floats(1, 0);
    float probabilities[CLASSES];
    wasm_run();
    dt_softmax(0, 1, classes, 1, wasm_output(0), probabilities);
    for (uint32_t i = 0; i < classes; i++) means[i] += .1f * (probabilities[i] - means[i]);
    return -taken;
}

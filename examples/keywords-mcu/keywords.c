/* Keywords on a Cortex-M4: a recording in flash, log-mel features, the network on one frame after the other, the words that were
 * heard. Also prints how many instructions a second of sound takes, and the deepest stack.
 *
 * Instructions are counted by SysTick: under `qemu -icount shift=0` each instruction takes 1 ns of the emulated time, whose
 * processor clock ticks every 40 ns. A loop of known length checks that. */
#include <stdint.h>

#include "log_mel.h"
#include "model.h"
#include "sound.h" /* sound, SOUND_SAMPLES, words, WORDS: written by run.py */

#include "dt.h"

extern uint32_t __bss_start__[], __bss_end__[], stack_end[]; /* of mps2.ld */
void _start(void);

#define SYSTICK ((volatile uint32_t *)0xE000E010u) /* control, reload, value */
enum { TICKS = 1 << 24, LOOPS = 400000, CLASSES = WORDS + 1, STACK = 1 << 14 };
#define PAINT 0x5ac3b1e7u

static dt_log_mel features;
static float arena[MODEL_ARENA_BYTES / 4 + 1] __attribute__((aligned(16)));
static float means[CLASSES], largest[CLASSES];

/* ---- semihosting: the debugger, here QEMU, prints ---- */

static void call(uint32_t operation, const void *argument) {
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(const char *text) { call(4, text); } /* SYS_WRITE0 */

static void print_number(uint64_t number, uint32_t decimals) { /* the last digits behind a point */
    char digits[24];
    uint32_t at = sizeof digits - 1, count = 0;
    digits[at] = 0;
    do {
        if (decimals && count == decimals) digits[--at] = '.';
        digits[--at] = (char)('0' + number % 10);
        number /= 10, count++;
    } while (number || count <= decimals);
    print(digits + at);
}

/* ---- counting ---- */

static uint32_t ticks_since(uint32_t begin) { return (begin - SYSTICK[2]) & (TICKS - 1); } /* it counts down */

static uint32_t loop(void) { /* 2 LOOPS instructions */
    const uint32_t begin = SYSTICK[2];
    uint32_t left = LOOPS;
    __asm__ volatile("1: subs %0, #1\n\tbne 1b" : "+r"(left) : : "cc");
    return ticks_since(begin);
}

static void paint_stack(void) {
    uint32_t *here;
    __asm__("mov %0, sp" : "=r"(here));
    for (volatile uint32_t *to = stack_end - STACK / 4; to < here; to++) *to = PAINT;
}

static uint32_t deepest_stack(void) {
    const uint32_t *at = stack_end - STACK / 4;
    while (at < stack_end && *at == PAINT) at++;
    return (uint32_t)(4 * (stack_end - at));
}

/* ---- the example ---- */

static void hear(uint64_t *ticks_of_features, uint64_t *ticks_of_network) {
    float samples[DT_LOG_MEL_HOP], frame[DT_LOG_MEL_BANDS], scores[CLASSES];
    uint32_t frames = 0, begin;
    dt_log_mel_init(&features);
    model_reset(arena);
    for (uint32_t first = 0; first < SOUND_SAMPLES; first += DT_LOG_MEL_HOP) { /* as a microphone gives them */
        const float *at = samples;
        size_t count = SOUND_SAMPLES - first < DT_LOG_MEL_HOP ? SOUND_SAMPLES - first : DT_LOG_MEL_HOP;
        begin = SYSTICK[2];
        for (size_t i = 0; i < count; i++) samples[i] = (float)sound[first + i] / 32768.0f;
        const int complete = dt_log_mel_next(&features, &at, &count, frame);
        *ticks_of_features += ticks_since(begin);
        if (!complete) continue;
        begin = SYSTICK[2];
        model_run(frame, scores, arena);
        dt_softmax(0, 1, CLASSES, 1, scores, scores);
        for (uint32_t k = 0; k < CLASSES; k++) {
            const float before = means[k];
            means[k] += 0.1f * (scores[k] - before);
            if (means[k] > largest[k]) largest[k] = means[k];
            if (k < WORDS && before <= 0.5f && means[k] > 0.5f) {
                print_number(frames, 2); /* 10 ms each */
                print(" s: ");
                print(words[k]);
                print("\n");
            }
        }
        *ticks_of_network += ticks_since(begin);
        frames++;
        /* the rest of the samples begins the next frame */
        begin = SYSTICK[2];
        dt_log_mel_next(&features, &at, &count, frame);
        *ticks_of_features += ticks_since(begin);
    }
}

static void print_rate(const char *what, uint64_t ticks, uint32_t each) {
    print(what);
    print_number(ticks * each * DT_LOG_MEL_RATE / SOUND_SAMPLES, 0);
    print(" instructions a second of sound\n");
}

static void run(void) {
    uint64_t features_took = 0, network_took = 0;
    SYSTICK[1] = TICKS - 1, SYSTICK[2] = 0, SYSTICK[0] = 5; /* the processor's clock, no interrupt */
    while (!SYSTICK[2]) continue;
    const uint32_t each = (2 * LOOPS + loop() / 2) / loop(); /* instructions of a tick, rounded */
    paint_stack();
    hear(&features_took, &network_took);
    const uint32_t stack = deepest_stack();
    for (uint32_t k = 0; k < CLASSES; k++) {
        print(k < WORDS ? words[k] : "(none of them)");
        print(": at most ");
        print_number((uint32_t)(10000.0f * largest[k] + 0.5f), 4);
        print("\n");
    }
    print_rate("features: ", features_took, each);
    print_rate("network: ", network_took, each);
    print("stack: ");
    print_number(stack, 0);
    print(" bytes; the counter ticks every ");
    print_number(each, 0);
    print(" instructions\n");
}

void _start(void) {
    static const uint32_t ended[2] = {0x20026, 0}; /* by the application, with status 0 */
    for (uint32_t *to = __bss_start__; to < __bss_end__;) *to++ = 0;
    run();
    call(0x20, ended); /* SYS_EXIT_EXTENDED */
    for (;;) {
    }
}

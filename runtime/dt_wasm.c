/* The runtime in a web page: what JavaScript calls. There is no heap; memory grows behind the last byte in use. */
#include "dt.h"

static dt_model model;
static unsigned char *arena;
static const void *inputs[16];
static float *outputs[16];

extern unsigned char __heap_base;
static size_t next_byte;

/* 16-byte aligned memory that is never given back; NULL if the browser has no more. */
void *wasm_memory(size_t bytes) {
    if (!next_byte) next_byte = ((size_t)&__heap_base + 15) & ~(size_t)15;
    const size_t begin = next_byte, end = (begin + bytes + 15) & ~(size_t)15, have = __builtin_wasm_memory_size(0) << 16;
    if (end > have && __builtin_wasm_memory_grow(0, (end - have + 65535) >> 16) == (size_t)-1) return NULL;
    next_byte = end;
    return (void *)begin;
}

/* Checks a flat file and takes memory for a run; DT_OK or an error of dt.h, or -1 without memory. */
int wasm_open(const void *file, size_t length) {
    const int status = dt_open(&model, file, length);
    if (status) return status;
    if (dt_inputs(&model) > 16 || dt_outputs(&model) > 16) return -1;
    arena = wasm_memory(dt_arena_bytes(&model));
    for (uint32_t i = 0; i < dt_inputs(&model); i++)
        if (!(inputs[i] = wasm_memory(4 * (size_t)dt_input_floats(&model, i)))) return -1;
    for (uint32_t i = 0; i < dt_outputs(&model); i++)
        if (!(outputs[i] = wasm_memory(4 * (size_t)dt_output_floats(&model, i)))) return -1;
    if (!arena) return -1;
    dt_reset(&model, arena);
    return DT_OK;
}

/* Numbers of an input, or of an output; 0 if there is none. */
uint32_t wasm_floats(uint32_t is_output, uint32_t index) {
    return is_output ? dt_output_floats(&model, index) : dt_input_floats(&model, index);
}
const void *wasm_input(uint32_t index) { return inputs[index & 15]; }
float *wasm_output(uint32_t index) { return outputs[index & 15]; }
void wasm_reset(void) { dt_reset(&model, arena); }
void wasm_run(void) { dt_run(&model, inputs, outputs, arena); }

/* What compilers expect of a C library, by WebAssembly's own instructions. */
#define BULK(instruction, to, with, count) \
    __asm__ volatile("local.get %0\n\tlocal.get %1\n\tlocal.get %2\n\t" instruction : : "r"(to), "r"(with), "r"(count) : "memory")
void *memcpy(void *to, const void *from, size_t count) {
    BULK("memory.copy 0, 0", to, from, count);
    return to;
}
void *memmove(void *to, const void *from, size_t count) { return memcpy(to, from, count); }
void *memset(void *to, int value, size_t count) {
    BULK("memory.fill 0", to, value, count);
    return to;
}

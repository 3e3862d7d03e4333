/* The fuzzer of flat files: changes valid ones word by word, signs them again, and runs what dt_open accepts.
 *
 *     fuzz FILES SEED FOLDER FILE.dtm...
 *
 * makes FILES changed files from the given ones; SEED decides on all of them. With FILES 0 the given files run as they are. Each
 * file, input, output and arena is a block of its own of exactly its size, so that AddressSanitizer sees every access beyond; UBSan
 * sees the rest. A process of its own runs the files: one that ends it, or takes more than 20 seconds, is written to FOLDER, and the
 * next files follow. Files with much work are not run. `make runtime-fuzz` compiles this with the sanitizers and runs a million. */
#define _DEFAULT_SOURCE /* mmap's anonymous memory */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dt_file.c" /* its tables */

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#endif
#endif
#ifndef ASAN_POISON_MEMORY_REGION
#define ASAN_POISON_MEMORY_REGION(from, count) ((void)(from), (void)(count))
#endif

enum { SECONDS = 20, LARGEST = 1 << 16, FINDS = 5 }; /* LARGEST: words of a file */
#define WORK 1e5                                      /* multiplications of a run, roughly, at most */
#define MEMORY ((size_t)1 << 17)                      /* floats of a run, at most */

typedef struct { /* shared by the process that runs files and the one that waits */
    unsigned long file, accepted, tight, run;
} counts;

typedef struct {
    uint32_t *words;
    size_t count;
} file;

/* ---- random numbers: SplitMix64 ---- */

static uint64_t state;

static uint64_t next(void) {
    uint64_t word = state += 0x9E3779B97F4A7C15u;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    return word ^ word >> 31;
}

static uint32_t below(size_t count) { return count ? (uint32_t)(next() % count) : 0; }

/* ---- changes ---- */

typedef struct {
    size_t first, count, record; /* words; of a record, 0: of any length */
} section;

enum { HEAD, SIZES, ARRAYS, CORES, MATRICES, CALLS, DATA, SECTIONS };

static void sections_of(const file *f, section *s) { /* of a valid file */
    const dt_model m = {(const uint8_t *)f->words, (uint32_t)(4 * f->count)};
    const uint32_t *w = f->words;
    const size_t first[SECTIONS + 1] = {2, HEADER, (size_t)(arrays_of(&m) - w), (size_t)(cores_of(&m) - w), (size_t)(matrices_of(&m) - w),
                                        (size_t)(calls_of(&m) - w), w[W_DATA] / 4, f->count - 1};
    static const size_t record[SECTIONS] = {0, 0, ARRAY, CORE, MATRIX, 0, 0};
    for (int i = 0; i < SECTIONS; i++) s[i].first = first[i], s[i].count = first[i + 1] - first[i], s[i].record = record[i];
    s[HEAD].count = W_DATA + 1 - 2, s[CALLS].count = w[W_CALLS];
}

static void change_word(const file *f, const section *s, uint32_t *word) {
    static const uint32_t odd[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 17, 31, 32, 33, 255, 256, 0x7fffffff, 0x80000000, 0xfffffffe, NONE,
                                   LIMIT - 1, LIMIT, LIMIT + 1, 0x7fc00000, 0x3f800000};
    switch (below(10)) {
        case 0: *word = odd[below(sizeof odd / sizeof *odd)]; break;
        case 1: *word = 1u << below(32); break;
        case 2: *word += 1 + below(4); break;
        case 3: *word -= 1 + below(4); break;
        case 4: *word ^= 1u << below(32); break;
        case 5: *word = f->words[s->first + below(s->count)]; break;
        case 6: *word = f->words[below(f->count)]; break;
        case 7: *word *= 2 + below(3); break;
        case 8: *word /= 2 + below(3); break;
        default: *word = below(64); break;
    }
}

static void change(file *f, const section *all) {
    const section *s = all + (below(4) ? SIZES + below(CALLS) : below(SECTIONS));
    if (!s->count) s = all + CALLS;
    uint32_t *words = f->words + s->first, *one = words + below(s->count), *other = words + below(s->count);
    const size_t record = s->record;
    switch (below(16)) {
        case 0: { /* a number that occurs, everywhere in the tables: dimensions change together */
            const uint32_t old = *one, now = below(2) ? old + 1 - 2 * below(2) : 1 + below(40);
            for (size_t i = HEADER; i < all[DATA].first && i < f->count; i++)
                if (f->words[i] == old && below(8)) f->words[i] = now;
            break;
        }
        case 1: { /* neighbours */
            const size_t at = below(s->count > 1 ? s->count - 1 : 1);
            const uint32_t kept = words[at];
            if (s->count > 1) words[at] = words[at + 1], words[at + 1] = kept;
            break;
        }
        case 2: { /* any two of a section */
            const uint32_t kept = *one;
            *one = *other, *other = kept;
            break;
        }
        case 3: /* a record over another */
            if (record) memmove(words + record * below(s->count / record), words + record * below(s->count / record), 4 * record);
            break;
        case 4: { /* some words move */
            const size_t some = 1 + below(8);
            const size_t from = below(s->count), to = below(s->count), most = s->count - (from > to ? from : to);
            memmove(words + to, words + from, 4 * (some < most ? some : most));
            break;
        }
        case 5: { /* more room, in which larger numbers are allowed */
            const uint32_t factor = 2 + below(7);
            f->words[W_ARENA] *= factor;
            for (size_t i = 0; i < all[SIZES].count; i++) f->words[all[SIZES].first + i] *= factor;
            break;
        }
        default: change_word(f, s, one); break;
    }
}

static void sign(file *f) {
    f->words[W_BYTES] = (uint32_t)(4 * f->count);
    f->words[f->count - 1] = crc32_of((const uint8_t *)f->words, 4 * f->count - 4);
}

/* The file of a number, from the valid ones. `made` has room for LARGEST words. */
static void mutated(const file *seeds, size_t count, uint64_t seed, unsigned long number, file *made) {
    section all[SECTIONS];
    state = seed * 0x2545F4914F6CDD1Du + number;
    next();
    const file *from = seeds + below(count);
    memcpy(made->words, from->words, 4 * from->count);
    made->count = from->count;
    sections_of(from, all);
    for (int changes = 1; changes < 9; changes++) {
        change(made, all);
        if (below(2)) break;
    }
    if (!below(16)) { /* cut off, or longer */
        made->count = below(4) ? made->count - below(16) : HEADER + 1 + below(made->count);
        if (made->count < HEADER + 1) made->count = HEADER + 1;
    }
    const uint32_t bytes = made->words[W_BYTES];
    sign(made);
    if (!below(64)) { /* lengths that lie */
        made->words[W_BYTES] = bytes;
        made->words[made->count - 1] = crc32_of((const uint8_t *)made->words, 4 * made->count - 4);
    }
    if (!below(64)) made->words[below(made->count)] ^= 1; /* not signed */
}

/* ---- how much work a run is, roughly: products of what is multiplied ---- */

static double work_of_row(const dt_matrix *w) {
    double work = w->cols, done = 1;
    if (w->kind == DT_WINDOWS) return work * (w->rank + 1.0) + w->rank;
    if (w->kind == DT_SPARSE) return work + w->n * (1 + 255.0 / w->cols);
    for (uint32_t k = w->count; w->kind == DT_TRAIN && k--; done *= w->cores[k].cols)
        work += (double)w->cores[k].before * w->cores[k].cols * w->cores[k].after * done;
    return work;
}

static double work_of(const dt_matrix *w, uint32_t use) {
    double work = (double)w->rows + w->cols, before = 1, done = 1;
    if (w->turned) return work + w->rows * (work_of_row(w) + w->cols);
    if (w->kind == DT_WINDOWS) return work + (double)dt_scratch(w, use) * w->n + (double)w->rows * ((double)w->cols / w->n + 20) * w->rank;
    if (w->kind == DT_SPARSE) return work + w->n * (1 + 255.0 / w->cols);
    if (w->kind != DT_TRAIN) return work + (double)w->rows * w->cols;
    for (uint32_t k = 0; k < w->count; k++) before *= w->cores[k].cols;
    for (uint32_t k = w->count; k--;) {
        const dt_core *c = w->cores + k;
        before /= c->cols;
        work += before * c->before * c->rows * c->cols * c->after * done;
        done *= c->rows;
    }
    return work;
}

static double product_of(const uint32_t *numbers, int count) {
    double all = 1;
    for (int i = 0; i < count; i++) all *= numbers[i] ? numbers[i] : 1;
    return all;
}

static double work_of_call(const dt_model *m, const uint32_t *w) {
    const uint32_t *a = w + 1;
    dt_core cores[2][DT_CORES];
    dt_matrix x, other;
    const dt_window *s = (const dt_window *)(const void *)a;
    switch (w[0]) {
        case LINEAR:
            x = matrix_at(m, a[0], cores[0]);
            return (double)dt_scratch(&x, a[4]) + a[3] * work_of(&x, a[4]);
        case EMBEDDING:
            x = matrix_at(m, a[0], cores[0]);
            return (double)dt_scratch(&x, DT_ROWS) + a[1] * work_of_row(&x);
        case CONV: {
            a += WINDOW, x = matrix_at(m, a[0], cores[0]);
            const double places = (double)s->out_height * s->out_width;
            const double work = s->groups > 1 ? s->outputs * (work_of_row(&x) + places * x.cols) : places * (2.0 * x.cols + work_of(&x, a[4]));
            return (double)dt_scratch(&x, s->groups > 1 ? DT_ROWS : a[4]) + a[3] * work;
        }
        case RECURRENT:
            x = matrix_at(m, a[1], cores[0]), other = matrix_at(m, a[2], cores[1]);
            return (double)dt_scratch(&x, a[9]) + (double)dt_scratch(&other, a[9]) + a[7] * (work_of(&x, a[9]) + work_of(&other, a[9]));
        case MAP: return a[1];
        case PAIR: return product_of(a + 1, 4);
        case AFFINE: return product_of(a, 3);
        case SOFTMAX:
        case REDUCE: return product_of(a + 1, 3);
        case NORMALIZE: return product_of(a, 2);
        case COPY: return product_of(a, 6);
        case FILL: return a[0];
        case POOL: return (double)s->channels * s->out_height * s->out_width * s->kernel[0] * s->kernel[1];
        default: return product_of(a, 4);
    }
}

static double work_of_file(const dt_model *m) {
    const uint32_t *call = calls_of(m), *end = call + words(m)[W_CALLS];
    double work = 0;
    for (; call < end; call += length_of(*call)) work += work_of_call(m, call);
    return work;
}

static size_t memory_of_file(const dt_model *m) {
    size_t floats = words(m)[W_ARENA];
    for (uint32_t i = 0; i < words(m)[W_INPUTS] + words(m)[W_OUTPUTS]; i++) floats += inputs_of(m)[i];
    return floats;
}

/* ---- running ---- */

static int opens(file *f) {
    dt_model model;
    sign(f);
    return dt_open(&model, f->words, 4 * f->count) == DT_OK;
}

/* The least number at which the file still opens. */
static void lower(file *f, uint32_t *number) {
    uint32_t low = 0, high = *number;
    while (low < high) {
        *number = low + (high - low) / 2;
        if (opens(f))
            high = *number;
        else
            low = *number + 1;
    }
    *number = high;
}

/* The largest number at which the file still opens: constants then end where the data end. */
static void raised(file *f, uint32_t *number) {
    uint32_t low = *number, high = (uint32_t)f->count;
    if (low >= high) return;
    while (low < high) {
        *number = high - (high - low) / 2;
        if (opens(f))
            low = *number;
        else
            high = *number - 1;
    }
    *number = low;
}

/* Moves the constants of one array, one matrix or one call to the end of the data. */
static void move_constants(file *f) {
    const dt_model m = {(const uint8_t *)f->words, (uint32_t)(4 * f->count)};
    uint32_t *const arrays = (uint32_t *)(uintptr_t)arrays_of(&m), *const matrices = (uint32_t *)(uintptr_t)matrices_of(&m);
    if (f->words[W_ARRAYS]) {
        uint32_t *array = arrays + (size_t)ARRAY * below(f->words[W_ARRAYS]);
        lower(f, array + 10); /* entries */
        for (int i = 0; i < 5; i++) raised(f, array + i);
    }
    if (f->words[W_MATRICES]) raised(f, matrices + (size_t)MATRIX * below(f->words[W_MATRICES]) + 15); /* gaps */
    uint32_t *call = (uint32_t *)(uintptr_t)calls_of(&m), *end = call + f->words[W_CALLS];
    while (call < end && call + length_of(*call) < end && below(3)) call += length_of(*call);
    if (call == end) return;
    uint32_t *word = call + 1;
    for (const char *a = arguments[*call]; *a; a++) {
        if ((*a == 'p' || *a == 'v') && word[0] == CONSTANT) raised(f, word + 1);
        word += *a == 'p' || *a == 'v' ? 2 : *a == 'w' ? WINDOW : *a >= '3' && *a <= '6' ? (uint32_t)(*a - '0') : 1;
    }
}

/* As small as it may be: arena, inputs, outputs, data. What a run touches beyond is then outside of a block. */
static void tighten(file *f) {
    const dt_model m = {(const uint8_t *)f->words, (uint32_t)(4 * f->count)};
    const size_t sizes = (size_t)f->words[W_INPUTS] + f->words[W_OUTPUTS];
    f->words[W_KEPT] = 0;
    lower(f, f->words + W_ARENA);
    for (size_t i = 0; i < sizes; i++) lower(f, (uint32_t *)(uintptr_t)inputs_of(&m) + i);
    size_t low = f->words[W_DATA] / 4 + 1, high = f->count;
    uint32_t kept[32]; /* a signature replaces a word */
    while (high - low > 32) low = high - 32;
    for (size_t i = low; i < high; i++) kept[i - low] = f->words[i - 1];
    for (f->count = high; f->count > low;) {
        f->count--;
        if (opens(f)) continue;
        f->count++;
        for (size_t i = low; i < f->count; i++) f->words[i - 1] = kept[i - low];
        break;
    }
    move_constants(f);
    sign(f);
}

static void *block(size_t bytes) {
    void *made = malloc(bytes);
    if (!made && bytes) abort();
    return made;
}

static void fill(void *to, size_t count) {
    static const uint32_t odd[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 0xff7fffff, 1, 0x80000000, 0};
    uint32_t *words = to;
    const uint32_t kind = below(4);
    for (size_t i = 0; i < count; i++) {
        const uint64_t random = next();
        const float value = (float)((int32_t)(random & 0xffff) - 0x8000) / 8192.0f;
        if (kind == 0)
            words[i] = (uint32_t)random % 32; /* ids */
        else if (kind == 1 && !(random >> 61))
            words[i] = odd[random >> 32 & 7];
        else
            memcpy(words + i, &value, sizeof value);
    }
}

/* Opens a copy of exactly the file's size, and runs it. */
static void try(const file *f, counts *counted) {
    uint8_t *bytes = block(4 * f->count);
    dt_model m;
    memcpy(bytes, f->words, 4 * f->count);
    if (dt_open(&m, bytes, 4 * f->count) == DT_OK) {
        counted->accepted++;
        if (memory_of_file(&m) <= MEMORY && dt_inputs(&m) + dt_outputs(&m) <= 64 && work_of_file(&m) <= WORK) {
            void *inputs[64], *arena = block(dt_arena_bytes(&m));
            float *outputs[64];
            const void **given = block(dt_inputs(&m) * sizeof *given);
            float **made = block(dt_outputs(&m) * sizeof *made);
            for (uint32_t i = 0; i < dt_inputs(&m); i++) {
                given[i] = inputs[i] = block((size_t)4 * dt_input_floats(&m, i));
                fill(inputs[i], dt_input_floats(&m, i));
            }
            for (uint32_t i = 0; i < dt_outputs(&m); i++) made[i] = outputs[i] = block((size_t)4 * dt_output_floats(&m, i));
            if (dt_arena_bytes(&m)) fill(arena, dt_arena_bytes(&m) / 4), dt_reset(&m, arena);
            ASAN_POISON_MEMORY_REGION(bytes + m.length - 4, 4); /* the checksum is no data */
            dt_run(&m, given, made, arena);
            counted->run++;
            if (memcmp(bytes, f->words, 4 * f->count - 4)) abort();
            for (uint32_t i = 0; i < dt_inputs(&m); i++) free(inputs[i]);
            for (uint32_t i = 0; i < dt_outputs(&m); i++) free(outputs[i]);
            free(given), free(made), free(arena);
        }
    }
    free(bytes);
}

/* Files from counted->file on; ends the process where one misbehaves. */
static void run_files(const file *seeds, size_t count, unsigned long files, uint64_t seed, counts *counted) {
    file made = {block(4 * LARGEST), 0};
    if (!files)
        for (; counted->file < count; counted->file++) alarm(SECONDS), try(seeds + counted->file, counted);
    for (; counted->file < files; counted->file++) {
        alarm(SECONDS);
        mutated(seeds, count, seed, counted->file, &made);
        try(&made, counted);
        if (!below(4) && opens(&made)) counted->tight++, tighten(&made), try(&made, counted);
    }
    free(made.words);
}

static int read_file(const char *path, file *to) {
    FILE *from = fopen(path, "rb");
    to->words = block(4 * LARGEST);
    to->count = from ? fread(to->words, 4, LARGEST, from) : 0;
    if (from) fclose(from);
    to->words = realloc(to->words, 4 * (to->count + 1));
    return to->words && to->count > HEADER && to->count < LARGEST;
}

int main(int argc, char **argv) {
    if (argc < 5) return fprintf(stderr, "usage: fuzz FILES SEED FOLDER FILE.dtm...\n"), 2;
    const unsigned long files = strtoul(argv[1], NULL, 10);
    const uint64_t seed = strtoul(argv[2], NULL, 10);
    const size_t count = (size_t)argc - 4;
    file *seeds = block(count * sizeof *seeds);
    for (size_t i = 0; i < count; i++) {
        dt_model m;
        if (!read_file(argv[i + 4], seeds + i) || (files && dt_open(&m, seeds[i].words, 4 * seeds[i].count) != DT_OK))
            return fprintf(stderr, "%s is no flat file, or larger than %d words.\n", argv[i + 4], LARGEST), 2;
    }
    counts *counted = mmap(NULL, sizeof *counted, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counted == MAP_FAILED) return 2;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    int finds = 0, status = 0;
    while (finds < FINDS) {
        fflush(NULL);
        const pid_t child = fork();
        if (child < 0) return 2;
        if (!child) {
            run_files(seeds, count, files, seed, counted);
            _exit(0);
        }
        if (waitpid(child, &status, 0) < 0) return 2;
        if (!status) break;
        char path[4096];
        file made = {block(4 * LARGEST), 0};
        if (files)
            mutated(seeds, count, seed, counted->file, &made);
        else
            memcpy(made.words, seeds[counted->file].words, 4 * seeds[counted->file].count), made.count = seeds[counted->file].count;
        snprintf(path, sizeof path, "%s/find-%lu-%lu.dtm", argv[3], (unsigned long)seed, counted->file);
        FILE *to = fopen(path, "wb");
        if (to) fwrite(made.words, 4, made.count, to), fclose(to);
        fprintf(stderr, "file %lu ended the process with status %d: %s\n", counted->file, status, path);
        free(made.words);
        finds++, counted->file++;
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    printf("%lu files in %.1f s, %.0f a second; %lu of them made as small as they may be; %lu accepted, %lu run, %d finds\n", counted->file,
           seconds, (double)counted->file / seconds, counted->tight, counted->accepted, counted->run, finds);
    for (size_t i = 0; i < count; i++) free(seeds[i].words);
    free(seeds);
    return finds != 0;
}

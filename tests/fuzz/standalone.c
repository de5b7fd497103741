/* standalone.c: a driver for fuzz targets where there is no libFuzzer: replay files and folders, then mutate them.
 *
 * fuzz_x [-runs=N] [-seconds=N] [-seed=S] [-max_len=N] PATH...
 * Without -runs and -seconds it replays only.  An input that takes more than a second is a failure. */
#include "input.h"

#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>
#include <time.h>

enum { MAX_INPUTS = 4096 };

static struct {
    uint8_t *data;
    size_t size;
} corpus[MAX_INPUTS];
static size_t num_inputs;
static uint64_t state;

/* splitmix64 */
static uint64_t random_word(void)
{
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static size_t below(size_t n)
{
    return n == 0 ? 0 : (size_t)(random_word() % n);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The input of a run that never returns can be made again from the seed and its number. */
static void run(const uint8_t *data, size_t size, const char *name)
{
    const double begin = now();
    uint8_t *exact = room(size, 1);
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    if (now() - begin > 1.0) {
        fprintf(stderr, "%s: %zu bytes took %.1f s\n", name, size, now() - begin);
        exit(1);
    }
}

static void load(const char *path)
{
    struct stat about;
    if (stat(path, &about) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(2);
    }
    if (S_ISDIR(about.st_mode)) {
        struct dirent **names;
        const int n = scandir(path, &names, NULL, alphasort);
        for (int i = 0; i < n; i++) {
            char below_path[4096];
            if (names[i]->d_name[0] != '.') {
                snprintf(below_path, sizeof below_path, "%s/%s", path, names[i]->d_name);
                load(below_path);
            }
            free(names[i]);
        }
        free(names);
        return;
    }
    FILE *file = fopen(path, "rb");
    LAW(file != NULL && num_inputs < MAX_INPUTS);
    uint8_t *data = room((uint64_t)about.st_size, 1);
    const size_t size = fread(data, 1, (size_t)about.st_size, file);
    fclose(file);
    corpus[num_inputs].data = data;
    corpus[num_inputs++].size = size;
    run(data, size, path);
}

static size_t mutate(uint8_t *data, size_t size, size_t room_for)
{
    static const uint8_t numbers[] = {0, 1, 2, 3, 4, 8, 16, 63, 64, 127, 128, 254, 255};
    for (size_t steps = 1 + below(6); steps > 0; steps--) {
        const size_t at = below(size), n = 1 + below(16);
        switch (below(8)) {
        case 0:
            if (size > 0)
                data[at] ^= (uint8_t)(1u << below(8));
            break;
        case 1:
            if (size > 0)
                data[at] = (uint8_t)random_word();
            break;
        case 2:
            if (size > 0)
                data[at] = numbers[below(sizeof numbers)];
            break;
        case 3:
            if (size > 0)
                data[at] = (uint8_t)(data[at] + below(9) - 4);
            break;
        case 4: /* cut out */
            if (size > n && at + n <= size) {
                memmove(data + at, data + at + n, size - at - n);
                size -= n;
            }
            break;
        case 5: /* put in */
            if (size + n <= room_for) {
                memmove(data + at + n, data + at, size - at);
                for (size_t i = 0; i < n; i++)
                    data[at + i] = (uint8_t)random_word();
                size += n;
            }
            break;
        case 6: /* a piece of the input elsewhere in it */
            if (size > n) {
                const size_t from = below(size - n), to = below(size - n);
                memmove(data + to, data + from, n);
            }
            break;
        default: /* go on as another input does */
            if (num_inputs > 0) {
                const size_t other = below(num_inputs);
                const size_t whole = corpus[other].size < room_for ? corpus[other].size : room_for;
                if (at < whole) {
                    memcpy(data + at, corpus[other].data + at, whole - at);
                    size = whole;
                }
            }
        }
    }
    return size;
}

int main(int argc, char **argv)
{
    unsigned long long runs = 0, seed = 0, max_len = 4096, done = 0;
    double seconds = 0;
    for (int i = 1; i < argc; i++) {
        if (sscanf(argv[i], "-runs=%llu", &runs) == 1 || sscanf(argv[i], "-seed=%llu", &seed) == 1 ||
            sscanf(argv[i], "-max_len=%llu", &max_len) == 1 || sscanf(argv[i], "-seconds=%lf", &seconds) == 1)
            continue;
        if (argv[i][0] == '-') {
            fprintf(stderr, "%s: unknown option\n", argv[i]);
            return 2;
        }
        load(argv[i]);
    }
    const double begin = now();
    state = seed;
    uint8_t *data = room(max_len, 1);
    while (done < runs || (seconds > 0 && (done % 256 != 0 || now() - begin < seconds))) {
        size_t size = 0;
        if (num_inputs > 0) {
            const size_t which = below(num_inputs);
            size = corpus[which].size < max_len ? corpus[which].size : (size_t)max_len;
            memcpy(data, corpus[which].data, size);
        }
        size = mutate(data, size, (size_t)max_len);
        run(data, size, "mutated input");
        done++;
    }
    printf("%zu inputs replayed, %llu mutated, %.1f s, seed %llu\n", num_inputs, done, now() - begin, seed);
    for (size_t i = 0; i < num_inputs; i++)
        free(corpus[i].data);
    free(data);
    return 0;
}

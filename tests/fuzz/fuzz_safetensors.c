/* fuzz_safetensors.c - any bytes as model.safetensors; with a leading 'I', as the index. */
#include <string.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"
#include "weights/safetensors.h"

/* Read all that an accepted file promises. */
static void touch(const struct safetensors *s)
{
    size_t total = 0;
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct tensor *t = safetensors_get(s, i);
        const volatile uint8_t *data = t->data;
        for (size_t j = 0; j < t->n_bytes; j++)
            (void)data[j];
        total += t->n_bytes;
        CHECK(safetensors_find(s, t->name) == t);
        CHECK(t->dtype == DTYPE_OTHER || (size_t)t->n_values * dtype_bytes(t->dtype) == t->n_bytes);
    }
    CHECK(total == safetensors_n_bytes(s));
}

/* The shard that an index may name: two tensors, a and b, of one byte each. */
static void write_shard(void)
{
    static const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                                 "\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}";
    uint8_t file[8 + sizeof(header) + 1] = {sizeof(header) - 1};
    memcpy(file + 8, header, sizeof(header) - 1);
    fuzz_file("s.safetensors", file, sizeof(file));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct safetensors *s = NULL;
    struct error err = {0};
    unlink(fuzz_file("model.safetensors", data, n));
    if (n && data[0] == 'I') {
        write_shard();
        fuzz_file("model.safetensors.index.json", data + 1, n - 1);
    } else {
        fuzz_file("model.safetensors", data, n);
    }
    if (safetensors_open(&s, fuzz_dir(), &err))
        fuzz_expect_reason(&err);
    else
        touch(s);
    safetensors_close(s);
    return 0;
}

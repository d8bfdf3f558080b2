/* api_keys.c - see api_keys.h */
#include "server/api_keys.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <xxhash.h>

enum { KEY_BYTES = 256, MIN_KEY_BYTES = 8, MAX_KEYS = 4096 };

struct key {
    unsigned char text[KEY_BYTES]; /* padded with zeros */
    bool is_admin;
};

struct api_keys {
    int n, cap;
    struct key *keys; /* [n], owned */
};

static bool is_key(const char *text, size_t n)
{
    if (n < MIN_KEY_BYTES || n >= KEY_BYTES)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (text[i] <= ' ' || text[i] >= 0x7f)
            return false;
    }
    return true;
}

static enum status add_key(struct api_keys *k, const char *text, size_t n, bool is_admin,
                           struct error *err)
{
    if (k->n == MAX_KEYS)
        return fail(err, STATUS_TOO_LARGE, "at most %d keys are supported", MAX_KEYS);
    if (k->n == k->cap) {
        int cap = k->cap ? 2 * k->cap : 8;
        struct key *grown = calloc((size_t)cap, sizeof(*grown));
        if (!grown)
            return fail(err, STATUS_NOMEM, "out of memory for %d keys", cap);
        if (k->n)
            memcpy(grown, k->keys, (size_t)k->n * sizeof(*grown));
        if (k->keys)
            explicit_bzero(k->keys, (size_t)k->n * sizeof(*grown));
        free(k->keys);
        k->keys = grown;
        k->cap = cap;
    }
    struct key *key = &k->keys[k->n++];
    memcpy(key->text, text, n);
    key->is_admin = is_admin;
    return STATUS_OK;
}

/* "KEY" or "KEY admin". */
static enum status read_line(struct api_keys *k, const char *line, struct error *err)
{
    size_t n = strcspn(line, " \t");
    const char *role = line + n + strspn(line + n, " \t");
    if (!is_key(line, n) || (*role && strcmp(role, "admin")))
        return fail(err, STATUS_INVALID,
                    "expected a key of %d to %d printable ASCII characters without blanks, and "
                    "behind it nothing or 'admin'",
                    MIN_KEY_BYTES, KEY_BYTES - 1);
    return add_key(k, line, n, *role, err);
}

static enum status read_lines(struct api_keys *k, FILE *f, struct error *err)
{
    enum status st = STATUS_OK;
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    for (int number = 1; !st && (n = getline(&line, &cap, f)) >= 0; number++) {
        while (n && strchr(" \t\r\n", line[n - 1]))
            n--;
        if (!n || line[0] == '#')
            continue;
        bool is_text = !memchr(line, '\0', (size_t)n);
        line[n] = '\0';
        st = read_line(k, is_text ? line : "", err);
        if (st)
            fail_context(err, "line %d", number);
    }
    if (line)
        explicit_bzero(line, cap);
    free(line);
    if (!st && ferror(f))
        st = fail(err, STATUS_IO, "cannot be read: %s", strerror(errno));
    if (!st && !k->n)
        st = fail(err, STATUS_INVALID, "expected at least one key, found none");
    return st;
}

enum status api_keys_open(struct api_keys **out, const char *path, struct error *err)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return fail(err, STATUS_IO, "API key file %s: cannot be opened: %s", path, strerror(errno));
    struct api_keys *k = calloc(1, sizeof(*k));
    enum status st = k ? read_lines(k, f, err) : fail(err, STATUS_NOMEM, "out of memory");
    fclose(f);
    if (st) {
        fail_context(err, "API key file %s", path);
        api_keys_close(k);
        return st;
    }
    *out = k;
    return STATUS_OK;
}

void api_keys_close(struct api_keys *keys)
{
    if (!keys)
        return;
    if (keys->keys)
        explicit_bzero(keys->keys, (size_t)keys->cap * sizeof(*keys->keys));
    free(keys->keys);
    free(keys);
}

int api_keys_count(const struct api_keys *keys)
{
    return keys->n;
}

/* 1 when the two are equal, 0 otherwise, without a branch on their bytes. */
static unsigned is_equal(const unsigned char *a, const unsigned char *b)
{
    unsigned char difference = 0;
    for (int i = 0; i < KEY_BYTES; i++) {
        difference |= a[i] ^ b[i];
        __asm__ volatile("" : "+r"(difference)); /* no early exit by the compiler */
    }
    return ((unsigned)difference - 1) >> 31;
}

int api_keys_find(const struct api_keys *keys, const char *authorization)
{
    static const char scheme[] = "Bearer ";
    if (!authorization || strncasecmp(authorization, scheme, sizeof(scheme) - 1))
        return API_KEYS_NONE;
    const char *given = authorization + sizeof(scheme) - 1;
    given += strspn(given, " ");
    size_t n = strlen(given);
    while (n && given[n - 1] == ' ')
        n--;
    if (!is_key(given, n))
        return API_KEYS_NONE;
    unsigned char padded[KEY_BYTES] = {0};
    memcpy(padded, given, n);
    int found = API_KEYS_NONE;
    for (int i = 0; i < keys->n; i++) {
        int mask = -(int)is_equal(padded, keys->keys[i].text);
        found = (found & ~mask) | (i & mask);
    }
    explicit_bzero(padded, sizeof(padded));
    return found;
}

void api_keys_tag(const struct api_keys *keys, int i, const uint8_t *secret, size_t n_secret,
                  uint8_t out[16])
{
    XXH128_canonical_t tag;
    const unsigned char *text = keys->keys[i].text;
    /* All 256 bytes: XXH3 takes what follows 240 through the whole secret. */
    XXH128_canonicalFromHash(&tag, XXH3_128bits_withSecret(text, KEY_BYTES, secret, n_secret));
    memcpy(out, tag.digest, sizeof(tag.digest));
}

bool api_keys_is_admin(const struct api_keys *keys, int index)
{
    return index >= 0 && index < keys->n && keys->keys[index].is_admin;
}

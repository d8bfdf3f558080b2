/* test_prefix.c - the index of prefixes against a list that is searched from end to end. */
#include "tests/unit/unit.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/prefix.h"
#include "tests/unit/fail_alloc.h"

enum { N_VALUES = 3, MAX_TOKENS = 24 };

static uint64_t random_state = 5;

static int random_below(int n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int)((random_state >> 33) % (uint64_t)n);
}

/* To be ended by image_store_free, which asserts that none is left. */
static void init_store(struct image_store *store, size_t n_images)
{
    *store = (struct image_store){0};
    image_store_init(store, "00112233445566778899aabbccddeeff", N_VALUES, 50, 0, 0);
    store->limit_bytes = n_images * image_bytes(store);
}

static struct prefixes *open_with(struct image_store *store, const struct prefix_options *options)
{
    struct prefixes *p = NULL;
    struct error err;
    if (prefixes_open(&p, options, store, &err))
        fail_msg("%s", err.text);
    return p;
}

/* Its state names the owner and the tokens. */
static void fill_values(float values[N_VALUES], int owner, const int32_t *ids, size_t n)
{
    uint32_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum = sum * 31 + (uint32_t)ids[i];
    values[0] = (float)owner;
    values[1] = (float)(sum % 100003);
    values[2] = 0;
}

static void mark_image(struct image *image, int owner, const int32_t *ids, size_t n)
{
    image->position = n;
    fill_values(image->values, owner, ids, n);
}

static bool add(struct prefixes *p, int owner, const int32_t *ids, size_t n)
{
    struct image *image = prefixes_reserve(p);
    if (!image)
        return false;
    mark_image(image, owner, ids, n);
    prefixes_add(p, owner, ids, n, image);
    return true;
}

/* Tokens found, 0 for none; what is found is the state after these tokens of the owner. */
static size_t find(struct prefixes *p, int owner, int stored_by, const int32_t *ids, size_t n)
{
    size_t n_seen = 0;
    struct image *image = prefixes_find(p, owner, ids, n, &n_seen);
    if (!image)
        return 0;
    float expected[N_VALUES];
    fill_values(expected, stored_by, ids, n_seen);
    assert_true(n_seen < n);
    assert_int_equal(image->position, n_seen);
    assert_memory_equal(image->values, expected, sizeof(expected));
    image_release(image);
    return n_seen;
}

/* ---- what is found ---- */

struct stored {
    int owner;
    size_t n;
    int32_t ids[MAX_TOKENS];
};

static size_t longest(const struct stored *all, int n_all, int owner, const int32_t *ids, size_t n)
{
    size_t found = 0;
    for (int i = 0; i < n_all; i++)
        if (all[i].owner == owner && all[i].n < n && all[i].n > found &&
            !memcmp(all[i].ids, ids, all[i].n * sizeof(*ids)))
            found = all[i].n;
    return found;
}

/* Few tokens, so that beginnings are often the same. */
static size_t random_ids(int32_t *ids)
{
    size_t n = 1 + (size_t)random_below(MAX_TOKENS);
    for (size_t i = 0; i < n; i++)
        ids[i] = random_below(10) ? 7 : random_below(3);
    return n;
}

static void check_against_list(int n_hash_bits)
{
    enum { N = 400 };
    static struct stored all[N];
    struct image_store store;
    int n_found = 0, n_missed = 0;
    init_store(&store, 10 * N);
    struct prefixes *p = open_with(
        &store, &(struct prefix_options){.limit_bytes = 1 << 20, .n_hash_bits = n_hash_bits});
    for (int i = 0; i < N; i++) {
        all[i].owner = random_below(3) - 1;
        all[i].n = random_ids(all[i].ids);
        assert_true(add(p, all[i].owner, all[i].ids, all[i].n));
        for (int k = 0; k < 10; k++) {
            int32_t ids[MAX_TOKENS];
            size_t n = random_ids(ids);
            int owner = random_below(4) - 1;
            size_t expected = longest(all, i + 1, owner, ids, n);
            size_t found = find(p, owner, owner, ids, n);
            if (found != expected)
                fail_msg("%zu tokens of %zu were found, expected %zu", found, n, expected);
            n_found += found > 0;
            n_missed += found == 0;
        }
        assert_true(prefixes_has(p, all[i].owner, all[i].ids, all[i].n));
        assert_false(prefixes_has(p, 3, all[i].ids, all[i].n));
    }
    assert_true(n_found > N && n_missed > N);
    prefixes_close(p);
    image_store_free(&store);
}

static void test_longest_beginning(void **state)
{
    (void)state;
    check_against_list(0);
}

/* Nothing but the comparison of tokens, lengths and owners tells entries apart. */
static void test_collisions(void **state)
{
    (void)state;
    check_against_list(1);
}

static void test_shared(void **state)
{
    (void)state;
    static const int32_t ids[] = {1, 2, 3, 4};
    struct image_store store;
    init_store(&store, 10);
    struct prefix_options options = {.limit_bytes = 1 << 20};
    struct prefixes *p = open_with(&store, &options);
    assert_true(add(p, 1, ids, 3));
    assert_int_equal(find(p, 2, 1, ids, 4), 0);
    assert_int_equal(find(p, -1, 1, ids, 4), 0);
    assert_int_equal(find(p, 1, 1, ids, 4), 3);
    assert_int_equal(find(p, 1, 1, ids, 3), 0); /* one token at least is left to feed */
    prefixes_close(p);
    options.shared = true;
    p = open_with(&store, &options);
    assert_true(add(p, 1, ids, 3));
    assert_int_equal(find(p, 2, 1, ids, 4), 3);
    prefixes_close(p);
    image_store_free(&store);
}

/* ---- limits ---- */

static size_t bytes_of(const struct image_store *store, size_t n_entries)
{
    return n_entries * (image_bytes(store) + 200);
}

static void test_least_recently_used_goes(void **state)
{
    (void)state;
    struct image_store store;
    struct prefix_stats stats;
    int32_t ids[2] = {0, 9};
    init_store(&store, 100);
    struct prefixes *p =
        open_with(&store, &(struct prefix_options){.limit_bytes = bytes_of(&store, 8)});
    for (int i = 0; i < 40; i++) {
        ids[0] = 0; /* is used all the time */
        assert_int_equal(find(p, 0, 0, ids, 2) > 0, i > 0);
        ids[0] = i;
        assert_true(add(p, 0, ids, 1));
        prefixes_stats(p, &stats);
        assert_true(stats.n_bytes <= bytes_of(&store, 8));
        assert_int_equal(store.n_images, stats.n_entries);
    }
    assert_true(stats.n_entries >= 6);
    for (int i = 1; i < 40; i++) {
        ids[0] = i;
        assert_int_equal(find(p, 0, 0, ids, 2) > 0, i > 40 - stats.n_entries);
    }
    prefixes_close(p);
    image_store_free(&store);
}

/* States that are still to be computed take a half, and then nothing more is reserved. */
static void test_reserved(void **state)
{
    (void)state;
    static const int32_t ids[] = {1, 2};
    struct image_store store;
    struct image *images[20];
    struct prefix_stats stats;
    init_store(&store, 100);
    struct prefixes *p =
        open_with(&store, &(struct prefix_options){.limit_bytes = 10 * image_bytes(&store)});
    int n = 0;
    while (n < 20 && (images[n] = prefixes_reserve(p)))
        n++;
    assert_int_equal(n, 5);
    mark_image(images[0], 0, ids, 1);
    prefixes_add(p, 0, ids, 1, images[0]);
    assert_int_equal(find(p, 0, 0, ids, 2), 1);
    for (int i = 1; i < n; i++)
        prefixes_cancel(p, images[i]);
    prefixes_cancel(p, NULL);
    prefixes_stats(p, &stats);
    assert_int_equal(stats.n_entries, 1);
    assert_int_equal(stats.n_reserved, 0);
    assert_int_equal(store.n_images, 1);
    assert_true(add(p, 0, ids, 1)); /* the same again is kept once */
    prefixes_stats(p, &stats);
    assert_int_equal(stats.n_entries, 1);
    assert_int_equal(store.n_images, 1);
    prefixes_close(p);
    image_store_free(&store);
}

/* A session that needs the memory gets it, but for what a running job holds. */
static void test_gives_way(void **state)
{
    (void)state;
    struct image_store store;
    struct image *sessions[4], *held, *none;
    struct error err;
    int32_t ids[2] = {0, 9};
    size_t n_seen;
    init_store(&store, 4);
    struct prefixes *p = open_with(&store, &(struct prefix_options){.limit_bytes = 1 << 20});
    store.give_way = prefixes_give_way;
    store.give_way_context = p;
    for (ids[0] = 0; ids[0] < 4; ids[0]++)
        assert_true(add(p, 0, ids, 1));
    ids[0] = 0;
    held = prefixes_find(p, 0, ids, 2, &n_seen);
    assert_non_null(held);
    for (int i = 0; i < 3; i++)
        assert_int_equal(image_new(&sessions[i], &store, &err), STATUS_OK);
    assert_int_equal(image_new(&none, &store, &err), STATUS_BUSY);
    assert_int_equal(find(p, 0, 0, ids, 2), 1);
    image_release(held);
    assert_int_equal(image_new(&sessions[3], &store, &err), STATUS_OK);
    assert_int_equal(find(p, 0, 0, ids, 2), 0);
    assert_null(prefixes_reserve(p)); /* and does not lose it again */
    for (int i = 0; i < 4; i++)
        image_release(sessions[i]);
    prefixes_close(p);
    image_store_free(&store);
}

static void test_many_entries(void **state)
{
    (void)state;
    struct image_store store;
    struct prefix_stats stats;
    int32_t ids[3] = {0};
    init_store(&store, 2 * PREFIX_MAX_ENTRIES);
    struct prefixes *p = open_with(&store, &(struct prefix_options){.limit_bytes = 64 << 20});
    for (int i = 0; i < PREFIX_MAX_ENTRIES + 100; i++) {
        ids[0] = i / 100;
        ids[1] = i % 100;
        assert_true(add(p, 0, ids, 2));
    }
    prefixes_stats(p, &stats);
    assert_int_equal(stats.n_entries, PREFIX_MAX_ENTRIES);
    ids[0] = 0, ids[1] = 99; /* of the first hundred none is left */
    assert_int_equal(find(p, 0, 0, ids, 3), 0);
    ids[0] = 1, ids[1] = 0;
    assert_int_equal(find(p, 0, 0, ids, 3), 2);
    prefixes_close(p);
    image_store_free(&store);
}

static void test_nothing_is_kept(void **state)
{
    (void)state;
    static const int32_t ids[] = {1, 2};
    struct prefix_stats stats;
    size_t n_seen;
    assert_null(prefixes_find(NULL, 0, ids, 2, &n_seen));
    assert_null(prefixes_reserve(NULL));
    assert_false(prefixes_has(NULL, 0, ids, 2));
    prefixes_cancel(NULL, NULL);
    prefixes_stats(NULL, &stats);
    assert_int_equal(stats.n_entries, 0);
    prefixes_close(NULL);
}

/* What finds no memory is not kept, and that is no failure. */
static enum status keep_one(void *context, struct error *err)
{
    static const int32_t ids[] = {1, 2, 3};
    struct image_store *store = context;
    struct prefixes *p = NULL;
    size_t n_seen;
    enum status st =
        prefixes_open(&p, &(struct prefix_options){.limit_bytes = 1 << 20}, store, err);
    if (st)
        return st;
    bool added = add(p, 0, ids, 2);
    struct image *found = prefixes_find(p, 0, ids, 3, &n_seen);
    CHECK(!found || (added && n_seen == 2));
    image_release(found);
    prefixes_close(p);
    CHECK(store->n_images == 0);
    return STATUS_OK;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    struct image_store store;
    init_store(&store, 10);
    fail_alloc_walk(keep_one, &store);
    image_store_free(&store);
}

/* ---- threads ---- */

struct racer {
    struct prefixes *p;
    int owner;
};

static void *race(void *context)
{
    const struct racer *r = context;
    for (int i = 0; i < 3000; i++) {
        int32_t ids[8];
        size_t n_seen, n = 8;
        for (size_t k = 0; k < n; k++)
            ids[k] = (int32_t)(k < 6 ? k : (size_t)i % 13 + k);
        struct image *found = prefixes_find(r->p, r->owner, ids, n, &n_seen);
        CHECK(!found || (found->position == n_seen && found->values[0] == (float)r->owner));
        image_release(found);
        struct image *image = prefixes_reserve(r->p);
        if (!image)
            continue;
        mark_image(image, r->owner, ids, 1 + (size_t)i % 7);
        if (i % 3)
            prefixes_add(r->p, r->owner, ids, 1 + (size_t)i % 7, image);
        else
            prefixes_cancel(r->p, image);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    enum { N = 4 };
    struct image_store store;
    pthread_t threads[N];
    struct racer racers[N];
    init_store(&store, 12);
    struct prefixes *p =
        open_with(&store, &(struct prefix_options){.limit_bytes = bytes_of(&store, 20)});
    store.give_way = prefixes_give_way;
    store.give_way_context = p;
    for (int i = 0; i < N; i++) {
        racers[i] = (struct racer){p, i / 2};
        assert_int_equal(pthread_create(&threads[i], NULL, race, &racers[i]), 0);
    }
    for (int i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    prefixes_close(p);
    assert_int_equal(store.used_bytes, 0);
    image_store_free(&store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_longest_beginning),
        cmocka_unit_test(test_collisions),
        cmocka_unit_test(test_shared),
        cmocka_unit_test(test_least_recently_used_goes),
        cmocka_unit_test(test_reserved),
        cmocka_unit_test(test_gives_way),
        cmocka_unit_test(test_many_entries),
        cmocka_unit_test(test_nothing_is_kept),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

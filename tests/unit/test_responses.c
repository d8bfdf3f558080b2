/* test_responses.c - stored responses: what a record tells as JSON and as events, and which of
 * many the table keeps. Time is the test's. */
#include "tests/unit/unit.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/responses.h"
#include "tests/unit/fail_alloc.h"

enum { TTL = 100, STATE_VALUES = 64 };

static struct image_store images;

static struct response *make(int owner)
{
    struct response *r = NULL;
    struct error err;
    struct bytes repeated = {0}, items = {0};
    bytes_text(&repeated, ",\"instructions\":null");
    bytes_text(&items, "\"role\":\"user\"\n");
    assert_int_equal(response_new(&r, &repeated, &items, 1, &err), STATUS_OK);
    r->owner = owner;
    r->model = "m\"odel";
    return r;
}

static struct image *make_image(void)
{
    struct image *image = NULL;
    struct error err;
    assert_int_equal(image_new(&image, &images, &err), STATUS_OK);
    return image;
}

static struct responses *make_table(int max_per_owner, size_t max_bytes)
{
    struct responses *t = NULL;
    struct error err;
    const struct responses_options options = {
        .ttl_s = TTL, .max_per_owner = max_per_owner, .max_bytes = max_bytes};
    assert_int_equal(responses_open(&t, &options, &err), STATUS_OK);
    return t;
}

static bool is_there(struct responses *t, const struct response *r, int owner, int64_t now)
{
    struct response *found = responses_find(t, r->id, owner, now);
    assert_true(!found || found == r);
    response_release(found);
    return found != NULL;
}

/* ---- one response -----------------------------------------------------------------------------
 */

/* The JSON of the event with this number, whose two lines say its type. */
static cJSON *event(const struct response *r, size_t number)
{
    struct bytes out = {0};
    response_write_event(&out, r, number);
    char type[64];
    int at = 0;
    assert_int_equal(sscanf(out.data, "event: %63s\ndata: %n", type, &at), 1);
    assert_memory_equal(out.data + out.n - 3, "}\n\n", 3);
    cJSON *v = cJSON_ParseWithLength(out.data + at, out.n - (size_t)at);
    assert_non_null(v);
    assert_string_equal(cJSON_GetObjectItem(v, "type")->valuestring, type);
    assert_int_equal(cJSON_GetObjectItem(v, "sequence_number")->valueint, number);
    bytes_free(&out);
    return v;
}

static void assert_type(const struct response *r, size_t number, const char *type)
{
    cJSON *v = event(r, number);
    assert_string_equal(cJSON_GetObjectItem(v, "type")->valuestring, type);
    cJSON_Delete(v);
}

static void assert_delta(const struct response *r, size_t number, const char *text, int n_logprobs)
{
    cJSON *v = event(r, number);
    assert_string_equal(cJSON_GetObjectItem(v, "delta")->valuestring, text);
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(v, "logprobs")), n_logprobs);
    cJSON_Delete(v);
}

static void add(struct response *r, const char *text, const char *logprobs)
{
    struct bytes list = {0};
    bytes_text(&list, logprobs);
    response_add(r, text, strlen(text), &list);
    bytes_free(&list);
}

/* Each event is there as soon as it can be told, and does not change afterwards. */
static void test_events_of_a_growing_one(void **state)
{
    (void)state;
    struct response *r = make(0);
    assert_int_equal(response_n_events(r), 2);
    response_begin(r);
    assert_int_equal(response_n_events(r), 4);
    add(r, "a\"", "{\"l\":1},{\"l\":2}");
    add(r, "\xc3\xa9", "");
    add(r, "", "{\"l\":3}");
    add(r, "c", "{\"l\":4}");
    assert_int_equal(response_n_events(r), 8);
    cJSON *before[8];
    for (size_t i = 0; i < 8; i++)
        before[i] = event(r, i);
    response_end(r, RESPONSE_COMPLETED, 77);
    assert_int_equal(response_n_events(r), 12);
    for (size_t i = 0; i < 8; i++) {
        cJSON *after = event(r, i);
        assert_true(cJSON_Compare(before[i], after, true));
        cJSON_Delete(before[i]);
        cJSON_Delete(after);
    }
    assert_delta(r, 4, "a\"", 2);
    assert_delta(r, 5, "\xc3\xa9", 0);
    assert_delta(r, 6, "", 1);
    assert_delta(r, 7, "c", 1);
    assert_type(r, 11, "response.completed");
    cJSON *done = event(r, 8);
    assert_string_equal(cJSON_GetObjectItem(done, "text")->valuestring, "a\"\xc3\xa9"
                                                                        "c");
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(done, "logprobs")), 4);
    cJSON_Delete(done);
    response_end(r, RESPONSE_INCOMPLETE, 78); /* it has ended once */
    assert_type(r, 11, "response.completed");
    response_release(r);
}

static void test_failures(void **state)
{
    (void)state;
    struct error err;
    struct response *early = make(0), *late = make(0);
    fail(&err, STATUS_BUSY, "full");
    response_fail(early, &err);
    assert_int_equal(response_n_events(early), 3);
    assert_type(early, 2, "response.failed");
    cJSON *v = event(early, 2);
    const cJSON *error = cJSON_GetObjectItem(cJSON_GetObjectItem(v, "response"), "error");
    assert_string_equal(cJSON_GetObjectItem(error, "code")->valuestring, "rate_limit_exceeded");
    cJSON_Delete(v);
    add(late, "a", "");
    fail(&err, STATUS_DEVICE, "broken");
    response_fail(late, &err);
    fail(&err, STATUS_BUSY, "full");
    response_fail(late, &err); /* the first reason stays */
    assert_int_equal(response_n_events(late), 6);
    v = event(late, 5);
    error = cJSON_GetObjectItem(cJSON_GetObjectItem(v, "response"), "error");
    assert_string_equal(cJSON_GetObjectItem(error, "message")->valuestring, "broken");
    assert_string_equal(cJSON_GetObjectItem(error, "code")->valuestring, "server_error");
    cJSON_Delete(v);
    response_release(early);
    response_release(late);
}

static void count_news(void *context)
{
    ++*(int *)context;
}

static void test_watchers(void **state)
{
    (void)state;
    int n[2] = {0};
    struct response *r = make(0);
    struct response_watcher one = {.news = count_news, .context = &n[0]},
                            two = {.news = count_news, .context = &n[1]};
    response_watch(r, &one);
    response_watch(r, &two);
    add(r, "a", "");
    response_unwatch(r, &one);
    response_end(r, RESPONSE_COMPLETED, 1);
    response_unwatch(r, &two);
    assert_int_equal(n[0], 1);
    assert_int_equal(n[1], 2);
    response_release(r);
}

/* ---- the table --------------------------------------------------------------------------------
 */

static void test_time_to_live(void **state)
{
    (void)state;
    struct responses *t = make_table(10, 1 << 20);
    struct response *first = make(0), *second = make(0);
    responses_add(t, first, 1000);
    responses_add(t, second, 1001);
    assert_true(is_there(t, first, 0, 1000 + TTL - 1));
    assert_false(is_there(t, first, 0, 1000 + TTL)); /* before anybody has cleaned up */
    assert_int_equal(responses_expire(t, 1000 + TTL - 1), 0);
    assert_int_equal(responses_expire(t, 1000 + TTL), 1);
    assert_int_equal(responses_n(t), 1);
    assert_true(is_there(t, second, 0, 1000 + TTL));
    assert_int_equal(responses_take_dropped(t), 0);
    response_release(first);
    response_release(second);
    responses_close(t);
}

static void test_limits(void **state)
{
    (void)state;
    struct responses *t = make_table(2, 1 << 20);
    struct response *r[6];
    static const int owners[] = {0, -1, 0, 5, 0, 0}; /* the third and fourth of 0 are too many */
    for (int i = 0; i < 6; i++) {
        r[i] = make(owners[i]);
        responses_add(t, r[i], 1000);
    }
    static const bool stays[] = {false, true, false, true, true, true};
    for (int i = 0; i < 6; i++) {
        assert_int_equal(is_there(t, r[i], owners[i], 1000), stays[i]);
        assert_false(is_there(t, r[i], owners[i] + 1, 1000));
    }
    assert_int_equal(responses_take_dropped(t), 2);
    responses_remove(t, r[4]);
    responses_remove(t, r[4]); /* harmless */
    responses_remove(t, r[0]);
    assert_int_equal(responses_n(t), 3);
    for (int i = 0; i < 6; i++)
        response_release(r[i]);
    responses_close(t);
}

/* Of random adds and removals, for owners in random order, what is there is what a list of them
 * says. */
static void test_many(void **state)
{
    (void)state;
    enum { N = 3000, MAX = 7, OWNERS = 4 };
    uint32_t seed = 12345;
    struct responses *t = make_table(MAX, 1 << 30);
    static struct response *all[N];
    static bool there[N];
    for (int i = 0; i < N; i++) {
        int owner = (int)(test_random(&seed) % OWNERS) - 1;
        all[i] = make(owner);
        responses_add(t, all[i], 0);
        there[i] = true;
        int n = 0;
        for (int k = i; k >= 0; k--)
            if (there[k] && all[k]->owner == owner && ++n > MAX)
                there[k] = false;
        if (test_random(&seed) % 3 == 0) {
            int k = (int)(test_random(&seed) % (uint32_t)(i + 1));
            responses_remove(t, all[k]);
            there[k] = false;
        }
    }
    int n = 0;
    for (int i = 0; i < N; i++) {
        assert_int_equal(is_there(t, all[i], all[i]->owner, 0), there[i]);
        n += there[i];
        response_release(all[i]);
    }
    assert_int_equal(responses_n(t), n);
    responses_close(t);
}

/* States count: the oldest responses go with theirs, and the newest stays whatever it takes. */
static void test_memory(void **state)
{
    (void)state;
    struct response *probe = make(0);
    const size_t each = response_bytes(probe) + image_bytes(&images);
    response_release(probe);
    struct responses *t = make_table(100, 3 * each + each / 2);
    struct response *r[6];
    for (int i = 0; i < 6; i++) {
        struct image *image = make_image();
        r[i] = make(0);
        responses_add(t, r[i], 1000);
        responses_settle(t, r[i], image);
        image_release(image);
    }
    for (int i = 0; i < 6; i++) {
        assert_int_equal(is_there(t, r[i], 0, 1000), i >= 3);
        if (i < 3)
            assert_int_equal(r[i]->stored, false);
    }
    char *long_text = calloc(1, 8 * each);
    memset(long_text, 'x', 8 * each - 1);
    add(r[5], long_text, "");
    responses_count(t, r[5]);
    assert_int_equal(responses_n(t), 1);
    assert_true(is_there(t, r[5], 0, 1000));
    free(long_text);
    for (int i = 0; i < 6; i++)
        response_release(r[i]);
    assert_int_equal(atomic_load(&images.n_images), 0 + 1); /* of the one that is stored */
    responses_close(t);
    assert_int_equal(atomic_load(&images.n_images), 0);
}

static enum status state_of(struct responses *t, const struct response *r, int owner,
                            struct image **image)
{
    struct response_instructions chain;
    struct error err;
    return responses_state(t, r->id, owner, 1000, image, &chain, &err);
}

static void test_state(void **state)
{
    (void)state;
    struct responses *t = make_table(10, 1 << 20);
    struct response *good = make(0), *bad = make(0);
    struct image *image = make_image(), *found = NULL;
    struct error err;
    good->instructions = response_instructions_of("be kind");
    assert_int_equal(state_of(t, good, 0, &found), STATUS_NOT_FOUND);
    responses_settle(t, good, image); /* not stored: it keeps no state */
    assert_null(good->image);
    responses_add(t, good, 1000);
    responses_add(t, bad, 1000);
    assert_int_equal(state_of(t, good, 0, &found), STATUS_CONFLICT);
    responses_settle(t, good, image);
    response_end(good, RESPONSE_COMPLETED, 1000);
    responses_count(t, good);
    fail(&err, STATUS_INTERNAL, "gone");
    response_fail(bad, &err);
    responses_count(t, bad);
    assert_int_equal(state_of(t, good, 1, &found), STATUS_NOT_FOUND);
    assert_int_equal(state_of(t, bad, 0, &found), STATUS_INVALID);
    assert_null(found);
    struct response_instructions chain;
    assert_int_equal(responses_state(t, good->id, 0, 1000, &found, &chain, &err), STATUS_OK);
    assert_ptr_equal(found, image);
    struct response_instructions same = response_instructions_of("be kind"),
                                 other = response_instructions_of("be kinD");
    assert_memory_equal(chain.hash, same.hash, sizeof(chain.hash));
    assert_memory_not_equal(chain.hash, other.hash, sizeof(chain.hash));
    assert_false(response_instructions_of(NULL).given);
    responses_remove(t, good);
    response_release(good);
    response_release(bad);
    image_release(image);
    image_drop(found); /* outlives the response */
    responses_close(t);
    assert_int_equal(atomic_load(&images.n_images), 0);
}

/* Whatever allocation fails, nothing leaks, and what was lost is said. */
static enum status live_once(void *context, struct error *err)
{
    (void)context;
    struct response *r = NULL;
    struct responses *t = NULL;
    struct bytes repeated = {0}, items = {0}, none = {0};
    const struct responses_options options = {
        .ttl_s = TTL, .max_per_owner = 2, .max_bytes = 1 << 20};
    enum status st = responses_open(&t, &options, err);
    if (!st)
        st = response_new(&r, &repeated, &items, 0, err);
    if (!st) {
        responses_add(t, r, 0);
        for (int i = 0; i < 40; i++)
            response_add(r, "text", 4, &none);
        if (response_failed(r))
            st = fail(err, STATUS_NOMEM, "lost");
        else
            assert_int_equal(r->text.n, 160);
    }
    response_release(r);
    responses_close(t);
    return st;
}

static void test_out_of_memory(void **state)
{
    (void)state;
    fail_alloc_walk(live_once, NULL);
}

int main(void)
{
    image_store_init(&images, "0123456789abcdef0123456789abcdef", STATE_VALUES, 10, 0, 1 << 20);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_events_of_a_growing_one),
        cmocka_unit_test(test_failures),
        cmocka_unit_test(test_watchers),
        cmocka_unit_test(test_time_to_live),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_many),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_state),
        cmocka_unit_test(test_out_of_memory),
    };
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (!n_failed) /* a test that failed leaves some */
        image_store_free(&images);
    return n_failed;
}

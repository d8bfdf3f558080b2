/* test_outcomes.c - what is kept of requests with an Idempotency-Key, and what goes when. */
#include "tests/unit/unit.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/outcomes.h"

#define PATH "/v1/completions"

static struct outcomes *open_table(size_t limit_bytes, int64_t keep_s)
{
    struct outcomes *t = NULL;
    struct error err;
    const struct outcomes_options options = {.limit_bytes = limit_bytes, .keep_s = keep_s};
    assert_int_equal(outcomes_open(&t, &options, &err), STATUS_OK);
    return t;
}

static struct outcome_key key_of(const char *text, int owner, const char *body)
{
    struct outcome_key key = {.owner = owner, .path = PATH, .key = text};
    outcome_hash(&key, body, strlen(body));
    return key;
}

static struct outcome *claim(struct outcomes *t, const struct outcome_key *key, bool expect_new)
{
    struct outcome *o = NULL;
    struct error err;
    bool is_new = !expect_new;
    assert_int_equal(outcomes_claim(t, key, &o, &is_new, &err), STATUS_OK);
    assert_int_equal(is_new, expect_new);
    return o;
}

static void test_one_claim(void **state)
{
    (void)state;
    struct outcomes *t = open_table(1 << 20, 100);
    struct outcome_key key = key_of("k", 1, "body"), other_body = key_of("k", 1, "Body"),
                       other_owner = key_of("k", 2, "Body"), other_path = other_body;
    struct outcome_record record;
    struct outcome *o = claim(t, &key, true), *found;
    struct error err;
    bool is_new;
    other_path.path = "/v1/chat/completions";
    assert_ptr_equal(claim(t, &key, false), o);
    assert_int_equal(outcome_state(o), OUTCOME_CLAIMED);
    assert_int_equal(outcomes_claim(t, &other_body, &found, &is_new, &err), STATUS_INVALID);
    outcome_forget(claim(t, &other_owner, true));
    outcome_forget(claim(t, &other_path, true));
    outcome_store(o, 404, "reply", 5);
    assert_ptr_equal(claim(t, &key, false), o);
    outcome_record(o, &record);
    assert_int_equal(outcome_state(o), OUTCOME_STORED);
    assert_int_equal(record.http_status, 404);
    assert_int_equal(record.n_body, 5);
    assert_memory_equal(record.body, "reply", 5);
    assert_string_equal(record.stream_id, "");
    /* Forgotten, it may be claimed for another body. */
    outcome_forget(o);
    outcome_forget(claim(t, &other_body, true));
    assert_int_equal(outcomes_stats(t).n_outcomes, 0);
    assert_int_equal(outcomes_stats(t).used_bytes, 0);
    outcomes_close(t);
}

static void test_streams(void **state)
{
    (void)state;
    struct outcomes *t = open_table(1 << 20, 100);
    struct outcome_key key = key_of("k", -1, "");
    struct outcome_record record;
    struct outcome *o = claim(t, &key, true);
    outcome_stream(o, "cmpl-1");
    assert_int_equal(outcome_state(claim(t, &key, false)), OUTCOME_STREAMING);
    outcome_record(o, &record);
    assert_string_equal(record.stream_id, "cmpl-1");
    outcome_end_stream(o);
    assert_int_equal(outcome_state(claim(t, &key, false)), OUTCOME_STORED);
    outcomes_close(t);
}

/* Bodies go first, the oldest first; then records. The newest one is always whole. */
static void test_limit(void **state)
{
    (void)state;
    enum { LIMIT = 100000, N = 2000, BODY = 500 };
    struct outcomes *t = open_table(LIMIT, 100);
    char body[BODY], text[16], large[LIMIT / 4 + 1];
    memset(body, 'x', sizeof(body));
    memset(large, 'x', sizeof(large));
    for (int i = 0; i < N; i++) {
        snprintf(text, sizeof(text), "%d", i);
        struct outcome_key key = key_of(text, 0, text);
        struct outcome_record record;
        struct outcome *o = claim(t, &key, true);
        outcome_store(o, 200, body, sizeof(body));
        outcome_record(o, &record);
        assert_int_equal(record.n_body, BODY);
        assert_true(outcomes_stats(t).used_bytes <= LIMIT);
    }
    int n_whole = 0, n_known = 0, first_whole = N;
    for (int i = N - 1; i >= 0; i--) {
        snprintf(text, sizeof(text), "%d", i);
        struct outcome_key key = key_of(text, 0, text);
        struct outcome_record record;
        struct outcome *o;
        struct error err;
        bool is_new;
        assert_int_equal(outcomes_claim(t, &key, &o, &is_new, &err), STATUS_OK);
        outcome_record(o, &record);
        if (is_new) {
            outcome_forget(o);
            continue;
        }
        assert_int_equal(N - 1 - i, n_known); /* none older is known than one that is not */
        n_known++;
        if (record.body) {
            assert_int_equal(n_whole, n_known - 1);
            first_whole = i;
            n_whole++;
        }
    }
    assert_true(n_whole > LIMIT / 4 / BODY && n_known > n_whole && n_known < N);
    assert_int_equal(first_whole, N - n_whole);
    struct outcome_key key = key_of("large", 0, "");
    struct outcome_record record;
    struct outcome *o = claim(t, &key, true);
    outcome_store(o, 200, large, sizeof(large));
    outcome_record(o, &record);
    assert_null(record.body);
    outcomes_close(t);
}

/* What was written down comes back, but for what is overdue. */
static void test_restore(void **state)
{
    (void)state;
    struct outcomes *t = open_table(1 << 20, 100), *after = open_table(1 << 20, 100);
    struct outcome_key key = key_of("k", 3, "body"), old = key_of("old", 3, "body");
    struct outcome_record record, found;
    struct error err;
    struct outcome *o = claim(t, &key, true);
    outcome_store(o, 200, "reply", 5);
    outcome_record(o, &record);
    assert_int_equal(outcomes_restore(after, &record, &err), STATUS_OK);
    assert_int_equal(outcomes_restore(after, &record, &err), STATUS_OK);
    assert_int_equal(outcomes_stats(after).n_outcomes, 1);
    outcome_record(claim(after, &key, false), &found);
    assert_int_equal(found.stored, record.stored);
    assert_int_equal(found.n_body, 5);
    assert_memory_equal(found.body, "reply", 5);
    record.key = old;
    record.stored -= 101;
    assert_int_equal(outcomes_restore(after, &record, &err), STATUS_OK);
    outcome_forget(claim(after, &old, true));
    outcomes_close(after);
    outcomes_close(t);
}

/* With no time to live what was stored goes with the next tick; what runs stays. */
static void test_expiry(void **state)
{
    (void)state;
    struct outcomes *t = open_table(1 << 20, 0);
    struct outcome_key key = key_of("k", 0, ""), running = key_of("r", 0, "");
    struct outcome *o = claim(t, &running, true);
    outcome_store(claim(t, &key, true), 200, "reply", 5);
    outcomes_expire(t);
    assert_int_equal(outcomes_stats(t).n_outcomes, 1);
    assert_ptr_equal(claim(t, &running, false), o);
    outcome_forget(o);
    outcomes_close(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_claim), cmocka_unit_test(test_streams),
        cmocka_unit_test(test_limit),     cmocka_unit_test(test_restore),
        cmocka_unit_test(test_expiry),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

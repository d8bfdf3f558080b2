/* test_session_quota.c - what owners have is counted as a plain recount says. */
#include "tests/unit/unit.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/session_quota.h"

static void test_sessions(void **state)
{
    (void)state;
    const struct session_quota_options options = {.max_sessions = 2, .image_bytes = 10};
    struct session_quota *q = NULL;
    struct error err;
    assert_int_equal(session_quota_open(&q, &options, &err), STATUS_OK);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(session_quota_check_session(q, 5, &err), STATUS_OK);
        session_quota_count_session(q, 5, 1);
    }
    assert_int_equal(session_quota_check_session(q, 5, &err), STATUS_BUSY);
    assert_non_null(strstr(err.text, "--max-sessions-per-key"));
    assert_int_equal(session_quota_check_session(q, 4, &err), STATUS_OK); /* another owner */
    session_quota_count_session(q, 5, -1);
    assert_int_equal(session_quota_check_session(q, 5, &err), STATUS_OK);
    for (int i = 0; i < 9; i++) /* the open API's */
        session_quota_count_session(q, -1, 1);
    assert_int_equal(session_quota_check_session(q, -1, &err), STATUS_OK);
    session_quota_close(q);
}

enum { OWNERS = 3, IMAGES = 300, STEPS = 20000 };

static int counts[OWNERS][IMAGES];

static int recount(int owner)
{
    int n = 0;
    for (int i = 0; i < IMAGES; i++)
        n += counts[owner][i] > 0;
    return n;
}

/* The limit is where the recount puts it, whatever came and went. */
static void test_states(void **state)
{
    (void)state;
    static const char images[IMAGES];
    const struct session_quota_options options = {.max_bytes = 1009, .image_bytes = 10};
    struct session_quota *q = NULL;
    struct error err;
    unsigned seed = 20261128;
    int n_refused = 0;
    assert_int_equal(session_quota_open(&q, &options, &err), STATUS_OK);
    for (int step = 0; step < STEPS; step++) {
        int owner = rand_r(&seed) % OWNERS, i = rand_r(&seed) % IMAGES;
        int k = rand_r(&seed) % IMAGES;
        bool grows = rand_r(&seed) % 100 < (step / 2000 % 2 ? 40 : 60);
        int after = recount(owner) + 1 - (counts[owner][k] == 1);
        enum status st = session_quota_check_state(q, owner, &images[k], &err);
        assert_int_equal(st, after <= 100 ? STATUS_OK : STATUS_BUSY);
        n_refused += st != STATUS_OK;
        st = session_quota_check_state(q, owner, NULL, &err);
        assert_int_equal(st, recount(owner) < 100 ? STATUS_OK : STATUS_BUSY);
        if (grows || counts[owner][i]) {
            session_quota_count_state(q, owner, &images[i], grows ? 1 : -1);
            counts[owner][i] += grows ? 1 : -1;
        }
    }
    assert_true(n_refused > 100 && n_refused < STEPS - 100);
    assert_int_equal(session_quota_check_state(q, -1, NULL, &err), STATUS_OK);
    session_quota_count_state(q, 0, NULL, 1); /* a session without tokens has none */
    session_quota_close(q);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sessions),
        cmocka_unit_test(test_states),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

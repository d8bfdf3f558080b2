/* test_redis.c - addresses, connections that break, and what a store in Redis promises: a change is
 * done once however often it is sent, and only by who holds the session's turn.
 */
#include "tests/unit/unit.h"

#include <hiredis/hiredis.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "engine/redis.h"
#include "engine/redis_store.h"
#include "tests/unit/redis_server.h"

enum { TIMEOUT_MS = 2000, LEASE_MS = 400, FILE_BYTES = 100 };

static struct redis_server server;
static const char nobody[] = "00000000000000000000000000000000";

static int set_up(void **state)
{
    (void)state;
    if (redis_server_is_installed())
        redis_server_open(&server, "p@ss:w/rd%");
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    redis_server_close(&server);
    return 0;
}

/* Its password as it has to be written in an address. */
static void address(char *out, size_t n)
{
    snprintf(out, n, "redis://:p%%40ss%%3Aw%%2frd%%25@127.0.0.1:%d/0", server.port);
}

/* ---- connections ---- */

static void test_addresses(void **state)
{
    (void)state;
    static const char *const wrong[] = {
        "redis://",           "redis:",        "redis://:1",     "redis://h:0x1",
        "redis://h:70000",    "redis://h/x",   "redis://h:1/-1", "redis://:%zz@h",
        "redis://:%4@h",      "redis://[::1",  "redis://:%00@h", "unix://",
        "unix://relative",    "unix:///a?b=1", "unix:///a?db=x", "rediss://h",
        "redis://[::1]:port",
    };
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        struct redis_options options = {wrong[i], 100};
        struct redis *r = NULL;
        struct error err;
        assert_true(redis_is_url(wrong[i]));
        if (redis_open(&r, &options, &err) != STATUS_INVALID)
            fail_msg("%s is not refused: %s", wrong[i], err.text);
        assert_null(r);
    }
    assert_false(redis_is_url("/var/lib/redis"));
    assert_false(redis_is_url("redis"));
}

static enum status ping(struct redis *r, struct error *err)
{
    struct redis_command c;
    redisReply *reply = NULL;
    redis_command(&c, "PING", NULL);
    enum status st = redis_run(r, &c, 1, &reply, err);
    if (!st)
        assert_string_equal(reply->str, "PONG");
    redis_free_replies(&reply, !st);
    return st;
}

static void test_connections(void **state)
{
    (void)state;
    char url[160];
    struct error err;
    struct redis *r = NULL;
    if (!server.pid)
        skip();
    address(url, sizeof(url));
    struct redis_options options = {url, TIMEOUT_MS};
    if (redis_open(&r, &options, &err))
        fail_msg("%s", err.text);
    assert_null(strstr(redis_address(r), "ss"));
    assert_int_equal(ping(r, &err), STATUS_OK);
    for (int round = 0; round < 2; round++) {
        redis_server_kill(&server);
        assert_int_not_equal(ping(r, &err), STATUS_OK);
        assert_non_null(strstr(err.text, redis_address(r)));
        assert_int_equal(ping(r, &err), STATUS_IO);
        assert_false(redis_is_up(r));
        redis_server_start(&server);
        for (int i = 0; ping(r, &err) && i < 300; i++)
            usleep(10000);
        assert_true(redis_is_up(r));
    }
    redis_server_kill(&server); /* and back, before anybody looks: nothing is noticed */
    redis_server_start(&server);
    assert_int_equal(ping(r, &err), STATUS_OK);
    redis_close(r);
}

static void test_scripts(void **state)
{
    (void)state;
    char url[160], out[16];
    struct error err;
    struct redis *r = NULL;
    struct redis_script script = {.text = "return ARGV[1]..KEYS[1]"};
    if (!server.pid)
        skip();
    address(url, sizeof(url));
    struct redis_options options = {url, TIMEOUT_MS};
    assert_int_equal(redis_open(&r, &options, &err), STATUS_OK);
    assert_int_equal(redis_load(r, &script, &err), STATUS_OK);
    for (int i = 0; i < 2; i++) {
        struct redis_command c[2];
        redisReply *replies[2];
        for (int k = 0; k < 2; k++) {
            redis_call(&c[k], &script, "key");
            redis_add_text(&c[k], k ? "b" : "a");
        }
        assert_int_equal(redis_run(r, c, 2, replies, &err), STATUS_OK);
        assert_string_equal(replies[0]->str, "akey");
        assert_string_equal(replies[1]->str, "bkey");
        redis_free_replies(replies, 2);
        redis_server_ask(&server, (const char *const[]){"SCRIPT", "FLUSH", NULL}, out, sizeof(out));
    }
    redis_close(r);
}

/* ---- sessions ---- */

static struct redis_store *open_store(void)
{
    char url[160];
    struct error err;
    struct redis_store *s = NULL;
    address(url, sizeof(url));
    struct redis_store_options options = {.url = url,
                                          .fingerprint = "0123456789abcdef0123456789abcdef",
                                          .timeout_ms = TIMEOUT_MS,
                                          .lease_ms = LEASE_MS};
    if (redis_store_open(&s, &options, FILE_BYTES, &err) || redis_store_start(s, &err))
        fail_msg("%s", err.text);
    return s;
}

static void make_change(struct redis_change *c, const uint8_t key[16], const char *expected,
                        const char *lease)
{
    *c = (struct redis_change){.record = "record", .n_record = 6};
    memcpy(c->key, key, 16);
    redis_store_random(c->revision);
    snprintf(c->expected, sizeof(c->expected), "%s", expected);
    snprintf(c->lease, sizeof(c->lease), "%s", lease);
    snprintf(c->owner, sizeof(c->owner), "%s", nobody);
}

static enum status change(struct redis_store *s, struct redis_change *c)
{
    struct redis_change *done;
    redis_store_append(s, c);
    while (!(done = redis_store_take_done(s)))
        usleep(200);
    assert_ptr_equal(done, c);
    return c->error.status;
}

static void expect_revision(struct redis_store *s, const uint8_t key[16], const char *revision)
{
    struct redis_fetched f;
    struct error err;
    assert_int_equal(redis_store_fetch(s, key, "", "", NULL, &f, &err), STATUS_OK);
    assert_int_equal(f.is_there, revision != NULL);
    if (revision)
        assert_string_equal(f.revision, revision);
    redis_fetched_free(&f);
}

static void test_changes_are_done_once(void **state)
{
    (void)state;
    static const uint8_t key[16] = {1};
    struct redis_change first, second, other, end;
    if (!server.pid)
        skip();
    struct redis_store *s = open_store();
    make_change(&first, key, "", "");
    make_change(&second, key, first.revision, "");
    make_change(&other, key, first.revision, "");
    assert_int_equal(change(s, &first), STATUS_OK);
    assert_int_equal(change(s, &first), STATUS_OK); /* its answer was lost, say */
    assert_int_equal(change(s, &second), STATUS_OK);
    assert_int_equal(change(s, &first), STATUS_OK); /* and came very late */
    expect_revision(s, key, second.revision);
    assert_int_equal(change(s, &other), STATUS_CONFLICT);
    make_change(&other, key, "", "");
    assert_int_equal(change(s, &other), STATUS_CONFLICT); /* there is one of this id */
    expect_revision(s, key, second.revision);
    make_change(&end, key, "", "");
    end.is_delete = true;
    assert_int_equal(change(s, &end), STATUS_OK);
    assert_int_equal(change(s, &end), STATUS_OK);
    expect_revision(s, key, NULL);
    make_change(&other, key, second.revision, "");
    assert_int_equal(change(s, &other), STATUS_NOT_FOUND);
    redis_store_close(s);
}

static enum status take(struct redis_store *s, const uint8_t key[16], const char *lease)
{
    struct redis_fetched f;
    struct error err;
    enum status st = redis_store_fetch(s, key, "", nobody, lease, &f, &err);
    if (!st)
        redis_fetched_free(&f);
    return st;
}

static void test_leases(void **state)
{
    (void)state;
    static const uint8_t key[16] = {2};
    char a[REDIS_HEX_BYTES], b[REDIS_HEX_BYTES];
    struct redis_change first, c;
    if (!server.pid)
        skip();
    struct redis_store *s = open_store(), *other = open_store();
    redis_store_random(a);
    redis_store_random(b);
    make_change(&first, key, "", "");
    assert_int_equal(change(s, &first), STATUS_OK);
    assert_int_equal(take(s, key, a), STATUS_OK);
    assert_int_equal(take(s, key, a), STATUS_OK); /* its answer was lost, say */
    assert_int_equal(take(other, key, b), STATUS_CONFLICT);
    usleep(2 * LEASE_MS * 1000); /* it is renewed */
    assert_int_equal(take(other, key, b), STATUS_CONFLICT);
    make_change(&c, key, first.revision, b);
    assert_int_equal(change(other, &c), STATUS_CONFLICT);
    make_change(&c, key, first.revision, "");
    assert_int_equal(change(other, &c), STATUS_CONFLICT);
    c.is_delete = true;
    assert_int_equal(change(other, &c), STATUS_CONFLICT);
    make_change(&c, key, first.revision, a);
    assert_int_equal(change(s, &c), STATUS_OK); /* which ends the turn */
    assert_int_equal(take(other, key, b), STATUS_OK);
    redis_store_close(other); /* without a word: the lease is not renewed any more */
    assert_int_equal(take(s, key, a), STATUS_CONFLICT);
    usleep(LEASE_MS * 1000 + 100000);
    struct redis_change late;
    make_change(&late, key, c.revision, b);
    assert_int_equal(change(s, &late), STATUS_CONFLICT); /* also when nobody else came */
    assert_int_equal(take(s, key, a), STATUS_OK);
    redis_store_release(s, a);
    for (int i = 0; take(s, key, b) && i < 100; i++)
        usleep(2000);
    assert_int_equal(take(s, key, b), STATUS_OK);
    redis_store_close(s);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_addresses),
        cmocka_unit_test_setup_teardown(test_connections, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_scripts, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_changes_are_done_once, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_leases, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

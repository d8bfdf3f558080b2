/* test_journal.c - a journal of known entries: read again after any byte of the file was changed,
 * after it was cut at any length, and after writes that failed. */
#include "tests/unit/unit.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "engine/journal.h"
#include "tests/unit/model_files.h"

#define FINGERPRINT "00112233445566778899aabbccddeeff"

enum { MAX_ENTRIES = 200, FILE_HEAD = 64 };

static char dir[100], path[160];

static int make_dir(void **state)
{
    (void)state;
    int failed = test_dir_make(dir, sizeof(dir));
    snprintf(path, sizeof(path), "%s/journal", dir);
    return failed;
}

static int remove_dir(void **state)
{
    (void)state;
    test_dir_remove(dir);
    return 0;
}

static struct journal *open_journal(enum journal_mode mode)
{
    struct journal_options o = {
        .path = path, .fingerprint = FINGERPRINT, .mode = mode, .interval_ms = 5};
    struct journal *j = NULL;
    struct error err;
    if (journal_open(&j, &o, &err))
        fail_msg("%s", err.text);
    return j;
}

/* Entry i: its key and payload are functions of i. */
static void fill(struct journal_entry *e, int i)
{
    *e = (struct journal_entry){0};
    memset(e->key, i + 1, sizeof(e->key));
    for (int k = 0; k < 3 + i * 7 % 40; k++)
        bytes_char(&e->payload, (char)(i * 31 + k));
}

static void append(struct journal *j, struct journal_entry *entries, int from, int n)
{
    for (int i = from; i < from + n; i++) {
        fill(&entries[i], i);
        journal_append(j, &entries[i]);
    }
}

/* Take n that are done; returns how many failed. */
static int take(struct journal *j, int n)
{
    int n_failed = 0;
    while (n) {
        struct journal_entry *e = journal_take_done(j);
        if (!e) {
            usleep(100);
            continue;
        }
        n_failed += e->error.status != STATUS_OK;
        bytes_free(&e->payload);
        n--;
    }
    return n_failed;
}

/* What a replay gave. */
struct seen {
    int n;
    int ids[MAX_ENTRIES];
    bool damaged[MAX_ENTRIES];
};

static enum status see(void *context, const uint8_t key[JOURNAL_KEY_BYTES], const char *payload,
                       size_t n, struct error *err)
{
    struct seen *s = context;
    struct journal_entry expected;
    (void)err;
    fill(&expected, key[0] - 1);
    assert_true(s->n < MAX_ENTRIES);
    assert_memory_equal(key, expected.key, sizeof(expected.key));
    if (payload) {
        assert_int_equal(n, expected.payload.n);
        assert_memory_equal(payload, expected.payload.data, n);
    }
    bytes_free(&expected.payload);
    s->ids[s->n] = key[0] - 1;
    s->damaged[s->n++] = !payload;
    return STATUS_OK;
}

static void replay(struct seen *seen, struct journal_found *found)
{
    struct journal *j = open_journal(JOURNAL_NONE);
    struct error err;
    *seen = (struct seen){0};
    if (journal_replay(j, see, seen, found, &err))
        fail_msg("%s", err.text);
    journal_close(j);
}

static void write_entries(int n, enum journal_mode mode)
{
    static struct journal_entry entries[MAX_ENTRIES];
    struct journal *j = open_journal(mode);
    struct error err;
    assert_int_equal(journal_start(j, &err), STATUS_OK);
    append(j, entries, 0, n);
    assert_int_equal(take(j, n), 0);
    journal_close(j);
}

static void test_modes(void **state)
{
    (void)state;
    static const enum journal_mode modes[] = {JOURNAL_TURN, JOURNAL_INTERVAL, JOURNAL_NONE};
    for (size_t m = 0; m < COUNT_OF(modes); m++) {
        struct seen seen;
        struct journal_found found;
        unlink(path);
        write_entries(MAX_ENTRIES, modes[m]);
        replay(&seen, &found);
        assert_int_equal(seen.n, MAX_ENTRIES);
        assert_int_equal(found.n_damaged, 0);
        for (int i = 0; i < seen.n; i++)
            assert_int_equal(seen.ids[i], i);
    }
}

/* Any one byte: at most the entry it is in is lost, and that is said of no other. */
static void test_changed_bytes(void **state)
{
    (void)state;
    enum { N = 6 };
    size_t n;
    unlink(path);
    write_entries(N, JOURNAL_NONE);
    char *good = test_file_read(path, &n);
    for (size_t at = FILE_HEAD; at < n; at++) {
        struct seen seen;
        struct journal_found found;
        char byte = (char)(good[at] ^ (1 << at % 8));
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        assert_int_equal(write(fd, good, n), n);
        assert_int_equal(pwrite(fd, &byte, 1, (off_t)at), 1);
        close(fd);
        replay(&seen, &found);
        if (seen.n != N)
            fail_msg("byte %zu: %d entries are told of, expected %d", at, seen.n, N);
        int n_damaged = 0;
        for (int i = 0; i < N; i++) {
            assert_int_equal(seen.ids[i], i);
            n_damaged += seen.damaged[i];
        }
        if (n_damaged > 1)
            fail_msg("byte %zu: %d entries are called damaged", at, n_damaged);
    }
    free(good);
}

/* A file that ends anywhere has the entries before, and says nothing of damage. */
static void test_cut(void **state)
{
    (void)state;
    enum { N = 6 };
    size_t n;
    int n_before = 0;
    unlink(path);
    write_entries(N, JOURNAL_NONE);
    char *good = test_file_read(path, &n);
    for (size_t length = FILE_HEAD; length <= n; length++) {
        struct seen seen;
        struct journal_found found;
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        assert_int_equal(write(fd, good, length), length);
        close(fd);
        replay(&seen, &found);
        assert_int_equal(found.n_damaged, 0);
        assert_true(seen.n == n_before || seen.n == n_before + 1);
        n_before = seen.n;
    }
    assert_int_equal(n_before, N);
    free(good);
}

static void test_whole(void **state)
{
    (void)state;
    static struct journal_entry entries[20], whole;
    struct seen seen;
    struct journal_found found;
    struct error err;
    unlink(path);
    struct journal *j = open_journal(JOURNAL_TURN);
    assert_int_equal(journal_start(j, &err), STATUS_OK);
    append(j, entries, 0, 10);
    assert_int_equal(take(j, 10), 0);
    whole = (struct journal_entry){.is_whole = true};
    for (int i = 3; i < 6; i++) {
        fill(&entries[i], i);
        journal_list(&whole.payload, entries[i].key, entries[i].payload.data, entries[i].payload.n);
        bytes_free(&entries[i].payload);
    }
    journal_append(j, &whole);
    append(j, entries, 10, 2);
    assert_int_equal(take(j, 3), 0);
    journal_close(j);
    replay(&seen, &found);
    static const int expected[] = {3, 4, 5, 10, 11};
    assert_int_equal(seen.n, COUNT_OF(expected));
    assert_memory_equal(seen.ids, expected, sizeof(expected));
}

/* A file that may not grow is like a disk that is full: entries fail, none is half there, and
 * there is room again later. */
static void test_full_disk(void **state)
{
    (void)state;
    static struct journal_entry entries[MAX_ENTRIES];
    struct seen seen;
    struct journal_found found;
    struct error err;
    struct rlimit before, less;
    unlink(path);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    struct journal *j = open_journal(JOURNAL_NONE);
    assert_int_equal(journal_start(j, &err), STATUS_OK);
    less = before;
    less.rlim_cur = 1500;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &less), 0);
    int n_failed = 0, written[MAX_ENTRIES], n_written = 0;
    for (int i = 0; i < 30; i++) { /* one by one, so that it is known which */
        append(j, entries, i, 1);
        bool failed = take(j, 1);
        n_failed += failed;
        if (!failed)
            written[n_written++] = i;
    }
    assert_true(n_failed > 0 && n_written > 3);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    append(j, entries, 30, 5);
    assert_int_equal(take(j, 5), 0);
    for (int i = 30; i < 35; i++)
        written[n_written++] = i;
    journal_close(j);
    replay(&seen, &found);
    assert_int_equal(found.n_damaged, 0);
    assert_int_equal(seen.n, n_written);
    assert_memory_equal(seen.ids, written, (size_t)n_written * sizeof(int));
}

static void test_refusals(void **state)
{
    (void)state;
    struct error err;
    struct journal *other = NULL;
    struct journal_options o = {.path = path, .fingerprint = "ffffffffffffffffffffffffffffffff"};
    unlink(path);
    write_entries(1, JOURNAL_NONE);
    assert_int_equal(journal_open(&other, &o, &err), STATUS_INVALID);
    assert_non_null(strstr(err.text, FINGERPRINT));
    struct journal *j = open_journal(JOURNAL_NONE);
    o.fingerprint = FINGERPRINT;
    assert_int_equal(journal_open(&other, &o, &err), STATUS_CONFLICT);
    journal_close(j);
    int fd = open(path, O_WRONLY | O_TRUNC);
    assert_int_equal(write(fd, "{}", 2), 2);
    close(fd);
    assert_int_equal(journal_open(&other, &o, &err), STATUS_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_modes, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_changed_bytes, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_cut, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_whole, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_full_disk, make_dir, remove_dir),
        cmocka_unit_test_setup_teardown(test_refusals, make_dir, remove_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

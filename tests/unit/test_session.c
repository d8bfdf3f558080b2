/* test_session.c - sessions in a store, in random order: turns, forks, snapshots, rollbacks,
 * exports and imports, turns given up, sessions deleted, the process ended and begun again. Memory
 * has room for a few states only, so that nearly every turn finds its own written out and read
 * back, or computes it again. Beside each session its history is computed by the model alone from
 * the first token: tokens, states, positions and versions must be equal, bit for bit.
 *
 * Once with a store in a directory, and once in Redis, where each operation comes to one of two
 * tables, which know of each other's changes only what Redis tells them.
 *
 * LATTE_SESSION_OPS operations for each model and backend (40).
 */
#include "tests/unit/unit.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/engine.h"
#include "engine/session.h"
#include "engine/state_store.h"
#include "tests/unit/history.h"
#include "tests/unit/model_files.h"
#include "tests/unit/model_run.h"
#include "tests/unit/redis_server.h"

enum { MAX_SIDES = 2, N_MEMBERS = 9, N_SNAPSHOTS = 3, N_IN_MEMORY = 5, OWNER = 0 };

/* What a session has to be. */
struct member {
    bool exists;
    char id[SESSION_ID_BYTES];
    uint64_t version, position;
    struct history now, previous;
    bool has_previous;
    int n_snapshots;
    struct history snapshots[N_SNAPSHOTS];
};

/* A server's. */
struct side {
    struct image_store images;
    struct state_store *store;
    struct sessions *sessions;
};

static struct world {
    const char *dir, *device, *label;
    char store_dir[200]; /* or Redis's URL, which several sides share */
    struct engine *engine;
    struct side sides[MAX_SIDES], *at; /* [n_sides]; where the operation is done */
    int n_sides;
    int32_t vocab_size;
    size_t max_replay;
    struct run run; /* the oracle */
    struct member members[N_MEMBERS];
    uint64_t n_evictions, n_reloads, n_replays;
} world;

/* ---- outcomes ---- */

struct awaited {
    bool is_done;
    struct error error;
    struct session_info info;
};

static void on_done(void *context, const struct session_outcome *outcome)
{
    struct awaited *a = context;
    assert_false(a->is_done);
    a->is_done = true;
    a->error = outcome->error;
    a->info = outcome->info;
    a->info.metadata = NULL;
}

/* The change is done; its status. */
static enum status await(struct awaited *a, enum status st, const struct error *err)
{
    if (st)
        fail_msg("%s: %s", world.label, err->text);
    for (int i = 0; !a->is_done && i < 20000; i++) {
        sessions_reap(world.at->sessions);
        if (!a->is_done)
            usleep(i < 100 ? 20 : 1000);
    }
    assert_true(a->is_done);
    return a->error.status;
}

static void await_good(struct awaited *a, enum status st, const struct error *err)
{
    if (await(a, st, err))
        fail_msg("%s: %s", world.label, a->error.text);
}

/* ---- the server's side ---- */

static bool is_on_device(void *context, const struct image *image)
{
    return engine_state_is_resident(context, image);
}

static void open_side(struct world *w)
{
    struct side *side = w->at;
    static const uint8_t owners[2][SESSION_OWNER_BYTES] = {{1}, {2}};
    struct engine_info info;
    struct session_found found;
    struct error err;
    engine_info(w->engine, &info);
    image_store_init(&side->images, info.fingerprint, info.n_state_values, w->vocab_size,
                     info.max_position, 0);
    side->images.limit_bytes = N_IN_MEMORY * image_bytes(&side->images);
    side->images.max_replay = w->max_replay;
    side->images.is_on_device = is_on_device;
    side->images.on_device_context = w->engine;
    side->images.next_id += (uint64_t)(side - w->sides) << 40; /* one engine sees both sides' */
    struct journal_options journal = {.fingerprint = info.fingerprint, .mode = JOURNAL_NONE};
    struct state_store_options store = {.path = w->store_dir,
                                        .images = &side->images,
                                        .journal = &journal,
                                        .timeout_ms = 5000,
                                        .lease_ms = 10000};
    if (state_store_open(&side->store, &store, &err))
        fail_msg("%s", err.text);
    struct session_options sessions = {
        .max_sessions = 100, .store = side->store, .owners = owners, .n_owners = 2};
    if (sessions_open(&side->sessions, &sessions, &err) ||
        sessions_recover(side->sessions, &found, &err) || state_store_start(side->store, &err))
        fail_msg("%s", err.text);
    assert_int_equal(found.n_lost, 0);
    assert_int_equal(found.n_damaged, 0);
}

static void close_side(struct world *w)
{
    struct side *side = w->at;
    struct image_counts counts;
    image_count(&side->images, &counts);
    w->n_evictions += counts.n_evictions;
    w->n_reloads += counts.n_reloads;
    w->n_replays += counts.n_replays;
    assert_int_equal(counts.n_errors, 0);
    state_store_stop(side->store);
    sessions_reap(side->sessions);
    sessions_close(side->sessions);
    state_store_close(side->store);
    image_store_free(&side->images);
}

static void open_store(struct world *w)
{
    for (w->at = w->sides; w->at < w->sides + w->n_sides; w->at++)
        open_side(w);
    w->at = w->sides;
}

static void close_store(struct world *w)
{
    for (w->at = w->sides; w->at < w->sides + w->n_sides; w->at++)
        close_side(w);
    w->at = w->sides;
}

/* What a server does before anything with a session. */
static void refresh(struct world *w, const struct member *m)
{
    struct error err;
    if (session_refresh(w->at->sessions, m->id, &err))
        fail_msg("%s: %s", w->label, err.text);
}

static void open_engine(struct world *w)
{
    struct engine_info info;
    history_open_engine(&w->engine, &info, w->dir, w->device);
    w->vocab_size = info.config->vocab_size;
}

static void *hold(struct world *w, struct image *image)
{
    struct error err;
    if (image && state_store_hold(w->at->store, w->engine, image, &err))
        fail_msg("%s: %s", w->label, err.text);
    return image;
}

/* ---- checks ---- */

static void check_member(struct world *w, const struct member *m)
{
    struct session_info info;
    struct image *image = NULL;
    struct error err;
    refresh(w, m);
    if (session_image(w->at->sessions, m->id, OWNER, SESSION_ANY_VERSION, &image, &info, &err))
        fail_msg("%s: %s", w->label, err.text);
    session_info_free(&info);
    if (info.version != m->version || info.position != m->position)
        fail_msg("%s: version %llu at %llu, expected %llu at %llu", w->label,
                 (unsigned long long)info.version, (unsigned long long)info.position,
                 (unsigned long long)m->version, (unsigned long long)m->position);
    assert_int_equal(info.n_snapshots, m->n_snapshots);
    hold(w, image);
    history_check(&m->now, image, &w->run, w->vocab_size, w->label);
    image_release(image);
    image_drop(image);
}

static void take_info(struct member *m, const struct awaited *a)
{
    m->version = a->info.version;
    m->position = a->info.position;
}

/* ---- operations ---- */

static void create(struct world *w, struct member *m, struct image *from,
                   const struct history *history)
{
    struct session_request request = {.owner = OWNER, .from = from};
    struct awaited a = {0};
    struct error err;
    await_good(&a, session_create(w->at->sessions, &request, on_done, &a, &err), &err);
    *m = (struct member){.exists = true, .now = *history};
    memcpy(m->id, a.info.id, sizeof(m->id));
    take_info(m, &a);
    assert_int_equal(m->version, 0);
}

static void destroy(struct world *w, struct member *m)
{
    struct awaited a = {0};
    struct error err;
    if (!m->exists)
        return;
    refresh(w, m);
    const int64_t version = (int64_t)m->version;
    assert_int_equal(session_delete(w->at->sessions, m->id, OWNER, version + 1, on_done, &a, &err),
                     STATUS_PRECONDITION);
    await_good(&a, session_delete(w->at->sessions, m->id, OWNER, version, on_done, &a, &err), &err);
    m->exists = false;
    struct session_info info;
    for (int i = 0; i < w->n_sides; i++) {
        struct sessions *sessions = w->sides[i].sessions;
        assert_int_equal(session_refresh(sessions, m->id, &err), STATUS_OK);
        assert_int_equal(session_show(sessions, m->id, OWNER, &info, &err), STATUS_NOT_FOUND);
    }
}

/* The end of a turn is told to the other side a moment later. */
static void await_end(struct world *w, const struct member *m)
{
    struct session_info info = {.in_turn = true};
    struct error err;
    for (int i = 0; info.in_turn; i++) {
        assert_true(i < 5000);
        usleep(i ? 1000 : 0);
        refresh(w, m);
        assert_int_equal(session_show(w->at->sessions, m->id, OWNER, &info, &err), STATUS_OK);
        session_info_free(&info);
    }
}

/* commits false: the turn runs, and is given up. */
static void take_turn(struct world *w, struct member *m, bool commits)
{
    struct session_turn turn = {0};
    struct image *into = NULL;
    struct error err;
    struct history after = m->now;
    int32_t fed[HISTORY_MAX_PROMPT + HISTORY_MAX_OUTPUT + IMAGE_MAX_PENDING];
    struct turn *t = &after.turns[after.n_turns++];
    if (session_begin(w->at->sessions, m->id, OWNER, (int64_t)m->version, &turn, &err))
        fail_msg("%s: %s", w->label, err.text);
    struct session_turn second = {0};
    for (int i = 0; i < w->n_sides; i++)
        assert_int_equal(
            session_begin(w->sides[i].sessions, m->id, OWNER, SESSION_ANY_VERSION, &second, &err),
            STATUS_CONFLICT);
    hold(w, turn.from);
    if (image_new_wait(&into, &w->at->images, 10000, &err))
        fail_msg("%s: %s", w->label, err.text);
    history_fill(t, turn.from, w->vocab_size);
    history_run(t, w->engine, history_below(HISTORY_MAX_OUTPUT + 1), turn.from, into, w->label);
    image_release(turn.from);
    if (commits) {
        struct awaited a = {0};
        size_t n_single = (size_t)(t->n_output - into->n_pending);
        memcpy(fed, t->prompt, (size_t)t->n_prompt * sizeof(*fed));
        memcpy(fed + t->n_prompt, t->output, n_single * sizeof(*fed));
        await_good(&a,
                   session_commit(w->at->sessions, &turn, into, fed, (size_t)t->n_prompt, n_single,
                                  on_done, &a, &err),
                   &err);
        m->previous = m->now;
        m->has_previous = true;
        m->now = after;
        assert_int_equal(a.info.version, m->version + 1);
        /* The slot has the state still. */
        assert_int_equal(a.info.tier,
                         strcmp(w->device, "cuda") ? IMAGE_IN_MEMORY : IMAGE_ON_DEVICE);
        take_info(m, &a);
    } else {
        session_abandon(w->at->sessions, &turn);
        await_end(w, m);
    }
    image_release(into);
    check_member(w, m);
}

static void go_on(struct world *w, struct member *m)
{
    static const struct history none;
    if (m->exists && m->now.n_turns == HISTORY_MAX_TURNS)
        destroy(w, m);
    if (!m->exists)
        create(w, m, NULL, &none);
    take_turn(w, m, history_below(6) != 0);
}

static void fork_session(struct world *w, const struct member *from, struct member *to)
{
    struct session_info info;
    struct image *image = NULL;
    struct error err;
    if (!from->exists || from == to)
        return;
    struct history history = from->now;
    refresh(w, from);
    const int64_t version = (int64_t)from->version;
    assert_int_equal(
        session_image(w->at->sessions, from->id, OWNER, version + 1, &image, &info, &err),
        STATUS_PRECONDITION);
    assert_int_equal(session_image(w->at->sessions, from->id, OWNER, version, &image, &info, &err),
                     STATUS_OK);
    session_info_free(&info);
    destroy(w, to);
    create(w, to, image, &history);
    image_drop(image);
    check_member(w, to);
}

static void keep_snapshot(struct world *w, struct member *m)
{
    struct awaited a = {0};
    struct error err;
    char name[8];
    if (!m->exists || m->n_snapshots == N_SNAPSHOTS)
        return;
    snprintf(name, sizeof(name), "s%d", m->n_snapshots);
    refresh(w, m);
    const int64_t version = (int64_t)m->version;
    assert_int_equal(
        session_keep(w->at->sessions, m->id, OWNER, version + 1, name, on_done, &a, &err),
        STATUS_PRECONDITION);
    await_good(&a, session_keep(w->at->sessions, m->id, OWNER, version, name, on_done, &a, &err),
               &err);
    m->snapshots[m->n_snapshots++] = m->now;
}

/* What another side knows of the session, in a shared store: not what happens now. */
static struct side *other_side(struct world *w, const struct member *m)
{
    struct side *here = w->at, *other = &w->sides[w->at == w->sides];
    if (w->n_sides < 2)
        return NULL;
    w->at = other;
    refresh(w, m);
    w->at = here;
    return other;
}

/* There the session still is at a version that it was at: nothing asked for at that is done. */
static void expect_stale(struct world *w, const struct member *m, int64_t version,
                         struct side *there)
{
    struct side *here = w->at;
    struct error err;
    for (int i = 0; there && i < 3; i++) {
        struct awaited a = {0};
        struct sessions *sessions = there->sessions;
        w->at = there;
        enum status st =
            i == 0   ? session_delete(sessions, m->id, OWNER, version, on_done, &a, &err)
            : i == 1 ? session_keep(sessions, m->id, OWNER, version, "stale", on_done, &a, &err)
                     : session_rollback(sessions, m->id, OWNER, version, NULL, on_done, &a, &err);
        if (i == 2 && st == STATUS_CONFLICT) /* it had no turn to roll back */
            break;
        assert_int_equal(await(&a, st, &err), STATUS_PRECONDITION);
    }
    w->at = here;
}

static void roll_back(struct world *w, struct member *m, bool to_snapshot)
{
    struct awaited a = {0};
    struct error err;
    char name[8];
    if (!m->exists || (to_snapshot ? !m->n_snapshots : !m->has_previous))
        return;
    int i = to_snapshot ? history_below(m->n_snapshots) : 0;
    snprintf(name, sizeof(name), "s%d", i);
    refresh(w, m);
    const char *const to = to_snapshot ? name : NULL;
    const int64_t version = (int64_t)m->version;
    struct side *const other = other_side(w, m);
    assert_int_equal(
        session_rollback(w->at->sessions, m->id, OWNER, version + 1, to, on_done, &a, &err),
        STATUS_PRECONDITION);
    await_good(&a, session_rollback(w->at->sessions, m->id, OWNER, version, to, on_done, &a, &err),
               &err);
    m->now = to_snapshot ? m->snapshots[i] : m->previous;
    m->has_previous = false;
    assert_int_equal(a.info.version, m->version + 1);
    take_info(m, &a);
    expect_stale(w, m, version, other);
    check_member(w, m);
}

/* One session's state as bytes into another. */
static void carry_over(struct world *w, const struct member *from, struct member *to)
{
    struct session_info info;
    struct image *image = NULL;
    struct bytes file = {0};
    struct awaited a = {0};
    struct error err;
    if (!from->exists || !to->exists || !from->now.n_turns)
        return;
    refresh(w, from);
    refresh(w, to);
    assert_int_equal(
        session_image(w->at->sessions, from->id, OWNER, SESSION_ANY_VERSION, &image, &info, &err),
        STATUS_OK);
    session_info_free(&info);
    hold(w, image);
    image_write(image, &file);
    image_release(image);
    image_drop(image);
    for (int i = 0; image_parse(&image, &w->at->images, file.data, file.n, 0, &err) == STATUS_BUSY;
         i++) {
        assert_true(i < 10000); /* all states in memory are being written */
        usleep(1000);
    }
    if (state_store_secure(w->at->store, image, &err))
        fail_msg("%s: %s", w->label, err.text);
    struct history history = from->now;
    await_good(&a,
               session_replace(w->at->sessions, to->id, OWNER, (int64_t)to->version, image, on_done,
                               &a, &err),
               &err);
    image_release(image);
    bytes_free(&file);
    to->previous = to->now;
    to->has_previous = true;
    to->now = history;
    take_info(to, &a);
    check_member(w, to);
}

/* All members are known to the side, and nothing else is. */
static void check_side(struct world *w)
{
    struct session_counts counts;
    int n = 0;
    for (int i = 0; i < N_MEMBERS; i++) {
        struct session_info info;
        struct error err;
        struct member *m = &w->members[i];
        n += m->exists;
        if (!m->exists)
            continue;
        check_member(w, m);
        assert_int_equal(session_show(w->at->sessions, m->id, 1, &info, &err), STATUS_NOT_FOUND);
    }
    sessions_count(w->at->sessions, &counts);
    assert_int_equal(counts.n_sessions, n);
}

static void restart(struct world *w, bool with_engine)
{
    close_store(w);
    if (with_engine) {
        engine_close(w->engine);
        open_engine(w);
    }
    open_store(w);
    for (w->at = w->sides; w->at < w->sides + w->n_sides; w->at++)
        check_side(w);
    w->at = w->sides;
}

static void operate(struct world *w)
{
    struct member *m = &w->members[history_below(N_MEMBERS)];
    struct member *other = &w->members[history_below(N_MEMBERS)];
    w->at = &w->sides[w->n_sides > 1 ? history_below(w->n_sides) : 0];
    switch (history_below(12)) {
    case 0:
        fork_session(w, m, other);
        break;
    case 1:
        keep_snapshot(w, m);
        break;
    case 2:
    case 3:
        roll_back(w, m, history_below(2));
        break;
    case 4:
        carry_over(w, m, other);
        break;
    case 5:
        if (history_below(3) == 0)
            destroy(w, m);
        break;
    default:
        go_on(w, m);
    }
}

/* Only the counter of sessions. */
static void check_nothing_left(const struct redis_server *redis)
{
    char n[16];
    redis_server_ask(redis, (const char *const[]){"DBSIZE", NULL}, n, sizeof(n));
    if (strcmp(n, "1"))
        fail_msg("%s: Redis has %s keys, expected 1", world.label, n);
    redis_server_ask(redis, (const char *const[]){"FLUSHALL", NULL}, n, sizeof(n));
}

/* redis NULL: in a directory. */
static void check_model(const char *dir, const char *device, const char *name, int n_ops,
                        size_t max_replay, const struct redis_server *redis)
{
    struct world *w = &world;
    char label[100];
    snprintf(label, sizeof(label), "%s on %s", name, device);
    uint64_t n[3] = {w->n_evictions, w->n_reloads, w->n_replays};
    *w = (struct world){.dir = dir, .device = device, .label = label, .max_replay = max_replay};
    w->n_evictions = n[0];
    w->n_reloads = n[1];
    w->n_replays = n[2];
    w->n_sides = redis ? 2 : 1;
    snprintf(w->store_dir, sizeof(w->store_dir), "%s%s", redis ? redis->url : dir,
             redis ? "" : "/store");
    open_engine(w);
    open_store(w);
    history_open_oracle(&w->run, dir, device);
    history_seed(20261128);
    for (int i = 0; i < n_ops; i++) {
        operate(w);
        if (i % 40 == 39)
            restart(w, i % 80 == 79);
    }
    for (int i = 0; i < N_MEMBERS; i++)
        destroy(w, &w->members[i]);
    restart(w, false);
    close_store(w);
    if (redis)
        check_nothing_left(redis);
    engine_close(w->engine);
    run_close(&w->run);
}

static bool is_causal(const struct test_model *m)
{
    return strcmp(m->name, "classifier") != 0 && strcmp(m->name, "embedder") != 0;
}

static void check_models(const struct redis_server *redis)
{
    const char *asked = getenv("LATTE_SESSION_OPS");
    int n_ops = asked ? atoi(asked) : 40, n = 0;
    world.n_evictions = world.n_reloads = world.n_replays = 0;
    for (size_t i = 0; i < n_test_models; i++) {
        char dir[100];
        if (!is_causal(&test_models[i]) || !strcmp(test_models[i].name, "transformer++"))
            continue; /* its context is too short for these histories */
        assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
        assert_int_equal(model_files_write(dir, test_models[i].config_json, 7, NULL), 0);
        for (int k = 0; run_backends()[k]; k++, n += n_ops)
            check_model(dir, run_backends()[k], test_models[i].name, n_ops,
                        (i + (size_t)k) % 2 ? 0 : 40, redis);
        test_dir_remove(dir);
    }
    print_message("seed 20261128, %d operations in all; states left memory %llu times, were read "
                  "%llu times and computed again %llu times\n",
                  n, (unsigned long long)world.n_evictions, (unsigned long long)world.n_reloads,
                  (unsigned long long)world.n_replays);
    assert_true(world.n_evictions && world.n_reloads && world.n_replays);
}

/* ---- items ---- */

static void put(const struct session_item *item)
{
    struct awaited a = {0};
    struct error err;
    await_good(&a, session_put_item(world.sides[0].sessions, item, on_done, &a, &err), &err);
}

static struct session_item outcome(const char *name, const char *data)
{
    return (struct session_item){
        .kind = SESSION_OUTCOME, .name = name, .owner = 1, .data = data, .n_data = strlen(data)};
}

/* What is found, one word for each item. */
static bool add_word(void *context, const struct session_item *item, int64_t created)
{
    struct bytes *words = context;
    assert_int_equal(item->owner, 1);
    assert_true(created > 0);
    bytes_append(words, item->data, item->n_data);
    bytes_char(words, ' ');
    return true;
}

static void expect_items(enum session_kind kind, const char *expected)
{
    struct bytes words = {0};
    sessions_each_item(world.sides[0].sessions, kind, add_word, &words);
    assert_string_equal(words.data ? words.data : "", expected);
    bytes_free(&words);
}

static void reopen_store(void)
{
    close_store(&world);
    open_store(&world);
}

/* Items are found as they were put last, but for those that were dropped, and those that follow a
 * turn which was not. No user sees them. */
static void test_items(void **state)
{
    (void)state;
    char dir[100];
    struct session_info infos[4];
    struct session_turn turn;
    struct error err;
    bool has_more;
    int n;
    assert_int_equal(test_dir_make(dir, sizeof(dir)), 0);
    assert_int_equal(model_files_write(dir, test_models[0].config_json, 7, NULL), 0);
    world = (struct world){.dir = dir, .device = "cpu", .label = dir, .n_sides = 1};
    snprintf(world.store_dir, sizeof(world.store_dir), "%s/store", dir);
    open_engine(&world);
    open_store(&world);
    struct awaited a = {0};
    const struct session_request request = {.owner = 1};
    await_good(&a, session_create(world.sides[0].sessions, &request, on_done, &a, &err), &err);

    struct session_item items[] = {outcome("a", "first"),    outcome("b", "second"),
                                   outcome("c", "third"),    outcome("a", "again"),
                                   outcome("turn", "early"), outcome("before", "known")};
    for (int i = 0; i < 4; i++)
        put(&items[i]);
    session_drop_item(world.sides[0].sessions, SESSION_OUTCOME, 1, "b");
    session_drop_item(world.sides[0].sessions, SESSION_OUTCOME, 1, "nothing");
    session_drop_item(world.sides[0].sessions, SESSION_PRESET, 1, "a");
    assert_int_equal(
        session_begin(world.sides[0].sessions, a.info.id, 1, SESSION_ANY_VERSION, &turn, &err),
        STATUS_OK);
    for (int i = 4; i < 6; i++) { /* that it comes about, and what has come about already */
        items[i].after_id = turn.id;
        items[i].after_version = turn.version + (i == 4);
        put(&items[i]);
    }
    session_abandon(world.sides[0].sessions, &turn);
    for (int round = 0; round < 2; round++) { /* the second finds what the first has written */
        reopen_store();
        expect_items(SESSION_OUTCOME, "again third known ");
        expect_items(SESSION_PRESET, "");
        sessions_expire(world.sides[0].sessions);
    }
    assert_int_equal(session_list(world.sides[0].sessions, 1, NULL, infos, 4, &n, &has_more, &err),
                     STATUS_OK);
    assert_int_equal(n, 1);
    session_info_free(&infos[0]);
    close_store(&world);
    engine_close(world.engine);
    test_dir_remove(dir);
}

/* ---- tiers ---- */

static bool is_the_one(void *context, const struct image *image)
{
    return image == context;
}

/* A session is where its state is: on the device, in memory (one without a state, too), or in the
 * store, whatever a slot holds. */
static void test_tiers(void **state)
{
    (void)state;
    enum { N = 4 };
    static const enum image_tier expected[N] = {IMAGE_IN_MEMORY, IMAGE_IN_MEMORY, IMAGE_ON_DEVICE,
                                                IMAGE_IN_STORE};
    const struct session_options options = {.max_sessions = N};
    struct image_store images;
    struct image *held[N] = {NULL};
    struct sessions *t = NULL;
    struct session_counts counts;
    struct session_info info;
    struct error err;
    image_store_init(&images, "00112233445566778899aabbccddeeff", 4, 10, 0, 1 << 20);
    images.is_on_device = is_the_one;
    assert_int_equal(sessions_open(&t, &options, &err), STATUS_OK);
    for (int i = 1; i < 3; i++)
        assert_int_equal(image_new(&held[i], &images, &err), STATUS_OK);
    assert_int_equal(image_new_named(&held[3], &images, (const uint8_t[IMAGE_NAME_BYTES]){7}, &err),
                     STATUS_OK);
    for (int i = 0; i < N; i++) {
        const struct session_request request = {.owner = OWNER, .from = held[i]};
        struct awaited a = {0};
        images.on_device_context = i < 3 ? held[2] : held[3];
        assert_int_equal(session_create(t, &request, on_done, &a, &err), STATUS_OK);
        assert_int_equal(session_show(t, a.info.id, OWNER, &info, &err), STATUS_OK);
        assert_int_equal(info.tier, expected[i]);
        session_info_free(&info);
    }
    images.on_device_context = held[2];
    sessions_count(t, &counts);
    assert_int_equal(counts.n_sessions, N);
    assert_int_equal(counts.n_on_device, 1);
    assert_int_equal(counts.n_in_memory, 2);
    sessions_close(t);
    image_release(held[1]);
    image_release(held[2]);
    image_drop(held[3]);
    image_store_free(&images);
}

static void test_in_a_directory(void **state)
{
    (void)state;
    check_models(NULL);
}

static void test_in_redis(void **state)
{
    (void)state;
    static struct redis_server redis;
    if (!redis_server_is_installed())
        skip();
    redis_server_open(&redis, NULL);
    check_models(&redis);
    redis_server_close(&redis);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_a_directory),
        cmocka_unit_test(test_in_redis),
        cmocka_unit_test(test_items),
        cmocka_unit_test(test_tiers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

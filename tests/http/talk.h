/* talk.h - conversations with sessions, of which the test remembers every token: what a session
 * says is compared with what a server says to the whole conversation without one.
 *
 * Threads: any, each with talks of its own.
 * Memory:  a talk is a plain value; an answer's JSON is freed by answer_free.
 * Errors:  fail the running test.
 */
#ifndef LATTE_TESTS_TALK_H
#define LATTE_TESTS_TALK_H

#include <cjson/cJSON.h>

#include "tests/http/harness.h"

enum { TALK_MAX_IDS = 4096, TALK_PROMPT = 8 };

struct answer {
    int code;    /* 0: none */
    cJSON *json; /* NULL when the body is not JSON */
    char etag[32];
};
/* body is freed; NULL: none. header: one more, or NULL. */
struct answer answer_of(const struct server *s, const char *method, const char *path, char *body,
                        const char *header);
void answer_expect(const struct answer *a, int code);
void answer_free(struct answer *a);
const cJSON *answer_member(const cJSON *v, const char *name);
/* printf into a string of its own. */
char *text_of(const char *format, ...) __attribute__((format(printf, 1, 2)));
int read_ids(const cJSON *array, int32_t *out, int max);

struct talk {
    char id[64];
    int version;
    int32_t ids[TALK_MAX_IDS]; /* [n], all tokens of the session */
    int n;
};
/* A new session, whose metadata is {"k":"v"}. */
void talk_open(struct talk *t, const struct server *s, const char *header);
/* A request about the session: "/fork", say, or "". */
struct answer talk_ask(const struct talk *t, const struct server *s, const char *method,
                       const char *what, const char *body, const char *header);
/* The same, whose code has to be this; nothing else is of interest. */
void talk_do(const struct talk *t, const struct server *s, const char *method, const char *what,
             const char *body, int code);
int talk_prompt(int32_t ids[TALK_PROMPT], int seed);
/* The body of a turn; more: further members, beginning with a comma. */
char *talk_body(const struct talk *t, const int32_t *prompt, int n, int max_tokens,
                const char *more);
/* A turn. Returns the code; with 200 the talk has gone on. */
int talk_turn(struct talk *t, const struct server *s, int seed, int max_tokens, const char *more,
              const char *header);
/* What a server says without a session to all these tokens. */
int talk_once(const struct server *s, const int32_t *ids, int n, int max_tokens, int32_t *out);
/* The session is where the talk is, and says next what the whole talk says. */
void talk_check(struct talk *t, const struct server *s, int seed, const char *header);
void talk_append(struct talk *t, const int32_t *ids, int n);

#endif

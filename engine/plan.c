/* plan.c - see plan.h */
#include "engine/plan.h"

#include <stdlib.h>

enum {
    MAX_SCORED_CHUNK = 256, /* prompt rows with scores need logits, and room in the job's ring */
    MAX_PASSED_OVER = 64,   /* prompts a step tries that find no room in it */
};

struct planner {
    struct plan_limits limits;
    int scored_chunk;
    struct slot *slots; /* [n_slots] */
    struct slot_list free, prompts, decoding;
    struct slot_list stuck; /* the job's ring has no room */
};

/* ---- Lists ---- */

static void unlink_slot(struct slot *slot)
{
    struct slot_list *list = slot->list;
    if (!list)
        return;
    *(slot->previous ? &slot->previous->next : &list->first) = slot->next;
    *(slot->next ? &slot->next->previous : &list->last) = slot->previous;
    list->n--;
    slot->list = NULL;
    slot->previous = slot->next = NULL;
}

/* From wherever it was to the end of a list. */
static void move_to(struct slot_list *list, struct slot *slot)
{
    unlink_slot(slot);
    slot->list = list;
    slot->previous = list->last;
    *(list->last ? &list->last->next : &list->first) = slot;
    list->last = slot;
    list->n++;
}

static void move_to_front(struct slot_list *list, struct slot *slot)
{
    unlink_slot(slot);
    slot->list = list;
    slot->next = list->first;
    *(list->first ? &list->first->previous : &list->last) = slot;
    list->first = slot;
    list->n++;
}

/* ---- Slots ---- */

static bool in_prompt(const struct slot *slot)
{
    return slot->n_fed < slot->request->n_prompt;
}

static bool is_scored(const struct slot *slot)
{
    return slot->request->prompt_logprobs >= 0;
}

/* Where the slot waits for its next rows. */
static void line_up(struct planner *p, struct slot *slot)
{
    if (slot->held || slot->how != FINISH_NONE)
        unlink_slot(slot);
    else if (in_prompt(slot))
        move_to(&p->prompts, slot);
    else if (slot->n_draws < slot->max_draws)
        move_to(&p->decoding, slot);
    else
        unlink_slot(slot);
}

/* Where the job's next mark is, or no place at all. */
static size_t next_mark(const struct slot *slot)
{
    const struct job_request *request = slot->request;
    return slot->n_marks < request->n_marks ? request->marks[slot->n_marks].at : SIZE_MAX;
}

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static uint64_t n_before(const struct job_request *request)
{
    if (!request->from)
        return 0;
    CHECK(request->from->position >= request->n_seen);
    return request->from->position - request->n_seen;
}

static int64_t max_draws(const struct planner *p, const struct job_request *request)
{
    int64_t max_position = p->limits.max_position;
    if (!max_position)
        return request->max_tokens;
    int64_t left = max_position - (int64_t)n_before(request) - (int64_t)request->n_prompt;
    left = left > 0 ? left : 0;
    return request->max_tokens < left ? request->max_tokens : left;
}

struct slot *planner_enter(struct planner *p, struct job *job, int wanted)
{
    struct slot *slot = p->free.first;
    if (wanted >= 0 && p->slots[wanted].list == &p->free)
        slot = &p->slots[wanted];
    if (!slot)
        return NULL;
    unlink_slot(slot);
    const struct job_request *request = job_request(job);
    *slot = (struct slot){.job = job,
                          .request = request,
                          .deadline_ns = job_deadline_ns(job),
                          .generation = slot->generation + 1,
                          .n_before = n_before(request),
                          .n_fed = request->n_seen,
                          .max_draws = max_draws(p, request)};
    line_up(p, slot);
    return slot;
}

void planner_end(struct planner *p, struct slot *slot, enum job_finish how)
{
    CHECK(slot->job && slot->how == FINISH_NONE && how != FINISH_NONE);
    slot->how = how;
    slot->generation++;
    line_up(p, slot);
}

/* To the front: its memory is warm. */
void planner_leave(struct planner *p, struct slot *slot, bool keeps_state)
{
    CHECK(slot->job);
    unlink_slot(slot);
    *slot = (struct slot){.generation = slot->generation + 1};
    if (keeps_state)
        move_to(&p->free, slot);
    else
        move_to_front(&p->free, slot);
}

struct slot *planner_slot(const struct planner *p, int i)
{
    return &p->slots[i];
}

int planner_index(const struct planner *p, const struct slot *slot)
{
    return (int)(slot - p->slots);
}

bool planner_has_room(const struct planner *p)
{
    return p->free.n > 0;
}

void planner_retry(struct planner *p)
{
    while (p->stuck.first)
        line_up(p, p->stuck.first);
}

void planner_release(struct planner *p, struct slot *slot)
{
    CHECK(slot->held);
    slot->held = false;
    slot->n_marks++;
    line_up(p, slot);
}

struct slot *planner_owner(const struct planner *p, const struct share *share)
{
    struct slot *slot = &p->slots[share->slot];
    return slot->generation == share->generation ? slot : NULL;
}

/* ---- Planning ---- */

/* Whether n more entries fit the ring beside those on their way. A slot that has none on its
 * way is stuck until its reader has read; the others are looked at again in the next step. */
static bool ring_has_room(struct planner *p, struct slot *slot, int n)
{
    size_t wanted = (size_t)n + (size_t)slot->n_coming;
    if (n == 0 || (wanted <= job_ring_size(slot->job) && job_has_room(slot->job, wanted)))
        return true;
    if (!slot->n_coming)
        move_to(&p->stuck, slot);
    return false;
}

/* Enter a slot's share of the plan, and send the slot where it waits next. */
static void add_share(struct planner *p, struct plan *plan, struct slot *slot,
                      const struct stepper_seq *seq, const struct share *share)
{
    plan->seqs[plan->n_seqs] = *seq;
    plan->shares[plan->n_seqs++] = *share;
    plan->n_rows += seq->n_rows;
    plan->n_logit_rows += seq->n_top >= 0 ? seq->n_rows : seq->draws;
    slot->n_coming += share->n_entries;
    slot->n_fed += (size_t)share->n_prompt_rows;
    slot->n_draws += share->draws;
    slot->held = slot->n_fed == next_mark(slot);
    line_up(p, slot);
}

static struct stepper_seq seq_of(const struct planner *p, const struct slot *slot)
{
    return (struct stepper_seq){
        .slot = planner_index(p, slot),
        .n_rows = 1,
        .draw_position = slot->n_before + slot->request->n_prompt + (uint64_t)slot->n_draws,
        .n_output = slot->n_draws,
        .n_top = -1,
    };
}

static struct share share_of(const struct stepper_seq *seq, const struct slot *slot)
{
    return (struct share){.slot = seq->slot, .generation = slot->generation, .from = slot->n_fed};
}

/* Those who are served go to the end of the list, so each is looked at once. */
static void plan_decoding(struct planner *p, struct plan *plan)
{
    struct slot *slot = p->decoding.first, *next;
    for (int left = p->decoding.n; left && plan->n_seqs < p->limits.max_batch; left--) {
        next = slot->next;
        struct stepper_seq seq = seq_of(p, slot);
        struct share share = share_of(&seq, slot);
        seq.draws = share.draws = true;
        share.n_entries = 1;
        if (ring_has_room(p, slot, share.n_entries))
            add_share(p, plan, slot, &seq, &share);
        slot = next;
    }
}

/* Row t scores token t + 1, which the last row of the prompt has not. Returns the scores. */
static int list_targets(struct plan *plan, const struct slot *slot, struct stepper_seq *seq)
{
    const struct job_request *request = slot->request;
    int32_t *targets = plan->targets + plan->n_logit_rows;
    bool ends = slot->n_fed + (size_t)seq->n_rows == request->n_prompt;
    for (int i = 0; i < seq->n_rows - ends; i++)
        targets[i] = request->prompt[slot->n_fed + (size_t)i + 1];
    if (ends)
        targets[seq->n_rows - 1] = -1;
    seq->targets = targets;
    seq->n_top = request->prompt_logprobs;
    return seq->n_rows - ends;
}

/* Where a replay's next rows end. */
static size_t end_in_run(struct slot *slot, size_t chunk)
{
    const struct job_run *run = &slot->request->runs[slot->run];
    while (slot->n_fed == slot->run_begin + run->n_chunked + run->n_single) {
        slot->run_begin = slot->n_fed;
        run = &slot->request->runs[++slot->run];
    }
    size_t at = slot->n_fed - slot->run_begin, end = (at / chunk + 1) * chunk;
    if (at >= run->n_chunked)
        return slot->n_fed + 1;
    return slot->run_begin + (end < run->n_chunked ? end : run->n_chunked);
}

/* Where the prompt's next chunk ends: at a multiple of `chunk`, whatever the load. */
static size_t chunk_end(struct slot *slot, size_t chunk)
{
    const struct job_request *request = slot->request;
    size_t end = (slot->n_fed / chunk + 1) * chunk;
    if (request->n_runs)
        return end_in_run(slot, chunk);
    return end < request->n_prompt ? end : request->n_prompt;
}

/* The prompt's next chunk. False: the step has no room for it. */
static bool plan_chunk(struct planner *p, struct plan *plan, struct slot *slot)
{
    const struct job_request *request = slot->request;
    bool scored = is_scored(slot);
    size_t chunk = (size_t)(scored ? p->scored_chunk : p->limits.chunk_tokens);
    size_t end = least(chunk_end(slot, chunk), next_mark(slot));
    struct stepper_seq seq = seq_of(p, slot);
    seq.n_rows = (int)(end - slot->n_fed);
    seq.tokens = request->prompt + slot->n_fed;
    seq.draws = end == request->n_prompt && slot->max_draws > 0;
    int n_logit_rows = scored ? seq.n_rows : seq.draws;
    if (plan->n_rows + seq.n_rows > p->limits.max_rows ||
        plan->n_logit_rows + n_logit_rows > p->limits.max_logit_rows)
        return false;

    struct share share = share_of(&seq, slot);
    share.n_prompt_rows = seq.n_rows;
    share.draws = seq.draws;
    if (scored)
        share.n_scores = list_targets(plan, slot, &seq);
    share.n_entries = share.n_scores + share.draws + (scored && slot->n_fed == 0);
    if (ring_has_room(p, slot, share.n_entries))
        add_share(p, plan, slot, &seq, &share);
    return true;
}

/* The prompts in turns. One that finds no room keeps its place, first in the next step's line. */
static void plan_prompts(struct planner *p, struct plan *plan)
{
    struct slot *slot = p->prompts.first, *next;
    int n_passed_over = 0;
    for (int left = p->prompts.n; left && plan->n_rows < p->limits.max_rows; left--) {
        next = slot->next;
        if (!plan_chunk(p, plan, slot) && ++n_passed_over == MAX_PASSED_OVER)
            break;
        slot = next;
    }
}

void planner_next(struct planner *p, struct plan *plan)
{
    plan->n_seqs = plan->n_rows = plan->n_logit_rows = 0;
    plan_decoding(p, plan);
    plan_prompts(p, plan);
}

/* ---- Opening ---- */

int planner_scored_chunk(int chunk_tokens)
{
    return chunk_tokens < MAX_SCORED_CHUNK ? chunk_tokens : MAX_SCORED_CHUNK;
}

enum status planner_open(struct planner **out, const struct plan_limits *limits, struct error *err)
{
    CHECK(limits->n_slots > 0 && limits->max_batch > 0 && limits->chunk_tokens > 0);
    struct planner *p = calloc(1, sizeof(*p));
    struct slot *slots = calloc((size_t)limits->n_slots, sizeof(*slots));
    if (!p || !slots) {
        free(p);
        free(slots);
        return fail(err, STATUS_NOMEM, "scheduler of %d slots: out of memory", limits->n_slots);
    }
    p->limits = *limits;
    p->slots = slots;
    p->scored_chunk = planner_scored_chunk(limits->chunk_tokens);
    for (int i = 0; i < limits->n_slots; i++)
        move_to(&p->free, &slots[i]);
    *out = p;
    return STATUS_OK;
}

void planner_close(struct planner *p)
{
    if (!p)
        return;
    free(p->slots);
    free(p);
}

enum status plan_open(struct plan *plan, const struct plan_limits *limits, struct error *err)
{
    int max_seqs = limits->n_slots < limits->max_rows ? limits->n_slots : limits->max_rows;
    *plan = (struct plan){0};
    plan->seqs = calloc((size_t)max_seqs, sizeof(*plan->seqs));
    plan->shares = calloc((size_t)max_seqs, sizeof(*plan->shares));
    plan->targets = calloc((size_t)limits->max_logit_rows, sizeof(*plan->targets));
    if (!plan->seqs || !plan->shares || !plan->targets)
        return fail(err, STATUS_NOMEM, "steps of %d rows: out of memory", limits->max_rows);
    return STATUS_OK;
}

void plan_close(struct plan *plan)
{
    free(plan->seqs);
    free(plan->shares);
    free(plan->targets);
}

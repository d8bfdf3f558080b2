/* backend.c - see backend.h */
#include "engine/backend.h"

void step_check(const struct step *step, const struct backend_options *options)
{
    CHECK(step->n_rows >= 1 && step->n_rows <= options->max_rows);
    CHECK(step->n_seqs >= 1 && step->n_seqs <= options->max_seqs);
    CHECK(step->n_logit_rows >= 0 && step->n_logit_rows <= step->n_rows);
    CHECK(step->seq_start[0] == 0 && step->seq_start[step->n_seqs] == step->n_rows);
    for (int i = 0; i < step->n_seqs; i++) {
        int first = step->seq_start[i], end = step->seq_start[i + 1];
        CHECK(first < end && step->positions[first] >= 0);
        for (int r = first + 1; r < end; r++)
            CHECK(step->positions[r] == step->positions[r - 1] + 1);
    }
    for (int i = 0; i < step->n_logit_rows; i++) {
        int before = i ? step->logit_rows[i - 1] : -1;
        CHECK(step->logit_rows[i] > before && step->logit_rows[i] < step->n_rows);
    }
}

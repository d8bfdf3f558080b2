/* test_warpgroup.cu - layers by warpgroups (warpgroup.cuh) against loops in double precision: the
 * front, with the RG-LRU and the latents' logits, and each kind of product; rows that fill tiles
 * and that do not, columns to spare, slices of n_in. Rows beyond the step's are NaN, and nothing is
 * written there.
 *
 * Tolerances, as test_linear.cu's: products of bf16 factors are exact in f32, so what is left is
 * the rounding of f32 sums, 4e-7 of the sum of |x w|, and of the result: 2^-8 of it in bf16. A
 * row's norm is a factor of f32, good to 1e-6. States, as test_rglru.cu's: the oracle rounds what
 * is multiplied, x times its norm's weight and the gates', to bf16 as the kernel does, so what is
 * left are f32 sums and the quick exponentials, 1e-5. Logits are products of bf16(z times its
 * norm's weight), which a z that differs in its last bits may round the other way, an error of up
 * to 2^-7 of a term; so their z is the one that was found in the state, of which the rounded
 * product is known to the bit, and they are held to what other products are.
 */
#include <vector>

#include "engine/kernels/cuda/cluster.cuh"
#include "engine/kernels/cuda/warpgroup.cuh"
#include "tests/cuda/products.cuh"

enum { DEPTH = WARPGROUP_DEPTH, MLP = 4 * DEPTH, MAX_ROWS = WARPGROUP_ROWS };

static const float EPS = 0.25f; /* beside a mean square of a third: a wrong one shows */
static void need_warpgroups(void)
{
    if (!c.queue.stream || !warpgroups_are_there(&c)) {
        print_message("SKIPPED: no CUDA device of capability 9.0\n");
        skip();
    }
}

template <class T> static void from_device(T *host, const T *p, size_t n)
{
    OK(c.queue.error);
    OK(cudaMemcpyAsync(host, p, n * sizeof(T), cudaMemcpyDeviceToHost, c.queue.stream));
    OK(cudaStreamSynchronize(c.queue.stream));
}

/* ---- packed rows ---- */

static struct packed_rows packed_open(int n, int n_parts)
{
    struct packed_rows p = {NULL, n, NULL, n_parts, EPS};
    const size_t values = (size_t)packed_values(MAX_ROWS, n);
    OK(cudaMalloc((void **)&p.values, values * sizeof(bf16)));
    OK(cudaMemset(p.values, 0xff, values * sizeof(bf16))); /* NaN */
    if (!n_parts)
        return p;
    OK(cudaMalloc((void **)&p.squares, (size_t)MAX_ROWS * n_parts * sizeof(float)));
    OK(cudaMemset(p.squares, 0xff, (size_t)MAX_ROWS * n_parts * sizeof(float)));
    return p;
}

static void packed_close(struct packed_rows *p)
{
    cudaFree(p->values);
    cudaFree(p->squares);
}

/* x [rows, n], already rounded, as packed rows. */
static void packed_put(struct packed_rows *p, const float *x, int rows)
{
    const size_t n = (size_t)packed_values(MAX_ROWS, p->n);
    bf16 *values = (bf16 *)malloc(n * sizeof(*values));
    from_device(values, p->values, n);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < p->n; i++)
            values[packed_at(r, i, p->n)] = __float2bfloat16_rn(x[(size_t)r * p->n + i]);
    OK(cudaMemcpy(p->values, values, n * sizeof(*values), cudaMemcpyHostToDevice));
    free(values);
}

/* All MAX_ROWS rows. */
static float *packed_get(const struct packed_rows *p)
{
    const size_t n = (size_t)packed_values(MAX_ROWS, p->n);
    bf16 *values = (bf16 *)malloc(n * sizeof(*values));
    float *x = (float *)malloc((size_t)MAX_ROWS * p->n * sizeof(*x));
    from_device(values, p->values, n);
    for (int r = 0; r < MAX_ROWS; r++)
        for (int i = 0; i < p->n; i++)
            x[(size_t)r * p->n + i] = __bfloat162float(values[packed_at(r, i, p->n)]);
    free(values);
    return x;
}

static double row_square(const float *x, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    return sum;
}

/* Packed rows of x times weight, with squares of x; `actual` of them. */
static void check_packed(const struct packed_rows *p, const float *x, const float *weight,
                         int actual)
{
    float *found = packed_get(p);
    float *parts = (float *)malloc((size_t)MAX_ROWS * p->n_parts * sizeof(*parts));
    from_device(parts, p->squares, (size_t)MAX_ROWS * p->n_parts);
    for (int r = 0; r < MAX_ROWS; r++) {
        double square = 0;
        for (int i = 0; i < p->n; i++) {
            const float y = found[(size_t)r * p->n + i];
            if (r >= actual ? !isnan(y) : y != rounded(x[(size_t)r * p->n + i] * weight[i]))
                fail_msg("row %d of %d, column %d: %g", r, actual, i, y);
        }
        for (int i = 0; i < p->n_parts; i++)
            square += parts[(size_t)r * p->n_parts + i];
        const double expected = r < actual ? row_square(x + (size_t)r * p->n, p->n) : 0;
        if (r >= actual ? !isnan(square) : !(fabs(square - expected) <= 1e-6 * expected))
            fail_msg("row %d of %d: squares %g, expected %g", r, actual, square, expected);
    }
    free(found);
    free(parts);
}

/* ---- steps ---- */

struct rows_case {
    int rows, actual;
};
static const struct rows_case all_rows[] = {{17, 1},    {17, 17},   {64, 50},   {70, 65},
                                            {128, 128}, {136, 130}, {256, 256}, {200, 60}};

/* On an emulated device some. */
static bool is_tested(const struct rows_case *r)
{
    return !emulated || r->actual == 1 || r->rows == 64 || r->rows == 136 || r->rows == 200;
}

static void put_n_rows(int n)
{
    OK(cudaMemcpy(n_rows, &n, sizeof(n), cudaMemcpyHostToDevice));
}

/* What rows of x [.., DEPTH] times weight are multiplied as, and what norms them. */
static void put_normed(struct packed_rows *in, const float *x, const float *weight, float *values,
                       double *scales, int rows, int actual)
{
    float *const device_x = on_device(x, (size_t)MAX_ROWS * DEPTH);
    float *const device_weight = on_device(weight, DEPTH);
    pack_rows(&c, in, device_x, device_weight, rows, n_rows);
    check_packed(in, x, weight, actual);
    for (int r = 0; r < actual; r++) {
        scales[r] = 1 / sqrt(row_square(x + (size_t)r * DEPTH, DEPTH) / DEPTH + in->eps);
        for (int i = 0; i < DEPTH; i++)
            values[(size_t)r * DEPTH + i] = rounded(x[(size_t)r * DEPTH + i] * weight[i]);
    }
    cudaFree(device_x);
    cudaFree(device_weight);
}

static struct warpgroup_product product_of(const struct packed_rows *in, const bf16 *weights,
                                           int n_out, enum product_output output, int rows)
{
    struct warpgroup_product p = {};
    p.in = *in;
    p.weights = weights;
    p.n_out = n_out;
    p.output = output;
    p.rows = rows;
    p.n_rows = n_rows;
    return p;
}

/* ---- the front ---- */

enum {
    RECURRENCE,
    INPUT,
    RECURRENCE_BIAS, /* a gate's bias is so many after it */
    INPUT_BIAS,
    LAMBDA,
    Z_NORM,
    N_WEIGHTS,
    WIDTH = 96, /* of a block of the gates */
    N_VQK = 104,
    VQK_STRIDE = 112,
    N_SLOTS = MAX_ROWS + 7,  /* a prime: mixed order is a multiple of the row */
    SLOT_VALUES = DEPTH + 8, /* more than there are */
    LOGIT_STRIDE = WARPGROUP_LOGITS + 8,
};

struct front_weights {
    float *host[N_WEIGHTS], *device[N_WEIGHTS];
    void *prepared; /* device */
    float *norm, *vqk, *logits;
    bf16 *device_vqk, *device_logits;
};

static void weights_open(struct front_weights *w)
{
    const size_t n_gate = (size_t)DEPTH * WIDTH;
    const size_t sizes[] = {n_gate, n_gate, DEPTH, DEPTH, DEPTH, DEPTH};
    const float scales[] = {0.3f, 0.3f, 2, 2, 4, 1.5f};
    for (int i = 0; i < N_WEIGHTS; i++) {
        w->host[i] = random_values(sizes[i], false);
        for (size_t j = 0; j < sizes[i]; j++)
            w->host[i][j] *= scales[i];
        w->device[i] = on_device(w->host[i], sizes[i]);
    }
    const struct cluster_shape shape = {DEPTH, 8, WIDTH, MLP, DEPTH / WIDTH};
    const struct cluster_gates gates = {w->device[RECURRENCE], w->device[RECURRENCE_BIAS],
                                        w->device[INPUT],      w->device[INPUT_BIAS],
                                        w->device[LAMBDA],     w->device[Z_NORM]};
    OK(cudaMalloc(&w->prepared, cluster_prepared_bytes(&shape)));
    cluster_prepare(&c, &shape, &gates, w->prepared);
    OK(cudaStreamSynchronize(c.queue.stream));
    w->norm = random_values(DEPTH, false);
    w->vqk = random_values(N_VQK * DEPTH, true);
    w->logits = random_values(WARPGROUP_LOGITS * DEPTH, true);
    w->device_vqk = device_bf16(w->vqk, N_VQK * DEPTH);
    w->device_logits = device_bf16(w->logits, WARPGROUP_LOGITS * DEPTH);
}

static void weights_close(struct front_weights *w)
{
    for (int i = 0; i < N_WEIGHTS; i++) {
        free(w->host[i]);
        cudaFree(w->device[i]);
    }
    cudaFree(w->prepared);
    cudaFree(w->device_vqk);
    cudaFree(w->device_logits);
    free(w->norm);
    free(w->vqk);
    free(w->logits);
}

/* A step's rows, what they are multiplied as and what norms them; its states before and after, its
 * results. */
struct front_step {
    int rows, actual, n_logits;
    int32_t slot[MAX_ROWS];
    int64_t position[MAX_ROWS];
    float values[MAX_ROWS * DEPTH];
    double scale[MAX_ROWS];
    float before[N_SLOTS * SLOT_VALUES], after[N_SLOTS * SLOT_VALUES];
    bf16 vqk[MAX_ROWS * VQK_STRIDE];
    float logits[MAX_ROWS * LOGIT_STRIDE];
};

/* Rows of mixed slots, every third at its beginning: such a slot may hold anything. */
static void put_step(struct front_step *s, const struct rows_case *k, int n_logits)
{
    s->rows = k->rows;
    s->actual = k->actual;
    s->n_logits = n_logits;
    for (int i = 0; i < N_SLOTS * SLOT_VALUES; i++)
        s->before[i] = random_value();
    for (int r = 0; r < MAX_ROWS; r++) {
        s->slot[r] = (37 * r + 5) % N_SLOTS;
        s->position[r] = r % 3 == 1 ? 0 : 1 + r;
        for (int i = 0; i < DEPTH && s->position[r] == 0 && r < s->actual; i++)
            s->before[s->slot[r] * SLOT_VALUES + i] = NAN;
    }
    memset((void *)s->vqk, 0xff, sizeof(s->vqk)); /* NaN */
    memset(s->logits, 0xff, sizeof(s->logits));
}

/* The arrays of a step. */
struct step_copy {
    struct step_sizes *sizes;
    int64_t *positions;
    int32_t *slots, *n_rows;
};

/* As a step's first kernel: lets the next one go, and writes what that is to wait for. */
static __global__ void write_late(struct step_copy to, struct step_copy from, int rows)
{
    pdl_trigger();
    pdl_wait();
#ifndef LATTE_EMULATE
    for (const long long begun = clock64(); clock64() - begun < 100000;)
        ;
#endif
    for (int r = threadIdx.x; r < rows; r += blockDim.x) {
        to.positions[r] = from.positions[r];
        to.slots[r] = from.slots[r];
    }
    if (threadIdx.x == 0) {
        *to.sizes = *from.sizes;
        *to.n_rows = *from.n_rows;
    }
}

/* On the device, every byte another than in x. */
template <class T> static T *wrong_copy(const T *x, size_t n)
{
    std::vector<T> wrong(x, x + n);
    for (size_t i = 0; i < n * sizeof(T); i++)
        ((unsigned char *)wrong.data())[i] ^= 0xff;
    return on_device(wrong.data(), n);
}

/* Where the step's arrays are wrong until write_late has been there. */
static struct step_copy late_copy(const struct front_step *s, const struct step_sizes *sizes)
{
    return {wrong_copy(sizes, 1), wrong_copy(s->position, (size_t)s->rows),
            wrong_copy(s->slot, (size_t)s->rows), wrong_copy(&sizes->n_rows, 1)};
}

static void late_free(struct step_copy *late)
{
    cudaFree(late->sizes);
    cudaFree(late->positions);
    cudaFree(late->slots);
    cudaFree(late->n_rows);
}

/* late: the step's arrays are wrong until a kernel just before has ended. */
static void run_front(struct front_step *s, const struct front_weights *w, bool late)
{
    const struct device_step none = c.step;
    struct step_sizes sizes = {};
    sizes.n_rows = s->actual;
    struct step_sizes *const device_sizes = on_device(&sizes, 1);
    int64_t *const positions = on_device(s->position, (size_t)s->rows);
    int32_t *const slots = on_device(s->slot, (size_t)s->rows);
    float *const x = random_values((size_t)MAX_ROWS * DEPTH, false);
    struct packed_rows in = packed_open(DEPTH, WARPGROUP_PARTS);
    put_n_rows(s->actual);
    put_normed(&in, x, w->norm, s->values, s->scale, s->rows, s->actual);
    const struct step_copy real = {device_sizes, positions, slots, n_rows};
    struct step_copy seen = late ? late_copy(s, &sizes) : real;
    c.step.sizes = seen.sizes;
    c.step.positions = seen.positions;
    c.step.seq_slot = seen.slots;
    c.step.rows = c.step.seqs = s->rows;
    c.step.decode = true;
    c.step.late = late;

    struct warpgroup_front f = {};
    f.vqk = product_of(&in, w->device_vqk, N_VQK, OUTPUT_BF16, s->rows);
    f.vqk.out = on_device(s->vqk, MAX_ROWS * VQK_STRIDE);
    f.vqk.out_stride = VQK_STRIDE;
    f.vqk.n_rows = seen.n_rows;
    f.prepared = w->prepared;
    f.state = {on_device(s->before, N_SLOTS * SLOT_VALUES), SLOT_VALUES};
    f.z_eps = EPS / 2;
    f.logit_weights = w->device_logits;
    f.n_logits = s->n_logits;
    f.logits = on_device(s->logits, MAX_ROWS * LOGIT_STRIDE);
    f.logit_stride = LOGIT_STRIDE;
    if (late)
        launch(&c.queue, "write_late", write_late, dim3(1), 256, 0, seen, real, s->rows);
    warpgroup_front(&c, &f);
    from_device(s->after, f.state.data, N_SLOTS * SLOT_VALUES);
    from_device(s->vqk, (bf16 *)f.vqk.out, MAX_ROWS * VQK_STRIDE);
    from_device(s->logits, f.logits, MAX_ROWS * LOGIT_STRIDE);
    c.step = none;
    void *const taken[] = {device_sizes, positions, slots, f.vqk.out, f.state.data, f.logits};
    for (void *p : taken)
        cudaFree(p);
    if (late)
        late_free(&seen);
    packed_close(&in);
    free(x);
}

static double gate_of(const struct front_weights *w, int gate, const float *values, double scale,
                      int channel)
{
    const float *const row = w->host[gate] + channel * WIDTH;
    double sum = 0;
    for (int k = 0; k < WIDTH; k++)
        sum += (double)values[channel / WIDTH * WIDTH + k] * rounded(row[k]);
    return 1 / (1 + exp(-(scale * sum + w->host[gate + RECURRENCE_BIAS][channel])));
}

static double z_of(const struct front_step *s, const struct front_weights *w, int r, int channel)
{
    const float *const values = s->values + r * DEPTH;
    const double scale = s->scale[r], past = s->before[s->slot[r] * SLOT_VALUES + channel];
    const double gated = gate_of(w, INPUT, values, scale, channel) * values[channel] * scale;
    const double log_a = -8 * log1p(exp((double)w->host[LAMBDA][channel])) *
                         gate_of(w, RECURRENCE, values, scale, channel);
    return s->position[r] == 0 ? gated : exp(log_a) * past + sqrt(-expm1(2 * log_a)) * gated;
}

static void check_states(const struct front_step *s, const struct front_weights *w)
{
    int row[N_SLOTS];
    for (int i = 0; i < N_SLOTS; i++)
        row[i] = -1;
    for (int r = 0; r < s->actual; r++)
        row[s->slot[r]] = r;
    for (int slot = 0; slot < N_SLOTS; slot++) {
        const int here = row[slot] < 0 ? 0 : DEPTH, at = slot * SLOT_VALUES;
        for (int i = 0; i < here; i++) {
            const double z = z_of(s, w, row[slot], i);
            check_value(s->after[at + i], z, 1e-5 * (1 + fabs(z)), "state", row[slot], i);
        }
        if (memcmp(s->after + at + here, s->before + at + here,
                   (size_t)(SLOT_VALUES - here) * sizeof(float)))
            fail_msg("slot %d, row %d: written where nothing was to be", slot, row[slot]);
    }
}

static void check_vqk(const struct front_step *s, const struct front_weights *w)
{
    for (int r = 0; r < MAX_ROWS; r++) {
        for (int i = 0; i < VQK_STRIDE; i++) {
            const float y = __bfloat162float(s->vqk[r * VQK_STRIDE + i]);
            double slack;
            if (r < s->actual && i < N_VQK) {
                const double sum =
                    s->scale[r] * dot(s->values + r * DEPTH, w->vqk + i * DEPTH, DEPTH, &slack);
                check_value(y, sum, slack * s->scale[r] + 0x1p-8 * fabs(sum), "v, q, k", r, i);
            } else if (!isnan(y)) {
                fail_msg("row %d of %d, column %d: %g was written", r, s->actual, i, y);
            }
        }
    }
}

/* z is what the kernel left in the state, after that was checked. */
static void check_logits(const struct front_step *s, const struct front_weights *w)
{
    for (int r = 0; r < MAX_ROWS; r++) {
        const float *const z = s->after + s->slot[r] * SLOT_VALUES;
        const double scale = 1 / sqrt(row_square(z, DEPTH) / DEPTH + EPS / 2);
        float values[DEPTH];
        for (int i = 0; i < DEPTH; i++)
            values[i] = rounded(z[i] * w->host[Z_NORM][i]);
        for (int i = 0; i < LOGIT_STRIDE; i++) {
            const float y = s->logits[r * LOGIT_STRIDE + i];
            double slack;
            if (r < s->actual && i < s->n_logits) {
                const double sum = scale * dot(values, w->logits + i * DEPTH, DEPTH, &slack);
                check_value(y, sum, slack * scale, "logits", r, i);
            } else if (!isnan(y)) {
                fail_msg("logits of row %d of %d, column %d: %g was written", r, s->actual, i, y);
            }
        }
    }
}

/* v, q and k, the states and the logits; as many of these as there may be, and fewer than the
 * cluster has blocks for. */
static void test_front(void **)
{
    static const int n_logits[] = {WARPGROUP_LOGITS, 40, 136};
    static struct front_step s;
    need_warpgroups();
    seed = 7;
    struct front_weights w;
    weights_open(&w);
    for (size_t j = 0; j < COUNT_OF(all_rows); j++) {
        if (!is_tested(&all_rows[j]))
            continue;
        put_step(&s, &all_rows[j], n_logits[j % COUNT_OF(n_logits)]);
        run_front(&s, &w, j % 2 == 0);
        check_vqk(&s, &w);
        check_states(&s, &w);
        check_logits(&s, &w);
    }
    weights_close(&w);
}

/* ---- products ---- */

static void test_activated(void **)
{
    enum { FEATURES = 64 * 3, F0 = 48 }; /* the results' columns; those that are computed */
    need_warpgroups();
    const enum activation acts[] = {ACTIVATION_SILU, ACTIVATION_GELU, ACTIVATION_GELU_TANH};
    for (size_t j = 0; j < COUNT_OF(all_rows) + 2; j++) {
        const struct rows_case k = all_rows[j < COUNT_OF(all_rows) ? j : 2];
        const enum activation act = acts[j < COUNT_OF(all_rows) ? 0 : j - COUNT_OF(all_rows) + 1];
        if (!is_tested(&k))
            continue;
        seed = 11;
        put_n_rows(k.actual);
        struct packed_rows in = packed_open(DEPTH, WARPGROUP_PARTS);
        struct packed_rows out = packed_open(FEATURES, 0);
        float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
        float *norm = random_values(DEPTH, false), *w = random_values(2 * F0 * DEPTH, true);
        static float values[MAX_ROWS * DEPTH];
        static double scales[MAX_ROWS];
        put_normed(&in, x, norm, values, scales, k.rows, k.actual);
        bf16 *const weights = device_bf16(w, 2 * F0 * DEPTH);
        struct warpgroup_product p = product_of(&in, weights, 2 * F0, OUTPUT_ACTIVATE, k.rows);
        p.act = act;
        p.next = out;
        warpgroup_product(&c, &p);
        float *found = packed_get(&out);
        for (int r = 0; r < MAX_ROWS; r++) {
            for (int i = 0; i < FEATURES; i++) {
                const float y = found[(size_t)r * FEATURES + i];
                if (r >= k.actual || i >= F0) {
                    if (!isnan(y))
                        fail_msg("row %d of %d, feature %d: %g was written", r, k.actual, i, y);
                    continue;
                }
                double slack[2];
                const float *const row = values + r * DEPTH;
                const double gate = scales[r] * dot(row, w + i * DEPTH, DEPTH, &slack[0]);
                const double up = scales[r] * dot(row, w + (F0 + i) * DEPTH, DEPTH, &slack[1]);
                const double expected = activation(gate, act) * up;
                /* the activations' slopes are below 1.2 */
                const double error =
                    scales[r] * (1.2 * slack[0] * fabs(up) + slack[1] * fabs(gate));
                check_value(y, expected, error + 0x1p-8 * fabs(expected) + 1e-6, "activated", r, i);
            }
        }
        cudaFree(weights);
        packed_close(&in);
        packed_close(&out);
        free(x);
        free(norm);
        free(w);
        free(found);
    }
}

/* x += W in; then x times the next norm's weight and its squares, or nothing. */
static void check_added(const struct rows_case *k, int n_in, bool has_next)
{
    seed = 13;
    put_n_rows(k->actual);
    struct packed_rows in = packed_open(n_in, 0), next = packed_open(DEPTH, WARPGROUP_PARTS);
    float *values = random_values((size_t)MAX_ROWS * n_in, true);
    float *w = random_values((size_t)DEPTH * n_in, true), *norm = random_values(DEPTH, false);
    float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
    float *found = (float *)malloc((size_t)MAX_ROWS * DEPTH * sizeof(*found));
    packed_put(&in, values, k->actual);
    bf16 *const weights = device_bf16(w, (size_t)DEPTH * n_in);
    float *const device_norm = on_device(norm, DEPTH);
    struct warpgroup_product p = product_of(&in, weights, DEPTH, OUTPUT_ADD, k->rows);
    p.out = on_device(x, (size_t)MAX_ROWS * DEPTH);
    p.out_stride = DEPTH;
    if (has_next) {
        p.next = next;
        p.next_weight = device_norm;
    }
    warpgroup_product(&c, &p);
    from_device(found, (float *)p.out, (size_t)MAX_ROWS * DEPTH);
    for (int r = 0; r < MAX_ROWS; r++) {
        for (int i = 0; i < DEPTH; i++) {
            const size_t at = (size_t)r * DEPTH + i;
            double slack = 0, y = x[at];
            if (r < k->actual)
                y += dot(values + (size_t)r * n_in, w + (size_t)i * n_in, n_in, &slack);
            else if (found[at] != x[at])
                fail_msg("row %d of %d was written", r, k->actual);
            check_value(found[at], y, slack, "added", r, i);
        }
    }
    check_packed(&next, found, norm, has_next ? k->actual : 0);
    cudaFree(weights);
    cudaFree(device_norm);
    cudaFree(p.out);
    packed_close(&in);
    packed_close(&next);
    free(values);
    free(w);
    free(norm);
    free(x);
    free(found);
}

static void test_added(void **)
{
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        if (is_tested(&k))
            check_added(&k, DEPTH, k.rows != 64);
    }
}

static void test_added_slices(void **)
{
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        if (emulated ? k.rows == 17 && k.actual == 17 : is_tested(&k))
            check_added(&k, MLP, k.rows != 64);
    }
}

/* ---- the head ---- */

enum {
    HEAD_OUT = 7 * 64 + 17, /* columns: tiles, and a part of one */
    HEAD_STRIDE = HEAD_OUT + 7,
    HEAD_SMS = 2, /* so that a block has more tiles than shared memory holds */
};

/* Which packed row a row of the logits is: the same, unsaid or said; another; or one of more rows
 * than have logits. */
enum head_rows { HEAD_ALL, HEAD_SAME, HEAD_OTHER, HEAD_SOME };

static int head_row(enum head_rows which, int r, int actual)
{
    if (which == HEAD_SOME)
        return (WARPGROUP_HEAD_ROWS - 1 + 5 * r) % WARPGROUP_HEAD_ROWS;
    return which == HEAD_OTHER ? (actual - 1 - r + actual / 3) % actual : r;
}

/* found [MAX_ROWS, HEAD_STRIDE]; values, w, scales: what gives each packed row's logits. */
static void check_head_logits(const struct rows_case *k, enum head_rows which, const float *found,
                              const float *values, const float *w, const double *scales)
{
    for (int r = 0; r < MAX_ROWS; r++) {
        for (int i = 0; i < HEAD_STRIDE; i++) {
            const float y = found[(size_t)r * HEAD_STRIDE + i];
            if (r >= k->actual || i > HEAD_OUT) { /* a column more is the pair's */
                if (!isnan(y))
                    fail_msg("row %d of %d, column %d: %g was written", r, k->actual, i, y);
            } else if (i < HEAD_OUT) {
                const int own = head_row(which, r, k->actual);
                double slack;
                const double sum = dot(values + own * DEPTH, w + i * DEPTH, DEPTH, &slack);
                check_value(y, scales[own] * sum, scales[own] * slack, "logit", r, i);
            }
        }
    }
}

static void check_head(const struct rows_case *k, enum head_rows which)
{
    const int packed = which == HEAD_SOME ? WARPGROUP_HEAD_ROWS : k->actual;
    seed = 17;
    put_n_rows(packed);
    struct packed_rows in = packed_open(DEPTH, WARPGROUP_PARTS);
    float *x = random_values((size_t)MAX_ROWS * DEPTH, false);
    float *norm = random_values(DEPTH, false), *w = random_values(HEAD_OUT * DEPTH, true);
    float *found = (float *)malloc((size_t)MAX_ROWS * HEAD_STRIDE * sizeof(*found));
    static float values[MAX_ROWS * DEPTH];
    static double scales[MAX_ROWS];
    put_normed(&in, x, norm, values, scales, packed, packed);
    put_n_rows(k->actual);
    OK(cudaMemset(in.values, 0xff, (size_t)packed_values(MAX_ROWS, DEPTH) * sizeof(bf16)));
    float *const device_x = on_device(x, (size_t)MAX_ROWS * DEPTH);
    float *const device_norm = on_device(norm, DEPTH);
    int32_t *const sizes = on_device(&packed, 1);
    int32_t from[MAX_ROWS], *device_from;
    for (int r = 0; r < MAX_ROWS; r++)
        from[r] = r < k->actual ? head_row(which, r, k->actual) : 1 << 30;
    OK(cudaMalloc((void **)&device_from, sizeof(from)));
    OK(cudaMemcpy(device_from, from, sizeof(from), cudaMemcpyHostToDevice));
    memset(found, 0xff, (size_t)MAX_ROWS * HEAD_STRIDE * sizeof(*found)); /* NaN */
    bf16 *const weights = device_bf16(w, HEAD_OUT * DEPTH);
    struct product p = {};
    p.w = {weights, DTYPE_BF16, NULL, NULL, HEAD_OUT, DEPTH};
    p.in_rows = which == HEAD_ALL ? NULL : device_from;
    p.out = on_device(found, (size_t)MAX_ROWS * HEAD_STRIDE);
    p.out_stride = HEAD_STRIDE;
    p.output = OUTPUT_F32;
    p.rows = k->rows;
    p.n_rows = n_rows;
    const int n_sms = c.queue.n_sms;
    c.queue.n_sms = HEAD_SMS;
    pack_rows(&c, &in, device_x, device_norm, packed, sizes); /* which it is to wait for */
    assert_true(warpgroup_head(&c, &p, &in));
    c.queue.n_sms = n_sms;
    from_device(found, (float *)p.out, (size_t)MAX_ROWS * HEAD_STRIDE);
    check_head_logits(k, which, found, values, w, scales);
    cudaFree(device_x);
    cudaFree(device_norm);
    cudaFree(sizes);
    cudaFree(weights);
    cudaFree(device_from);
    cudaFree(p.out);
    packed_close(&in);
    free(x);
    free(norm);
    free(w);
    free(found);
}

static void test_head(void **)
{
    need_warpgroups();
    for (const struct rows_case &k : all_rows) {
        for (const enum head_rows which : {HEAD_ALL, HEAD_SAME, HEAD_OTHER, HEAD_SOME}) {
            if (k.rows <= WARPGROUP_HEAD_ROWS && (!emulated || k.rows != 17))
                check_head(&k, which);
        }
    }
}

/* What the head's kernel does not know. */
static void test_other_heads(void **)
{
    need_warpgroups();
    struct packed_rows in = packed_open(DEPTH, WARPGROUP_PARTS);
    struct product p = {};
    p.w = {in.values, DTYPE_BF16, NULL, NULL, 64, DEPTH};
    p.out_stride = 64;
    p.output = OUTPUT_F32;
    p.rows = WARPGROUP_HEAD_ROWS + 1;
    assert_false(warpgroup_head(&c, &p, &in));
    p.rows = WARPGROUP_HEAD_ROWS;
    p.out_stride = 65;
    assert_false(warpgroup_head(&c, &p, &in));
    p.out_stride = 64;
    p.softcap = 1;
    assert_false(warpgroup_head(&c, &p, &in));
    p.softcap = 0;
    p.w.dtype = DTYPE_I8;
    assert_false(warpgroup_head(&c, &p, &in));
    p.w.dtype = DTYPE_BF16;
    p.w.n_in = 2 * DEPTH;
    assert_false(warpgroup_head(&c, &p, &in));
    packed_close(&in);
}

static void test_shapes(void **)
{
    assert_true(warpgroup_has(OUTPUT_BF16, 2304, DEPTH));
    assert_true(warpgroup_has(OUTPUT_ACTIVATE, 2 * MLP, DEPTH));
    assert_true(warpgroup_has(OUTPUT_ADD, DEPTH, MLP));
    assert_false(warpgroup_has(OUTPUT_BF16, 2304, 512));
    assert_false(warpgroup_has(OUTPUT_BF16, 2300, DEPTH));
    assert_false(warpgroup_has(OUTPUT_F32, 264, DEPTH));
    assert_false(warpgroup_has(OUTPUT_ACTIVATE, 100, DEPTH));
    assert_false(warpgroup_has(OUTPUT_ADD, DEPTH, 2 * DEPTH));
    assert_false(warpgroup_has(OUTPUT_ACTIVATE_PLAIN, 96, DEPTH));
    assert_true(warpgroup_has_logits(264, DEPTH));
    assert_false(warpgroup_has_logits(260, DEPTH));
    assert_false(warpgroup_has_logits(272, DEPTH));
    assert_false(warpgroup_has_logits(264, 2 * DEPTH));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),       cmocka_unit_test(test_front),
        cmocka_unit_test(test_activated),    cmocka_unit_test(test_added),
        cmocka_unit_test(test_added_slices), cmocka_unit_test(test_head),
        cmocka_unit_test(test_other_heads),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}

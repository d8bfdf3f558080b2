/* test_prompt.cu - latents and windows on the device, as ops and as prompt_mix, against loops in
 * double precision that know whole sessions: the past of each is drawn first, put into slots
 * and rings as the kernels keep them, and looked at from position 0 or the window's beginning.
 *
 * Slots that hold nothing of a session, rows beyond the step's and places of a ring not yet
 * reached are NaN, so that a value from the wrong place shows. Every case is run again with each
 * sequence alone: its results must be the same bits.
 */
#include <vector>

#include "engine/kernels/cuda/attention.cuh"
#include "engine/kernels/cuda/fused.cuh"

extern "C" {
#include "tests/unit/unit.h"
}

typedef std::vector<float> floats_of;
typedef std::vector<double> doubles_of;

enum { N_SLOTS = 9, MAX_ROWS = 1024, SPARE = 3 /* rows of the bucket not used */ };

#define OK(call) assert_int_equal((call), cudaSuccess)

/* ---- random numbers ---- */

static uint32_t seed;

static int random_int(int low, int high) /* both included */
{
    return low + (int)(test_random(&seed) % (uint32_t)(high - low + 1));
}

static float random_float(float scale)
{
    return scale * ((float)(test_random(&seed) >> 8) / (1 << 23) - 1);
}

static void fill(floats_of *x, size_t n, float scale)
{
    x->resize(n);
    for (size_t i = 0; i < n; i++)
        (*x)[i] = random_float(scale);
}

static float as_dtype(float x, enum dtype dtype)
{
    unsigned char narrow[sizeof(float)];
    dtype_from_f32(narrow, dtype, &x, 1);
    dtype_to_f32(&x, narrow, dtype, 1);
    return x;
}

static void round_all(floats_of *x, enum dtype dtype)
{
    for (float &value : *x)
        value = as_dtype(value, dtype);
}

/* ---- the device ---- */

static struct {
    struct cuda c;
    std::vector<void *> taken;
} device;

static void *take(size_t n_bytes)
{
    void *p = nullptr;
    OK(cudaMalloc(&p, n_bytes + 256));
    device.taken.push_back(p);
    return p;
}

static void give_all(void)
{
    for (void *p : device.taken)
        OK(cudaFree(p));
    device.taken.clear();
}

static void *upload_bytes(const void *data, size_t n_bytes)
{
    void *p = take(n_bytes);
    OK(cudaMemcpy(p, data, n_bytes, cudaMemcpyHostToDevice));
    return p;
}

/* from_float and to_float are the device's: not to be called here. */
static enum dtype dtype_of(const float *)
{
    return DTYPE_F32;
}
static enum dtype dtype_of(const bf16 *)
{
    return DTYPE_BF16;
}
static enum dtype dtype_of(const fp8 *)
{
    return DTYPE_F8_E4M3;
}

template <class T> static T *upload(const floats_of &x)
{
    std::vector<T> y(x.size() + 1);
    dtype_from_f32(y.data(), dtype_of(y.data()), x.data(), x.size());
    return (T *)upload_bytes(y.data(), y.size() * sizeof(T));
}

static void *upload_as(const floats_of &x, enum dtype dtype)
{
    return dtype == DTYPE_F32    ? (void *)upload<float>(x)
           : dtype == DTYPE_BF16 ? (void *)upload<bf16>(x)
                                 : (void *)upload<fp8>(x);
}

template <class T> static floats_of download(const void *p, size_t n)
{
    std::vector<T> y(n + 1);
    OK(cudaMemcpy(y.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    floats_of x(n);
    dtype_to_f32(x.data(), y.data(), dtype_of(y.data()), n);
    return x;
}

static floats_of download_as(const void *p, size_t n, enum dtype dtype)
{
    return dtype == DTYPE_F32    ? download<float>(p, n)
           : dtype == DTYPE_BF16 ? download<bf16>(p, n)
                                 : download<fp8>(p, n);
}

static int open_device(void **)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || !n)
        return 0; /* each test skips */
    device.c.queue.n_sms = 4;
    device.c.options.max_rows = MAX_ROWS;
    OK(cudaStreamCreate(&device.c.queue.stream));
    return 0;
}

static int close_device(void **)
{
    if (device.c.queue.stream)
        OK(cudaStreamDestroy(device.c.queue.stream));
    return 0;
}

static void finish(void)
{
    OK(device.c.queue.error);
    OK(cudaStreamSynchronize(device.c.queue.stream));
}

/* ---- steps ---- */

struct sequence {
    int slot, n;
    int64_t position;
};

struct batch {
    std::vector<sequence> seqs;

    int n_rows() const
    {
        int n = 0;
        for (const sequence &s : seqs)
            n += s.n;
        return n;
    }
};

static struct batch random_batch(int n_seqs, int longest)
{
    static const int positions[] = {0, 0, 1, 3, 40, 63, 64, 65, 200, 511, 1000, 99999, 1000000};
    struct batch b;
    for (int i = 0; i < n_seqs; i++) {
        const int64_t position = positions[random_int(0, COUNT_OF(positions) - 1)];
        b.seqs.push_back({(i * 4 + 1) % N_SLOTS, random_int(0, 2) ? random_int(1, longest) : 1,
                          position + (position > 1000 ? random_int(0, 999) : 0)});
    }
    return b;
}

/* Put the step on the device, in a bucket somewhat larger than it. */
static void begin(const struct batch &b)
{
    std::vector<int64_t> positions;
    std::vector<int32_t> row_slot, seq_slot, start;
    std::vector<piece> pieces;
    bool decode = true;
    for (size_t i = 0; i < b.seqs.size(); i++) {
        const sequence &s = b.seqs[i];
        const int first = (int)pieces.size(), row = (int)positions.size();
        start.push_back(row);
        seq_slot.push_back(s.slot);
        decode = decode && s.n == 1;
        for (int r = 0; r < s.n; r += PIECE_ROWS)
            pieces.push_back({(int)i, row + r, s.n - r < PIECE_ROWS ? s.n - r : PIECE_ROWS, first});
        for (int r = 0; r < s.n; r++) {
            positions.push_back(s.position + r);
            row_slot.push_back(s.slot);
        }
    }
    const int n_rows = (int)positions.size();
    start.push_back(n_rows);
    const struct step_sizes sizes = {n_rows, (int)b.seqs.size(), (int)pieces.size(), 0, 0, 0};
    struct device_step *step = &device.c.step;
    step->sizes = (const step_sizes *)upload_bytes(&sizes, sizeof(sizes));
    step->positions = (const int64_t *)upload_bytes(positions.data(), n_rows * sizeof(int64_t));
    step->row_slot = (const int32_t *)upload_bytes(row_slot.data(), n_rows * sizeof(int32_t));
    step->seq_slot = (const int32_t *)upload_bytes(seq_slot.data(), seq_slot.size() * 4);
    step->seq_start = (const int32_t *)upload_bytes(start.data(), start.size() * 4);
    step->pieces = (const piece *)upload_bytes(pieces.data(), pieces.size() * sizeof(piece));
    step->rows = n_rows + SPARE;
    step->seqs = sizes.n_seqs + SPARE;
    step->n_pieces = sizes.n_pieces + SPARE;
    step->decode = decode;
}

/* ---- a case: shapes, inputs, slots before, and what must come out ---- */

struct shape {
    int H, KV, d, M, w;
    float softcap, theta_scale;
    bool norm = false, vapor = false;
    enum dtype ring = DTYPE_F32;

    int window() const
    {
        return w > 0;
    }
    int n_g() const
    {
        return M + window();
    }
};

struct slots {
    floats_of m, alpha, s, k, v; /* of all slots */
};

struct inputs {
    floats_of theta, g, q, k, v, out, p0; /* a row each; SPARE rows of NaN behind */
    floats_of q_norm, k_norm, vapor;
    doubles_of frequencies;
};

struct results {
    floats_of out, p0;
    struct slots slots;
};

struct wanted {
    doubles_of out, p0, m, alpha, s, k, v; /* NaN: anything goes */
};

struct test_case {
    struct shape shape;
    struct batch batch;
    struct inputs in;
    struct slots before;
    struct wanted want;
    bool half; /* prompt_mix: bf16 q and k before norm and rope, both parts together */
};

static void add_spare(floats_of *x, size_t row)
{
    x->resize(x->size() + SPARE * row, NAN);
}

static void draw_inputs(struct test_case *t)
{
    const struct shape *sh = &t->shape;
    const size_t n = (size_t)t->batch.n_rows(), heads = (size_t)(sh->H * sh->d);
    const size_t kv = (size_t)(sh->KV * sh->d), L = (size_t)(sh->H * sh->M);
    struct inputs *in = &t->in;
    fill(&in->theta, n * L, sh->theta_scale);
    fill(&in->g, n * (size_t)(sh->H * sh->n_g()), 4);
    fill(&in->q, n * heads, 1.5);
    fill(&in->k, n * kv, 1.5);
    fill(&in->v, n * kv, 1);
    fill(&in->out, n * heads, 1);
    fill(&in->p0, n * (size_t)sh->H, 1);
    fill(&in->q_norm, (size_t)sh->d, 2);
    fill(&in->k_norm, (size_t)sh->d, 2);
    fill(&in->vapor, heads / 2, 2);
    for (int i = 0; i < sh->d / 2; i++)
        in->frequencies.push_back(pow(10000.0, -2.0 * i / sh->d));
    if (t->half)
        for (floats_of *x : {&in->q, &in->k, &in->v})
            round_all(x, DTYPE_BF16);
    add_spare(&in->theta, L);
    add_spare(&in->g, (size_t)(sh->H * sh->n_g()));
    add_spare(&in->q, heads);
    add_spare(&in->k, kv);
    add_spare(&in->v, kv);
    add_spare(&in->out, heads);
    add_spare(&in->p0, (size_t)sh->H);
}

static void empty_slots(struct test_case *t)
{
    const struct shape *sh = &t->shape;
    const size_t L = (size_t)(sh->H * sh->M * N_SLOTS), ring = (size_t)sh->KV * sh->w * sh->d;
    for (floats_of *x : {&t->before.m, &t->before.alpha})
        x->assign(L, NAN);
    t->before.s.assign(L * (size_t)sh->d, NAN);
    for (floats_of *x : {&t->before.k, &t->before.v})
        x->assign(ring * N_SLOTS, NAN);
    struct wanted *w = &t->want;
    for (doubles_of *x : {&w->m, &w->alpha})
        x->assign(L, NAN);
    w->s.assign(L * (size_t)sh->d, NAN);
    for (doubles_of *x : {&w->k, &w->v})
        x->assign(ring * N_SLOTS, NAN);
    w->out.assign((size_t)t->batch.n_rows() * (size_t)(sh->H * sh->d), 0);
    w->p0.assign((size_t)(t->batch.n_rows() * sh->H), 0);
}

/* ---- the oracle ---- */

/* p [n_g] = softmax of one head's gates. */
static doubles_of gates_of(const struct test_case *t, int row, int h)
{
    const int n = t->shape.n_g();
    const float *g = t->in.g.data() + (size_t)(row * t->shape.H + h) * n;
    doubles_of p(n);
    double top = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        top = fmax(top, g[i]);
    for (int i = 0; i < n; i++)
        sum += p[i] = exp(g[i] - top);
    for (int i = 0; i < n; i++)
        p[i] /= sum;
    return p;
}

/* One latent of one head over a sequence, P(eq 19). */
static void want_latent(struct test_case *t, const sequence &seq, int first, int h, int l)
{
    const struct shape *sh = &t->shape;
    const int d = sh->d, kv = h / (sh->H / sh->KV);
    const size_t at = (size_t)((seq.slot * sh->H + h) * sh->M + l);
    double m = -INFINITY, alpha = 0;
    doubles_of s(d);
    if (seq.position) {
        m = t->before.m[at] = random_float(5);
        alpha = t->before.alpha[at] = 1 + fabsf(random_float(50));
        for (int i = 0; i < d; i++)
            s[i] = t->before.s[at * d + i] = random_float((float)alpha);
    }
    for (int row = first; row < first + seq.n; row++) {
        const double theta = t->in.theta[(size_t)(row * sh->H + h) * sh->M + l];
        const double top = fmax(m, theta), take = exp(theta - top);
        const double keep = m == -INFINITY ? 0 : exp(m - top);
        const double p = gates_of(t, row, h)[l + sh->window()];
        m = top;
        alpha = alpha * keep + take;
        for (int i = 0; i < d; i++) {
            s[i] = s[i] * keep + take * t->in.v[(size_t)(row * sh->KV + kv) * d + i];
            t->want.out[(size_t)(row * sh->H + h) * d + i] += p * s[i] / alpha;
        }
    }
    t->want.m[at] = m;
    t->want.alpha[at] = alpha;
    for (int i = 0; i < d; i++)
        t->want.s[at * d + i] = s[i];
}

/* A head of q or k as the window sees it: normed and turned, in bf16, with prompt_mix. */
static doubles_of window_vector(const struct test_case *t, const float *x, const floats_of &norm,
                                int64_t position)
{
    const int d = t->shape.d, half = d / 2;
    doubles_of y(x, x + d);
    if (!t->half)
        return y;
    double square = 0;
    for (int i = 0; i < d; i++)
        square += y[i] * y[i] / d;
    for (int i = 0; i < d && t->shape.norm; i++)
        y[i] *= norm[i] / sqrt(square + 1e-6);
    for (int i = 0; i < half; i++) {
        const long double angle = (long double)position * t->in.frequencies[i];
        const double a = y[i], b = y[i + half], c = (double)cosl(angle), s = (double)sinl(angle);
        y[i] = as_dtype((float)(a * c - b * s), DTYPE_BF16);
        y[i + half] = as_dtype((float)(a * s + b * c), DTYPE_BF16);
    }
    return y;
}

/* Keys and values of one kv head from the oldest that a row may see to the step's last. */
struct history {
    std::vector<doubles_of> k, v;
    int n_past;
};

static struct history draw_history(struct test_case *t, const sequence &seq, int first, int kv)
{
    const struct shape *sh = &t->shape;
    const int d = sh->d;
    struct history hist;
    hist.n_past = seq.position < sh->w ? (int)seq.position : sh->w;
    for (int j = 0; j < hist.n_past + seq.n; j++) {
        const int64_t position = seq.position - hist.n_past + j;
        doubles_of k(d), v(d);
        const size_t at = (((size_t)seq.slot * sh->KV + kv) * sh->w + position % sh->w) * d;
        if (j < hist.n_past) {
            for (int i = 0; i < d; i++) {
                k[i] = t->before.k[at + i] = as_dtype(random_float(1.5), sh->ring);
                v[i] = t->before.v[at + i] = as_dtype(random_float(1), sh->ring);
            }
        } else {
            const size_t row = (size_t)((first + j - hist.n_past) * sh->KV + kv) * d;
            k = window_vector(t, t->in.k.data() + row, t->in.k_norm, position);
            for (int i = 0; i < d; i++)
                v[i] = t->in.v[row + i];
        }
        for (int i = 0; i < d; i++) { /* the last position of a place stays */
            t->want.k[at + i] = k[i];
            t->want.v[at + i] = v[i];
        }
        hist.k.push_back(k);
        hist.v.push_back(v);
    }
    return hist;
}

/* local [d] of one row and head, P(eq 13), with VAPOR P(eq 20). */
static doubles_of local_of(const struct test_case *t, const struct history &hist, int row, int r,
                           int64_t position, int h)
{
    const struct shape *sh = &t->shape;
    const int d = sh->d, now = hist.n_past + r, oldest = now - sh->w + 1 > 0 ? now - sh->w + 1 : 0;
    const doubles_of q =
        window_vector(t, t->in.q.data() + (size_t)(row * sh->H + h) * d, t->in.q_norm, position);
    doubles_of local(d);
    double sum = 0;
    for (int j = oldest; j <= now; j++) {
        double score = 0;
        for (int i = 0; i < d; i++)
            score += q[i] * hist.k[j][i];
        score /= sqrt(d);
        const double p = exp(sh->softcap > 0 ? sh->softcap * tanh(score / sh->softcap) : score);
        doubles_of v = hist.v[j];
        for (int i = 0; i < d / 2 && sh->vapor; i++) {
            const long double angle = (long double)(now - j) * t->in.vapor[h * (d / 2) + i];
            const double a = v[i], b = v[i + d / 2];
            v[i] = a * (double)cosl(angle) - b * (double)sinl(angle);
            v[i + d / 2] = a * (double)sinl(angle) + b * (double)cosl(angle);
        }
        sum += p;
        for (int i = 0; i < d; i++)
            local[i] += p * v[i];
    }
    for (int i = 0; i < d; i++)
        local[i] /= sum;
    return local;
}

static void want_window(struct test_case *t, const sequence &seq, int first, bool gated)
{
    const struct shape *sh = &t->shape;
    for (int kv = 0; kv < sh->KV; kv++) {
        const struct history hist = draw_history(t, seq, first, kv);
        for (int h = kv * (sh->H / sh->KV); h < (kv + 1) * (sh->H / sh->KV); h++) {
            for (int r = 0; r < seq.n; r++) {
                const int row = first + r;
                const size_t head = (size_t)(row * sh->H + h);
                const doubles_of local = local_of(t, hist, row, r, seq.position + r, h);
                const double p0 = !gated ? 1 : t->half ? gates_of(t, row, h)[0] : t->in.p0[head];
                for (int i = 0; i < sh->d; i++)
                    t->want.out[head * sh->d + i] += p0 * local[i];
            }
        }
    }
}

/* The latents' part of the case. */
static void want_latents(struct test_case *t, const sequence &seq, int first)
{
    const struct shape *sh = &t->shape;
    for (int i = 0; i < sh->H * sh->M; i++)
        want_latent(t, seq, first, i / sh->M, i % sh->M);
    for (int r = first; r < first + seq.n; r++)
        for (int h = 0; h < sh->H; h++)
            t->want.p0[r * sh->H + h] = gates_of(t, r, h)[0];
}

/* ---- running ---- */

/* The rows of one sequence, with the spare ones behind. */
static floats_of part_of(const floats_of &x, int n_rows, int first, int n)
{
    const size_t row = x.size() / (size_t)(n_rows + SPARE);
    floats_of y(x.begin() + first * row, x.begin() + (first + n) * row);
    add_spare(&y, row);
    return y;
}

static struct test_case alone(const struct test_case *t, size_t seq)
{
    struct test_case one;
    const int n = t->batch.n_rows();
    int first = 0;
    for (size_t i = 0; i < seq; i++)
        first += t->batch.seqs[i].n;
    one.shape = t->shape;
    one.half = t->half;
    one.before = t->before;
    one.in = t->in;
    one.batch.seqs = {t->batch.seqs[seq]};
    for (floats_of inputs::*x : {&inputs::theta, &inputs::g, &inputs::q, &inputs::k, &inputs::v,
                                 &inputs::out, &inputs::p0})
        one.in.*x = part_of(t->in.*x, n, first, one.batch.seqs[0].n);
    return one;
}

/* A slab on the device, and the buffer that ops know it by. */
struct held {
    struct buffer buffer;
    struct slab slab;
};

static struct held hold(const floats_of &x, enum dtype dtype)
{
    struct held h;
    h.buffer = {upload_as(x, dtype), 0, false};
    h.slab = {nullptr, (int64_t)x.size() / N_SLOTS, dtype};
    return h;
}

struct held_slots {
    struct held m, alpha, s, k, v;
};

static void hold_slots(struct held_slots *h, const struct test_case *t)
{
    h->m = hold(t->before.m, DTYPE_F32);
    h->alpha = hold(t->before.alpha, DTYPE_F32);
    h->s = hold(t->before.s, DTYPE_F32);
    h->k = hold(t->before.k, t->shape.ring);
    h->v = hold(t->before.v, t->shape.ring);
    for (struct held *x : {&h->m, &h->alpha, &h->s, &h->k, &h->v})
        x->slab.buffer = &x->buffer;
}

static struct slots read_slots(const struct held_slots *h, const struct test_case *t)
{
    struct slots s;
    s.m = download<float>(h->m.buffer.data, t->before.m.size());
    s.alpha = download<float>(h->alpha.buffer.data, t->before.alpha.size());
    s.s = download<float>(h->s.buffer.data, t->before.s.size());
    s.k = download_as(h->k.buffer.data, t->before.k.size(), t->shape.ring);
    s.v = download_as(h->v.buffer.data, t->before.v.size(), t->shape.ring);
    return s;
}

static struct latent_shape latent_shape_of(const struct shape *sh)
{
    struct latent_shape l = {};
    l.n_heads = sh->H;
    l.n_latents = sh->M;
    l.head_dim = sh->d;
    l.n_kv_heads = sh->KV;
    l.gated_window = sh->window();
    return l;
}

static struct window_shape window_shape_of(const struct shape *sh)
{
    struct window_shape w = {};
    w.n_heads = sh->H;
    w.n_kv_heads = sh->KV;
    w.head_dim = sh->d;
    w.ring_rows = sh->w;
    w.scale = 1 / sqrtf((float)sh->d);
    w.softcap = sh->softcap;
    return w;
}

static size_t piece_values_of(const struct shape *sh)
{
    return (size_t)(sh->H * sh->M) * (size_t)(sh->d + 2);
}

/* Scratch of the step, NaN at first. */
static void take_scratch(const struct test_case *t, bool pieces, size_t partial_values)
{
    struct cuda *c = &device.c;
    c->max_pieces = c->step.n_pieces;
    c->piece_values = pieces ? piece_values_of(&t->shape) + 1 : 0;
    c->piece_states = upload<float>(floats_of((size_t)c->max_pieces * c->piece_values, NAN));
    c->partial_values = partial_values;
    c->partials = upload<float>(floats_of(partial_values, NAN));
}

typedef struct results run_case(const struct test_case *t);

static bool by_pieces; /* of run_latent: else each sequence by one block a head */

static struct results run_latent(const struct test_case *t)
{
    const size_t n = (size_t)t->batch.n_rows();
    const struct latent_shape shape = latent_shape_of(&t->shape);
    struct held_slots h;
    struct buffer theta = {upload<float>(t->in.theta), 0, false};
    struct buffer g = {upload<float>(t->in.g), 0, false};
    struct buffer v = {upload<float>(t->in.v), 0, false};
    struct buffer out = {upload<float>(t->in.out), 0, false};
    struct buffer p0 = {upload<float>(t->in.p0), 0, false};
    begin(t->batch);
    take_scratch(t, by_pieces, 0);
    hold_slots(&h, t);
    cuda_latent(&device.c.base, &out, &p0, &theta, &g, &v, &h.m.slab, &h.alpha.slab, &h.s.slab,
                &shape);
    finish();
    struct results r;
    r.out = download<float>(out.data, n * (size_t)(t->shape.H * t->shape.d));
    if (t->shape.window())
        r.p0 = download<float>(p0.data, n * (size_t)t->shape.H);
    r.slots = read_slots(&h, t);
    give_all();
    return r;
}

static bool gated;          /* of run_window */
static size_t split_values; /* room for partial results */

static struct results run_window(const struct test_case *t)
{
    const size_t n = (size_t)t->batch.n_rows();
    const struct window_shape shape = window_shape_of(&t->shape);
    struct held_slots h;
    struct buffer q = {upload<float>(t->in.q), 0, false};
    struct buffer k = {upload<float>(t->in.k), 0, false};
    struct buffer v = {upload<float>(t->in.v), 0, false};
    struct buffer out = {upload<float>(t->in.out), 0, false};
    struct buffer p0 = {upload<float>(t->in.p0), 0, false};
    struct buffer vapor = {upload<float>(t->in.vapor), 0, false};
    begin(t->batch);
    take_scratch(t, false, split_values);
    hold_slots(&h, t);
    cuda_window(&device.c.base, &out, gated ? &p0 : nullptr, &q, &k, &v, &h.k.slab, &h.v.slab,
                t->shape.vapor ? &vapor : nullptr, &shape);
    finish();
    struct results r;
    r.out = download<float>(out.data, n * (size_t)(t->shape.H * t->shape.d));
    r.slots = read_slots(&h, t);
    give_all();
    return r;
}

/* Rows of several inputs side by side, as the fused layer's products leave them. */
static floats_of beside(const std::vector<const floats_of *> &parts, size_t n_rows, size_t pad)
{
    floats_of rows;
    for (size_t r = 0; r < n_rows; r++) {
        for (const floats_of *x : parts) {
            const size_t n = x->size() / n_rows;
            rows.insert(rows.end(), x->begin() + r * n, x->begin() + (r + 1) * n);
        }
        rows.insert(rows.end(), pad, NAN);
    }
    return rows;
}

static struct results run_mix(const struct test_case *t)
{
    const struct shape *sh = &t->shape;
    const size_t n = (size_t)t->batch.n_rows(), rows = n + SPARE;
    const int heads = sh->H * sh->d, kv = sh->KV * sh->d;
    struct held_slots h;
    begin(t->batch);
    take_scratch(t, true, 0);
    hold_slots(&h, t);
    struct mix m = {};
    bf16 *qkv = upload<bf16>(beside({&t->in.q, &t->in.k, &t->in.v}, rows, 8));
    m.stride = heads + 2 * kv + 8;
    m.q = sh->window() ? qkv : nullptr;
    m.k = qkv + heads;
    m.v = qkv + heads + kv;
    if (sh->M) {
        m.theta = upload<float>(beside({&t->in.theta, &t->in.g}, rows, 3));
        m.g = m.theta + sh->H * sh->M;
        m.gate_stride = sh->H * (sh->M + sh->n_g()) + 3;
    }
    m.q_norm = sh->norm ? upload<float>(t->in.q_norm) : nullptr;
    m.k_norm = sh->norm ? upload<float>(t->in.k_norm) : nullptr;
    m.qk_eps = 1e-6f;
    m.frequencies = (const double *)upload_bytes(t->in.frequencies.data(),
                                                 t->in.frequencies.size() * sizeof(double));
    m.latents = latent_shape_of(sh);
    m.window = window_shape_of(sh);
    m.m = {(float *)h.m.buffer.data, h.m.slab.row_values};
    m.alpha = {(float *)h.alpha.buffer.data, h.alpha.slab.row_values};
    m.s = {(float *)h.s.buffer.data, h.s.slab.row_values};
    m.ring_k = h.k.slab;
    m.ring_v = h.v.slab;
    m.out = upload<bf16>(floats_of(rows * (size_t)heads, NAN));
    assert_true(prompt_mix(&device.c, &m));
    finish();
    struct results r;
    r.out = download<bf16>(m.out, n * (size_t)heads);
    r.slots = read_slots(&h, t);
    give_all();
    return r;
}

/* ---- checking ---- */

static void expect_close(const char *what, const floats_of &got, const doubles_of &want,
                         double tolerance)
{
    for (size_t i = 0; i < got.size(); i++)
        if (!isnan(want[i]) && !(fabs(got[i] - want[i]) <= tolerance * (1 + fabs(want[i]))))
            fail_msg("%s: value %zu of %zu is %.9g, expected %.9g", what, i, got.size(), got[i],
                     want[i]);
}

static void expect_same(const char *what, const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(got + i, want + i, sizeof(float)) && !(isnan(got[i]) && isnan(want[i])))
            fail_msg("%s: value %zu is %.9g, expected exactly %.9g", what, i, got[i], want[i]);
}

static void expect_slot(const char *what, const floats_of &got, const floats_of &want, int slot)
{
    const size_t n = want.size() / N_SLOTS;
    expect_same(what, got.data() + n * (size_t)slot, want.data() + n * (size_t)slot, n);
}

/* Run the case whole, then each of its sequences alone. */
static void check(const struct test_case *t, run_case *run, double tolerance)
{
    const double place = t->shape.ring == DTYPE_F8_E4M3 ? 0.07
                         : t->half || t->shape.ring     ? 0.005
                                                        : 1e-6;
    const struct results all = run(t);
    expect_close("out", all.out, t->want.out, tolerance);
    expect_close("p0", all.p0, t->want.p0, 1e-5);
    expect_close("m", all.slots.m, t->want.m, 0);
    expect_close("alpha", all.slots.alpha, t->want.alpha, 1e-5);
    expect_close("s", all.slots.s, t->want.s, 1e-5);
    expect_close("ring of keys", all.slots.k, t->want.k, place);
    expect_close("ring of values", all.slots.v, t->want.v, place);

    const size_t row = (size_t)(t->shape.H * t->shape.d);
    size_t first = 0;
    for (size_t i = 0; i < t->batch.seqs.size() && t->batch.seqs.size() > 1; i++) {
        const int slot = t->batch.seqs[i].slot;
        const struct test_case one_case = alone(t, i);
        const struct results one = run(&one_case);
        expect_same("out alone", one.out.data(), all.out.data() + first * row, one.out.size());
        expect_slot("m alone", one.slots.m, all.slots.m, slot);
        expect_slot("alpha alone", one.slots.alpha, all.slots.alpha, slot);
        expect_slot("s alone", one.slots.s, all.slots.s, slot);
        expect_slot("keys alone", one.slots.k, all.slots.k, slot);
        expect_slot("values alone", one.slots.v, all.slots.v, slot);
        first += (size_t)t->batch.seqs[i].n;
    }
}

enum { LATENTS = 1, WINDOW = 2 };

static struct test_case make_case(const struct shape &sh, const struct batch &b, int parts,
                                  bool half, bool with_p0)
{
    struct test_case t;
    t.shape = sh;
    t.batch = b;
    t.half = half;
    draw_inputs(&t);
    empty_slots(&t);
    int first = 0;
    for (const sequence &seq : b.seqs) {
        if (parts & LATENTS)
            want_latents(&t, seq, first);
        if (parts & WINDOW)
            want_window(&t, seq, first, with_p0);
        first += seq.n;
    }
    if (parts == WINDOW && with_p0) /* the op adds to what out holds */
        for (size_t i = 0; i < t.want.out.size(); i++)
            t.want.out[i] += t.in.out[i];
    return t;
}

static int new_seed(void **)
{
    seed = 0x9e3779b9u; /* every test alone gives what it gives in the suite */
    return 0;
}

static void need_device(void)
{
    if (!device.c.queue.stream) {
        print_message("skipped: no GPU\n");
        skip();
    }
}

/* ---- latents as an op ---- */

/* Heads and kv heads, width, latents; w: gated by one column more. */
static void test_latent(void **)
{
    need_device();
    static const struct shape shapes[] = {
        {4, 2, 24, 16, 1, 0, 3},  {1, 1, 33, 5, 0, 0, 1000}, {2, 1, 64, 3, 1, 0, 100},
        {6, 3, 2, 20, 0, 0, 3},   {1, 1, 96, 64, 1, 0, 30},  {3, 3, 1, 1, 0, 0, 3},
        {1, 1, 256, 9, 1, 0, 50},
    };
    for (size_t i = 0; i < 2 * COUNT_OF(shapes); i++) {
        by_pieces = i % 2 == 0;
        const struct batch b = random_batch(random_int(1, 4), i % 4 ? 150 : 300);
        const struct test_case t = make_case(shapes[i / 2], b, LATENTS, false, false);
        check(&t, run_latent, 2e-5);
    }
}

static void test_latent_decode(void **)
{
    need_device();
    by_pieces = true;
    const struct shape shape = {4, 2, 32, 16, 1, 0, 10};
    const struct test_case t = make_case(shape, random_batch(7, 1), LATENTS, false, false);
    check(&t, run_latent, 1e-5);
}

/* A decode row gets the same bits beside a prompt as in a step of decode rows. */
static void test_latent_mixed(void **)
{
    need_device();
    by_pieces = true;
    const struct shape shape = {2, 2, 16, 8, 1, 0, 10};
    struct batch b = {{{1, 1, 77}, {2, 130, 5}, {3, 1, 0}}};
    const struct test_case t = make_case(shape, b, LATENTS, false, false);
    check(&t, run_latent, 1e-5);
}

/* Thetas that only rise, only fall, or jump between the ends of the range; then all alike. */
static void check_extremes(const struct shape &shape, bool half, run_case *run, double tolerance)
{
    for (int form = 0; form < 4; form++) {
        const struct batch b = {{{1, 200, 0}, {2, 130, 9}}};
        struct test_case t;
        t.shape = shape;
        t.batch = b;
        t.half = half;
        draw_inputs(&t);
        empty_slots(&t);
        for (int i = 0; i < b.n_rows() * 3; i++) {
            const float rise = -1000 + 2000 * (float)(i / 3) / 330;
            t.in.theta[i] = form == 0   ? rise
                            : form == 1 ? -rise
                            : form == 2 ? (i * 7 % 5 < 2 ? 1000 : -1000)
                                        : -1000;
        }
        want_latents(&t, b.seqs[0], 0);
        want_latents(&t, b.seqs[1], 200);
        check(&t, run, tolerance);
    }
}

/* More pieces than are scanned at a time; how many depends on the step. */
static void check_long(const struct shape &shape, bool half, run_case *run, double tolerance)
{
    const struct batch b = {{{1, 1, 77}, {2, 9000, 5}, {3, 64, 0}, {4, 1100, 0}, {5, 65, 3}}};
    const struct test_case t = make_case(shape, b, LATENTS, half, half);
    check(&t, run, tolerance);
}

static void test_latent_long(void **)
{
    need_device();
    by_pieces = true;
    check_long({1, 1, 6, 3, 1, 0, 3}, false, run_latent, 2e-5);
}

static void test_latent_extremes(void **)
{
    need_device();
    by_pieces = true;
    check_extremes({1, 1, 6, 3, 1, 0, 1}, false, run_latent, 1e-5);
}

/* ---- the window as an op ---- */

static void test_window(void **)
{
    need_device();
    static const struct shape shapes[] = {
        {2, 1, 16, 0, 1, 0, 0, false, false, DTYPE_F32},
        {4, 2, 6, 0, 5, 0, 0, false, true, DTYPE_F32},
        {2, 2, 48, 0, 64, 3, 0, false, false, DTYPE_BF16},
        {1, 1, 33, 0, 20, 0, 0, false, false, DTYPE_F32},
        {2, 1, 32, 0, 100, 0, 0, false, false, DTYPE_F8_E4M3},
        {1, 1, 20, 0, 70, 2, 0, false, true, DTYPE_BF16},
        {1, 1, 256, 0, 30, 0, 0, false, false, DTYPE_F32},
    };
    split_values = 0;
    for (size_t i = 0; i < 2 * COUNT_OF(shapes); i++) {
        gated = i % 2;
        const struct batch b = random_batch(random_int(1, 3), i % 4 == 1 ? 90 : 10);
        const struct test_case t = make_case(shapes[i / 2], b, WINDOW, false, gated);
        check(&t, run_window, 1e-5);
    }
}

/* Long rings: the same bits whether segments have blocks of their own or not. */
static void test_window_long(void **)
{
    need_device();
    gated = false;
    static const enum dtype rings[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F8_E4M3};
    for (int i = 0; i < 3; i++) {
        const struct shape shape = {2, 1, 16, 0, i ? 9000 : 1100, 0, 0, false, i == 0, rings[i]};
        const struct batch b = {{{1, 1, 99}, {2, 2, 8990}, {3, 1, 1000000}}};
        const struct test_case t = make_case(shape, b, WINDOW, false, false);
        split_values = 0;
        const struct results whole = run_window(&t);
        split_values = 1 << 16;
        check(&t, run_window, 1e-5);
        const struct results split = run_window(&t);
        expect_same("split", split.out.data(), whole.out.data(), whole.out.size());
    }
}

/* ---- prompts of the fused layer ---- */

static void check_mix(const struct shape &shape, const struct batch &b)
{
    const int parts = (shape.M ? LATENTS : 0) | (shape.w ? WINDOW : 0);
    const struct test_case t = make_case(shape, b, parts, true, shape.M > 0);
    check(&t, run_mix, 8e-3);
}

static void test_mix(void **)
{
    need_device();
    static const struct shape shapes[] = {
        {2, 2, 96, 16, 128, 0, 10, false, false, DTYPE_BF16},
        {4, 2, 16, 16, 40, 30, 100, true, false, DTYPE_F8_E4M3},
        {2, 1, 64, 5, 64, 0, 3, true, false, DTYPE_F32},
        {2, 1, 32, 8, 7, 0, 3, false, false, DTYPE_BF16},
        {1, 1, 256, 16, 70, 50, 3, false, false, DTYPE_F8_E4M3},
        {1, 1, 80, 3, 1, 0, 3, false, false, DTYPE_BF16},
        {2, 1, 48, 3, 20, 0, 3, false, false, DTYPE_F8_E4M3},
        {1, 1, 144, 2, 30, 0, 3, false, false, DTYPE_F32},
        {2, 1, 128, 4, 33, 0, 3, true, false, DTYPE_F32},
    };
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        check_mix(shapes[i], random_batch(random_int(2, 3), i % 2 ? 100 : 170));
}

static void test_mix_window_alone(void **)
{
    need_device();
    check_mix({2, 1, 16, 0, 24, 0, 0, false, false, DTYPE_BF16}, random_batch(3, 100));
    check_mix({1, 1, 32, 0, 1200, 0, 0, false, false, DTYPE_BF16},
              {{{1, 70, 1100}, {2, 1, 1000}, {3, 65, 1200}, {4, 100, 3000}}});
}

static void test_mix_latents_alone(void **)
{
    need_device();
    check_mix({2, 1, 24, 6, 0, 0, 20, false, false, DTYPE_F32}, random_batch(3, 200));
}

/* Longer than the ring, in pieces that see other pieces' rows and the ring's; several of them one
 * after the other in a block, which a sequence alone has not. */
static void test_mix_long(void **)
{
    need_device();
    static const struct shape shapes[] = {
        {1, 1, 16, 4, 100, 0, 10, false, false, DTYPE_BF16},
        {4, 2, 96, 4, 128, 0, 10, true, false, DTYPE_BF16},
        {2, 2, 48, 4, 129, 20, 10, false, false, DTYPE_F8_E4M3},
        {2, 1, 128, 2, 65, 0, 10, false, false, DTYPE_F32},
        {1, 1, 256, 2, 32, 0, 10, false, false, DTYPE_BF16},
    };
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        check_mix(shapes[i], {{{1, 300, 0}, {2, 1, 50}, {3, 230, 90}, {4, 290, 1000000}}});
}

static void test_mix_latents_long(void **)
{
    need_device();
    check_long({1, 1, 16, 3, 0, 0, 3}, true, run_mix, 8e-3);
}

/* More than 16 latents, and slices of columns that are not alike. */
static void test_mix_many_latents(void **)
{
    need_device();
    static const struct shape shapes[] = {
        {1, 1, 64, 64, 9, 0, 10, false, false, DTYPE_F32},
        {2, 1, 80, 33, 9, 0, 100, false, false, DTYPE_F32},
        {1, 1, 96, 20, 9, 0, 1000, false, false, DTYPE_F32},
        {1, 1, 128, 17, 0, 0, 3, false, false, DTYPE_F32},
        {1, 1, 256, 32, 0, 0, 3, false, false, DTYPE_F32},
    };
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        check_mix(shapes[i], random_batch(3, 200));
}

static void test_mix_extremes(void **)
{
    need_device();
    check_extremes({1, 1, 16, 3, 0, 0, 1}, true, run_mix, 8e-3);
}

static void test_mix_refuses(void **)
{
    need_device();
    struct mix m = {};
    assert_false(prompt_mix(&device.c, &m));
    m.latents.n_latents = 4; /* without its gates */
    assert_false(prompt_mix(&device.c, &m));
}

#define TEST(f) cmocka_unit_test_setup(f, new_seed)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_latent),           TEST(test_latent_decode),
        TEST(test_latent_mixed),     TEST(test_latent_long),
        TEST(test_latent_extremes),  TEST(test_window),
        TEST(test_window_long),      TEST(test_mix),
        TEST(test_mix_window_alone), TEST(test_mix_latents_alone),
        TEST(test_mix_long),         TEST(test_mix_latents_long),
        TEST(test_mix_many_latents), TEST(test_mix_extremes),
        TEST(test_mix_refuses),
    };
    return cmocka_run_group_tests(tests, open_device, close_device);
}

/* emulate.cc - the threads of a block as fibers: see emulate.h. */
#include "engine/kernels/cuda/device.cuh"
#include "tests/emulate/block.h"

#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulate
{

enum {
    MAX_THREADS = 1024,
    MAX_WARPS = MAX_THREADS / 32,
    MAX_COPIES = 128,         /* in flight, of a thread */
    MAX_BULKS = 1024,         /* in flight, of a block */
    MAX_SENT = 8192,          /* to a block, not received */
    STACK_BYTES = 256 * 1024, /* taken from the system as it is used */
    GUARD_BYTES = 4096,
    SHARED_PAGES = (SHARED_LIMIT + 1024 + 4095) / 4096 * 4096,
    BEYOND_BYTES = 256 * 1024, /* behind shared memory, not to be touched */
    POISON = 0xFF,             /* NaN as f32, bf16 and fp8, -1 as an integer */
};

/* ---- fibers ---- */

struct context {
#ifdef __x86_64__
    void *stack_pointer;
#else
    ucontext_t registers;
#endif
    void *fake_stack; /* AddressSanitizer's */
    const void *bottom;
    size_t n_bytes;
};

struct copy {
    unsigned char *to;
    const void *from;
    bool valid;
};

struct fiber : thread {
    context registers;
    unsigned char *stack;
    int warp;
    bool arrived; /* at the cluster's barrier, and has not waited since */
    unsigned arrived_round;
};

struct background {          /* a thread's copies */
    copy copies[MAX_COPIES]; /* not done, oldest first */
    int groups[MAX_COPIES];  /* copies in all after each commit, oldest first */
    int n_copies, n_groups;
};

struct warp {
    uint32_t ready, meeting, at_barrier, at_cluster, receiving, returned; /* lanes */

    /* What each lane waits for, and where. */
    uint32_t mask[32];
    void *arguments[32];
    combine *what[32];
    const char *file[32];
    int line[32];

    /* Where its first lane arrived for that round of the cluster's barrier. */
    const char *arrive_file;
    int arrive_line;
    unsigned arrive_round;
};

struct bulk {
    unsigned char *to;
    const void *from;
    uint32_t n_bytes;
    const uint64_t *barrier;
};

struct message {
    unsigned char *to, value[16];
    uint32_t n_bytes;
    const uint64_t *barrier;
};

/* An mbarrier; phase: the number of the one that has not ended. */
struct phases {
    uint64_t *barrier;
    int n, n_left; /* arrivals */
    int64_t bytes; /* expected, and not asked for */
    uint32_t phase;
};

struct box {
    unsigned char *to;
    matrix from;
    int at[5];
    const uint64_t *barrier;
};

struct warpgroup {
    int n_there;
    uint32_t round; /* how often all have met */
};

struct block {
    warpgroup warpgroups[MAX_WARPS / 4];
    std::vector<phases> mbarriers;
    std::vector<box> boxes;    /* not done */
    std::vector<bulk> bulks;   /* not done */
    std::vector<message> sent; /* to the block, not received */
    fiber fibers[MAX_THREADS];
    background backgrounds[MAX_THREADS];
    warp warps[MAX_WARPS];
    uint32_t ready_warps;
    int n_live, n_arrived, n_true;
    int barrier_true, barrier_live; /* of the barrier passed last */
    const char *barrier_file;
    int barrier_line;
    uint3 index;
    bool has_begun, has_waited;           /* has_waited: in pdl_wait */
    bool is_closed;                       /* nobody may touch its dynamic shared memory */
    unsigned char *shared, *shared_end;   /* dynamic; the end of its pages */
    std::vector<unsigned char> variables; /* its __shared__ ones while other blocks run */
};

thread *self;
uint3 block_index;
dim3 block_dim, grid_dim;
unsigned char *dynamic_shared;

static block blocks[MAX_CLUSTER];         /* of the cluster that runs; without clusters the first */
static block *now = blocks;               /* the one that runs */
static int n_blocks, n_warps;             /* of the cluster; of each block */
static int cluster_live, cluster_arrived; /* threads */
static unsigned cluster_round;            /* how often its barrier has opened */
static bool cluster_hides;
static context host;
static const kernel_run *running;
static std::vector<unsigned char> host_variables; /* see static_shared */
static bool any_waited;
static long order;
static uint32_t random_state;

static fiber *current(void)
{
    return static_cast<fiber *>(self);
}

#ifdef __x86_64__
extern "C" void emulate_switch(void **save, void *load);
asm(R"(
.text
.globl emulate_switch
.type emulate_switch, @function
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulate_switch, . - emulate_switch
)");
#endif

/* `forever`: the one that is left has returned. */
static void change(context *from, context *to, bool forever)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &from->fake_stack, to->bottom, to->n_bytes);
#endif
#ifdef __x86_64__
    emulate_switch(&from->stack_pointer, to->stack_pointer);
#else
    swapcontext(&from->registers, &to->registers);
#endif
    (void)forever;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

static void fiber_main(void);

static void take_stack(fiber *f)
{
    void *p = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, GUARD_BYTES, PROT_NONE)) {
        perror("emulate: stacks");
        abort();
    }
    f->stack = (unsigned char *)p + GUARD_BYTES;
}

static void start(fiber *f)
{
    if (!f->stack)
        take_stack(f);
    f->registers.bottom = f->stack;
    f->registers.n_bytes = STACK_BYTES;
    f->registers.fake_stack = nullptr;
#ifdef __x86_64__
    /* As emulate_switch leaves it: six registers, where to return to, and a word that makes
     * the stack aligned as after a call. Not at one place in all stacks, or they would share
     * the same lines of the processor's cache. */
    const size_t aside = (size_t)(f - now->fibers + (now - blocks)) * 5 % 64 * 64;
    void **top = (void **)(f->stack + STACK_BYTES - aside) - 8;
    memset(top, 0, 8 * sizeof(*top));
    top[6] = (void *)fiber_main;
    f->registers.stack_pointer = top;
#else
    getcontext(&f->registers.registers);
    f->registers.registers.uc_stack.ss_sp = f->stack;
    f->registers.registers.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f->registers.registers, fiber_main, 0);
#endif
    background *b = &now->backgrounds[f - now->fibers];
    b->n_copies = b->n_groups = 0;
}

/* ---- mistakes ---- */

static void restore_host_variables(void);

/* The kernel's name, by the debugging information of the program. */
static void print_name(const void *kernel)
{
    Dl_info info;
    char command[512] = "", name[256] = "";
    if (dladdr(kernel, &info))
        snprintf(command, sizeof(command), "addr2line -fCs -e '%s' %#lx 2>/dev/null | paste -sd' '",
                 info.dli_fname,
                 (unsigned long)((const char *)kernel - (const char *)info.dli_fbase));
    FILE *f = *command ? popen(command, "r") : nullptr;
    if (!f || !fgets(name, sizeof(name), f))
        snprintf(name, sizeof(name), "%p", kernel);
    name[strcspn(name, "\n")] = 0;
    if (f)
        pclose(f);
    fprintf(stderr, "  kernel %s\n", name);
}

static void print_where(void)
{
    print_name(running->kernel);
    fprintf(stderr, "  grid %u %u %u, block of %d, %zu bytes of dynamic shared memory\n",
            grid_dim.x, grid_dim.y, grid_dim.z, running->block, running->shared_bytes);
    if (running->cluster)
        fprintf(stderr, "  clusters of %d blocks\n", running->cluster);
    fprintf(stderr, "  in block %u %u %u, order %ld\n", block_index.x, block_index.y, block_index.z,
            order);
}

void mistake(const char *file, int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    restore_host_variables(); /* malloc may have some */
    fflush(stdout);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    print_where();
    if (self)
        fprintf(stderr, "  thread %u\n", self->index.x);
    abort();
}

/* The block whose dynamic shared memory, or what lies behind it, has the address; else none. */
static const block *owner_of(const unsigned char *address)
{
    for (int i = 0; i < n_blocks; i++)
        if (address >= blocks[i].shared_end - SHARED_PAGES &&
            address < blocks[i].shared_end + BEYOND_BYTES)
            return &blocks[i];
    return nullptr;
}

/* An access outside all memory. The test framework would catch the signal and go on. */
static void segmentation(int, siginfo_t *info, void *)
{
    auto address = (const unsigned char *)info->si_addr;
    const fiber *f = static_cast<fiber *>(self);
    if (f && address >= f->stack - GUARD_BYTES && address < f->stack)
        mistake("emulate", 0, "the thread's %d bytes of stack are used up", STACK_BYTES);
    const block *owner = owner_of(address);
    if (!owner || owner == now)
        mistake("emulate", 0, "access to %p, offset %td in dynamic shared memory (at %p)",
                (const void *)address, address - dynamic_shared, (void *)dynamic_shared);
    const char *state = !owner->has_begun ? "has not begun" : owner->n_live ? "runs" : "has ended";
    mistake("emulate", 0,
            "access to %p, offset %td in dynamic shared memory of block %td of the "
            "cluster, which %s",
            (const void *)address, address - owner->shared, owner - blocks, state);
}

static void catch_signals(bool begin)
{
    static struct sigaction before[2];
    static unsigned char stack[64 * 1024];
    static stack_t stack_before; /* of this thread */
    const int signals[2] = {SIGSEGV, SIGBUS};
    stack_t other = {};
    other.ss_sp = stack;
    other.ss_size = sizeof(stack);
    sigaltstack(begin ? &other : &stack_before, begin ? &stack_before : nullptr);
    struct sigaction ours = {};
    ours.sa_sigaction = segmentation;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND;
    for (int i = 0; i < 2; i++)
        sigaction(signals[i], begin ? &ours : &before[i], begin ? &before[i] : nullptr);
}

/* Where the threads of each warp stand, a line for each different place. */
static void print_warps(const block *b)
{
    for (int w = 0; w < n_warps; w++) {
        const warp *in = &b->warps[w];
        uint32_t left = ~in->returned;
        if (w == n_warps - 1 && running->block % 32)
            left &= (1u << running->block % 32) - 1;
        if (in->returned)
            fprintf(stderr, "  warp %d: lanes %08x have returned\n", w, in->returned);
        while (left) {
            const int lane = __builtin_ctz(left);
            const bool at_barrier = in->at_barrier >> lane & 1;
            const bool at_cluster = in->at_cluster >> lane & 1;
            const bool receives = in->receiving >> lane & 1;
            uint32_t same = 0;
            for (int i = lane; i < 32; i++)
                if (left >> i & 1 && in->file[i] == in->file[lane] &&
                    in->line[i] == in->line[lane] &&
                    (at_barrier || at_cluster || receives || in->mask[i] == in->mask[lane]))
                    same |= 1u << i;
            left &= ~same;
            fprintf(stderr, "  warp %d: lanes %08x wait at %s:%d ", w, same, in->file[lane],
                    in->line[lane]);
            if (at_barrier)
                fprintf(stderr, "for the block\n");
            else if (at_cluster)
                fprintf(stderr, "for the cluster\n");
            else if (receives)
                fprintf(stderr, "for bytes or others\n");
            else
                fprintf(stderr, "for lanes %08x\n", in->mask[lane]);
        }
    }
}

[[noreturn]] static void deadlock(void)
{
    restore_host_variables();
    fflush(stdout);
    fprintf(stderr, "emulate: deadlock\n");
    print_where();
    for (const block *b = blocks; b < blocks + n_blocks; b++) {
        if (n_blocks > 1)
            fprintf(stderr, "  block %u %u %u%s\n", b->index.x, b->index.y, b->index.z,
                    b->n_live ? ":" : " has ended");
        if (b->n_live)
            print_warps(b);
    }
    abort();
}

/* ---- who runs next ---- */

static uint32_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static int pick(uint32_t set)
{
    if (order == 0)
        return __builtin_ctz(set);
    if (order == 1)
        return 31 - __builtin_clz(set);
    const unsigned from = random_bits() & 31;
    const uint32_t turned = set >> from | set << (-from & 31);
    return (int)((unsigned)__builtin_ctz(turned) + from) & 31;
}

static void make_ready(block *b, int w, uint32_t lanes)
{
    b->warps[w].ready |= lanes;
    if (b->warps[w].ready)
        b->ready_warps |= 1u << w;
}

static void change_block(void);

static fiber *take_next(int w)
{
    if (!now->warps[w].ready) {
        if (!now->ready_warps)
            change_block();
        w = pick(now->ready_warps);
    }
    warp *from = &now->warps[w];
    const int lane = pick(from->ready);
    from->ready &= ~(1u << lane);
    if (!from->ready)
        now->ready_warps &= ~(1u << w);
    return &now->fibers[w * 32 + lane];
}

/* Let others run until something makes this one ready again. */
static void rest(void)
{
    fiber *me = current(), *next = take_next(me->warp);
    if (next == me)
        return;
    self = next;
    change(&me->registers, &next->registers, false);
    self = me;
}

static void open_barrier(void)
{
    now->barrier_true = now->n_true;
    now->barrier_live = now->n_live;
    now->n_true = now->n_arrived = 0;
    now->barrier_file = nullptr;
    for (int w = 0; w < n_warps; w++) {
        uint32_t lanes = now->warps[w].at_barrier;
        now->warps[w].at_barrier = 0;
        make_ready(now, w, lanes);
    }
}

static bool is_place(const char *file, int line, const char *other_file, int other_line)
{
    return line == other_line && (file == other_file || !strcmp(file, other_file));
}

int barrier(bool predicate, int *n_threads, const char *file, int line)
{
    fiber *me = current();
    if (!now->barrier_file) {
        now->barrier_file = file;
        now->barrier_line = line;
    }
    if (!is_place(file, line, now->barrier_file, now->barrier_line))
        mistake(file, line, "this barrier meets another one, of %s:%d", now->barrier_file,
                now->barrier_line);
    warp *w = &now->warps[me->warp];
    w->file[me->lane] = file;
    w->line[me->lane] = line;
    w->at_barrier |= 1u << me->lane;
    now->n_true += predicate;
    if (++now->n_arrived == now->n_live)
        open_barrier();
    rest();
    if (n_threads)
        *n_threads = now->barrier_live;
    return now->barrier_true;
}

/* Are all lanes of the lane's mask here for the same? */
static bool all_met(const warp *w, int lane)
{
    const uint32_t mask = w->mask[lane];
    if (mask & w->returned)
        mistake(w->file[lane], w->line[lane], "waits for lanes %08x, which have returned",
                mask & w->returned);
    if ((w->meeting & mask) != mask)
        return false;
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1))
            continue;
        if (w->mask[i] != mask)
            return false;
        if (w->what[i] != w->what[lane] || w->line[i] != w->line[lane])
            mistake(w->file[lane], w->line[lane], "meets another warp operation, of %s:%d",
                    w->file[i], w->line[i]);
    }
    return true;
}

void meet(uint32_t mask, void *arguments, combine *what, const char *file, int line)
{
    const fiber *me = current();
    const int lane = me->lane;
    warp *w = &now->warps[me->warp];
    if (!(mask >> lane & 1))
        mistake(file, line, "lane %d is not in its own mask %08x", lane, mask);
    w->mask[lane] = mask;
    w->arguments[lane] = arguments;
    w->what[lane] = what;
    w->file[lane] = file;
    w->line[lane] = line;
    w->meeting |= 1u << lane;
    if (all_met(w, lane)) {
        what(w->arguments, mask);
        w->meeting &= ~mask;
        make_ready(now, me->warp, mask);
    }
    rest();
}

/* ---- clusters ---- */

static void show(void);

static void need_cluster(const char *file, int line)
{
    if (!running->cluster)
        mistake(file, line, "the kernel was launched without clusters");
}

int rank_in_cluster(const char *file, int line)
{
    need_cluster(file, line);
    return (int)(now - blocks);
}

void *peer(const void *shared, int rank, const char *file, int line)
{
    need_cluster(file, line);
    const ptrdiff_t offset = (const unsigned char *)shared - dynamic_shared;
    if (offset < 0 || (size_t)offset > running->shared_bytes)
        mistake(file, line, "cluster_peer of %p, which is not dynamic shared memory (at %p)",
                shared, (void *)dynamic_shared);
    if (rank < 0 || rank >= n_blocks)
        mistake(file, line, "cluster_peer in block %d of a cluster of %d", rank, n_blocks);
    return blocks[rank].shared + offset;
}

static void open_cluster_barrier(void)
{
    cluster_round++;
    cluster_arrived = 0;
    bool has_waited = false;
    for (block *b = blocks; b < blocks + n_blocks; b++) {
        has_waited |= b->has_waited;
        for (int w = 0; w < n_warps; w++) {
            uint32_t lanes = b->warps[w].at_cluster;
            b->warps[w].at_cluster = 0;
            make_ready(b, w, lanes);
        }
    }
    if (!has_waited)
        return;
    for (block *b = blocks; b < blocks + n_blocks; b++)
        b->has_waited = true; /* for the one that did */
    show();
}

void arrive_in_cluster(const char *file, int line)
{
    need_cluster(file, line);
    fiber *me = current();
    warp *w = &now->warps[me->warp];
    if (me->arrived)
        mistake(file, line, "arrives at the cluster's barrier twice without waiting");
    if (!w->arrive_file || w->arrive_round != cluster_round) {
        w->arrive_file = file;
        w->arrive_line = line;
        w->arrive_round = cluster_round;
    }
    if (!is_place(file, line, w->arrive_file, w->arrive_line))
        mistake(file, line, "another lane of the warp arrives for the same at %s:%d",
                w->arrive_file, w->arrive_line);
    me->arrived = true;
    me->arrived_round = cluster_round;
    if (++cluster_arrived == cluster_live)
        open_cluster_barrier();
}

void wait_in_cluster(const char *file, int line)
{
    need_cluster(file, line);
    fiber *me = current();
    warp *w = &now->warps[me->warp];
    if (!me->arrived)
        mistake(file, line, "waits for the cluster without having arrived");
    if (me->arrived_round == cluster_round) {
        if (w->at_cluster) {
            const int other = __builtin_ctz(w->at_cluster);
            if (!is_place(file, line, w->file[other], w->line[other]))
                mistake(file, line, "another lane of the warp waits for the same at %s:%d",
                        w->file[other], w->line[other]);
        }
        w->file[me->lane] = file;
        w->line[me->lane] = line;
        w->at_cluster |= 1u << me->lane;
        rest();
    }
    me->arrived = false;
}

/* Threads that have returned are not waited for, whether they had arrived or not. */
static void leave_cluster(const fiber *me)
{
    cluster_live--;
    if (me->arrived && me->arrived_round == cluster_round)
        cluster_arrived--;
    if (cluster_arrived && cluster_arrived == cluster_live)
        open_cluster_barrier();
}

/* ---- shared memory ---- */

/* The program's thread-local variables: the __shared__ ones, and the host's own, which are put
 * back when a kernel has ended. */
struct area {
    unsigned char *start;
    size_t n_bytes;
};

static int find_area(struct dl_phdr_info *info, size_t, void *data)
{
    area *found = (area *)data;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
            found->start = (unsigned char *)info->dlpi_tls_data;
            found->n_bytes = info->dlpi_phdr[i].p_memsz;
        }
    }
    return 1; /* the first object is the program */
}

static area static_shared;

static void restore_host_variables(void)
{
    if (!host_variables.empty())
        memcpy(static_shared.start, host_variables.data(), host_variables.size());
    host_variables.clear();
}

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Dynamic shared memory ends where a page that cannot be touched begins. */
static void place_shared(block *b, size_t n_bytes)
{
    if (!b->shared_end) {
        unsigned char *p =
            (unsigned char *)mmap(nullptr, SHARED_PAGES + BEYOND_BYTES, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + SHARED_PAGES, BEYOND_BYTES, PROT_NONE)) {
            perror("emulate: shared memory");
            abort();
        }
        b->shared_end = p + SHARED_PAGES;
    }
    b->shared = b->shared_end - round_up(n_bytes, 128);
}

/* Peers must not touch the memory of a block before it has begun and after it has ended. */
static void close_shared(block *b, bool closed)
{
    if (b->is_closed != closed && mprotect(b->shared_end - SHARED_PAGES, SHARED_PAGES,
                                           closed ? PROT_NONE : PROT_READ | PROT_WRITE)) {
        perror("emulate: shared memory");
        abort();
    }
    b->is_closed = closed;
}

static void poison_shared(void)
{
    const size_t n = running->shared_bytes;
    memset(dynamic_shared - 128, POISON, 128);
    memset(dynamic_shared, POISON, n);
    memset(dynamic_shared + n, POISON, (size_t)(now->shared_end - dynamic_shared) - n);
    memset(static_shared.start, POISON, static_shared.n_bytes);
}

/* Is all around it still as it was? NaN: reading there shows too. */
static void check_shared(void)
{
    const unsigned char *end = dynamic_shared + running->shared_bytes;
    self = nullptr;
    for (const unsigned char *p = end; p < now->shared_end; p++)
        if (*p != POISON)
            mistake("emulate", 0, "dynamic shared memory was written at offset %zu",
                    (size_t)(p - dynamic_shared));
    for (const unsigned char *p = dynamic_shared - 128; p < dynamic_shared; p++)
        if (*p != POISON)
            mistake("emulate", 0, "dynamic shared memory was written at offset -%zu",
                    (size_t)(dynamic_shared - p));
}

bool is_shared(const void *pointer, size_t n)
{
    auto p = (const unsigned char *)pointer;
    return (p >= dynamic_shared && p + n <= dynamic_shared + running->shared_bytes) ||
           (p >= static_shared.start && p + n <= static_shared.start + static_shared.n_bytes);
}

/* ---- copies in the background ---- */

static background *copies_of_thread(void)
{
    return &now->backgrounds[current() - now->fibers];
}

void copy_16(void *shared, const void *global, bool valid, const char *file, int line)
{
    if ((uintptr_t)shared % 16 || (valid && (uintptr_t)global % 16))
        mistake(file, line, "copy_async_16 from %p to %p, not aligned to 16", global, shared);
    if (!is_shared(shared, 16))
        mistake(file, line, "copy_async_16 to %p, which is not shared memory (dynamic: %p)", shared,
                (void *)dynamic_shared);
    background *me = copies_of_thread();
    if (me->n_copies == MAX_COPIES)
        mistake(file, line, "more than %d copies in flight", MAX_COPIES);
    me->copies[me->n_copies++] = {(unsigned char *)shared, global, valid};
    memset(shared, POISON, 16);
}

void commit_copies(void)
{
    background *me = copies_of_thread();
    if (me->n_groups == MAX_COPIES)
        mistake("emulate", 0, "more than %d groups of copies in flight", MAX_COPIES);
    me->groups[me->n_groups++] = me->n_copies;
}

void wait_copies(int n_left)
{
    background *me = copies_of_thread();
    const int n_groups = me->n_groups - n_left;
    if (n_groups <= 0)
        return;
    const int n = me->groups[n_groups - 1];
    for (int i = 0; i < n; i++) {
        const copy *c = &me->copies[i];
        if (c->valid)
            memcpy(c->to, c->from, 16);
        else
            memset(c->to, 0, 16);
    }
    me->n_copies -= n;
    me->n_groups -= n_groups;
    memmove(me->copies, me->copies + n, (size_t)me->n_copies * sizeof(*me->copies));
    for (int i = 0; i < me->n_groups; i++)
        me->groups[i] = me->groups[n_groups + i] - n;
}

enum : uint64_t { BULK_DONE = (uint64_t)1 << 63 }; /* in a barrier; else the bytes to come */

void begin_bulk(uint64_t *barrier, uint32_t n_bytes, const char *file, int line)
{
    if ((uintptr_t)barrier % 8 || !is_shared(barrier, 8))
        mistake(file, line, "bulk_begin of %p, which is not 8 aligned bytes of shared memory",
                (void *)barrier);
    *barrier = n_bytes;
}

/* Lanes that wait for bytes that nobody had asked for or sent. */
static void rest_receiving(const char *file, int line)
{
    const int lane = current()->lane;
    warp *w = &now->warps[current()->warp];
    w->file[lane] = file;
    w->line[lane] = line;
    w->receiving |= 1u << lane;
    rest();
}

static void wake_receiving(block *b)
{
    for (int w = 0; w < n_warps; w++) {
        const uint32_t lanes = b->warps[w].receiving;
        b->warps[w].receiving = 0;
        make_ready(b, w, lanes);
    }
}

void copy_bulk(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier,
               const char *file, int line)
{
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || n_bytes % 16)
        mistake(file, line, "bulk_copy of %u bytes from %p to %p, not multiples of 16", n_bytes,
                global, shared);
    if (!is_shared(shared, n_bytes))
        mistake(file, line, "bulk_copy to %p, which is not shared memory (dynamic: %p)", shared,
                (void *)dynamic_shared);
    if (now->bulks.size() == MAX_BULKS)
        mistake(file, line, "more than %d bulk copies in flight", MAX_BULKS);
    now->bulks.push_back({(unsigned char *)shared, global, n_bytes, barrier});
    memset(shared, POISON, n_bytes);
    wake_receiving(now);
}

void wait_bulk(uint64_t *barrier, const char *file, int line)
{
    uint64_t n_bytes = 0;
    for (;;) {
        if (*barrier == BULK_DONE)
            return;
        n_bytes = 0;
        for (const bulk &b : now->bulks)
            n_bytes += b.barrier == barrier ? b.n_bytes : 0;
        if (n_bytes >= *barrier)
            break;
        rest_receiving(file, line);
    }
    if (n_bytes != *barrier)
        mistake(file, line, "bulk_wait for %llu bytes, of which %llu were asked for",
                (unsigned long long)*barrier, (unsigned long long)n_bytes);
    for (const bulk &b : now->bulks)
        if (b.barrier == barrier)
            memcpy(b.to, b.from, b.n_bytes);
    size_t n_left = 0;
    for (const bulk &b : now->bulks)
        if (b.barrier != barrier)
            now->bulks[n_left++] = b;
    now->bulks.resize(n_left);
    *barrier = BULK_DONE;
}

/* ---- mbarriers and boxes of matrices ---- */

void begin_phases(uint64_t *barrier, int n, const char *file, int line)
{
    if ((uintptr_t)barrier % 8 || !is_shared(barrier, 8))
        mistake(file, line, "mbarrier_begin of %p, which is not 8 aligned bytes of shared memory",
                (void *)barrier);
    if (now->mbarriers.size() == MAX_BULKS)
        mistake(file, line, "more than %d mbarriers", MAX_BULKS);
    now->mbarriers.push_back({barrier, n, n, 0, 0});
}

static phases *find_phases(block *b, const uint64_t *barrier, const char *file, int line)
{
    for (phases &p : b->mbarriers)
        if (p.barrier == barrier)
            return &p;
    mistake(file, line, "an mbarrier at %p that has not begun", (const void *)barrier);
}

/* A row of 64 values to shared memory; pieces of 16 bytes change places. */
static void copy_line(unsigned char *to, const box *b, const uint32_t *in_box, unsigned row)
{
    const matrix *m = &b->from;
    const unsigned char *from = m->base;
    bool inside = true;
    for (int i = 1; i < m->n; i++) {
        const uint64_t at = (uint64_t)(b->at[i] + (int64_t)in_box[i]);
        inside = inside && at < m->dims[i];
        from += at * m->strides[i];
    }
    for (unsigned i = 0; i < 64; i++) {
        const uint64_t at = (uint64_t)b->at[0] + i;
        unsigned char *value = to + (i / 8 ^ row % 8) * 16 + i % 8 * 2;
        if (inside && at < m->dims[0])
            memcpy(value, from + 2 * at, 2);
        else
            memset(value, 0, 2);
    }
}

static unsigned n_lines(const matrix *m)
{
    unsigned n = 1;
    for (int i = 1; i < m->n; i++)
        n *= m->box[i];
    return n;
}

static void copy_lines(const box *b)
{
    uint32_t in_box[5] = {};
    for (unsigned row = 0; row < n_lines(&b->from); row++) {
        copy_line(b->to + row * 128, b, in_box, row);
        for (int i = 1; i < b->from.n && ++in_box[i] == b->from.box[i]; i++)
            in_box[i] = 0;
    }
}

/* The phase ends where nothing is missing: its copies are there. */
static void end_phase(block *b, phases *p)
{
    if (p->n_left || p->bytes)
        return;
    size_t n_left = 0;
    for (const box &one : b->boxes) {
        if (one.barrier == p->barrier)
            copy_lines(&one);
        else
            b->boxes[n_left++] = one;
    }
    b->boxes.resize(n_left);
    p->n_left = p->n;
    p->phase++;
    wake_receiving(b);
}

static void arrive_at(block *b, phases *p, const char *file, int line)
{
    if (!p->n_left)
        mistake(file, line, "more than the %d that an mbarrier counts arrive in a phase", p->n);
    p->n_left--;
    end_phase(b, p);
}

void expect(uint64_t *barrier, uint32_t n_bytes, const char *file, int line)
{
    phases *p = find_phases(now, barrier, file, line);
    p->bytes += n_bytes;
    arrive_at(now, p, file, line);
}

void arrive(uint64_t *barrier, int rank, const char *file, int line)
{
    auto there = (const uint64_t *)peer(barrier, rank, file, line);
    block *b = &blocks[rank];
    arrive_at(b, find_phases(b, there, file, line), file, line);
}

void wait_phase(uint64_t *barrier, uint32_t parity, const char *file, int line)
{
    while (find_phases(now, barrier, file, line)->phase % 2 == parity)
        rest_receiving(file, line);
}

/* To the blocks of a cluster whose bits are set; 0: to the block itself. */
void copy_box(void *shared, const matrix *m, const int (&at)[5], uint64_t *barrier, int to_blocks,
              const char *file, int line)
{
    const uint32_t n_bytes = n_lines(m) * 128;
    if ((uintptr_t)shared % 1024 || !is_shared(shared, n_bytes))
        mistake(file, line, "tensor_copy of %u bytes to %p, not 1,024-byte aligned shared memory",
                n_bytes, shared);
    const int own = 1 << (int)(now - blocks);
    for (int rank = 0; rank < n_blocks; rank++) {
        if (!((to_blocks ? to_blocks : own) >> rank & 1))
            continue;
        block *b = &blocks[rank];
        const bool is_own = b == now;
        auto to = (unsigned char *)(is_own ? shared : peer(shared, rank, file, line));
        auto count = (uint64_t *)(is_own ? barrier : peer(barrier, rank, file, line));
        phases *p = find_phases(b, count, file, line);
        if (b->boxes.size() == MAX_BULKS)
            mistake(file, line, "more than %d boxes on their way to a block", MAX_BULKS);
        b->boxes.push_back({to, *m, {at[0], at[1], at[2], at[3], at[4]}, count});
        memset(to, POISON, n_bytes);
        p->bytes -= n_bytes;
        end_phase(b, p);
    }
}

/* What is sent to a barrier: the bytes so far are in its upper half. */
static uint32_t bytes_sent(const uint64_t *barrier)
{
    return (uint32_t)(*barrier >> 32);
}

void send(void *shared, const void *value, size_t n_bytes, int rank, uint64_t *barrier,
          const char *file, int line)
{
    auto to = (unsigned char *)peer(shared, rank, file, line);
    auto count = (uint64_t *)peer(barrier, rank, file, line);
    block *b = &blocks[rank];
    if ((n_bytes != 4 && n_bytes != 8 && n_bytes != 16) || (uintptr_t)to % n_bytes)
        mistake(file, line, "cluster_send of %zu bytes to %p", n_bytes, (void *)to);
    if (*count & BULK_DONE) /* also of a barrier that has not begun */
        mistake(file, line, "cluster_send to a barrier of block %d that waits for nothing", rank);
    if (b->sent.size() == MAX_SENT)
        mistake(file, line, "more than %d values sent to block %d", MAX_SENT, rank);
    message one = {to, {}, (uint32_t)n_bytes, count};
    memcpy(one.value, value, n_bytes);
    b->sent.push_back(one);
    memset(to, POISON, n_bytes);
    *count += (uint64_t)n_bytes << 32;
    if (bytes_sent(count) > (uint32_t)*count)
        mistake(file, line, "cluster_send of more than the %u bytes that block %d waits for",
                (uint32_t)*count, rank);
    if (bytes_sent(count) < (uint32_t)*count)
        return;
    wake_receiving(b);
}

void receive(uint64_t *barrier, const char *file, int line)
{
    need_cluster(file, line);
    while (*barrier != BULK_DONE && bytes_sent(barrier) < (uint32_t)*barrier)
        rest_receiving(file, line);
    if (*barrier == BULK_DONE)
        return;
    size_t n_left = 0;
    for (const message &one : now->sent) {
        if (one.barrier == barrier)
            memcpy(one.to, one.value, one.n_bytes);
        else
            now->sent[n_left++] = one;
    }
    now->sent.resize(n_left);
    *barrier = BULK_DONE;
}

/* ---- what earlier kernels wrote ---- */

static const std::vector<range> *hidden;
static std::vector<unsigned char> hidden_bytes; /* of all ranges, one behind the other */
static bool is_hidden;

static void hide(void)
{
    size_t n = 0;
    for (const range &r : *hidden) {
        memcpy(hidden_bytes.data() + n, r.start, r.n_bytes);
        memset(r.start, POISON, r.n_bytes);
        n += r.n_bytes;
    }
    is_hidden = n > 0;
}

static void show(void)
{
    size_t n = 0;
    if (!is_hidden)
        return;
    for (const range &r : *hidden) {
        for (size_t i = 0; i < r.n_bytes; i++)
            if (r.start[i] != POISON)
                mistake("emulate", 0, "%p was written before pdl_wait", (void *)(r.start + i));
        memcpy(r.start, hidden_bytes.data() + n, r.n_bytes);
        n += r.n_bytes;
    }
    is_hidden = false;
}

void waited(void)
{
    any_waited = now->has_waited = true;
    show();
}

/* ---- matrices ---- */

struct product {
    float *d;
    const uint32_t *a, *b;
};

/* The fragments as instructions.cuh has them. */
static void multiply(void **arguments, uint32_t)
{
    auto all = reinterpret_cast<product **>(arguments);
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const product *p = all[lane];
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            const int row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
            a[row][column] = bf16_value(p->a[i] & 0xffff);
            a[row][column + 1] = bf16_value(p->a[i] >> 16);
        }
        for (int i = 0; i < 2; i++) {
            b[2 * t + 8 * i][g] = bf16_value(p->b[i] & 0xffff);
            b[2 * t + 8 * i + 1][g] = bf16_value(p->b[i] >> 16);
        }
    }
    float sums[16][8] = {};
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++)
                sums[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            all[lane]->d[i] += sums[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
}

void mma_bf16(float *d, const uint32_t *a, const uint32_t *b, const char *file, int line)
{
    product mine = {d, a, b};
    meet(0xffffffffu, &mine, multiply, file, line);
}

/* Where a value of a row of 64 lies, whose 16-byte pieces have changed places. */
static const __nv_bfloat16 *place_of(const __nv_bfloat16 *rows, int row, int column)
{
    return rows + row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8;
}

static float unpacked(const __nv_bfloat16 *rows, int row, int column)
{
    return __bfloat162float(*place_of(rows, row, column));
}

void wgmma(float *d, const __nv_bfloat16 *a, const __nv_bfloat16 *b, int n, int column,
           const char *file, int line)
{
    if ((uintptr_t)a % 1024 || (uintptr_t)b % 1024 || !is_shared(a, 64 * 128) ||
        !is_shared(b, (size_t)n * 128) || column % 16 || column < 0 || column >= 64)
        mistake(file, line, "wgmma of %p and %p, %d rows, column %d: not 1,024-byte aligned tiles",
                (const void *)a, (const void *)b, n, column);
    meet(
        0xffffffffu, nullptr, [](void **, uint32_t) {}, file, line);
    const int row0 = (int)self->index.x / 32 % 4 * 16 + self->lane / 4;
    for (int tile = 0; tile < n / 8; tile++)
        for (int j = 0; j < 4; j++) {
            const int row = row0 + j / 2 * 8, out = 8 * tile + self->lane % 4 * 2 + j % 2;
            float sum = 0;
            for (int k = column; k < column + 16; k++)
                sum = fmaf(unpacked(a, row, k), unpacked(b, out, k), sum);
            d[4 * tile + j] += sum;
        }
}

/* The warp's 16 rows are in its lanes' registers, as mma_bf16 has them. */
void wgmma_rows(float *d, const uint32_t *a, const __nv_bfloat16 *b, int n, int column,
                const char *file, int line)
{
    if ((uintptr_t)b % 1024 || !is_shared(b, (size_t)n * 128) || column % 16 || column < 0 ||
        column >= 64)
        mistake(file, line, "wgmma of %p, %d rows, column %d: not 1,024-byte aligned tiles",
                (const void *)b, n, column);
    const int g = self->lane / 4, t = self->lane % 4;
    for (int tile = 0; tile < n / 8; tile++) {
        uint32_t pair[2];
        for (int i = 0; i < 2; i++)
            memcpy(pair + i, place_of(b, 8 * tile + g, column + 8 * i + 2 * t), sizeof(*pair));
        mma_bf16(d + 4 * tile, a, pair, file, line);
    }
}

void discard(void *line_of_memory, const char *file, int line)
{
    if ((uintptr_t)line_of_memory % 128 || is_shared(line_of_memory, 128))
        mistake(file, line, "discard_line of %p, not an aligned line of global memory",
                line_of_memory);
    memset(line_of_memory, POISON, 128);
}

void meet_warpgroup(const char *file, int line)
{
    warpgroup *group = &now->warpgroups[current()->warp / 4];
    const uint32_t round = group->round;
    if (++group->n_there == 4 * 32) {
        group->n_there = 0;
        group->round++;
        wake_receiving(now);
    }
    while (group->round == round)
        rest_receiving(file, line);
}

struct load {
    uint32_t *out;
    const void *row;
    int n;
    bool transposed;
};

static void load_matrices(void **arguments, uint32_t)
{
    auto all = reinterpret_cast<load **>(arguments);
    for (int i = 0; i < all[0]->n; i++) {
        uint16_t matrix[8][8];
        for (int j = 0; j < 8; j++)
            memcpy(matrix[j], all[8 * i + j]->row, 16);
        for (int lane = 0; lane < 32; lane++) {
            const int row = lane / 4, column = 2 * (lane % 4);
            uint32_t low = matrix[row][column], high = matrix[row][column + 1];
            if (all[lane]->transposed) {
                low = matrix[column][row];
                high = matrix[column + 1][row];
            }
            all[lane]->out[i] = low | high << 16;
        }
    }
}

void ldmatrix(uint32_t *out, const void *row, int n, bool transposed, const char *file, int line)
{
    load mine = {out, row, n, transposed};
    if (self->lane < 8 * n) { /* the other lanes' addresses are not used */
        if ((uintptr_t)row % 16)
            mistake(file, line, "ldmatrix row at %p, not aligned to 16", row);
        if (!is_shared(row, 16))
            mistake(file, line, "ldmatrix row at %p, which is not shared memory", row);
    }
    meet(0xffffffffu, &mine, load_matrices, file, line);
}

/* ---- blocks ---- */

static void end_block(void);

static void fiber_main(void)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    running->body();
    fiber *me = current();
    now->warps[me->warp].returned |= 1u << me->lane;
    now->n_live--;
    leave_cluster(me);
    if (now->n_live && now->n_arrived == now->n_live)
        open_barrier();
    if (!now->n_live)
        end_block();
    if (!cluster_live)
        change(&me->registers, &host, true);
    fiber *next = take_next(me->warp);
    self = next;
    change(&me->registers, &next->registers, true);
    abort(); /* nobody comes back */
}

static void start_fibers(void)
{
    const int n = running->block;
    now->n_arrived = now->n_true = 0;
    now->barrier_file = nullptr;
    for (int i = 0; i < n; i++) {
        fiber *f = &now->fibers[i];
        f->index = {(unsigned)i, 0, 0};
        f->lane = i % 32;
        f->warp = i / 32;
        f->arrived = false;
        start(f);
    }
    for (int i = 0; i < n_warps; i++) {
        const int n_lanes = n - i * 32;
        warp *w = &now->warps[i];
        w->ready = w->meeting = w->at_barrier = w->at_cluster = w->receiving = w->returned = 0;
        w->arrive_file = nullptr;
        make_ready(now, i, n_lanes >= 32 ? 0xffffffffu : (1u << n_lanes) - 1);
    }
}

static void enter_block(block *b)
{
    now = b;
    dynamic_shared = b->shared;
    block_index = b->index;
    if (b->has_begun) {
        memcpy(static_shared.start, b->variables.data(), static_shared.n_bytes);
    } else {
        b->has_begun = true;
        close_shared(b, false);
        poison_shared();
        start_fibers();
    }
    if (cluster_hides && !b->has_waited)
        hide();
}

static void end_block(void)
{
    check_shared();
    if (!now->sent.empty())
        mistake("emulate", 0, "a block has ended that had not received what was sent to it");
    if (!now->boxes.empty())
        mistake("emulate", 0, "a block has ended before what is copied to it has come");
    show();
    if (n_blocks > 1)
        close_shared(now, true);
}

/* No thread of this block can run: one of the cluster that can takes over. */
static void change_block(void)
{
    uint32_t ready = 0;
    for (int i = 0; i < n_blocks; i++)
        if (!blocks[i].has_begun || blocks[i].ready_warps)
            ready |= 1u << i;
    if (!ready)
        deadlock();
    show();
    if (now->n_live)
        now->variables.assign(static_shared.start, static_shared.start + static_shared.n_bytes);
    enter_block(&blocks[pick(ready)]);
}

/* `first` is the number of its first block in the grid. */
static void run_cluster(uint64_t first, bool hides)
{
    for (int i = 0; i < n_blocks; i++) {
        const uint64_t number = first + (unsigned)i;
        block *b = &blocks[i];
        b->index.x = (unsigned)(number % grid_dim.x);
        b->index.y = (unsigned)(number / grid_dim.x % grid_dim.y);
        b->index.z = (unsigned)(number / grid_dim.x / grid_dim.y);
        b->has_begun = b->has_waited = false;
        b->ready_warps = 0;
        memset(b->warpgroups, 0, sizeof(b->warpgroups));
        b->mbarriers.clear();
        b->boxes.clear();
        b->bulks.clear();
        b->sent.clear();
        b->n_live = running->block;
        close_shared(b, n_blocks > 1);
    }
    cluster_live = n_blocks * running->block;
    cluster_arrived = 0;
    cluster_hides = hides;
    enter_block(&blocks[n_blocks > 1 ? pick((1u << n_blocks) - 1) : 0]);
    fiber *next = take_next(order == 1 ? n_warps - 1 : 0);
    self = next;
    change(&host, &next->registers, false);
}

#if defined(__SANITIZE_ADDRESS__)
static void find_host_stack(void)
{
    pthread_attr_t attributes;
    void *bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &host.n_bytes);
    pthread_attr_destroy(&attributes);
    host.bottom = bottom;
}
#else
static void find_host_stack(void)
{
}
#endif

static void choose_order(long number)
{
    const char *fixed = getenv("LATTE_EMULATE_ORDER");
    order = fixed ? atol(fixed) : number % 3 < 2 ? number % 3 : number;
    random_state = (uint32_t)order * 2654435761u | 1;
}

void run(const kernel_run &launch, long number, const std::vector<range> &ranges)
{
    size_t n_hidden = 0;
    running = &launch;
    hidden = &ranges;
    for (const range &r : ranges)
        n_hidden += r.n_bytes;
    hidden_bytes.resize(n_hidden);
    grid_dim = launch.grid;
    block_dim = dim3((unsigned)launch.block);
    any_waited = false;
    choose_order(number);
    find_host_stack();
    static_shared = {};
    dl_iterate_phdr(find_area, &static_shared);
    host_variables.assign(static_shared.start, static_shared.start + static_shared.n_bytes);
    for (int i = 0; i < MAX_CLUSTER; i++) { /* later malloc's own variables may be poisoned */
        blocks[i].variables.reserve(static_shared.n_bytes);
        blocks[i].mbarriers.reserve(MAX_BULKS);
        blocks[i].boxes.reserve(MAX_BULKS);
        blocks[i].bulks.reserve(MAX_BULKS);
        blocks[i].sent.reserve(MAX_SENT);
    }
    n_warps = (launch.block + 31) / 32;
    n_blocks = launch.cluster ? launch.cluster : 1;
    for (int i = 0; i < n_blocks; i++)
        place_shared(&blocks[i], launch.shared_bytes);
    catch_signals(true);

    /* Clusters are along x, of which grid.x has a whole number. */
    const uint64_t n = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z / (unsigned)n_blocks;
    for (uint64_t i = 0; i < n; i++) {
        const uint64_t c = order == 1 ? n - 1 - i : i;
        run_cluster(c * (unsigned)n_blocks, i % (n / 4 + 1) == 0); /* the same code in all */
    }
    catch_signals(false);
    restore_host_variables();
    if (!any_waited)
        mistake("emulate", 0, "no thread of the kernel called pdl_wait");
    running = nullptr;
}

} // namespace emulate

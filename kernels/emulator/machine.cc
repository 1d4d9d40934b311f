// Fibers, the scheduler and launches; see machine.h. Linux on x86-64.
#include "state.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <link.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <unistd.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Dynamic shared memory, by all the names that kernels give it: `extern __shared__` is thread-local here, and each block of
// a cluster is an OS thread. 1024 bytes behind its end stay free.
#define NAME(N) ".globl " #N "\n" #N ":\n"
asm(".section .tbss,\"awT\",@nobits\n.p2align 10\n" NAME(emulator_dynamic) NAME(shared) NAME(dynamic_shared)
        NAME(_ZN8backward14dynamic_sharedE) ".zero 232448\n.zero 1024\n.text\n");
extern __thread u8 emulator_dynamic[emulator::MOST_SHARED];
static_assert(emulator::MOST_SHARED == 232448);

namespace emulator {

u32 shared_skew = 0;
std::vector<std::unique_ptr<Block>> blocks;
Block* block;
Fiber* fiber;
const Launch* configuration;
static const std::function<void()>* thread_body;
u64 rounds;
static u64 idle_rounds;
static bool ended; // whether a copy has, since a thread last ran

u32 thread_rank() { return fiber->rank; }
u32 lane() { return fiber->rank % 32; }
u32 cluster_rank() { return block->rank; }
u32 cluster_size() { return (u32)blocks.size(); }

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
u32 random_u32() {
    constexpr u64 STEP = 0x9E3779B97F4A7C15ull;
    static u64 state = [] {
        const char* seed = getenv("EMULATOR_SEED");
        return (seed ? strtoull(seed, nullptr, 0) : 1) * STEP;
    }();
    u64 z = state += STEP;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return (u32)(z >> 32);
}

// ---- Errors ----
static void print_threads() {
    for (auto& b : blocks) {
        fprintf(stderr, "block (%u, %u, %u):\n", b->index.x, b->index.y, b->index.z);
        const u32 count = (u32)b->fibers.size();
        for (u32 first = 0, next; first < count; first = next) {
            const Fiber& f = b->fibers[first];
            auto same = [&](const Fiber& other) {
                if (f.alive != other.alive) return false;
                return !f.alive || (f.what == other.what && f.number0 == other.number0 && f.number1 == other.number1);
            };
            for (next = first + 1; next < count && same(b->fibers[next]); next++) {}
            fprintf(stderr, "  threads %u..%u: ", first, next - 1);
            if (!f.alive) fprintf(stderr, "ended\n");
            else fprintf(stderr, "%s (0x%llx, 0x%llx)\n", f.what ? f.what : "running", f.number0, f.number1);
        }
    }
}
void fail(const char* format, ...) {
    fflush(stdout);
    fprintf(stderr, "EMULATOR: ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n  in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
    if (fiber) fprintf(stderr, ", thread %u (warp %u, lane %u)", fiber->rank, fiber->rank / 32, fiber->rank % 32);
    fprintf(stderr, "\n");
    if (getenv("EMULATOR_DUMP")) print_threads();
    _exit(1);
}

// A kernel's access to memory that is nobody's.
static void crashed(int, siginfo_t* info, void* context) {
    const auto instruction = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
    fail("access to memory at %p, outside of an array? By the instruction at %p (addr2line -Cfie PROGRAM says where that is)",
         info->si_addr, (void*)instruction);
}
// In this OS thread.
static void catch_crashes() {
    constexpr size_t SIZE = 64 << 10;
    stack_t stack{};
    stack.ss_sp = malloc(SIZE), stack.ss_size = SIZE; // as long as the thread lives
    sigaltstack(&stack, nullptr);
    struct sigaction action {};
    action.sa_sigaction = crashed;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, nullptr);
    sigaction(SIGBUS, &action, nullptr);
}

// ---- Fibers ----
constexpr size_t STACK = 256 << 10, PAGE = 4096;
// Saves the registers that a function must keep and goes to another stack, where they were saved likewise.
asm(R"(
.text
.globl emulator_switch
emulator_switch: # (void** save, void* load)
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
extern "C" void emulator_switch(void** save, void* load);

// The i-th stack, with a page below it that nobody may touch. They are used again.
static u8* stack(size_t i) {
    static std::vector<u8*> stacks;
    while (stacks.size() <= i) {
        void* p = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED || mprotect(p, PAGE, PROT_NONE)) fail("no memory for stacks");
        stacks.push_back((u8*)p + PAGE);
    }
    return stacks[i];
}
static void to_scheduler() {
    Fiber* me = fiber;
    fiber = nullptr;
    emulator_switch(&me->stack_pointer, block->scheduler);
}
static void fiber_main() {
    (*thread_body)();
    check_all_waited_for();
    fiber->alive = false;
    block->living--;
    leave_barriers();
    to_scheduler();
    abort(); // an ended fiber gets no turn
}
void wait_until(bool (*ready)(void*), void* context, const char* what, u64 number0, u64 number1) {
    if (!fiber) fail("%s outside of a kernel", what);
    if (ready(context)) return;
    Fiber& me = *fiber;
    me.ready = ready, me.context = context, me.what = what, me.number0 = number0, me.number1 = number1;
    to_scheduler();
    me.ready = nullptr, me.what = nullptr;
}

void pause() {
    if (chance(8)) to_scheduler();
}

// ---- The scheduler ----
static void run_fiber(Block& b, Fiber& f) {
    fiber = &f;
    threadIdx = f.index;
    emulator_switch(&b.scheduler, f.stack_pointer);
}
// Gives each warp the turn, or in a `fair` pass leaves none out. Returns whether anyone ran.
static bool pass(Block& b, bool fair) {
    bool any = false;
    const u32 warps = (u32)b.warps.size(), first = random_u32() % warps;
    // Now and then a warp or a warpgroup falls far behind the others.
    if (chance(40)) b.warps[random_u32() % warps].stalled = random_u32() % 200;
    if (chance(80)) {
        const u32 group = random_u32() % warps / 4 * 4, rounds = random_u32() % 200;
        for (u32 w = group; w < std::min(group + 4, warps); w++) b.warps[w].stalled = rounds;
    }
    for (u32 i = 0; i < warps; i++) {
        const u32 w = (first + i) % warps;
        if (!fair && b.warps[w].stalled) {
            b.warps[w].stalled--;
            continue;
        }
        if (!fair && chance(4)) continue;
        const u32 lanes = std::min<u32>(32, (u32)b.fibers.size() - 32 * w);
        const u32 first_lane = random_u32() % lanes;
        for (u32 j = 0; j < lanes; j++) {
            Fiber& f = b.fibers[w * 32 + (first_lane + j) % lanes];
            if (!f.alive || (f.ready && !f.ready(f.context))) continue;
            run_fiber(b, f);
            any = true;
        }
    }
    return any;
}
static void round_of(Block& b) {
    block = &b;
    blockIdx = b.index;
    if (b.living == 0) return;
    rounds++;
    ended |= next_due() <= rounds;
    finish_due(b);
    for (Warp& w : b.warps) finish_some_products(*w.products);
    if (pass(b, false) || pass(b, true)) {
        idle_rounds = 0, ended = false;
        return;
    }
    if (++idle_rounds <= blocks.size()) return;
    // No block can go on before something is done. What has ended meanwhile may be what a block waits for that had its turn before.
    idle_rounds = 0;
    const u64 due = next_due();
    if (due == ~0ull && ended) {
        ended = false;
        return;
    }
    rounds = std::max(rounds, due);
    if (due == ~0ull) {
        fflush(stdout);
        fprintf(stderr, "EMULATOR: deadlock: no thread can run and no copy is under way\n");
        print_threads();
        _exit(1);
    }
}

// ---- Launches ----
// The program's thread-local memory, in this OS thread.
static int find_window(dl_phdr_info* info, size_t, void* to) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
        Block& b = *static_cast<Block*>(to);
        b.window = (u8*)info->dlpi_tls_data;
        b.window_bytes = (u32)info->dlpi_phdr[i].p_memsz;
    }
    return 1; // the program comes first, its libraries do not matter
}
static void prepare(Block& b, uint3 index, u32 rank) {
    const u32 threads = blockDim.x * blockDim.y * blockDim.z, warps = (threads + 31) / 32;
    dl_iterate_phdr(find_window, &b);
    b.dynamic = emulator_dynamic;
    std::memset(b.window, 0xff, b.window_bytes);
    b.written.assign(b.window_bytes / 16 + 1, 0);
    b.index = index, b.rank = rank, b.living = threads;
    for (ThreadBarrier& barrier : b.barriers) barrier = {};
    b.fibers.clear();
    b.fibers.resize(threads);
    b.warps.clear();
    b.warps.resize(warps);
    for (u32 w = 0; w < warps; w++) {
        const u32 lanes = std::min<u32>(32, threads - 32 * w);
        b.warps[w].living = ~0u >> (32 - lanes);
        b.warps[w].products = new_products(rank, w);
    }
    for (u32 i = 0; i < threads; i++) {
        Fiber& f = b.fibers[i];
        f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        f.rank = i, f.alive = true;
        u64* top = (u64*)(stack((size_t)rank * threads + i) + STACK) - 1; // so that rsp % 16 = 8 where fiber_main begins
        *--top = (u64)fiber_main;
        for (int r = 0; r < 6; r++) *--top = 0; // the saved registers
        f.stack_pointer = top;
    }
}
static void finish(Block& b) {
    block = &b;
    blockIdx = b.index;
    for (u32 i = configuration->shared_bytes; i < MOST_SHARED; i++) {
        if (b.dynamic[i] != 0xff)
            fail("something was written at byte %u of %u of dynamic shared memory", i, configuration->shared_bytes);
    }
    check_products_ended(b.warps);
}

// An OS thread that does what it is told.
class Helper {
    sem_t go, done;
    const std::function<void()>* task = nullptr;
    std::thread thread;

public:
    Helper() {
        sem_init(&go, 0, 0), sem_init(&done, 0, 0);
        thread = std::thread([this] {
            catch_crashes();
            for (;;) {
                while (sem_wait(&go)) {}
                if (!task) return;
                (*task)();
                sem_post(&done);
            }
        });
    }
    ~Helper() {
        task = nullptr;
        sem_post(&go);
        thread.join();
    }
    void run(const std::function<void()>& f) {
        task = &f;
        sem_post(&go);
        while (sem_wait(&done)) {}
    }
};

void run_grid(const Launch& launch, const std::function<void()>& thread) {
    static const bool caught = (catch_crashes(), true);
    (void)caught;
    configuration = &launch, thread_body = &thread;
    gridDim = launch.grid, blockDim = launch.block;
    const u32 size = launch.cluster, threads = blockDim.x * blockDim.y * blockDim.z;
    if (size == 0 || gridDim.x % size) fail("a grid of %u blocks in clusters of %u", gridDim.x, size);
    if (launch.shared_bytes > MOST_SHARED)
        fail("%u bytes of shared memory; a block can have %u", launch.shared_bytes, MOST_SHARED);
    if (threads == 0 || threads > 1024) fail("%u threads in a block", threads);
    blocks.clear();
    std::vector<std::unique_ptr<Helper>> helpers; // of all blocks of the cluster but the first, which is this OS thread
    for (u32 r = 0; r < size; r++) {
        blocks.push_back(std::make_unique<Block>());
        if (r > 0) helpers.push_back(std::make_unique<Helper>());
    }
    auto on_each = [&](const std::function<void(Block&, u32)>& task) {
        task(*blocks[0], 0);
        for (u32 r = 1; r < size; r++) helpers[r - 1]->run([&] { task(*blocks[r], r); });
    };
    auto living = [&] { return std::any_of(blocks.begin(), blocks.end(), [](auto& b) { return b->living > 0; }); };
    // One cluster after another.
    const u32 per_row = gridDim.x / size;
    for (u64 c = 0; c < (u64)per_row * gridDim.y * gridDim.z; c++) {
        const u32 x = (u32)(c % per_row) * size, y = (u32)(c / per_row % gridDim.y), z = (u32)(c / per_row / gridDim.y);
        on_each([&](Block& b, u32 r) { prepare(b, {x + r, y, z}, r); });
        prepare_cluster_barrier();
        idle_rounds = 0;
        while (living()) on_each([](Block& b, u32) { round_of(b); });
        if (any_under_way()) fail("a block ends while copies are under way");
        on_each([](Block& b, u32) { finish(b); });
    }
    helpers.clear();
    blocks.clear();
    block = nullptr, configuration = nullptr;
}

} // namespace emulator

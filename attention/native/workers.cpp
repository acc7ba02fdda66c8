// This file has the workers of a memory node, the code that cuts work for them, and the C interface for library.py.
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernel.h"

namespace lamina {
namespace {

constexpr int ABI = 4;              // to be counted up when a call changes its meaning; see library.py
constexpr int SPINS = 4000;         // tens of us, in which the next layer of a step usually comes; then a worker sleeps
constexpr int64_t PART_TILES = 32;  // per part of a long context: merging a part costs less than one of its tiles
constexpr int ROWS_AT_ONCE = 64;    // of several queries: more would not fit into the second-level cache
constexpr int CHUNKS_PER_WORKER = 8;  // at least, so that all workers end at about the same time
constexpr int64_t PAGES_ALONE = 32;   // one worker does these before the others would be awake

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex(std::atomic<uint32_t> &word, int operation, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t *>(&word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

const Kernel *const KERNELS[] = {
#if defined(__x86_64__)
    &avx512bf16_kernel, &avx512_kernel, &avx2_kernel,
#endif
    &portable_kernel};

bool supported(const Kernel &kernel) {
    const std::string name = kernel.name;
#if defined(__x86_64__)
#if LAMINA_EMULATE  // the wide kernels, compiled for a narrower machine, to test their logic on it
    const bool wide = __builtin_cpu_supports("avx2"), bfloat16 = wide;
#else
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bfloat16 = wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    if (name == "avx512bf16") return bfloat16;
    if (name == "avx512") return wide;
    if (name == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return name == "portable";
}

// The workers are N - 1 threads, each pinned to a processor if some are given, and the calling thread, whose affinity
// stays as it is. Work is numbered, and the workers take it in the order of the numbers.
class Workers {
  public:
    Workers(const Kernel &kernel, int threads, const int *cpus, int cpu_count) : kernel(kernel), scratch_(threads) {
        threads_.reserve(threads);
        for (auto &scratch : scratch_) scratch.reset(new (std::align_val_t(64)) Scratch);
        for (int i = 1; i < threads; ++i) {
            pthread_attr_t attributes;
            pthread_attr_init(&attributes);
            if (cpu_count) {
                cpu_set_t set;
                CPU_ZERO(&set);
                CPU_SET(cpus[i % cpu_count], &set);
                pthread_attr_setaffinity_np(&attributes, sizeof set, &set);
            }
            pthread_t thread;
            auto start = std::make_unique<Start>(Start{this, i});
            const int failed = pthread_create(&thread, &attributes, enter, start.get());
            pthread_attr_destroy(&attributes);
            if (failed) break;
            start.release();  // it belongs to the thread now
            threads_.push_back(thread);
        }
    }

    ~Workers() {
        stopping_ = true;
        begin();
        for (pthread_t thread : threads_) pthread_join(thread, nullptr);
    }

    bool complete() const { return threads_.size() + 1 == scratch_.size(); }
    int threads() const { return int(scratch_.size()); }

    // Call f(number, scratch) for every number below `count`, and return when all calls are done. The other threads
    // help unless `alone` is set. A thread that has not begun when all work is taken is not waited for, because its
    // processor may be busy with something else.
    template <class Function>
    void run(int64_t count, bool alone, Function f) {
        if (!count) return;
        if (alone || threads_.empty() || count == 1) {
            for (int64_t i = 0; i < count; ++i) f(i, *scratch_[0]);
            return;
        }
        next_ = 0, count_ = count;
        work_ = [&](int64_t i, Scratch &scratch) { f(i, scratch); };
        helpers_.fetch_and(~CLOSED, std::memory_order_release);
        begin();
        take(*scratch_[0]);
        helpers_.fetch_or(CLOSED, std::memory_order_relaxed);
        for (int spins = 0;;) {
            const uint32_t left = helpers_.load(std::memory_order_acquire);
            if (left == CLOSED) return;
            if (++spins < SPINS)
                relax();
            else
                futex(helpers_, FUTEX_WAIT, left);
        }
    }

    const Kernel &kernel;
    std::vector<Chunk> chunks;
    std::vector<Piece> pieces;
    std::vector<float> states;
    std::vector<int32_t> ready;
    std::atomic<uint64_t> sum{0};

  private:
    struct Start {
        Workers *workers;
        int index;
    };
    struct Release {
        void operator()(Scratch *scratch) const { operator delete(scratch, std::align_val_t(64)); }
    };

    static void *enter(void *argument) {
        std::unique_ptr<Start> start(static_cast<Start *>(argument));
        start->workers->work(start->index);
        return nullptr;
    }

    void begin() {
        generation_.fetch_add(1);
        if (sleepers_.load()) futex(generation_, FUTEX_WAKE, 1 << 30);
    }

    void work(int index) {
        for (uint32_t seen = 0;;) {
            for (int spins = 0; generation_.load() == seen;) {
                if (++spins < SPINS) {
                    relax();
                    continue;
                }
                sleepers_.fetch_add(1);
                futex(generation_, FUTEX_WAIT, seen);
                sleepers_.fetch_sub(1);
            }
            seen = generation_.load();
            if (stopping_) return;
            if (!(helpers_.fetch_add(1, std::memory_order_acquire) & CLOSED)) take(*scratch_[index]);
            if (helpers_.fetch_sub(1, std::memory_order_release) == (CLOSED | 1)) futex(helpers_, FUTEX_WAKE, 1);
        }
    }

    void take(Scratch &scratch) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work_(i, scratch);
    }

    std::vector<std::unique_ptr<Scratch, Release>> scratch_;
    std::vector<pthread_t> threads_;
    std::function<void(int64_t, Scratch &)> work_;
    static constexpr uint32_t CLOSED = 1u << 31;
    std::atomic<uint32_t> helpers_{CLOSED};  // how many threads take work, and whether more may begin
    std::atomic<uint32_t> generation_{0}, sleepers_{0};
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0;
    std::atomic<bool> stopping_{false};
};

// A chunk has at most this many queries of a run.
int queries_at_once(const Layer &layer) { return ROWS_AT_ONCE > layer.group ? ROWS_AT_ONCE / layer.group : 1; }

// A span says what the queries from `first` on of a run see, in every KV head. If the run has no other queries, as in
// decode, a long context is cut into parts. The cut depends on nothing but the run itself. So every bit of the run's
// result does too, whatever else is in the step and however many workers there are.
struct Span {
    static constexpr int64_t PART_PAGES = PART_TILES * TILE_PAGES;
    int32_t queries, parts;
    int64_t low, high, first_page, pages;

    Span(const Layer &layer, const Step &step, int64_t run, int64_t first, bool present) {
        const int64_t start = step.starts[run], count = step.counts[run], most = queries_at_once(layer);
        queries = int32_t(count - first < most ? count - first : most);
        low = layer.first_visible(start + first), high = start;
        if (present) low = low > start ? low : start, high = start + first + queries;
        if (low > high) low = high;
        first_page = low / PAGE, pages = (high + PAGE - 1) / PAGE - first_page;
        parts = count == queries && pages ? int32_t((pages + PART_PAGES - 1) / PART_PAGES) : 1;
    }
    int64_t begin(int part) const { return part ? (first_page + part * PART_PAGES) * PAGE : low; }
    int64_t end(int part) const { return part + 1 < parts ? begin(part + 1) : high; }
};

// Cut a step into chunks, and return the number of its pages. The KV heads of a block lie one after the other, so a
// chunk has all of them, or as many as leave enough chunks for the workers.
int64_t cut(Workers &workers, const Layer &layer, const Step &step, bool present) {
    auto &chunks = workers.chunks;
    chunks.clear();
    int64_t pages = 0, floats = 0, spans = 0;
    auto each_span = [&](auto f) {
        for (int64_t run = 0; run < step.runs; ++run)
            for (int64_t first = 0; first < step.counts[run]; first += queries_at_once(layer))
                f(int32_t(run), int32_t(first), Span(layer, step, run, first, present));
    };
    each_span([&](int32_t, int32_t, const Span &span) { pages += span.pages * layer.kv_heads, spans += span.parts; });
    const int64_t least = workers.threads() > 1 ? CHUNKS_PER_WORKER * workers.threads() : 1;
    const int64_t cuts = (least + spans - 1) / spans;  // of the KV heads
    const int heads_wanted = int((layer.kv_heads + cuts - 1) / cuts);
    int32_t split = 0;
    each_span([&](int32_t run, int32_t first, const Span &span) {
        const int most = ROWS_AT_ONCE / (span.queries * layer.group);
        const int heads_at_once = most < 1 ? 1 : most < heads_wanted ? most : heads_wanted;
        for (int head = 0; head < layer.kv_heads; head += heads_at_once) {
            const int left = layer.kv_heads - head, heads = left < heads_at_once ? left : heads_at_once;
            Chunk chunk = {run, head, heads, first, span.queries, 0, 0, 0, span.parts, floats, split};
            for (; chunk.part < span.parts; ++chunk.part) {
                chunk.low = span.begin(chunk.part), chunk.high = span.end(chunk.part);
                chunks.push_back(chunk);
            }
            if (span.parts > 1) {
                floats += int64_t(span.parts) * chunk.rows(layer.group) * (padded(layer.v_dim) + 2);
                ++split;
            }
        }
    });
    if (int64_t(workers.states.size()) < floats) workers.states.resize(floats);
    workers.ready.assign(split, 0);
    return pages;
}

// Store the new tokens of the runs of more than `least` tokens.
void append(Workers &workers, const Layer &layer, const Step &step, const void *k, const void *v, int64_t least) {
    auto &pieces = workers.pieces;
    pieces.clear();
    int64_t pages = 0;
    for (int64_t run = 0; run < step.runs; ++run) {
        if (step.counts[run] <= least) continue;
        for (int64_t first = 0; first < step.counts[run]; first += Piece::MOST)
            for (int head = 0; head < layer.kv_heads; ++head) {
                const int64_t left = step.counts[run] - first;
                pieces.push_back({int32_t(run), head, first, left < Piece::MOST ? left : Piece::MOST});
                pages += pieces.back().count / PAGE + 1;
            }
    }
    workers.run(int64_t(pieces.size()), pages < PAGES_ALONE,
                [&](int64_t i, Scratch &scratch) { workers.kernel.append(layer, step, k, v, pieces[i], scratch); });
}

}  // namespace
}  // namespace lamina

using namespace lamina;

// Return 0, or -1 if memory ran out: no exception may reach Python.
template <class Function>
static int guarded(Function f) {
    try {
        f();
        return 0;
    } catch (...) {
        return -1;
    }
}

#pragma GCC visibility push(default)
extern "C" {

// Identify the library by its version and the sizes of the structs that it shares with library.py.
int64_t lamina_abi() { return int64_t(ABI) << 32 | sizeof(Layer) << 16 | sizeof(Step); }

// Return the names of the kernels that this machine can run, best first, separated by commas.
const char *lamina_isas() {
    static const std::string names = [] {
        std::string all;
        for (const Kernel *kernel : KERNELS)
            if (supported(*kernel)) all += (all.empty() ? "" : ",") + std::string(kernel->name);
        return all;
    }();
    return names.c_str();
}

// Return null if memory or a thread is refused, or `isa` is not one of lamina_isas().
void *lamina_workers(const char *isa, int threads, const int *cpus, int cpu_count) {
    void *handle = nullptr;
    guarded([&] {
        for (const Kernel *kernel : KERNELS)
            if (supported(*kernel) && std::string(kernel->name) == isa) {
                auto workers = std::make_unique<Workers>(*kernel, threads, cpus, cpu_count);
                if (workers->complete()) handle = workers.release();
                return;
            }
    });
    return handle;
}

void lamina_close(void *workers) { delete static_cast<Workers *>(workers); }

int64_t lamina_layer_bytes(const Layer *layer) { return int64_t(layer->kv_heads) * int64_t(layer->head_bytes()); }

int lamina_past(void *handle, const Layer *layer, const Step *step, const void *q, float *o, float *lse) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        const int64_t pages = cut(workers, *layer, *step, false);
        const Call call = {q, nullptr, nullptr, workers.states.data(), workers.ready.data(), o, lse, false};
        workers.run(int64_t(workers.chunks.size()), pages < PAGES_ALONE, [&](int64_t i, Scratch &scratch) {
            workers.kernel.attend(*layer, *step, call, workers.chunks[i], scratch);
        });
    });
}

// Store the new tokens, whose type is the input type of `stores`, and attend to them. `layer` has the input type of q,
// and differs from `stores` only in that.
int lamina_finish(void *handle, const Layer *layer, const Layer *stores, const Step *step, const void *q, const void *k,
                  const void *v, const float *past_o, const float *past_lse, float *o, float *lse) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        // Tokens that several chunks need are stored first; a chunk stores those that it alone needs.
        append(workers, *stores, *step, k, v, queries_at_once(*layer));
        const int64_t pages = cut(workers, *layer, *step, true);
        const Call call = {q, past_o, past_lse, workers.states.data(), workers.ready.data(), o, lse, true};
        workers.run(int64_t(workers.chunks.size()), pages < PAGES_ALONE, [&](int64_t i, Scratch &scratch) {
            const Chunk &chunk = workers.chunks[i];
            if (chunk.queries == step->counts[chunk.run])
                for (int head = chunk.head; head < chunk.head + chunk.heads; ++head)
                    workers.kernel.append(*stores, *step, k, v, {chunk.run, head, 0, chunk.queries}, scratch);
            workers.kernel.attend(*layer, *step, call, chunk, scratch);
        });
    });
}

int lamina_append(void *handle, const Layer *layer, const Step *step, const void *k, const void *v) {
    return guarded([&] { append(*static_cast<Workers *>(handle), *layer, *step, k, v, 0); });
}

// Copy `count` blocks, at these byte offsets in the cache, to or from `plain`, where each takes `plain_bytes`.
static int move(void *handle, const Layer *layer, const int64_t *blocks, int64_t count, uint8_t *plain,
                int64_t plain_bytes, void (*Kernel::*copy)(const Layer &, const Block &, Scratch &)) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        const int64_t heads = layer->kv_heads;
        workers.run(count * heads, count * heads * layer->pages() < PAGES_ALONE, [&](int64_t i, Scratch &scratch) {
            const int64_t block = i / heads;
            (workers.kernel.*copy)(*layer, {blocks[block], int32_t(i % heads), plain + block * plain_bytes}, scratch);
        });
    });
}

int lamina_unpack(void *handle, const Layer *layer, const int64_t *blocks, int64_t count, uint8_t *plain,
                  int64_t plain_bytes) {
    return move(handle, layer, blocks, count, plain, plain_bytes, &Kernel::unpack);
}

int lamina_pack(void *handle, const Layer *layer, const int64_t *blocks, int64_t count, uint8_t *plain,
                int64_t plain_bytes) {
    return move(handle, layer, blocks, count, plain, plain_bytes, &Kernel::pack);
}

// Read `count` bytes, a multiple of 4096.
int lamina_read(void *handle, const uint8_t *bytes, int64_t count) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        const int64_t parts = workers.threads(), each = count / parts / 4096 * 4096;
        workers.run(parts, false, [&](int64_t i, Scratch &) {
            workers.sum += workers.kernel.read(bytes + i * each, i + 1 < parts ? each : count - i * each);
        });
    });
}

}  // extern "C"
#pragma GCC visibility pop

// The workers of a memory node, how work is cut for them, and the C interface that library.py calls.
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernel.h"

namespace lamina {
namespace {

constexpr int ABI = 1;                // counted up when a call changes its meaning; see library.py
constexpr int SPINS = 4000;           // tens of us: the next layer of a step comes soon; after that a worker sleeps
constexpr int64_t PART_TILES = 32;    // of a long context: merging a part costs less than one of its tiles
constexpr int ROWS_AT_ONCE = 64;      // of several queries: more would leave the second-level cache
constexpr int TRIALS = 8;             // calls with and without prefetching, in turns
constexpr int64_t TRIAL_TILES = 512;  // of a worker: enough to be measured, and more than its caches hold

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

// Whether to prefetch by instructions, which is better where the arithmetic takes long enough to hide it, or to leave
// it to the processor, which keeps more lines on their way where nothing but memory counts. Which of the two a load is
// depends on the machine, so the first large calls of each kind try both.
class Prefetching {
  public:
    bool trying() const { return calls_ < TRIALS; }
    bool next() const { return calls_ % 2; }
    bool settled() const { return trying() || best_[1] <= best_[0]; }
    void took(double seconds_per_tile) {
        double &best = best_[calls_++ % 2];
        best = seconds_per_tile < best ? seconds_per_tile : best;
    }

  private:
    int calls_ = 0;
    double best_[2] = {1e9, 1e9};
};

// N - 1 threads, each pinned to a processor if some are given, and the one that calls, which stays where its owner put
// it. Work is numbered, and taken in the order of the numbers.
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

    // Call f(number, scratch) for every number below `count`; returns when all are done.
    template <class Function>
    void run(int64_t count, Function f) {
        if (!count) return;
        next_ = 0, count_ = count;
        if (threads_.empty() || count == 1) {
            for (int64_t i = 0; i < count; ++i) f(i, *scratch_[0]);
            return;
        }
        work_ = [&](int64_t i, Scratch &scratch) { f(i, scratch); };
        running_ = int(threads_.size());
        begin();
        take(*scratch_[0]);
        for (int spins = 0; running_.load(std::memory_order_acquire);) {
            if (++spins < SPINS)
                relax();
            else if (uint32_t left = running_.load(std::memory_order_acquire))
                futex(running_, FUTEX_WAIT, left);
        }
    }

    const Kernel &kernel;
    std::vector<Chunk> chunks;
    std::vector<Piece> pieces;
    std::vector<float> states;
    std::vector<int32_t> ready;
    std::map<std::array<int, 3>, Prefetching> prefetching;  // by type stored, rows that share a KV head and head size
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
        generation_.fetch_add(1, std::memory_order_release);
        futex(generation_, FUTEX_WAKE, 1 << 30);
    }

    void work(int index) {
        for (uint32_t seen = 0;;) {
            for (int spins = 0; generation_.load(std::memory_order_acquire) == seen;) {
                if (++spins < SPINS)
                    relax();
                else
                    futex(generation_, FUTEX_WAIT, seen);
            }
            ++seen;
            if (stopping_) return;
            take(*scratch_[index]);
            if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) futex(running_, FUTEX_WAKE, 1);
        }
    }

    void take(Scratch &scratch) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work_(i, scratch);
    }

    std::vector<std::unique_ptr<Scratch, Release>> scratch_;
    std::vector<pthread_t> threads_;
    std::function<void(int64_t, Scratch &)> work_;
    std::atomic<uint32_t> generation_{0}, running_{0};
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0;
    std::atomic<bool> stopping_{false};
};

// Cut a step into chunks: for each run, KV head and block of queries the positions it sees. Where one block is all
// that a run has, as in decode, a long context goes in parts. How a run is cut depends on nothing but itself, and so
// does every bit of its result, whatever else is in the step and however many workers there are. Returns the tiles.
int64_t cut(Workers &workers, const Layer &layer, const Step &step, bool present) {
    auto &chunks = workers.chunks;
    chunks.clear();
    const int queries_at_once = ROWS_AT_ONCE > layer.group ? ROWS_AT_ONCE / layer.group : 1;
    int64_t tiles = 0, floats = 0;
    int32_t split = 0;
    for (int64_t run = 0; run < step.runs; ++run) {
        const int64_t start = step.starts[run], count = step.counts[run];
        for (int64_t first = 0; first < count; first += queries_at_once) {
            const int queries = int(count - first < queries_at_once ? count - first : queries_at_once);
            int64_t low = layer.window ? start + first - layer.window + 1 : 0, high = start;
            if (present) {
                low = low > start ? low : start;
                high = start + first + queries;
            }
            low = low > 0 ? low : 0;
            if (low > high) low = high;
            const int64_t first_page = low / PAGE, end = (high + PAGE - 1) / PAGE;
            const int64_t pages = PART_TILES * TILE_PAGES;  // of a part
            int32_t parts = count == queries ? int32_t((end - first_page + pages - 1) / pages) : 1;
            if (parts < 1) parts = 1;
            tiles += (end - first_page + TILE_PAGES - 1) / TILE_PAGES * layer.kv_heads;
            for (int head = 0; head < layer.kv_heads; ++head) {
                Chunk chunk = {int32_t(run), head, int32_t(first), queries, low, high, 0, parts, floats, split};
                if (parts > 1) {
                    floats += int64_t(parts) * queries * layer.group * (padded(layer.v_dim) + 2);
                    ++split;
                }
                for (; chunk.part < parts; ++chunk.part) {
                    chunk.low = chunk.part ? (first_page + chunk.part * pages) * PAGE : low;
                    chunk.high = chunk.part + 1 < parts ? (first_page + (chunk.part + 1) * pages) * PAGE : high;
                    chunks.push_back(chunk);
                }
            }
        }
    }
    if (int64_t(workers.states.size()) < floats) workers.states.resize(floats);
    workers.ready.assign(split, 0);
    return tiles;
}

// Call f(memory of a token's number, canonical place or -1 for padding) for the positions first .. first+count-1 of one
// table, but those below `frozen` and those in blocks that are not there.
template <class Function>
void each_number(const Layer &layer, const int64_t *table, int64_t first, int64_t count, int64_t frozen, bool values,
                 Function f) {
    const int dim = values ? layer.v_dim : layer.qk_dim, item = item_bytes(layer.kv_type);
    const bool pairs = paired(layer.kv_type);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t position = first + i, t = position % PAGE;
        if (position < frozen || table[position / layer.block_tokens] < 0) continue;
        for (int head = 0; head < layer.kv_heads; ++head) {
            const Place at = place(layer, table, head, position / PAGE);
            const int64_t row = i * layer.kv_heads + head;
            for (int d = 0; d < padded(dim); ++d) {
                const int64_t line = values ? d / 16 * (PAGE / 2) + t / 2 : d / 2;
                const int64_t x = values ? d % 16 : t, parity = values ? t % 2 : d % 2;
                const int64_t number = line * LINE + (pairs ? 2 * x + parity : PAGE * parity + x);
                f((values ? at.v : at.k) + number * item, d < dim ? (row * dim + d) * item : -1, item);
            }
            if (scaled(layer.kv_type)) f(nullptr, row, 0, (values ? at.v_scales : at.k_scales) + t);
        }
    }
}

struct Canonical {
    uint8_t *numbers;
    float *scales;
    bool out;
    void operator()(uint8_t *stored, int64_t at, int item) const {
        if (!out && at < 0)
            std::memset(stored, 0, item);
        else if (!out)
            std::memcpy(stored, numbers + at, item);
        else if (at >= 0)
            std::memcpy(numbers + at, stored, item);
    }
    void operator()(std::nullptr_t, int64_t row, int, float *scale) const {
        if (out)
            scales[row] = *scale;
        else
            *scale = scales[row];
    }
};

}  // namespace
}  // namespace lamina

using namespace lamina;

// Nothing may be thrown into Python: 0, or -1 where memory ran out.
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

// Which library this is: its version and the sizes of what it shares with library.py.
int64_t lamina_abi() { return int64_t(ABI) << 32 | sizeof(Layer) << 16 | sizeof(Step); }

// Comma-separated names of the kernels that this machine can run, best first.
const char *lamina_isas() {
    static const std::string names = [] {
        std::string all;
        for (const Kernel *kernel : KERNELS)
            if (supported(*kernel)) all += (all.empty() ? "" : ",") + std::string(kernel->name);
        return all;
    }();
    return names.c_str();
}

// Null where memory or a thread cannot be had, or `isa` is not one of lamina_isas().
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

int lamina_attend(void *handle, const Layer *layer, const Step *step, const void *q, const float *past_o,
                  const float *past_lse, float *o, float *lse, int present) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        const int64_t tiles = cut(workers, *layer, *step, present != 0);
        Prefetching &prefetching = workers.prefetching[{layer->kv_type, layer->group, layer->qk_dim}];
        const bool trial = !present && tiles >= TRIAL_TILES * workers.threads() && prefetching.trying();
        const bool prefetch = trial ? prefetching.next() : prefetching.settled();
        const Call call = {q,   past_o,       past_lse, workers.states.data(), workers.ready.data(), o,
                           lse, present != 0, prefetch};
        const auto start = std::chrono::steady_clock::now();
        workers.run(int64_t(workers.chunks.size()), [&](int64_t i, Scratch &scratch) {
            workers.kernel.attend(*layer, *step, call, workers.chunks[i], scratch);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (trial) prefetching.took(took.count() / tiles);
    });
}

int lamina_append(void *handle, const Layer *layer, const Step *step, const void *k, const void *v) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        auto &pieces = workers.pieces;
        pieces.clear();
        for (int64_t run = 0; run < step->runs; ++run)
            for (int64_t first = 0; first < step->counts[run]; first += Piece::MOST)
                for (int head = 0; head < layer->kv_heads; ++head) {
                    const int64_t left = step->counts[run] - first;
                    pieces.push_back({int32_t(run), head, first, left < Piece::MOST ? left : Piece::MOST});
                }
        workers.run(int64_t(pieces.size()), [&](int64_t i, Scratch &scratch) {
            workers.kernel.append(*layer, *step, k, v, pieces[i], scratch);
        });
    });
}

// Copy positions between a cache and canonical tensors: k [count, Hkv, Dk], v [count, Hkv, Dv], scales [count, Hkv].
void lamina_copy(const Layer *layer, const int64_t *table, int64_t first, int64_t count, void *k, void *v,
                 float *k_scales, float *v_scales, int64_t frozen, int out) {
    const Canonical keys = {static_cast<uint8_t *>(k), k_scales, out != 0};
    const Canonical values = {static_cast<uint8_t *>(v), v_scales, out != 0};
    each_number(*layer, table, first, count, frozen, false, keys);
    each_number(*layer, table, first, count, frozen, true, values);
}

// Read `count` bytes, a multiple of 4096.
int lamina_read(void *handle, const uint8_t *bytes, int64_t count) {
    return guarded([&] {
        Workers &workers = *static_cast<Workers *>(handle);
        const int64_t parts = workers.threads(), each = count / parts / 4096 * 4096;
        workers.run(parts, [&](int64_t i, Scratch &) {
            workers.sum += workers.kernel.read(bytes + i * each, i + 1 < parts ? each : count - i * each);
        });
    });
}

}  // extern "C"
#pragma GCC visibility pop

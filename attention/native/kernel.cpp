// The kernel attends with the rows of one KV head over pages, and stores into pages. It is compiled once for every
// instruction set, with LAMINA_ISA for its name.
//
// Attention reads each page once for all rows that share its KV head, a tile of four pages at a time: scores, one
// update of the running softmax (Milakov and Gimelshein, arXiv 1805.02867), weighted values. Both products are the
// same `panel` over lines of 32 numbers: it keeps a block of sums in registers and streams lines through them.

#include "kernel.h"

#include <cfloat>
#include <cmath>
#include <type_traits>

#define LAMINA_STRING_(x) #x
#define LAMINA_STRING(x) LAMINA_STRING_(x)
#define LAMINA_JOIN_(a, b) a##b
#define LAMINA_JOIN(a, b) LAMINA_JOIN_(a, b)

#include "simd.h"

namespace lamina {
namespace {  // without a name, or the linker would keep one instruction set's version of a function for all

constexpr int VECTORS = PAGE / W;  // of one page's tokens, or of one chunk of 16 dimensions
#if LAMINA_WIDE
constexpr int BLOCK_ROWS = 8;
constexpr int groups_of(int rows) { return rows <= 4 ? 4 : 2; }  // pages or chunks of dimensions in registers at once
#else
constexpr int BLOCK_ROWS = 4;
constexpr int groups_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// -- products by type: a policy names the operand (two numbers of a row: q of two dimensions or the weights of two
//    tokens) and the sum, and adds the products of an operand with vector `v` of a line to a sum.

struct Float32Line {
    static constexpr int type = FLOAT32;
    static void split(const uint8_t *line, int v, F &a, F &b) {
        a = load<F>(line + 4 * W * v);
        b = load<F>(line + 4 * (PAGE + W * v));
    }
};
struct Float16Line {
    static constexpr int type = FLOAT16;
    static void split(const uint8_t *line, int v, F &a, F &b) {
        a = from_float16((const uint16_t *)line + W * v);
        b = from_float16((const uint16_t *)line + PAGE + W * v);
    }
};
struct BFloat16Line {
    static constexpr int type = BFLOAT16;
    static void split(const uint8_t *line, int v, F &a, F &b) {
        U x = load<U>(line + 4 * W * v);
        a = from_bfloat16_low(x);
        b = from_bfloat16_high(x);
    }
    static U pairs(const uint8_t *line, int v) { return load<U>(line + 4 * W * v); }
};

// fp8 e4m3 becomes a wider format by moving its exponent and mantissa to their place, which makes it too small by
// 2^120, the difference of the biases, subnormals included. FLOAT8_UP on the operands and FLOAT8_UP again on the sums
// put that right without leaving the range of float32 on the way. VDPBF16PS reads subnormals as 0: there, numbers below
// 2^-6, which is 1/28672 of the largest of their vector, count as 0.
constexpr float FLOAT8_UP = 0x1p60f;
struct Float8Line {
    static constexpr int type = FLOAT8;
    static void split(const uint8_t *line, int v, F &a, F &b) {
        I x = widen(load<S>(line + 2 * W * v));
        a = (F)(((x << 24) >> 4) & (int32_t)0x87f00000);
        b = (F)((x << 12) & (int32_t)0x87f00000);
    }
    static U pairs(const uint8_t *line, int v) {
        I16 x = widen(load<B>(line + 2 * W * v));
        return (U)((x << 4) & (int16_t)0x87f0);
    }
};

template <class Line>
struct FloatProducts {
    using Sum = F;
    struct Operand {
        float a, b;
    };
    static constexpr int type = Line::type;
    static constexpr float up = type == FLOAT8 ? FLOAT8_UP : 1;
    template <int N>
    struct Values {
        F a[N], b[N];
        void take(int n, const uint8_t *line, int v) { Line::split(line, v, a[n], b[n]); }
    };
    template <int N>
    static void add(Sum *sums, const Values<N> &values, const Operand &operand) {
        F a = all(operand.a), b = all(operand.b);
        for (int n = 0; n < N; ++n) sums[n] = values.a[n] * a + sums[n];
        for (int n = 0; n < N; ++n) sums[n] = values.b[n] * b + sums[n];
    }
    static F rounded(F x) { return x; }
    // Turn a row of `pairs` pairs into operands. Sums of products with them have to be multiplied by the result.
    static float pack(const float *row, int pairs, Operand *to) {
        for (int i = 0; i < 2 * pairs; i += W) store((float *)to + i, load<F>(row + i) * up);
        return up;
    }
};

template <class Line>
struct BFloat16Products {
    using Sum = F;
    using Operand = uint32_t;
    static constexpr int type = Line::type;
    static constexpr float up = type == FLOAT8 ? FLOAT8_UP : 1;
    template <int N>
    struct Values {
        U x[N];
        void take(int n, const uint8_t *line, int v) { x[n] = Line::pairs(line, v); }
    };
    template <int N>
    static void add(Sum *sums, const Values<N> &values, const Operand &operand) {
        U a = all(operand);
        for (int n = 0; n < N; ++n) sums[n] = dot_bfloat16(sums[n], values.x[n], a);
    }
    static F rounded(F x) { return as_float(to_bfloat16(x) << 16); }
    static float pack(const float *row, int pairs, Operand *to) {
        for (int i = 0; i < 2 * pairs; i += W)
            store((uint16_t *)to + i, __builtin_convertvector(to_bfloat16(load<F>(row + i) * up), H));
        return up;
    }
};

// int8 is multiplied by 16-bit integer products, which are exact: only the operand is rounded, to 15 bits of its
// largest number.
struct Int8Products {
    using Sum = I;
    using Operand = uint32_t;
    static constexpr int type = INT8;
    static constexpr float up = 1;
    template <int N>
    struct Values {
        I16 x[N];
        void take(int n, const uint8_t *line, int v) { x[n] = widen(load<B>(line + 2 * W * v)); }
    };
    template <int N>
    static void add(Sum *sums, const Values<N> &values, const Operand &operand) {
        I16 a = (I16)all(operand);
        for (int n = 0; n < N; ++n) sums[n] = dot_int16(sums[n], values.x[n], a);
    }
    static float pack(const float *row, int pairs, Operand *to) {
        F largest = {}, total = {};
        for (int i = 0; i < 2 * pairs; i += W) {
            F x = load<F>(row + i);
            largest = max(max(x, -x), largest);
            total = total + x * 0.0f;  // NaN if any is
        }
        float peak = horizontal_max(largest);
        float down = peak > 1e-30f ? 32767.0f / peak : 0;
        for (int i = 0; i < 2 * pairs; i += W) {
            F x = load<F>(row + i) * down;
            x = select(x == x, x, F{});
            const F magic = all(TO_INTEGER);
            I n = (I)((x + magic)) - (I)magic;
            store((int16_t *)to + i, __builtin_convertvector(n, S));
        }
        return (down > 0 ? peak / 32767.0f : 0) + horizontal_sum(total);
    }
};

// -- the two products

// sums[r][n] += over `steps` lines, an even number: operand (r, i) . line i of group n, where a group is a page
// (scores) or a chunk of 16 dimensions (values). `ahead[n]` will be read next in the place of `lines[n]`.
template <class P, int R, int N>
inline void panel(typename P::Sum (&sums)[R][N * VECTORS], const uint8_t *const (&lines)[N],
                  const uint8_t *const (&ahead)[N], int steps, const typename P::Operand *operands,
                  int operand_stride) {
    constexpr int line_bytes = LINE * item_bytes(P::type);
    for (int i = 0; i < steps; i += 2) {
        for (int n = 0; n < N; ++n)
            for (int b = 0; b < 2 * line_bytes; b += 64) prefetch(ahead[n] + i * line_bytes + b);
        for (int j = i; j < i + 2; ++j) {
            typename P::template Values<N * VECTORS> values;
            for (int n = 0; n < N; ++n)
                for (int v = 0; v < VECTORS; ++v) values.take(n * VECTORS + v, lines[n] + j * line_bytes, v);
            for (int r = 0; r < R; ++r) P::template add<N * VECTORS>(sums[r], values, operands[r * operand_stride + j]);
        }
    }
}

template <class P, int R, int N>
__attribute__((noinline)) void score_pages(const uint8_t *const *pages, const uint8_t *const *ahead, int lines,
                                           const typename P::Operand *q, int q_stride, float *scores, bool onto) {
    typename P::Sum sums[R][N * VECTORS];
    for (auto &row : sums)
        for (auto &sum : row) sum = typename P::Sum{};
    const uint8_t *now[N], *next[N];
    for (int n = 0; n < N; ++n) now[n] = pages[n], next[n] = ahead[n];
    panel<P, R, N>(sums, now, next, lines, q, q_stride);
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N * VECTORS; ++n) {
            float *to = scores + r * TILE + n * W;
            F x;
            if constexpr (P::type == INT8)
                x = __builtin_convertvector(sums[r][n], F);
            else
                x = sums[r][n];
            store(to, onto ? x + load<F>(to) : x);
        }
}

template <class P, int R>
void score_rows(const uint8_t *const *pages, const uint8_t *const *ahead, int count, int lines,
                const typename P::Operand *q, int q_stride, float *scores, bool onto) {
    constexpr int N = groups_of(R);
    int n = 0;
    for (; n + N <= count; n += N)
        score_pages<P, R, N>(pages + n, ahead + n, lines, q, q_stride, scores + n * PAGE, onto);
    for (; n < count; ++n) score_pages<P, R, 1>(pages + n, ahead + n, lines, q, q_stride, scores + n * PAGE, onto);
}

template <class P, int R, int N>
__attribute__((noinline)) void value_chunks(const uint8_t *const *pages, const uint8_t *const *ahead, int count,
                                            size_t offset, const typename P::Operand *weights, int weight_stride,
                                            const float *weight_scale, float *o, int o_stride) {
    constexpr int chunk_bytes = PAGE / 2 * LINE * item_bytes(P::type);
    typename P::Sum sums[R][N * VECTORS];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N * VECTORS; ++n) {
            if constexpr (P::type == INT8)
                sums[r][n] = I{};
            else
                sums[r][n] = load<F>(o + r * o_stride + n * W);
        }
    for (int page = 0; page < count; ++page) {
        const uint8_t *lines[N], *next[N];
        for (int n = 0; n < N; ++n) {
            lines[n] = pages[page] + offset + n * chunk_bytes;
            next[n] = ahead[page] + offset + n * chunk_bytes;
        }
        panel<P, R, N>(sums, lines, next, PAGE / 2, weights + page * (PAGE / 2), weight_stride);
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N * VECTORS; ++n) {
            float *to = o + r * o_stride + n * W;
            if constexpr (P::type == INT8)
                store(to, __builtin_convertvector(sums[r][n], F) * weight_scale[r] + load<F>(to));
            else
                store(to, sums[r][n]);
        }
}

template <class P, int R>
void value_rows(const uint8_t *const *pages, const uint8_t *const *ahead, int count, int chunks,
                const typename P::Operand *weights, int weight_stride, const float *weight_scale, float *o,
                int o_stride) {
    constexpr int N = groups_of(R);
    constexpr size_t chunk_bytes = PAGE / 2 * LINE * item_bytes(P::type);
    int c = 0;
    for (; c + N <= chunks; c += N)
        value_chunks<P, R, N>(pages, ahead, count, c * chunk_bytes, weights, weight_stride, weight_scale, o + c * PAGE,
                              o_stride);
    for (; c < chunks; ++c)
        value_chunks<P, R, 1>(pages, ahead, count, c * chunk_bytes, weights, weight_stride, weight_scale, o + c * PAGE,
                              o_stride);
}

// Call f with the number of rows of each block, as a constant, and its first row.
template <class Function>
inline void by_rows(int rows, Function f) {
    for (int row = 0; row < rows;) {
        int n = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
        switch (n) {
            case 1: f(std::integral_constant<int, 1>(), row); break;
            case 2: f(std::integral_constant<int, 2>(), row); break;
            case 3: f(std::integral_constant<int, 3>(), row); break;
#if LAMINA_WIDE
            case 4: f(std::integral_constant<int, 4>(), row); break;
            case 5: f(std::integral_constant<int, 5>(), row); break;
            case 6: f(std::integral_constant<int, 6>(), row); break;
            case 7: f(std::integral_constant<int, 7>(), row); break;
#endif
            default: f(std::integral_constant<int, BLOCK_ROWS>(), row);
        }
        row += n;
    }
}

// -- input rows of any floating type

inline float number(const void *from, int type, size_t i) {
    if (type == FLOAT32) return ((const float *)from)[i];
    uint16_t h = ((const uint16_t *)from)[i];
    if (type == BFLOAT16) {
        uint32_t u = uint32_t(h) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
    uint16_t padded[W] = {h};
    return from_float16(padded)[0];
}

// Read `n` numbers from index `at` on as float32, followed by zeros up to a multiple of 16.
inline void read_row(const void *from, int type, size_t at, int n, float *to) {
    int i = 0;
    for (; i + W <= n; i += W) {
        F x;
        if (type == FLOAT32)
            x = load<F>((const float *)from + at + i);
        else if (type == BFLOAT16)
            x = as_float(__builtin_convertvector(load<H>((const uint16_t *)from + at + i), U) << 16);
        else
            x = from_float16((const uint16_t *)from + at + i);
        store(to + i, x);
    }
    for (; i < n; ++i) to[i] = number(from, type, at + i);
    for (; i < padded(n); ++i) to[i] = 0;
}

// -- attention

// Copy a page in which some tokens must not be read, because they were never written or a window has passed them. The
// weight of such a token is 0, but 0 times NaN is NaN, so zeros take their place.
inline const uint8_t *clean_page(const uint8_t *v, int type, int chunks, int from, int to, uint8_t *copy) {
    const int item = item_bytes(type), line_bytes = LINE * item;
    for (int line = 0; line < chunks * (PAGE / 2); ++line, v += line_bytes) {
        const int t = line % (PAGE / 2) * 2;  // and t + 1
        const bool keeps[2] = {t >= from && t < to, t + 1 >= from && t + 1 < to};
        uint8_t *out = copy + line * line_bytes;
        if (paired(type)) {
            const uint32_t first = item == 1 ? 0x00ff00ff : 0x0000ffff;
            const uint32_t mask = (keeps[0] ? first : 0) | (keeps[1] ? ~first : 0);
            for (int i = 0; i < line_bytes / 4; ++i) ((uint32_t *)out)[i] = ((const uint32_t *)v)[i] & mask;
        } else {
            for (int which = 0; which < 2; ++which)
                if (keeps[which])
                    std::memcpy(out + which * PAGE * item, v + which * PAGE * item, PAGE * item);
                else
                    std::memset(out + which * PAGE * item, 0, PAGE * item);
        }
    }
    return copy;
}

// Write the rows of a chunk: as output, or as a part; the chunk that is done last merges all parts in their order.
inline void leave(const Layer &layer, const Step &step, const Call &call, const Chunk &chunk, float up, Scratch &s) {
    const int rows = chunk.rows(layer.group), dim = padded(layer.v_dim);
    if (chunk.parts > 1) {
        const size_t size = size_t(rows) * (dim + 2);
        const float *states = call.states + chunk.state;
        float *mine = call.states + chunk.state + chunk.part * size;
        std::memcpy(mine, s.o, sizeof(float) * rows * dim);
        std::memcpy(mine + rows * dim, s.peak, sizeof(float) * rows);
        std::memcpy(mine + rows * (dim + 1), s.sum, sizeof(float) * rows);
        if (__atomic_add_fetch(call.ready + chunk.ready, 1, __ATOMIC_ACQ_REL) < chunk.parts) return;
        for (int r = 0; r < rows; ++r) {
            float peak = -FLT_MAX, sum = 0, *o = s.o + r * dim;
            for (int p = 0; p < chunk.parts; ++p) {
                float other = states[p * size + rows * dim + r];
                peak = other > peak ? other : peak;
            }
            std::memset(o, 0, sizeof(float) * dim);
            for (int p = 0; p < chunk.parts; ++p) {
                const float *part = states + p * size;
                F weight = exp2_negative(all(part[rows * dim + r] - peak));
                sum += weight[0] * part[rows * (dim + 1) + r];
                for (int d = 0; d < dim; d += W) store(o + d, load<F>(part + r * dim + d) * weight + load<F>(o + d));
            }
            s.peak[r] = peak, s.sum[r] = sum;
        }
    }
    for (int r = 0; r < rows; ++r) {
        const size_t token = step.rows[chunk.run] + chunk.query(layer.group, r);
        const size_t head = chunk.q_head(layer.group, r), at = token * layer.q_heads() + head;
        float scale = 1, sum = s.sum[r], peak = s.peak[r];
        if (call.present && layer.sinks) {
            const float sink = layer.sinks[head] * LOG2_E, top = sink > peak ? sink : peak;
            scale = std::exp2(peak - top);
            sum = sum * scale + std::exp2(sink - top), peak = top;
        }
        const bool empty = sum == 0;
        scale = empty ? 0 : scale * up / sum;
        for (int d = 0; d < layer.v_dim; ++d) call.o[at * layer.v_dim + d] = empty ? 0 : s.o[r * dim + d] * scale;
        call.lse[at] = empty ? -INFINITY : peak * LN_2 + std::log(sum);
    }
}

// Turn the products of a row with a tile into weights, as operands, and scale what the row has so far to its new peak.
// Scores and peaks are logarithms to base 2. The row does not see tokens before `from` and from `to` on. Products with
// the weights have to be multiplied by the result. `slope` joins the score for each token from position `here` of the
// tile.
template <class P, int Tokens, bool Masked>
__attribute__((noinline)) float weigh(const Layer &layer, int tokens, int from, int to, const float *const *k_scales,
                                      const float *const *v_scales, int r, int dim, float slope, int64_t here,
                                      float *scores, typename P::Operand *weights, float *o, Scratch &s) {
    if (Tokens) tokens = Tokens;
    const float before = s.peak[r];
    const F q_scale = all(s.q_scale[r]);
    F lanes, peak = all(before);
    for (int i = 0; i < W; ++i) lanes[i] = float(i);
    for (int n = 0; n < tokens; n += W) {
        F x = load<F>(scores + n) * q_scale;
        if constexpr (scaled(P::type)) x = x * load<F>(k_scales[n / PAGE] + n % PAGE);
        if (layer.softcap > 0) x = tanh(x / layer.softcap) * (layer.softcap * LOG2_E);
        if (slope != 0) x = x + (lanes + float(n - here)) * (slope * LOG2_E);
        if (Masked) {
            const F at = lanes + float(n);
            x = select((at >= float(from)) & (at < float(to)), x, all(-INFINITY));
        }
        store(scores + n, x);
        peak = max(peak, x);
    }
    const float after = horizontal_max(peak);
    F total = {};
    for (int n = 0; n < tokens; n += W) {
        F x = exp2_negative(load<F>(scores + n) - after);
        if constexpr (scaled(P::type)) {
            total = total + x;
            x = x * load<F>(v_scales[n / PAGE] + n % PAGE);
            // The scale of a token that is not seen may be NaN, which a weight of 0 does not undo.
            if (Masked) x = select((lanes + float(n) >= float(from)) & (lanes + float(n) < float(to)), x, F{});
        } else {
            x = P::rounded(x);  // the sum is of the weights by which values are multiplied
            total = total + x;
        }
        store(scores + n, x);
    }
    if (after != before) {
        const F down = exp2_negative(all(before - after));
        s.sum[r] *= down[0];
        for (int d = 0; d < dim; d += W) store(o + d, load<F>(o + d) * down);
        s.peak[r] = after;
    }
    s.sum[r] += horizontal_sum(total);
    return P::pack(scores, tokens / 2, weights);
}

template <class P>
void attend_with(const Layer &layer, const Step &step, const Call &call, const Chunk &chunk, Scratch &s) {
    constexpr int type = P::type;
    const int group = layer.group, rows = chunk.rows(group), head_rows = chunk.queries * group;
    const int k_lines = padded(layer.qk_dim) / 2, dim = padded(layer.v_dim), chunks = dim / 16;
    const int64_t start = step.starts[chunk.run];
    const int64_t *table = step.tables[chunk.run];
    using Operand = typename P::Operand;
    Operand *q = (Operand *)s.q, *weights = (Operand *)s.weights;
    constexpr int weight_stride = TILE / 2;

    // bfloat16 products round q, unless it is bfloat16 already: the rest of q goes into a second product.
    constexpr bool rounds = std::is_same_v<Operand, uint32_t> && type != INT8;
    const int terms = rounds && layer.input_type != BFLOAT16 ? 2 : 1;
    for (int r = 0; r < rows; ++r) {
        float row[MAX_DIM];
        size_t token = step.rows[chunk.run] + chunk.query(group, r), head = chunk.q_head(group, r);
        read_row(call.q, layer.input_type, (token * layer.q_heads() + head) * layer.qk_dim, layer.qk_dim, row);
        s.q_scale[r] = layer.scale * P::pack(row, k_lines, q + r * k_lines) * (layer.softcap > 0 ? 1 : LOG2_E);
        if (terms == 2) {
            for (int i = 0; i < 2 * k_lines; i += W) {
                F x = load<F>(row + i);
                store(row + i, x - as_float(to_bfloat16(x) << 16));
            }
            P::pack(row, k_lines, q + (ROWS + r) * k_lines);
        }

        bool merges = call.past_o && chunk.part == 0;
        size_t at = token * layer.q_heads() + head;
        // An empty past has a log-sum-exp of -inf; that of a past with NaN is NaN, and stays.
        const bool seen = merges && !(call.past_lse[at] < -FLT_MAX);
        s.peak[r] = seen && call.past_lse[at] == call.past_lse[at] ? call.past_lse[at] * LOG2_E : -FLT_MAX;
        s.sum[r] = !seen ? 0 : call.past_lse[at] == call.past_lse[at] ? 1 : NAN;
        float *o = s.o + r * dim;
        std::memset(o, 0, dim * sizeof(float));
        if (seen)
            for (int d = 0; d < layer.v_dim; ++d) o[d] = call.past_o[at * layer.v_dim + d] / P::up;
    }

    const int64_t pages_end = (chunk.high + PAGE - 1) / PAGE;
    const uint8_t *k_pages[2][TILE_PAGES], *v_pages[2][TILE_PAGES];
    const float *k_scales[2][TILE_PAGES], *v_scales[2][TILE_PAGES];
    auto locate = [&](int64_t page, int head, int into) {
        int count = 0;
        for (; count < TILE_PAGES && page + count < pages_end; ++count) {
            Place p = place(layer, table, chunk.head + head, page + count);
            k_pages[into][count] = p.k, v_pages[into][count] = p.v;
            k_scales[into][count] = p.k_scales, v_scales[into][count] = p.v_scales;
        }
        return count;
    };

    // The heads take turns tile by tile, because their pages lie one after the other in a block.
    int64_t page = chunk.low / PAGE;
    int head = 0, now = 0, count = locate(page, head, now);
    while (count) {
        const int next = 1 - now, next_head = head + 1 < chunk.heads ? head + 1 : 0;
        const int64_t next_page = next_head ? page : page + count;
        const int next_count = locate(next_page, next_head, next);
        // The next tile is prefetched if it has as many pages; else the current one, which is in the cache already.
        const int ahead = next_count >= count ? next : now;
        const int64_t first = page * PAGE;
        const int tokens = count * PAGE, base = head * head_rows;

        for (int term = 0; term < terms; ++term)
            by_rows(head_rows, [&](auto block, int row) {
                const bool first_time = row + term == 0;
                score_rows<P, block>(k_pages[now], k_pages[first_time ? ahead : now], count, k_lines,
                                     q + (term * ROWS + base + row) * k_lines, k_lines, s.scores + row * TILE,
                                     term > 0);
            });

        // Positions before `low` and from `high` on are outside of the chunk and must not be read.
        const int low = chunk.low > first ? int(chunk.low - first) : 0;
        const int high = chunk.high < first + tokens ? int(chunk.high - first) : tokens;
        const uint8_t *v_read[TILE_PAGES];
        for (int n = 0; n < count; ++n) {
            int from = low - n * PAGE, to = high - n * PAGE;
            v_read[n] = v_pages[now][n];
            if (from > 0 || to < PAGE) v_read[n] = clean_page(v_read[n], type, chunks, from, to, s.edge[n]);
        }

        float *o = s.o + base * dim;
        for (int r = 0; r < head_rows; ++r) {
            const int64_t position = start + chunk.first + r / group - first;  // within the tile
            int from = low, to = high;
            const int64_t seen = layer.first_visible(position + first) - first;
            if (seen > from) from = seen < tokens ? int(seen) : tokens;
            if (position + 1 < to) to = position + 1 > 0 ? int(position + 1) : 0;
            const auto weigh_row =
                count == TILE_PAGES && from == 0 && to == tokens ? weigh<P, TILE, false> : weigh<P, 0, true>;
            const float slope = layer.slopes ? layer.slopes[chunk.q_head(group, base + r)] : 0;
            s.weight_scale[r] = weigh_row(layer, tokens, from, to, k_scales[now], v_scales[now], base + r, dim, slope,
                                          position, s.scores + r * TILE, weights + r * weight_stride, o + r * dim, s);
        }

        by_rows(head_rows, [&](auto block, int row) {
            value_rows<P, block>(v_read, v_pages[row ? now : ahead], count, chunks, weights + row * weight_stride,
                                 weight_stride, s.weight_scale + row, o + row * dim, dim);
        });
        page = next_page, head = next_head, now = next, count = next_count;
    }
    leave(layer, step, call, chunk, P::up, s);
}

void attend(const Layer &layer, const Step &step, const Call &call, const Chunk &chunk, Scratch &s) {
#if LAMINA_BFLOAT16
    using BFloat16 = BFloat16Products<BFloat16Line>;
    using Float8 = BFloat16Products<Float8Line>;
#else
    using BFloat16 = FloatProducts<BFloat16Line>;
    using Float8 = FloatProducts<Float8Line>;
#endif
    switch (layer.kv_type) {
        case FLOAT32: return attend_with<FloatProducts<Float32Line>>(layer, step, call, chunk, s);
        case FLOAT16: return attend_with<FloatProducts<Float16Line>>(layer, step, call, chunk, s);
        case BFLOAT16: return attend_with<BFloat16>(layer, step, call, chunk, s);
        case FLOAT8: return attend_with<Float8>(layer, step, call, chunk, s);
        default: return attend_with<Int8Products>(layer, step, call, chunk, s);
    }
}

// -- storing

// Round a row of n numbers (a multiple of 16) to the type stored; `scale` is set if that type has one.
inline void round_row(const float *row, int n, int type, void *to, float &scale) {
    if (type == FLOAT32) {
        std::memcpy(to, row, n * sizeof(float));
        return;
    }
    if (type == BFLOAT16 || type == FLOAT16) {
        for (int i = 0; i < n; i += W) {
            F x = load<F>(row + i);
            store((uint16_t *)to + i, type == FLOAT16 ? to_float16(x) : __builtin_convertvector(to_bfloat16(x), H));
        }
        return;
    }
    F largest = {}, nothing = {};
    for (int i = 0; i < n; i += W) {
        F x = load<F>(row + i);
        largest = max(max(x, -x), largest);
        nothing = nothing + x * 0.0f;  // NaN where x is not finite
    }
    const float peak = horizontal_max(largest);
    scale = (peak < 1e-30f ? 0 : peak / (type == FLOAT8 ? 448.0f : 127.0f)) + horizontal_sum(nothing);
    const bool stores = scale > 0;  // false for NaN
    for (int i = 0; i < n; i += W) {
        F x = stores ? load<F>(row + i) / scale : F{};
        U code;
        if (type == INT8) {
            const F magic = all(TO_INTEGER);
            code = as_bits(x + magic) - as_bits(magic);
        } else {
            U u = as_bits(x), a = u & 0x7fffffffu;
            U normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
            const F magic = all(16384.0f);  // adding it rounds to multiples of 2^-9, the smallest subnormal
            U subnormal = as_bits(as_float(a) + magic) - as_bits(magic);
            code = (I)(a < 0x3c800000u) ? subnormal : normal;
            code = (code > 0x7eu ? all(0x7eu) : code) | ((u >> 24) & 0x80u);
        }
        typedef uint8_t C __attribute__((vector_size(W)));
        store((uint8_t *)to + i, __builtin_convertvector(code, C));
    }
}

// Write 16 pairs of numbers, one of each row; and the reverse.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Pairs __attribute__((vector_size(32)));
inline void interleave(const uint16_t *a, const uint16_t *b, uint16_t *to) {
    for (int d = 0; d < 16; d += W) {
        const U low = __builtin_convertvector(load<H>(a + d), U), high = __builtin_convertvector(load<H>(b + d), U);
        store(to + 2 * d, low | high << 16);
    }
}
inline void interleave(const uint8_t *a, const uint8_t *b, uint8_t *to) {
    store(to, __builtin_convertvector(load<Bytes>(a), Pairs) | __builtin_convertvector(load<Bytes>(b), Pairs) << 8);
}
inline void interleave(const uint32_t *, const uint32_t *, uint32_t *) {}  // no type of 32 bits is stored in pairs

inline void separate(const uint16_t *from, uint16_t *a, uint16_t *b) {
    for (int d = 0; d < 16; d += W) {
        const U pairs = load<U>(from + 2 * d);
        store(a + d, __builtin_convertvector(pairs, H));
        store(b + d, __builtin_convertvector(pairs >> 16, H));
    }
}
inline void separate(const uint8_t *from, uint8_t *a, uint8_t *b) {
    const Pairs pairs = load<Pairs>(from);
    store(a, __builtin_convertvector(pairs & 0xff, Bytes));
    store(b, __builtin_convertvector(pairs >> 8, Bytes));
}
inline void separate(const uint32_t *, uint32_t *, uint32_t *) {}

// to[i * to_stride + t] = from[t * from_stride + i], for 8 x 8 numbers or pairs.
template <class T>
inline void transpose8(const T *from, int64_t from_stride, T *to, int64_t to_stride) {
    for (int i = 0; i < 8; ++i)
        for (int t = 0; t < 8; ++t) to[i * to_stride + t] = from[t * from_stride + i];
}
#if __has_builtin(__builtin_shufflevector)
inline void transpose8(const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride) {
    typedef uint32_t U8 __attribute__((vector_size(32)));
    U8 a[8], b[8];  // by numbers, by pairs, by fours
    for (int r = 0; r < 8; ++r) a[r] = load<U8>(from + r * from_stride);
    for (int r = 0; r < 8; r += 2) {
        b[r] = __builtin_shufflevector(a[r], a[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[r + 1] = __builtin_shufflevector(a[r], a[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int r = 0; r < 8; r += 4)
        for (int h = 0; h < 2; ++h) {
            a[r + 2 * h] = __builtin_shufflevector(b[r + h], b[r + 2 + h], 0, 1, 8, 9, 4, 5, 12, 13);
            a[r + 2 * h + 1] = __builtin_shufflevector(b[r + h], b[r + 2 + h], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int r = 0; r < 4; ++r) {
        const U8 low = __builtin_shufflevector(a[r], a[r + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        const U8 high = __builtin_shufflevector(a[r], a[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        store(to + r * to_stride, low);
        store(to + (r + 4) * to_stride, high);
    }
}
inline void transpose8(const uint16_t *from, int64_t from_stride, uint16_t *to, int64_t to_stride) {
    typedef uint16_t H8 __attribute__((vector_size(16)));
    H8 a[8], b[8];
    for (int r = 0; r < 8; ++r) a[r] = load<H8>(from + r * from_stride);
    for (int round = 0; round < 3; ++round) {  // each shuffles rows and columns perfectly
        for (int r = 0; r < 4; ++r) {
            b[2 * r] = __builtin_shufflevector(a[r], a[r + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * r + 1] = __builtin_shufflevector(a[r], a[r + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int r = 0; r < 8; ++r) a[r] = b[r];
    }
    for (int r = 0; r < 8; ++r) store(to + r * to_stride, a[r]);
}
#endif

// to[i * PAGE + t] = from[t * stride + i], for `tokens` tokens t and n numbers or pairs i, a multiple of 8.
template <class T>
inline void transpose(const T *from, int64_t stride, int tokens, int n, T *to) {
    for (int i = 0; i < n; i += 8) {
        if (tokens == PAGE) {
            transpose8(from + i, stride, to + i * PAGE, PAGE);
            transpose8(from + 8 * stride + i, stride, to + i * PAGE + 8, PAGE);
            continue;
        }
        for (int j = i; j < i + 8; ++j)
            for (int t = 0; t < tokens; ++t) to[j * PAGE + t] = from[t * stride + j];
    }
}

// The reverse, for all tokens of a page: to[t * stride + i] = from[i * PAGE + t].
template <class T>
inline void transpose_back(const T *from, int n, T *to, int64_t stride) {
    for (int i = 0; i < n; i += 8) {
        transpose8(from + i * PAGE, PAGE, to + i, stride);
        transpose8(from + i * PAGE + 8, PAGE, to + 8 * stride + i, stride);
    }
}

// A pair holds two neighbouring numbers.
template <class T>
using Pair = std::conditional_t<sizeof(T) == 1, uint16_t, std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>>;

// Put the rows of `tokens` tokens, each of `width` numbers, `stride` numbers apart, into a page of K or V, from token
// `at` on.
template <class T>
inline void put_rows(int type, bool is_v, const T *rows, int64_t stride, int width, int at, int tokens, T *page) {
    if (!is_v && paired(type))
        return transpose((const Pair<T> *)rows, stride / 2, tokens, width / 2, (Pair<T> *)page + at);
    if (!is_v) return transpose(rows, stride, tokens, width, page + at);
    for (int c = 0; c < width / 16; ++c)
        for (int t = 0; t < tokens; ++t) {
            T *line = page + (c * (PAGE / 2) + (at + t) / 2) * LINE;
            const T *from = rows + t * stride + c * 16;
            if (paired(type) && (at + t) % 2 == 0 && t + 1 < tokens)
                interleave(from, from + stride, line), ++t;
            else if (paired(type))
                for (int d = 0; d < 16; ++d) line[2 * d + (at + t) % 2] = from[d];
            else
                std::memcpy(line + (at + t) % 2 * 16, from, 16 * sizeof(T));
        }
}

// Get the rows of all tokens of a page of K or V.
template <class T>
inline void get_rows(int type, bool is_v, const T *page, int width, T *rows, int64_t stride) {
    if (!is_v && paired(type)) return transpose_back((const Pair<T> *)page, width / 2, (Pair<T> *)rows, stride / 2);
    if (!is_v) return transpose_back(page, width, rows, stride);
    for (int c = 0; c < width / 16; ++c)
        for (int t = 0; t < PAGE; t += 2) {
            const T *line = page + (c * (PAGE / 2) + t / 2) * LINE;
            T *to = rows + t * stride + c * 16;
            if (paired(type)) {
                separate(line, to, to + stride);
                continue;
            }
            std::memcpy(to, line, 16 * sizeof(T));
            std::memcpy(to + stride, line + 16, 16 * sizeof(T));
        }
}

template <class T>
void append_as(const Layer &layer, const Step &step, const void *k, const void *v, const Piece &piece, Scratch &s) {
    const int run = piece.run, head = piece.head;
    const int64_t start = step.starts[run], frozen = step.frozen[run], end = piece.first + piece.count;
    const int64_t *table = step.tables[run];
    const int dims[2] = {layer.qk_dim, layer.v_dim};
    for (int64_t token = piece.first; token < end;) {
        const int64_t position = start + token;
        const int at = position % PAGE;
        int tokens = PAGE - at;
        if (tokens > end - token) tokens = int(end - token);
        if (position < frozen || table[position / layer.block_tokens] < 0) {
            token += tokens;  // in a published block, which is final, or freed behind a window
            continue;
        }
        const Place to = place(layer, table, head, position / PAGE);
        T *staged = (T *)s.q;
        for (int which = 0; which < 2; ++which) {
            const int dim = dims[which], width = padded(dim);
            for (int t = 0; t < tokens; ++t) {
                const size_t row = (step.rows[run] + token + t) * layer.kv_heads + head;
                if (layer.kv_type == layer.input_type) {
                    std::memcpy(staged + t * width, (const T *)(which ? v : k) + row * dim, dim * sizeof(T));
                    std::memset(staged + t * width + dim, 0, (width - dim) * sizeof(T));
                    continue;
                }
                float scale;
                read_row(which ? v : k, layer.input_type, row * dim, dim, s.o);
                round_row(s.o, width, layer.kv_type, staged + t * width, scale);
                if (scaled(layer.kv_type)) (which ? to.v_scales : to.k_scales)[at + t] = scale;
            }
            put_rows(layer.kv_type, which, staged, width, width, at, tokens, (T *)(which ? to.v : to.k));
        }
        token += tokens;
    }
}

void append(const Layer &layer, const Step &step, const void *k, const void *v, const Piece &piece, Scratch &s) {
    switch (item_bytes(layer.kv_type)) {
        case 4: return append_as<uint32_t>(layer, step, k, v, piece, s);
        case 2: return append_as<uint16_t>(layer, step, k, v, piece, s);
        default: return append_as<uint8_t>(layer, step, k, v, piece, s);
    }
}

// -- blocks in the form in which they are moved

template <class T>
void unpack_as(const Layer &layer, const Block &block, Scratch &s) {
    const int heads = layer.kv_heads, head = block.head, type = layer.kv_type, dims[2] = {layer.qk_dim, layer.v_dim};
    const PlainBlock plain(layer, block.plain);
    for (int page = 0; page < layer.pages(); ++page) {
        const Place from = place(layer, &block.at, head, page);
        for (int which = 0; which < 2; ++which) {
            const int dim = dims[which], width = padded(dim);
            const int64_t stride = int64_t(heads) * dim;
            const T *own = (const T *)(which ? from.v : from.k);
            T *to = (T *)(which ? plain.v : plain.k) + page * PAGE * stride + head * dim;
            if (dim == width) {
                get_rows(type, which, own, width, to, stride);
            } else {
                T *rows = (T *)s.q;
                get_rows(type, which, own, width, rows, width);
                for (int t = 0; t < PAGE; ++t) std::memcpy(to + t * stride, rows + t * width, dim * sizeof(T));
            }
            if (!scaled(type)) continue;
            float *scales = (which ? plain.v_scales : plain.k_scales) + int64_t(page) * PAGE * heads + head;
            for (int t = 0; t < PAGE; ++t) scales[int64_t(t) * heads] = (which ? from.v_scales : from.k_scales)[t];
        }
    }
}

template <class T>
void pack_as(const Layer &layer, const Block &block, Scratch &s) {
    const int heads = layer.kv_heads, head = block.head, type = layer.kv_type, dims[2] = {layer.qk_dim, layer.v_dim};
    const PlainBlock plain(layer, block.plain);
    for (int page = 0; page < layer.pages(); ++page) {
        const Place to = place(layer, &block.at, head, page);
        for (int which = 0; which < 2; ++which) {
            const int dim = dims[which], width = padded(dim);
            const int64_t stride = int64_t(heads) * dim;
            T *own = (T *)(which ? to.v : to.k);
            const T *from = (const T *)(which ? plain.v : plain.k) + page * PAGE * stride + head * dim;
            if (dim == width) {
                put_rows(type, which, from, stride, width, 0, PAGE, own);
            } else {
                T *rows = (T *)s.q;
                for (int t = 0; t < PAGE; ++t) {
                    std::memcpy(rows + t * width, from + t * stride, dim * sizeof(T));
                    std::memset(rows + t * width + dim, 0, (width - dim) * sizeof(T));
                }
                put_rows(type, which, rows, width, width, 0, PAGE, own);
            }
            if (!scaled(type)) continue;
            const float *scales = (which ? plain.v_scales : plain.k_scales) + int64_t(page) * PAGE * heads + head;
            for (int t = 0; t < PAGE; ++t) (which ? to.v_scales : to.k_scales)[t] = scales[int64_t(t) * heads];
        }
    }
}

void unpack(const Layer &layer, const Block &block, Scratch &s) {
    switch (item_bytes(layer.kv_type)) {
        case 4: return unpack_as<uint32_t>(layer, block, s);
        case 2: return unpack_as<uint16_t>(layer, block, s);
        default: return unpack_as<uint8_t>(layer, block, s);
    }
}

void pack(const Layer &layer, const Block &block, Scratch &s) {
    switch (item_bytes(layer.kv_type)) {
        case 4: return pack_as<uint32_t>(layer, block, s);
        case 2: return pack_as<uint16_t>(layer, block, s);
        default: return pack_as<uint8_t>(layer, block, s);
    }
}

uint64_t read(const uint8_t *bytes, size_t count) {
    U sums[8] = {};
    for (size_t i = 0; i + 8 * sizeof(U) <= count; i += 8 * sizeof(U))
        for (int n = 0; n < 8; ++n) sums[n] ^= load<U>(bytes + i + n * sizeof(U));
    U x = {};
    for (U sum : sums) x ^= sum;
    uint64_t result = 0;
    for (int i = 0; i < W; ++i) result += x[i];
    return result;
}

}  // namespace

extern const Kernel LAMINA_JOIN(LAMINA_ISA, _kernel);
const Kernel LAMINA_JOIN(LAMINA_ISA, _kernel) = {LAMINA_STRING(LAMINA_ISA), attend, append, unpack, pack, read};

}  // namespace lamina

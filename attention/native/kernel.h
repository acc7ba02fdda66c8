// The kernel of every instruction set has this interface. It has no state and no threads: see workers.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

// A block of `block_tokens` positions holds for each KV head of a layer the pages of K, the pages of V and, for 8-bit
// types, the scales of K and of V. A page is 16 tokens in lines of 32 numbers:
//   K: line i holds the dimensions 2i and 2i+1 of the 16 tokens;
//   V: line 8c+j holds the dimensions 16c .. 16c+15 of the tokens 2j and 2j+1.
// In a line of bfloat16, fp8 or int8 the two alternate, [16][2], as dot-product instructions want them; in a line of
// float32 or float16 they are apart, [2][16]. Head sizes are padded with zeros to multiples of 16.
constexpr int PAGE = 16;
constexpr int LINE = 32;
constexpr int TILE_PAGES = 4;
constexpr int TILE = TILE_PAGES * PAGE;  // tokens of one update of the softmax
constexpr int ROWS = 128;                // rows (queries x heads of a group) that one chunk may have
constexpr int MAX_DIM = 512;             // of a head

enum Type : int32_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT8, INT8 };

inline constexpr int item_bytes(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 || type == FLOAT16 ? 2 : 1; }
inline constexpr bool scaled(int type) { return type == FLOAT8 || type == INT8; }
inline constexpr bool paired(int type) { return type == BFLOAT16 || scaled(type); }
inline constexpr int padded(int dim) { return (dim + 15) / 16 * 16; }

// This describes one layer of a cache and its attention. library.py mirrors it.
struct Layer {
    uint8_t *memory;      // of the cache, at the layer's offset within a block
    const float *sinks;   // [q_heads] or null
    const float *slopes;  // [q_heads] or null
    int32_t kv_heads, group, qk_dim, v_dim;
    int32_t block_tokens;
    int32_t kv_type, input_type;  // the type stored; the type of q, k and v
    int32_t window, chunk;        // 0: none
    float scale, softcap;         // softcap 0: none

    int k_page() const { return PAGE * padded(qk_dim) * item_bytes(kv_type); }
    int v_page() const { return PAGE * padded(v_dim) * item_bytes(kv_type); }
    int pages() const { return block_tokens / PAGE; }
    size_t head_bytes() const {
        return size_t(pages()) * (k_page() + v_page()) + (scaled(kv_type) ? 2 * sizeof(float) * block_tokens : 0);
    }
    // The first position that a query sees.
    int64_t first_visible(int64_t position) const {
        int64_t first = window ? position - window + 1 : 0;
        if (chunk && position - position % chunk > first) first = position - position % chunk;
        return first > 0 ? first : 0;
    }
    int q_heads() const { return kv_heads * group; }
};

// This describes the runs of a step. library.py mirrors it.
struct Step {
    const int64_t *const *tables;                    // [runs]: byte offsets of blocks
    const int64_t *starts, *counts, *rows, *frozen;  // [runs]; rows: of q, k and v; frozen: positions that are final
    int64_t runs;
};

// A place is the bytes of one KV head in one page.
struct Place {
    uint8_t *k, *v;
    float *k_scales, *v_scales;  // of the page's 16 tokens; null unless scaled
};

inline Place place(const Layer &layer, const int64_t *table, int head, int64_t page) {
    int pages = layer.pages();
    int64_t block = page / pages, within = page % pages;
    uint8_t *at = layer.memory + table[block] + head * layer.head_bytes();
    uint8_t *v = at + size_t(pages) * layer.k_page();
    Place p = {at + within * layer.k_page(), v + within * layer.v_page(), nullptr, nullptr};
    if (scaled(layer.kv_type)) {
        p.k_scales = (float *)(v + size_t(pages) * layer.v_page()) + within * PAGE;
        p.v_scales = p.k_scales + layer.block_tokens;
    }
    return p;
}

// A chunk has the queries first .. first+queries-1 of a run, in the heads of the KV heads head .. head+heads-1, over
// the positions low .. high-1. A row is one of these queries in one of these heads; the rows of a KV head follow one
// another. If `parts` > 1, other chunks have the same rows over other positions, and all of them are merged: their
// states lie side by side in Call.states from `state` on, and Call.ready[ready] counts the chunks that are done.
struct Chunk {
    int32_t run, head, heads, first, queries;
    int64_t low, high;
    int32_t part, parts;
    int64_t state;
    int32_t ready;

    int rows(int group) const { return heads * queries * group; }
    int query(int group, int row) const { return first + row % (queries * group) / group; }
    int q_head(int group, int row) const { return (head + row / (queries * group)) * group + row % group; }
};

// A piece has the tokens first .. first+count-1 of a run, which are stored in one KV head.
struct Piece {
    static constexpr int64_t MOST = 256;
    int32_t run, head;
    int64_t first, count;
};

// Blocks move from one memory node to another in a plain form, that of the reference backend: k [tokens, Hkv, Dk], v
// [tokens, Hkv, Dv] and, for 8-bit types, their scales, [tokens, Hkv] each. Each part begins at a multiple of 64 bytes.
struct PlainBlock {
    uint8_t *k, *v;
    float *k_scales, *v_scales;

    PlainBlock(const Layer &layer, uint8_t *plain) : k(plain) {
        const size_t rows = size_t(layer.block_tokens) * layer.kv_heads, item = item_bytes(layer.kv_type);
        v = k + whole_lines(rows * layer.qk_dim * item);
        k_scales = (float *)(v + whole_lines(rows * layer.v_dim * item));
        v_scales = (float *)((uint8_t *)k_scales + whole_lines(rows * sizeof(float)));
    }
    static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
};

// One KV head of a block, in the cache at the byte offset `at`, and the block in its plain form.
struct Block {
    int64_t at;
    int32_t head;
    uint8_t *plain;
};

// An attention call reads and writes this. o: [T, Hq, Dv]; lse: [T, Hq].
struct Call {
    const void *q;
    const float *past_o, *past_lse;  // null, or merged with the result
    float *states;                   // for each part the padded output of each row, and then all peaks and all sums
    int32_t *ready;
    float *o, *lse;
    bool present;  // the call is over the new tokens, which ends the step: sinks join now
};

// Each worker has this memory.
struct Scratch {
    float q[2 * ROWS * MAX_DIM];
    float o[ROWS * MAX_DIM];
    float scores[ROWS * TILE];
    float weights[ROWS * TILE];
    float peak[ROWS], sum[ROWS], q_scale[ROWS], weight_scale[ROWS];
    uint8_t edge[TILE_PAGES][PAGE * MAX_DIM * 4];
};
struct Kernel {
    const char *name;
    void (*attend)(const Layer &, const Step &, const Call &, const Chunk &, Scratch &);
    // k: [T, Hkv, Dk]; v: [T, Hkv, Dv], of the layer's input type.
    void (*append)(const Layer &, const Step &, const void *k, const void *v, const Piece &, Scratch &);
    // Copy one KV head of a block out of the cache, into its plain form; and the reverse.
    void (*unpack)(const Layer &, const Block &, Scratch &);
    void (*pack)(const Layer &, const Block &, Scratch &);
    // Read all of the bytes, a multiple of 4096, with vector loads; the result depends on every one of them.
    uint64_t (*read)(const uint8_t *, size_t);
};

extern const Kernel portable_kernel, avx2_kernel, avx512_kernel, avx512bf16_kernel;

}  // namespace lamina

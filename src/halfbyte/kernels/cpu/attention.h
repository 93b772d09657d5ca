// What the two ways of computing attention share: the job, a unit of it, and how keys are read.
//
// `attention.c` walks units and splits and computes with vectors; `attention_tiles.c` computes a split
// with the matrix unit (AMX) where a machine has one.

#ifndef HALFBYTE_ATTENTION_H
#define HALFBYTE_ATTENTION_H

#include "vectors.h"

enum { LANES = 16, SPLIT = 256, TILE = 16, MAX_ROWS = 96, MAX_HEAD = 256 };
enum { SPAN = 4 };  // splits

typedef struct {
    const bf16 *q;                              // (tokens, heads, head_dim), dense
    bf16 *out;                                  // the same
    const uint8_t *k_cache, *v_cache;
    long long page_stride, slot_stride, head_stride;  // elements
    const int32_t *block_table;
    const int32_t *context_lengths, *query_starts;
    long long table_stride;
    int num_sequences, page_tokens, num_heads, num_kv_heads, head_dim, is_fp8;
    float score_scale, v_scale;
    int tokens_per_unit, num_units, is_spread, use_tiles;
    int first_span, num_spans, is_end;          // of this call; whether no span comes after them
    const int32_t *units;                       // (units, 3): sequence, first query, kv head
    float *partial;                             // (units, spans, rows, 2 + head_dim)
    float *totals;                              // (tokens, heads, 2 + head_dim) between calls, or NULL
} attention;

// The part of a unit that everything below works on.
typedef struct {
    int sequence, kv_head, num_rows, group;
    int position[MAX_ROWS];                     // of the row's query
    const bf16 *q[MAX_ROWS];
    bf16 *out[MAX_ROWS];
} unit;

// Result of a row over some splits: softmax maximum, sum of exponentials, weighted values.
typedef struct {
    float max, sum;
    float values[MAX_HEAD] __attribute__((aligned(64)));
} state;

// Element offsets in the caches of the tokens of a split; one division for all of them.
INLINE void find_tokens(const attention *job, const unit *u, int first, int count,
                        long long offsets[SPLIT]) {
    const int32_t *page = job->block_table + u->sequence * job->table_stride + first / job->page_tokens;
    int slot = first % job->page_tokens;
    for (int t = 0; t < count; t++, slot++) {
        if (slot == job->page_tokens) slot = 0, page++;
        offsets[t] = *page * job->page_stride + slot * job->slot_stride + u->kv_head * job->head_stride;
    }
}

// Rows of a page lie apart by the other heads' bytes, which the hardware's prefetching does not
// follow well: ask for the next tile's keys and, as they come later, this tile's values.
INLINE void prefetch_tile(const attention *job, int row_bytes, const long long *offsets, int count,
                          int num_next) {
    int width = job->is_fp8 ? 1 : 2;
    for (int at = 0; at < row_bytes; at += 64) {
        for (int t = 0; t < num_next; t++)
            __builtin_prefetch(job->k_cache + offsets[TILE + t] * width + at);
        for (int t = 0; t < count; t++) __builtin_prefetch(job->v_cache + offsets[t] * width + at);
    }
}

// The same 64 bytes of 16 tokens -> word i of all tokens in vector i.
#if HB_AVX512
INLINE void transpose_words(const uint8_t *const row[TILE], int at, u8x64 words[TILE]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(row[i] + at);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int n = 0; n < 2; n++) {
            a[i + 2 * n] = _mm512_unpacklo_epi64(b[i + n], b[i + n + 2]);
            a[i + 2 * n + 1] = _mm512_unpackhi_epi64(b[i + n], b[i + n + 2]);
        }
    // a[4 g + w], 128-bit lane q: word 4 q + w of tokens 4 g .. 4 g + 3
    for (int w = 0; w < 4; w++) {
        __m512i low = _mm512_shuffle_i32x4(a[w], a[4 + w], 0x88);
        __m512i low_odd = _mm512_shuffle_i32x4(a[w], a[4 + w], 0xdd);
        __m512i high = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0x88);
        __m512i high_odd = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0xdd);
        words[w] = (u8x64)_mm512_shuffle_i32x4(low, high, 0x88);
        words[8 + w] = (u8x64)_mm512_shuffle_i32x4(low, high, 0xdd);
        words[4 + w] = (u8x64)_mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        words[12 + w] = (u8x64)_mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// Four codes of each token -> in each 16-byte lane the first two codes of its tokens, then the others.
INLINE u8x64 split_pairs(u8x64 words) {
    __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    return (u8x64)_mm512_shuffle_epi8((__m512i)words, _mm512_broadcast_i32x4(order));
}
#else
INLINE void transpose_words(const uint8_t *const row[TILE], int at, u8x64 words[TILE]) {
    for (int i = 0; i < TILE; i++)
        for (int t = 0; t < TILE; t++) memcpy((uint8_t *)&words[i] + 4 * t, row[t] + at + 4 * i, 4);
}

INLINE u8x64 split_pairs(u8x64 words) {
    uint8_t from[64], to[64];
    memcpy(from, &words, sizeof from);
    for (int t = 0; t < TILE; t++)
        for (int n = 0; n < 4; n++)
            to[(t / 4) * 16 + (n / 2) * 8 + (t % 4) * 2 + n % 2] = from[4 * t + n];
    memcpy(&words, to, sizeof words);
    return words;
}
#endif

// Keys of 16 tokens as pairs of neighbouring features, tokens in the lanes: (head_dim / 2) vectors.
INLINE void load_keys(const attention *job, int head_dim, const long long *offsets, int count,
                      u16x32 *keys) {
    const uint8_t *row[TILE];
    int width = job->is_fp8 ? 1 : 2, row_bytes = head_dim * width;
    for (int t = 0; t < TILE; t++)  // lanes without a token repeat the last one; nobody reads them
        row[t] = job->k_cache + offsets[t < count ? t : count - 1] * width;
    for (int at = 0; at < row_bytes; at += 64) {
        u8x64 words[TILE];
        int num_words = TILE;
        if (row_bytes - at >= 64) {
            transpose_words(row, at, words);
        } else {
            num_words = (row_bytes - at) / 4;
            for (int i = 0; i < num_words; i++)
                for (int t = 0; t < TILE; t++)
                    memcpy((uint8_t *)&words[i] + 4 * t, row[t] + at + 4 * i, 4);
        }
        for (int i = 0; i < num_words; i++)
            if (job->is_fp8)
                decode_e4m3_64(split_pairs(words[i]), &keys[at / 2 + 2 * i], &keys[at / 2 + 2 * i + 1]);
            else
                memcpy(&keys[at / 4 + i], &words[i], 64);
    }
}

// Widened values lie in groups of 64 in the order of decode_e4m3_64_f32 where whole groups are
// decoded, else as stored: the place in the result of what stands at `i`.
INLINE int place_of(const attention *job, int i) {
    if (!job->is_fp8 || i >= job->head_dim / 64 * 64) return i;
    return i / 64 * 64 + i / 4 % 4 * 16 + i / 16 % 4 * 4 + i % 4;
}

// Whether the matrix unit takes this job; asks the system for it on the first call.
int hb_can_use_tiles(const attention *job);

// As `attend_split` of attention.c, on the matrix unit. What it leaves in `results` of rows whose
// query stands before the split means nothing.
void hb_attend_split_on_tiles(const attention *job, const unit *u, int split, state *results);

#endif

// e4m3 codes of a weight to NVFP4, without decoding one of them; and the largest code of a tensor.
//
// With one scale for a whole weight, everything about a 16-block follows from its largest
// magnitude code m: the block scale, and for every other magnitude code the e2m1 code it becomes.
// Decoding, dividing and rounding keep order, so that a row of eight limits per m says it all: the
// e2m1 magnitude is the number of limits 1-7 that a code exceeds, and a negative weight keeps its
// sign if its code exceeds limit 8 (else it became zero). The caller makes the limits with the
// arithmetic of `formats`, of which there is no second statement here.
//
// A block is 16 bytes: seven comparisons and additions, whatever the instruction set.
// Bytes: 1 read and 0.56 written a weight.

#include "pool.h"
#include "vectors.h"

enum { BLOCK = 16, LIMITS = 8, ITEM_BLOCKS = 4096 };

typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

typedef struct {
    const uint8_t *codes;
    const i8x16 *limits;          // [128][LIMITS], each in all lanes
    const uint8_t *block_scales;  // [128]
    uint8_t *packed, *scales;
    uint8_t *largest;             // of every item
    long long num_blocks;
} requantizing;

INLINE uint8_t largest_of(const uint8_t *codes, int count) {
    uint8_t largest = 0;
    for (int i = 0; i < count; i++) {
        uint8_t magnitude = codes[i] & 0x7f;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

INLINE u8x8 packed_codes(i8x16 codes, const i8x16 *limits) {
    i8x16 magnitudes = codes & 0x7f;
    i8x16 counted = {0};  // minus the e2m1 magnitude: a comparison that holds gives -1
    for (int k = 0; k < LIMITS - 1; k++) counted += magnitudes > limits[k];
    i8x16 is_negative = (codes < 0) & (magnitudes > limits[LIMITS - 1]);
    u16x8 pairs = (u16x8)((-counted) | (is_negative & 8));
    return __builtin_convertvector((pairs | (pairs >> 4)) & 0xff, u8x8);
}

static void requantize_item(const void *context, int item) {
    const requantizing *job = context;
    long long first = (long long)item * ITEM_BLOCKS, last = first + ITEM_BLOCKS;
    if (last > job->num_blocks) last = job->num_blocks;
    uint8_t largest = 0;
    for (long long b = first; b < last; b++) {
        i8x16 codes;
        memcpy(&codes, job->codes + b * BLOCK, sizeof codes);
        uint8_t m = largest_of(job->codes + b * BLOCK, BLOCK);
        u8x8 packed = packed_codes(codes, job->limits + m * LIMITS);
        memcpy(job->packed + b * (BLOCK / 2), &packed, sizeof packed);
        job->scales[b] = job->block_scales[m];
        largest = m > largest ? m : largest;
    }
    job->largest[item] = largest;
}

// `largest` has one byte for every 4096 blocks. `limits` is aligned to 16 bytes.
void hb_fp8_to_nvfp4(const uint8_t *codes, const int8_t *limits, const uint8_t *block_scales,
                     uint8_t *packed, uint8_t *scales, uint8_t *largest, long long num_blocks,
                     int num_threads) {
    requantizing job = {codes, (const i8x16 *)limits, block_scales, packed, scales, largest,
                        num_blocks};
    hb_phase phase = {requantize_item, (int)((num_blocks + ITEM_BLOCKS - 1) / ITEM_BLOCKS)};
    hb_run(&phase, 1, &job, num_threads);
}

// ---- the largest code --------------------------------------------------------------------------

typedef struct {
    const uint8_t *codes;
    uint8_t *largest;
    long long num_codes;
} searching;

static void search_item(const void *context, int item) {
    const searching *job = context;
    long long first = (long long)item * ITEM_BLOCKS * BLOCK, left = job->num_codes - first;
    int count = left < ITEM_BLOCKS * BLOCK ? (int)left : ITEM_BLOCKS * BLOCK;
    job->largest[item] = largest_of(job->codes + first, count);
}

// `largest` has one byte for every 65,536 codes.
void hb_largest_code(const uint8_t *codes, uint8_t *largest, long long num_codes, int num_threads) {
    searching job = {codes, largest, num_codes};
    long long items = (num_codes + ITEM_BLOCKS * BLOCK - 1) / (ITEM_BLOCKS * BLOCK);
    hb_phase phase = {search_item, (int)items};
    hb_run(&phase, 1, &job, num_threads);
}

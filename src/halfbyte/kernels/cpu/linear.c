// y = x w^T for weights in bf16, e4m3 or e2m1, read as stored and decoded on the way.
//
// Weights lie in panels of 32 output features, two halves of 16. A panel walks along the inputs in
// blocks of 16; of a block each half is eight vectors of two neighbouring inputs for 16 outputs, so
// that one bf16 pair of x, broadcast, multiplies it: no sums across lanes. Panels follow each other
// in memory, so a thread reads one stream. Ragged last panels are padded with zeros.
//
//   for each panel                        (items of the thread pool: some panels)
//     for each group of up to 48 rows
//       for each block: decode 2 x 8 vectors once
//         for each 8 rows: 8 products a row and half, then sum += part * scale
//
// The sum of a row has one fixed order, so it does not depend on which rows run beside it or on the
// number of threads. Codes and codes times block scale are exact; row and token scales multiply the
// sum.
//
// Bytes: O*I*{2, 1, 0.5625} read once a group of 48 rows; FLOPs: 2*T*O*I. At one row it is bound by
// memory and decoding, from some 4 rows on by the products.

#include "pool.h"
#include "vectors.h"

enum { FORMAT_BF16 = 0, FORMAT_FP8 = 1, FORMAT_NVFP4 = 2 };
enum { LANES = 16, HALVES = 2, PANEL = 32, BLOCK = 16, PAIRS = 8, GROUP = 48 };
enum { ROWS = HB_AVX512 ? 8 : 2 };  // at once: as many as sums fit the registers
enum { AHEAD_BYTES = 4096 };  // prefetched: what memory delivers in some 300 ns to one core

static const int HALF_BYTES[] = {512, 256, 128};  // of a block

typedef struct {
    const bf16 *x;          // (rows, in), dense
    bf16 *packed_x;         // scratch of the same size; unused for one row
    const uint8_t *codes;   // panels
    const uint8_t *scales;  // NVFP4: (panels, blocks, 32), see pack_scale
    const float *row_scale; // (panels * 32), or NULL for 1
    const float *token_scale;  // (rows), or NULL for 1
    void *y;                // (rows, out), dense
    int rows, in, out, format, is_f32;
    int panels_per_item, num_panels;
} product;

// Blocks scales are e4m3 without sign; re-biased so that 5 exponent and 3 mantissa bits hold every
// value >= 2^-9 as a normal number, a shift and an addition make the f32.
enum { SCALE_BIAS = 15 };

INLINE f32x16 decode_scales(const uint8_t *from) {
    u8x16 bytes;
    memcpy(&bytes, from, sizeof bytes);
#if HB_AVX512
    u32x16 wide = (u32x16)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
    u32x16 wide = __builtin_convertvector(bytes, u32x16);
#endif
    return (f32x16)((wide << 20) + ((127u - SCALE_BIAS) << 23));
}

INLINE void decode_half(int format, const uint8_t *from, u16x32 w[PAIRS]) {
    if (format == FORMAT_BF16) {
        memcpy(w, from, 512);
    } else if (format == FORMAT_FP8) {
        for (int v = 0; v < 4; v++) {
            u8x64 codes;
            memcpy(&codes, from + 64 * v, 64);
            decode_e4m3_64(codes, &w[2 * v], &w[2 * v + 1]);
        }
    } else {
        for (int v = 0; v < 2; v++) {
            u16x32 words;
            memcpy(&words, from + 64 * v, 64);
            for (int n = 0; n < 4; n++) w[4 * v + n] = decode_e2m1_words(words >> (4 * n));
        }
    }
}

INLINE void store_half(const product *job, int row, int first, f32x16 sum) {
    int count = job->out - first < LANES ? job->out - first : LANES;
    if (count <= 0) return;
    if (job->row_scale) sum *= load_f32(job->row_scale + first);
    if (job->token_scale) sum *= job->token_scale[row];
    size_t at = (size_t)row * (size_t)job->out + (size_t)first;
    if (job->is_f32) {
        memcpy((float *)job->y + at, &sum, (size_t)count * sizeof(float));
    } else {
        store_bf16_part((bf16 *)job->y + at, sum, count);
    }
}

// One block of a panel times `num_rows` rows; both sizes are constants after inlining, so that the
// parts stay in registers: 16 sums, two weights, one pair of x.
INLINE void multiply_block(int format, int num_rows, const u16x32 *w, const f32x16 *scale,
                           const bf16 *x, f32x16 *sums) {
    f32x16 part[ROWS][HALVES];
    for (int r = 0; r < num_rows; r++)
        for (int h = 0; h < HALVES; h++) part[r][h] = (f32x16){0};
#pragma GCC unroll 8
    for (int j = 0; j < PAIRS; j++)
#pragma GCC unroll 8
        for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; h++)
                part[r][h] = dot_pair(part[r][h], w[h * PAIRS + j], x + r * BLOCK + 2 * j);
    for (int r = 0; r < num_rows; r++)
        for (int h = 0; h < HALVES; h++) {
            f32x16 *sum = &sums[r * HALVES + h];
            *sum = format == FORMAT_NVFP4 ? fused(part[r][h], scale[h], *sum) : *sum + part[r][h];
        }
}

#define ROWS_CASE(n)                                                        \
    case n:                                                                 \
        if (n <= ROWS) multiply_block(format, n, w, scale, at, at_sums);    \
        break;

INLINE void multiply_group(const product *job, int format, int panel, int first_row, int num_rows) {
    int num_blocks = job->in / BLOCK, block_bytes = HALVES * HALF_BYTES[format];
    const uint8_t *codes = job->codes + (size_t)panel * num_blocks * block_bytes;
    const uint8_t *scales = job->scales + (size_t)panel * num_blocks * PANEL;
    const bf16 *x = (job->rows == 1 ? job->x : job->packed_x) + (size_t)first_row * (size_t)job->in;
    f32x16 sums[GROUP * HALVES], scale[HALVES];
    memset(sums, 0, sizeof(f32x16) * HALVES * (size_t)num_rows);
    for (int b = 0; b < num_blocks; b++, codes += block_bytes, scales += PANEL) {
        u16x32 w[HALVES * PAIRS];
        for (int line = 0; line < block_bytes; line += 64)
            __builtin_prefetch(codes + AHEAD_BYTES + line);
        for (int h = 0; h < HALVES; h++) {
            decode_half(format, codes + h * HALF_BYTES[format], w + h * PAIRS);
            if (format == FORMAT_NVFP4) scale[h] = decode_scales(scales + h * LANES);
        }
        const bf16 *at = x + (size_t)b * (size_t)(num_rows * BLOCK);
        f32x16 *at_sums = sums;
        for (int left = num_rows; left > 0; left -= ROWS, at += ROWS * BLOCK, at_sums += ROWS * HALVES)
            switch (left < ROWS ? left : ROWS) {
                ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4)
                ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7)
                default: multiply_block(format, ROWS, w, scale, at, at_sums);
            }
    }
    for (int r = 0; r < num_rows; r++)
        for (int h = 0; h < HALVES; h++)
            store_half(job, first_row + r, panel * PANEL + h * LANES, sums[r * HALVES + h]);
}

static void group_bf16(const product *job, int panel, int first_row, int num_rows) {
    multiply_group(job, FORMAT_BF16, panel, first_row, num_rows);
}
static void group_fp8(const product *job, int panel, int first_row, int num_rows) {
    multiply_group(job, FORMAT_FP8, panel, first_row, num_rows);
}
static void group_nvfp4(const product *job, int panel, int first_row, int num_rows) {
    multiply_group(job, FORMAT_NVFP4, panel, first_row, num_rows);
}

static void multiply_panels(const void *context, int item) {
    static void (*const run[])(const product *, int, int, int) = {group_bf16, group_fp8,
                                                                  group_nvfp4};
    const product *job = context;
    int first = item * job->panels_per_item;
    int last = first + job->panels_per_item;
    if (last > job->num_panels) last = job->num_panels;
    for (int panel = first; panel < last; panel++)
        for (int row = 0; row < job->rows; row += GROUP)
            run[job->format](job, panel, row, job->rows - row < GROUP ? job->rows - row : GROUP);
}

// Rows of a group side by side, block by block: the order in which multiply_group reads them.
static void pack_rows(const void *context, int item) {
    const product *job = context;
    int first = item * GROUP;
    int count = job->rows - first < GROUP ? job->rows - first : GROUP;
    bf16 *to = job->packed_x + (size_t)first * (size_t)job->in;
    for (int b = 0; b < job->in / BLOCK; b++)
        for (int r = 0; r < count; r++, to += BLOCK)
            memcpy(to, job->x + (size_t)(first + r) * (size_t)job->in + b * BLOCK, 2 * BLOCK);
}

// Fewer multiplications than this do not repay waking a second thread (some 5 microseconds).
#define WORTH_SHARING 100000

void hb_linear(int format, const bf16 *x, bf16 *scratch, const uint8_t *codes,
               const uint8_t *scales, const float *row_scale, const float *token_scale, void *y,
               int is_f32, int rows, int in, int out, int num_threads) {
    product job = {.x = x, .packed_x = scratch, .codes = codes, .scales = scales,
                   .row_scale = row_scale, .token_scale = token_scale, .y = y, .rows = rows,
                   .in = in, .out = out, .format = format, .is_f32 = is_f32, .num_panels = (out + PANEL - 1) / PANEL};
    if ((double)rows * in * out < WORTH_SHARING) num_threads = 1;
    // Some four items a thread even out unequal cores; neighbouring panels stay together.
    job.panels_per_item = job.num_panels / (4 * num_threads) + 1;
    int num_items = (job.num_panels + job.panels_per_item - 1) / job.panels_per_item;
    hb_phase phases[2] = {{pack_rows, rows > 1 ? (rows + GROUP - 1) / GROUP : 0},
                          {multiply_panels, num_items}};
    hb_run(phases, 2, &job, num_threads);
}

// ---- packing -------------------------------------------------------------------------------

typedef struct {
    const uint8_t *from;
    const uint8_t *scales;
    uint8_t *to;
    uint8_t *packed_scales;
    int in, out, format;
} packing;

// e4m3 -> exponent (5 bits, SCALE_BIAS) and mantissa (3 bits) without subnormals. A scale of zero
// has no such form; pack_output then stores zero codes under a scale of 1.
INLINE uint8_t pack_scale(uint8_t scale) {
    if (scale == 0) return SCALE_BIAS << 3;
    int exponent = scale >> 3, mantissa = scale & 7;
    if (exponent == 0) {
        exponent = 1;
        while (mantissa < 8) mantissa <<= 1, exponent--;
    }
    return (uint8_t)(((exponent - 7 + SCALE_BIAS) << 3) | (mantissa & 7));
}

// Where the layout wants input k (within its block) of output o (within its half): decode_half.
INLINE void place(const packing *job, uint8_t *half, int o, int k, const uint8_t *row, int column) {
    int pair = k / 2, parity = k % 2;
    if (job->format == FORMAT_BF16) {
        memcpy(half + pair * 64 + (2 * o + parity) * 2, row + (size_t)column * 2, 2);
    } else if (job->format == FORMAT_FP8) {
        int byte = (o / 4) * 16 + (pair % 2) * 8 + (o % 4) * 2 + parity;
        half[(pair / 2) * 64 + byte] = row[column];
    } else {
        int code = (row[column / 2] >> (4 * (column % 2))) & 15;
        int word = 2 * o + parity, nibble = pair % 4;
        half[(pair / 4) * 64 + word * 2 + nibble / 2] |= (uint8_t)(code << (4 * (nibble % 2)));
    }
}

INLINE void pack_output(const packing *job, int o, size_t output, uint8_t *to, uint8_t *scale_to) {
    static const int BITS[] = {16, 8, 4};
    int num_blocks = job->in / BLOCK, half_bytes = HALF_BYTES[job->format];
    const uint8_t *row = job->from + output * ((size_t)job->in * (size_t)BITS[job->format] / 8);
    for (int b = 0; b < num_blocks; b++) {
        uint8_t *half = to + (size_t)(b * HALVES + o / LANES) * (size_t)half_bytes;
        if (job->format == FORMAT_NVFP4) {
            uint8_t scale = job->scales[output * (size_t)num_blocks + (size_t)b];
            scale_to[b * PANEL + o] = pack_scale(scale);
            if (scale == 0) continue;  // the codes stay zero
        }
        for (int k = 0; k < BLOCK; k++) place(job, half, o % LANES, k, row, b * BLOCK + k);
    }
}

static void pack_panel(const void *context, int panel) {
    const packing *job = context;
    size_t num_blocks = (size_t)(job->in / BLOCK);
    size_t panel_bytes = num_blocks * HALVES * (size_t)HALF_BYTES[job->format];
    uint8_t *to = job->to + (size_t)panel * panel_bytes;
    uint8_t *scale_to = job->packed_scales + (size_t)panel * num_blocks * PANEL;
    memset(to, 0, panel_bytes);
    if (job->format == FORMAT_NVFP4) memset(scale_to, SCALE_BIAS << 3, num_blocks * PANEL);
    for (int o = 0; o < PANEL && panel * PANEL + o < job->out; o++)
        pack_output(job, o, (size_t)panel * PANEL + (size_t)o, to, scale_to);
}

void hb_pack(int format, const uint8_t *from, const uint8_t *scales, uint8_t *to,
             uint8_t *packed_scales, int in, int out, int num_threads) {
    packing job = {.from = from, .scales = scales, .to = to, .packed_scales = packed_scales,
                   .in = in, .out = out, .format = format};
    hb_phase phase = {pack_panel, (out + PANEL - 1) / PANEL};
    hb_run(&phase, 1, &job, num_threads);
}

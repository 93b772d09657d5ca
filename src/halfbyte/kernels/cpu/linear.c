// y = x w^T for weights in bf16, e4m3 or e2m1, read as stored and decoded on the way.
//
// Weights lie in panels of 16 output features. A panel walks along the inputs in blocks of 16; a
// block is eight vectors, each of two neighbouring inputs for all 16 outputs, so that one bf16 pair
// of x, broadcast, multiplies it: no sums across lanes. Ragged last panels are padded with zeros.
//
//   for each two panels                   (items of the thread pool)
//     for each group of up to 48 rows
//       for each block: decode 2 x 8 vectors once
//         for each 8 rows: 8 products a row and panel, then sum += part * scale
//
// The sum of a row has one fixed order, so it does not depend on which rows run beside it or on the
// number of threads. Codes and codes times block scale are exact; row scales multiply the sum.
//
// Bytes: O*I*{2, 1, 0.5625} read once a group of 48 rows; FLOPs: 2*T*O*I. At one row it is bound by
// memory and decoding, from some 4 rows on by the products.

#include "pool.h"
#include "vectors.h"

enum { FORMAT_BF16 = 0, FORMAT_FP8 = 1, FORMAT_NVFP4 = 2 };
enum { LANES = 16, BLOCK = 16, PAIRS = 8, PANELS = 2, ROWS = 8, GROUP = 48 };

static const int BLOCK_BYTES[] = {512, 256, 128};

typedef struct {
    const bf16 *x;          // (rows, in), dense
    bf16 *packed_x;         // scratch of the same size; unused for one row
    const uint8_t *codes;   // panels
    const uint8_t *scales;  // NVFP4: (panels, blocks, 16), see pack_scale
    const float *row_scale; // (panels * 16), or NULL for 1
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

INLINE void decode_block(int format, const uint8_t *from, u16x32 w[PAIRS]) {
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

INLINE void store_row(const product *job, int row, int panel, f32x16 sum) {
    int first = panel * LANES, count = job->out - first < LANES ? job->out - first : LANES;
    if (job->row_scale) sum *= load_f32(job->row_scale + first);
    size_t at = (size_t)row * (size_t)job->out + (size_t)first;
    if (job->is_f32) {
        memcpy((float *)job->y + at, &sum, (size_t)count * sizeof(float));
    } else {
        store_bf16_part((bf16 *)job->y + at, sum, count);
    }
}

// One block of `num_panels` panels times `num_rows` rows; all three sizes are constants after
// inlining, so that the parts stay in registers: 16 sums, two weights, one pair of x.
INLINE void multiply_block(int format, int num_panels, int num_rows, const u16x32 *w,
                           const f32x16 *scale, const bf16 *x, f32x16 *sums) {
    f32x16 part[ROWS][PANELS];
    for (int r = 0; r < num_rows; r++)
        for (int p = 0; p < num_panels; p++) part[r][p] = (f32x16){0};
#pragma GCC unroll 8
    for (int j = 0; j < PAIRS; j++)
#pragma GCC unroll 8
        for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 2
            for (int p = 0; p < num_panels; p++)
                part[r][p] = dot_pair(part[r][p], w[p * PAIRS + j], x + r * BLOCK + 2 * j);
    for (int r = 0; r < num_rows; r++)
        for (int p = 0; p < num_panels; p++) {
            f32x16 *sum = &sums[r * PANELS + p];
            *sum = format == FORMAT_NVFP4 ? fused(part[r][p], scale[p], *sum) : *sum + part[r][p];
        }
}

#define ROWS_CASE(n)                                                              \
    case n: multiply_block(format, num_panels, n, w, scale, at, at_sums); break;

INLINE void multiply_group(const product *job, int format, int num_panels, int panel,
                           int first_row, int num_rows) {
    int num_blocks = job->in / BLOCK;
    size_t panel_bytes = (size_t)num_blocks * BLOCK_BYTES[format];
    const uint8_t *codes = job->codes + (size_t)panel * panel_bytes;
    const uint8_t *scales = job->scales + (size_t)panel * num_blocks * LANES;
    const bf16 *x = (job->rows == 1 ? job->x : job->packed_x) + (size_t)first_row * (size_t)job->in;
    f32x16 sums[GROUP * PANELS], scale[PANELS];
    memset(sums, 0, sizeof(f32x16) * PANELS * (size_t)num_rows);
    for (int b = 0; b < num_blocks; b++) {
        u16x32 w[PANELS * PAIRS];
        for (int p = 0; p < num_panels; p++) {
            decode_block(format, codes + p * panel_bytes + (size_t)b * BLOCK_BYTES[format],
                         w + p * PAIRS);
            if (format == FORMAT_NVFP4)
                scale[p] = decode_scales(scales + ((size_t)p * num_blocks + (size_t)b) * LANES);
        }
        const bf16 *at = x + (size_t)b * (size_t)(num_rows * BLOCK);
        f32x16 *at_sums = sums;
        for (int left = num_rows; left > 0; left -= ROWS, at += ROWS * BLOCK, at_sums += ROWS * PANELS)
            switch (left) {
                ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4)
                ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7)
                default: multiply_block(format, num_panels, ROWS, w, scale, at, at_sums);
            }
    }
    for (int r = 0; r < num_rows; r++)
        for (int p = 0; p < num_panels; p++)
            store_row(job, first_row + r, panel + p, sums[r * PANELS + p]);
}

#define GROUP_FUNCTION(name, format, num_panels)                                            \
    static void name(const product *job, int panel, int first_row, int num_rows) {          \
        multiply_group(job, format, num_panels, panel, first_row, num_rows);                \
    }
GROUP_FUNCTION(one_bf16, FORMAT_BF16, 1)
GROUP_FUNCTION(two_bf16, FORMAT_BF16, 2)
GROUP_FUNCTION(one_fp8, FORMAT_FP8, 1)
GROUP_FUNCTION(two_fp8, FORMAT_FP8, 2)
GROUP_FUNCTION(one_nvfp4, FORMAT_NVFP4, 1)
GROUP_FUNCTION(two_nvfp4, FORMAT_NVFP4, 2)

static void multiply_panels(const void *context, int item) {
    static void (*const run[3][PANELS])(const product *, int, int, int) = {
        {one_bf16, two_bf16}, {one_fp8, two_fp8}, {one_nvfp4, two_nvfp4}};
    const product *job = context;
    int first = item * job->panels_per_item;
    int last = first + job->panels_per_item;
    if (last > job->num_panels) last = job->num_panels;
    for (int panel = first; panel < last; panel += PANELS) {
        int num_panels = last - panel < PANELS ? last - panel : PANELS;
        for (int row = 0; row < job->rows; row += GROUP) {
            int num_rows = job->rows - row < GROUP ? job->rows - row : GROUP;
            run[job->format][num_panels - 1](job, panel, row, num_rows);
        }
    }
}

// Rows of a group side by side, block by block: the order in which panel_rows reads them.
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
               const uint8_t *scales, const float *row_scale, void *y, int is_f32, int rows, int in,
               int out, int num_threads) {
    product job = {.x = x, .packed_x = scratch, .codes = codes, .scales = scales,
                   .row_scale = row_scale, .y = y, .rows = rows, .in = in, .out = out,
                   .format = format, .is_f32 = is_f32, .num_panels = (out + LANES - 1) / LANES};
    if ((double)rows * in * out < WORTH_SHARING) num_threads = 1;
    // Some four items a thread even out unequal cores; neighbouring panels stay together.
    job.panels_per_item = PANELS * (job.num_panels / (4 * num_threads * PANELS) + 1);
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
// has no such form; pack_panel then stores zero codes under a scale of 1.
INLINE uint8_t pack_scale(uint8_t scale) {
    if (scale == 0) return SCALE_BIAS << 3;
    int exponent = scale >> 3, mantissa = scale & 7;
    if (exponent == 0) {
        exponent = 1;
        while (mantissa < 8) mantissa <<= 1, exponent--;
    }
    return (uint8_t)(((exponent - 7 + SCALE_BIAS) << 3) | (mantissa & 7));
}

// Where the layout wants input k (within its block) of lane o: see decode_block.
INLINE void place(const packing *job, uint8_t *block, int o, int k, const uint8_t *row, int column,
                  int is_blank) {
    int pair = k / 2, parity = k % 2;
    if (job->format == FORMAT_BF16) {
        memcpy(block + pair * 64 + (2 * o + parity) * 2, row + (size_t)column * 2, 2);
    } else if (job->format == FORMAT_FP8) {
        int byte = (o / 4) * 16 + (pair % 2) * 8 + (o % 4) * 2 + parity;
        block[(pair / 2) * 64 + byte] = row[column];
    } else if (!is_blank) {
        int code = (row[column / 2] >> (4 * (column % 2))) & 15;
        int word = 2 * o + parity, nibble = pair % 4;
        block[(pair / 4) * 64 + word * 2 + nibble / 2] |= (uint8_t)(code << (4 * (nibble % 2)));
    }
}

static void pack_panel(const void *context, int panel) {
    static const int BITS[] = {16, 8, 4};
    const packing *job = context;
    int num_blocks = job->in / BLOCK;
    size_t row_bytes = (size_t)job->in * (size_t)BITS[job->format] / 8;
    uint8_t *to = job->to + (size_t)panel * num_blocks * BLOCK_BYTES[job->format];
    memset(to, 0, (size_t)num_blocks * BLOCK_BYTES[job->format]);
    uint8_t *scale_to = job->packed_scales + (size_t)panel * num_blocks * LANES;
    if (job->format == FORMAT_NVFP4) memset(scale_to, SCALE_BIAS << 3, (size_t)num_blocks * LANES);
    for (int o = 0; o < LANES && panel * LANES + o < job->out; o++) {
        size_t output = (size_t)panel * LANES + (size_t)o;
        const uint8_t *row = job->from + output * row_bytes;
        for (int b = 0; b < num_blocks; b++) {
            int is_blank = 0;
            if (job->format == FORMAT_NVFP4) {
                uint8_t scale = job->scales[output * (size_t)num_blocks + (size_t)b];
                scale_to[b * LANES + o] = pack_scale(scale);
                is_blank = scale == 0;
            }
            for (int k = 0; k < BLOCK; k++)
                place(job, to + (size_t)b * BLOCK_BYTES[job->format], o, k, row, b * BLOCK + k,
                      is_blank);
        }
    }
}

void hb_pack(int format, const uint8_t *from, const uint8_t *scales, uint8_t *to,
             uint8_t *packed_scales, int in, int out, int num_threads) {
    packing job = {.from = from, .scales = scales, .to = to, .packed_scales = packed_scales,
                   .in = in, .out = out, .format = format};
    hb_phase phase = {pack_panel, (out + LANES - 1) / LANES};
    hb_run(&phase, 1, &job, num_threads);
}

// A split of paged attention on the matrix unit (AMX, bf16 products summed in f32).
//
// Tile walk, R rows (query tokens times heads) in groups of 16, 256 tokens:
//
//   for each 16 tokens: keys decoded as pairs of features; for each row group: scores = q keys^T
//   for each row: scores -> weights, each as two bf16 whose sum keeps 16 bits of it
//   for each 64 features: values decoded as pairs of tokens;
//     for each row group: sums = high weights x values + low weights x values, in registers
//
// Decoding codes and exponentials take as long as the products from 96 rows on, hence so many. A
// row's sums run over the tokens in order and what lies behind its query counts as zero, so its bits
// do not depend on the rows beside it. (A NaN among the values of a later token of the same chunk
// does reach it; that token's own result is NaN in any case.)
//
// FLOPs: 6*R*H a token, 2 of 6 for the low weights; bytes: 2*H (e4m3) or 4*H a token and key/value
// head. Limits: H a multiple of 64, at most 256.

#include "attention.h"

#if defined(__AMX_BF16__) && defined(__linux__) && HB_AVX512

#include <sys/syscall.h>
#include <unistd.h>

enum { ROWS = 16, FEATURES = 64, PAIRED = 32 };
enum { SCORE_STRIDE = SPLIT + 16, WEIGHT_STRIDE = SPLIT + 32 };  // rows in different cache sets

// Tiles 0-3 are sums; 4 and 5 hold rows (queries, or high and low weights), 6 and 7 what they meet.
// The statements are volatile and clobber memory: their order among plain loads and stores counts.
#define TILE_ZERO(n) __asm__ volatile("tilezero %%tmm" #n ::: "memory")
#define TILE_LOAD(n, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #n ::"r"(from), "r"((long)(stride)) : "memory")
#define TILE_STORE(n, to, stride) \
    __asm__ volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(to), "r"((long)(stride)) : "memory")
#define TILE_MULTIPLY(sum, rows, columns) \
    __asm__ volatile("tdpbf16ps %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sum ::: "memory")

// Linux gives a process the matrix unit's registers when asked.
static int ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static int is_allowed = 1;

// For tests and comparisons: whether later calls may use the matrix unit. Returns what held before.
int hb_allow_tiles(int allowed) {
    int before = is_allowed;
    is_allowed = allowed;
    return before;
}

int hb_can_use_tiles(const attention *job) {
    static int answer = -1;  // every thread that asks finds the same
    if (answer < 0) answer = ask_for_tiles();
    return answer && is_allowed && job->head_dim % FEATURES == 0;
}

// Tiles of `num_rows` rows for sums and left operands, 16 for right operands.
static void configure(int num_rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shape.row_bytes[tile] = 64;
        shape.rows[tile] = (uint8_t)(tile < 6 && num_rows < ROWS ? num_rows : ROWS);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
}

typedef struct {
    bf16 q[MAX_ROWS * (MAX_HEAD + PAIRED)];
    float scores[MAX_ROWS][SCORE_STRIDE];
    bf16 high[MAX_ROWS][WEIGHT_STRIDE], low[MAX_ROWS][WEIGHT_STRIDE];
    u16x32 keys[2][MAX_HEAD / 2];            // of 16 tokens each
    u16x32 values[SPLIT / PAIRED][4][ROWS];  // token pairs of 64 features in the order of place_of
} workspace __attribute__((aligned(64)));

// Scores of 32 tokens, before scaling. Two groups of rows at a time, if there are two: four products
// that do not wait for each other.
INLINE void score_tokens(workspace *w, int num_rows, int head_dim, int at) {
    int stride = head_dim + PAIRED;
    for (int r = 0; r < num_rows; r += 2 * ROWS) {
        int has_second = r + ROWS < num_rows;
        const bf16 *q = w->q + r * stride;
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int i = 0; i < head_dim; i += PAIRED) {
            TILE_LOAD(4, q + i, 2 * stride);
            TILE_LOAD(6, &w->keys[0][i / 2], 64);
            TILE_MULTIPLY(0, 4, 6);
            TILE_LOAD(7, &w->keys[1][i / 2], 64);
            TILE_MULTIPLY(1, 4, 7);
            if (!has_second) continue;
            TILE_LOAD(5, q + ROWS * stride + i, 2 * stride);
            TILE_MULTIPLY(2, 5, 6);
            TILE_MULTIPLY(3, 5, 7);
        }
        TILE_STORE(0, &w->scores[r][at], sizeof w->scores[0]);
        TILE_STORE(1, &w->scores[r][at + TILE], sizeof w->scores[0]);
        if (!has_second) continue;
        TILE_STORE(2, &w->scores[r + ROWS][at], sizeof w->scores[0]);
        TILE_STORE(3, &w->scores[r + ROWS][at + TILE], sizeof w->scores[0]);
    }
}

// e^x for x <= 0 to within 2 ulp, e^-64 for what is less, which is nothing beside the largest
// weight's 1; NaN stays NaN. The steps of exp_f32. Lower weights would leave subnormal rests, which
// processors compute a hundred times slower.
INLINE __m512 exp_below_0(__m512 x) {
    const __m512 whole = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: rounds to a whole number
    x = _mm512_max_ps(_mm512_set1_ps(-64.0f), x);      // the second where one is NaN
    __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), whole);
    __m512 n = _mm512_sub_ps(shifted, whole);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3888889e-3f), _mm512_set1_ps(8.3333333e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1666667e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666667e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    // The lowest bits of `shifted` are n; what stands above them leaves by the shift.
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

INLINE __mmask16 first_lanes(int count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

// The upper halves of two vectors' lanes, as bf16.
INLINE void store_upper(bf16 *to, __m512i first, __m512i second) {
    static const bf16 odd[32] __attribute__((aligned(64))) = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    _mm512_store_si512(to, _mm512_permutex2var_epi16(first, _mm512_load_si512(odd), second));
}

// 32 weights in two parts: the upper half of their bits, and what that leaves, rounded.
INLINE void split_weights(const __m512 weight[2], bf16 *high, bf16 *low) {
    __m512i upper[2], rest[2];
    for (int n = 0; n < 2; n++) {
        __m512i bits = _mm512_castps_si512(weight[n]);
        upper[n] = _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000));
        bits = _mm512_castps_si512(_mm512_sub_ps(weight[n], _mm512_castsi512_ps(upper[n])));
        rest[n] = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    }
    store_upper(high, upper[0], upper[1]);
    store_upper(low, rest[0], rest[1]);
}

// Largest of a row's first `limit` scores, scaled.
INLINE float largest(const float *scores, int limit, float scale) {
    __m512 top[4];
    for (int n = 0; n < 4; n++) top[n] = _mm512_set1_ps(-INFINITY);
    int t = 0;
    for (; t + 4 * LANES <= limit; t += 4 * LANES)
        for (int n = 0; n < 4; n++) {
            __m512 score = _mm512_load_ps(scores + t + n * LANES);
            top[n] = _mm512_max_ps(_mm512_mul_ps(score, _mm512_set1_ps(scale)), top[n]);
        }
    for (; t < limit; t += LANES) {
        __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(scale));
        top[0] = _mm512_mask_max_ps(top[0], first_lanes(limit - t), score, top[0]);
    }
    return _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
}

// Weights of a row's first `limit` tokens, zeros up to `padded`; maximum and sum.
static void soften(const float *scores, int limit, int padded, float scale, bf16 *high, bf16 *low,
                   state *result) {
    __m512 sum = _mm512_setzero_ps();
    float max = largest(scores, limit, scale);
    for (int t = 0; t < padded; t += PAIRED) {
        __m512 weight[2];
        for (int n = 0; n < 2; n++) {
            __m512 score = _mm512_load_ps(scores + t + n * LANES);
            score = _mm512_fmsub_ps(score, _mm512_set1_ps(scale), _mm512_set1_ps(max));
            weight[n] = exp_below_0(score);
            if (t + PAIRED > limit)
                weight[n] = _mm512_maskz_mov_ps(first_lanes(limit - t - n * LANES), weight[n]);
            sum = _mm512_add_ps(sum, weight[n]);
        }
        split_weights(weight, high + t, low + t);
    }
    result->max = max, result->sum = _mm512_reduce_add_ps(sum);
}

// 64 e4m3 features of tokens t and t + 1 as pairs, in the order of place_of.
INLINE void load_pair_e4m3(const uint8_t *first, const uint8_t *second, u16x32 (*to)[ROWS],
                           int row) {
    __m512i a = _mm512_loadu_si512(first), b = _mm512_setzero_si512();
    if (second != NULL) b = _mm512_loadu_si512(second);
    u8x64 front = (u8x64)_mm512_unpacklo_epi8(a, b), back = (u8x64)_mm512_unpackhi_epi8(a, b);
    decode_e4m3_64(front, &to[0][row], &to[1][row]);
    decode_e4m3_64(back, &to[2][row], &to[3][row]);
}

// The same of bf16 features, in their own order.
INLINE void load_pair_bf16(const uint8_t *first, const uint8_t *second, u16x32 (*to)[ROWS],
                           int row) {
    static const uint16_t turns[2][32] __attribute__((aligned(64))) = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    for (int n = 0; n < 4; n++) {
        int at = n / 2 * 64;
        __m512i a = _mm512_loadu_si512(first + at), b = _mm512_setzero_si512();
        if (second != NULL) b = _mm512_loadu_si512(second + at);
        to[n][row] = (u16x32)_mm512_permutex2var_epi16(a, _mm512_load_si512(turns[n % 2]), b);
    }
}

INLINE void load_value_pairs(const attention *job, const long long *offsets, int count, int padded,
                             int feature, workspace *w) {
    int width = job->is_fp8 ? 1 : 2;
    const uint8_t *from = job->v_cache + feature * width;
    for (int t = 0; t < padded; t += 2) {
        u16x32(*to)[ROWS] = w->values[t / PAIRED];
        int row = t % PAIRED / 2;
        if (t >= count) {
            for (int n = 0; n < 4; n++) to[n][row] = (u16x32){0};
            continue;
        }
        const uint8_t *first = from + offsets[t] * width;
        const uint8_t *second = t + 1 < count ? from + offsets[t + 1] * width : NULL;
        if (job->is_fp8) load_pair_e4m3(first, second, to, row);
        else load_pair_bf16(first, second, to, row);
    }
}

INLINE void weigh_values(workspace *w, int num_rows, int padded, int feature, state *results) {
    for (int r = 0; r < num_rows; r += ROWS) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int t = 0; t < padded; t += PAIRED) {
            u16x32(*values)[ROWS] = w->values[t / PAIRED];
            TILE_LOAD(4, &w->high[r][t], sizeof w->high[0]);
            TILE_LOAD(5, &w->low[r][t], sizeof w->low[0]);
            TILE_LOAD(6, values[0], 64);
            TILE_MULTIPLY(0, 4, 6);
            TILE_LOAD(7, values[1], 64);
            TILE_MULTIPLY(1, 4, 7);
            TILE_MULTIPLY(0, 5, 6);
            TILE_LOAD(6, values[2], 64);
            TILE_MULTIPLY(1, 5, 7);
            TILE_MULTIPLY(2, 4, 6);
            TILE_LOAD(7, values[3], 64);
            TILE_MULTIPLY(3, 4, 7);
            TILE_MULTIPLY(2, 5, 6);
            TILE_MULTIPLY(3, 5, 7);
        }
        float *to = results[r].values + feature;
        TILE_STORE(0, to, sizeof(state));
        TILE_STORE(1, to + 16, sizeof(state));
        TILE_STORE(2, to + 32, sizeof(state));
        TILE_STORE(3, to + 48, sizeof(state));
    }
}

INLINE void load_rows(const unit *u, int head_dim, int start, workspace *w, int *limit) {
    for (int r = 0; r < u->num_rows; r++) {
        int seen = u->position[r] + 1 - start;
        limit[r] = seen < 0 ? 0 : seen > SPLIT ? SPLIT : seen;
        memcpy(w->q + r * (head_dim + PAIRED), u->q[r], (size_t)head_dim * sizeof(bf16));
    }
}

INLINE void attend_split_of(const attention *job, const unit *u, int head_dim, int split,
                            state *results) {
    workspace w;
    long long offsets[SPLIT];
    int start = split * SPLIT, limit[MAX_ROWS], num_rows = u->num_rows;
    int row_bytes = head_dim * (job->is_fp8 ? 1 : 2);
    int longest = u->position[num_rows - 1] + 1 - start;
    if (longest > SPLIT) longest = SPLIT;
    load_rows(u, head_dim, start, &w, limit);
    find_tokens(job, u, start, longest, offsets);
    configure(num_rows);
    for (int t = 0; t < longest; t += PAIRED) {
        for (int n = 0; n < 2; n++) {
            int at = t + n * TILE, left = longest - at, next = left - TILE;
            if (left <= 0) break;
            prefetch_tile(job, row_bytes, offsets + at, left < TILE ? left : TILE,
                          next < 0 ? 0 : next < TILE ? next : TILE);
            load_keys(job, head_dim, offsets + at, left < TILE ? left : TILE, w.keys[n]);
        }
        score_tokens(&w, num_rows, head_dim, t);
    }
    int padded = (longest + PAIRED - 1) / PAIRED * PAIRED;
    for (int r = 0; r < num_rows; r++)
        soften(w.scores[r], limit[r], padded, job->score_scale, w.high[r], w.low[r], &results[r]);
    for (int feature = 0; feature < head_dim; feature += FEATURES) {
        load_value_pairs(job, offsets, longest, padded, feature, &w);
        weigh_values(&w, num_rows, padded, feature, results);
    }
    // Idle tiles need not be saved when the system switches threads.
    __asm__ volatile("tilerelease" :::);
}

void hb_attend_split_on_tiles(const attention *job, const unit *u, int split, state *results) {
    switch (job->head_dim) {
        case 64: attend_split_of(job, u, 64, split, results); break;
        case 128: attend_split_of(job, u, 128, split, results); break;
        default: attend_split_of(job, u, job->head_dim, split, results);
    }
}

#else

int hb_allow_tiles(int allowed) { return allowed; }

int hb_can_use_tiles(const attention *job) { return (void)job, 0; }

void hb_attend_split_on_tiles(const attention *job, const unit *u, int split, state *results) {
    (void)job, (void)u, (void)split, (void)results;
}

#endif

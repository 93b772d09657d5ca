// Norms, the gated activation, rotary embedding and the store of keys and values.
//
// Each reads and writes its rows once. A row is one item, done by one thread in one fixed order.

#include "pool.h"
#include "vectors.h"

enum { LANES = 16 };

// Fewer values than this are done by the caller alone.
#define WORTH_SHARING 32768

INLINE int threads_for(long long num_values, int num_threads) {
    return num_values < WORTH_SHARING ? 1 : num_threads;
}

// ---- RMSNorm, with or without an addition in front -------------------------------------------

typedef struct {
    const bf16 *x, *residual, *weight;
    bf16 *normed, *sum;
    int width;
    float eps;
} norm;

static void norm_row(const void *context, int row) {
    const norm *job = context;
    size_t at = (size_t)row * (size_t)job->width;
    const bf16 *x = job->x + at;
    f32x16 squares = {0};
    for (int i = 0; i < job->width; i += LANES) {
        int count = job->width - i < LANES ? job->width - i : LANES;
        f32x16 value = load_bf16_part(x + i, count);
        if (job->residual) {
            value = widen(narrow(value + load_bf16_part(job->residual + at + i, count)));
            store_bf16_part(job->sum + at + i, value, count);
        }
        squares += value * value;
    }
    float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)job->width + job->eps);
    const bf16 *from = job->residual ? job->sum + at : x;
    for (int i = 0; i < job->width; i += LANES) {
        int count = job->width - i < LANES ? job->width - i : LANES;
        f32x16 value = load_bf16_part(from + i, count) * inverse;
        store_bf16_part(job->normed + at + i, value * load_bf16_part(job->weight + i, count), count);
    }
}

// `residual` and `sum` are both given or both NULL.
void hb_rms_norm(const bf16 *x, const bf16 *residual, const bf16 *weight, bf16 *normed, bf16 *sum,
                 int rows, int width, float eps, int num_threads) {
    norm job = {x, residual, weight, normed, sum, width, eps};
    hb_phase phase = {norm_row, rows};
    hb_run(&phase, 1, &job, threads_for((long long)rows * width, num_threads));
}

// ---- silu(gate) * up --------------------------------------------------------------------------

typedef struct {
    const bf16 *gate_up;
    bf16 *y;
    int width;
} gated;

static void gated_row(const void *context, int row) {
    const gated *job = context;
    const bf16 *gate = job->gate_up + (size_t)row * 2 * (size_t)job->width;
    const bf16 *up = gate + job->width;
    bf16 *y = job->y + (size_t)row * (size_t)job->width;
    for (int i = 0; i < job->width; i += LANES) {
        int count = job->width - i < LANES ? job->width - i : LANES;
        f32x16 g = load_bf16_part(gate + i, count);
        f32x16 value = g / (exp_f32(-g) + 1.0f) * load_bf16_part(up + i, count);
        store_bf16_part(y + i, value, count);
    }
}

void hb_silu_mul(const bf16 *gate_up, bf16 *y, int rows, int width, int num_threads) {
    gated job = {gate_up, y, width};
    hb_phase phase = {gated_row, rows};
    hb_run(&phase, 1, &job, threads_for((long long)rows * width, num_threads));
}

// ---- rows to e4m3 by their own largest value --------------------------------------------------

// A row twice: its largest magnitude, then its codes' values, which bf16 holds exactly. Bytes: 6 a
// value, of which the second reading is from the cache.
typedef struct {
    const bf16 *x;
    bf16 *rounded;
    float *scale;  // of each row
    int width;
} tokens;

// The e4m3 value next to x, ties to even, clamped to +-448; NaN stays.
INLINE f32x16 round_e4m3(f32x16 x) {
    u32x16 sign = (u32x16)x & 0x80000000u, bits = (u32x16)x ^ sign;
    f32x16 magnitude = (f32x16)bits;
    f32x16 normal = (f32x16)((bits + 0x7ffffu + ((bits >> 20) & 1u)) & ~0xfffffu);
    f32x16 subnormal = (magnitude + 16384.0f) - 16384.0f;  // 2^14 has steps of 2^-9: rounds to them
    f32x16 value = select_f32(magnitude < 0.015625f, subnormal, normal);
    value = select_f32(magnitude > 448.0f, splat(448.0f), value);
    value = select_f32(magnitude == magnitude, value, magnitude);
    return (f32x16)((u32x16)value | sign);
}

static void round_row(const void *context, int row) {
    const tokens *job = context;
    size_t at = (size_t)row * (size_t)job->width;
    const bf16 *x = job->x + at;
    unsigned largest = 0;  // of magnitudes as bits, above which NaN's are
    for (int i = 0; i < job->width; i++) {
        unsigned bits = x[i] & 0x7fffu;
        largest = bits > largest ? bits : largest;
    }
    float magnitude = bf16_to_float((bf16)largest);
    float scale = (magnitude < 1e-12f ? 1e-12f : magnitude) / 448.0f;
    job->scale[row] = scale;
    for (int i = 0; i < job->width; i += LANES) {
        int count = job->width - i < LANES ? job->width - i : LANES;
        f32x16 value = round_e4m3(load_bf16_part(x + i, count) / splat(scale));
        store_bf16_part(job->rounded + at + i, value, count);
    }
}

void hb_round_tokens(const bf16 *x, bf16 *rounded, float *scale, int rows, int width,
                     int num_threads) {
    tokens job = {x, rounded, scale, width};
    hb_phase phase = {round_row, rows};
    hb_run(&phase, 1, &job, threads_for((long long)rows * width, num_threads));
}

// ---- rotary embedding -------------------------------------------------------------------------

typedef struct {
    const bf16 *from[2];   // queries, keys
    bf16 *to[2];           // dense
    long long stride[2];   // elements from one token to the next, in `from`
    int heads[2];
    const float *cos, *sin;      // (rows, head_dim / 2)
    const float *query_scale;    // (rows), or NULL
    int head_dim;
} rotation;

INLINE void rotate_head(const bf16 *from, bf16 *to, const float *cos, const float *sin, float scale,
                        int half) {
    for (int i = 0; i < half; i += LANES) {
        int count = half - i < LANES ? half - i : LANES;
        f32x16 a = load_bf16_part(from + i, count), b = load_bf16_part(from + half + i, count);
        f32x16 c = load_f32_part(cos + i, count), s = load_f32_part(sin + i, count);
        store_bf16_part(to + i, (a * c - b * s) * scale, count);
        store_bf16_part(to + half + i, (b * c + a * s) * scale, count);
    }
}

static void rotate_row(const void *context, int row) {
    const rotation *job = context;
    int half = job->head_dim / 2;
    const float *cos = job->cos + (size_t)row * (size_t)half;
    const float *sin = job->sin + (size_t)row * (size_t)half;
    for (int part = 0; part < 2; part++) {
        float scale = part == 0 && job->query_scale ? job->query_scale[row] : 1.0f;
        size_t dense = (size_t)row * (size_t)(job->heads[part] * job->head_dim);
        for (int h = 0; h < job->heads[part]; h++)
            rotate_head(job->from[part] + row * job->stride[part] + h * job->head_dim,
                        job->to[part] + dense + (size_t)(h * job->head_dim), cos, sin, scale, half);
    }
}

void hb_rotate(const bf16 *q, long long q_stride, int num_heads, const bf16 *k, long long k_stride,
               int num_kv_heads, bf16 *q_out, bf16 *k_out, const float *cos, const float *sin,
               const float *query_scale, int rows, int head_dim, int num_threads) {
    rotation job = {{q, k}, {q_out, k_out}, {q_stride, k_stride}, {num_heads, num_kv_heads},
                    cos, sin, query_scale, head_dim};
    hb_phase phase = {rotate_row, rows};
    long long num_values = (long long)rows * (num_heads + num_kv_heads) * head_dim;
    hb_run(&phase, 1, &job, threads_for(num_values, num_threads));
}

// ---- keys and values into their pages ---------------------------------------------------------

typedef struct {
    const bf16 *from[2];
    long long from_stride[2];
    uint8_t *cache[2];
    long long page_stride, slot_stride, head_stride;  // elements, the same for both caches
    float scale[2];
    const int64_t *slots;
    int page_tokens, num_kv_heads, head_dim, is_fp8;
} storing;

static void store_token(const void *context, int row) {
    const storing *job = context;
    int64_t slot = job->slots[row];
    if (slot < 0) return;
    long long at = slot / job->page_tokens * job->page_stride +
                   slot % job->page_tokens * job->slot_stride;
    for (int part = 0; part < 2; part++)
        for (int h = 0; h < job->num_kv_heads; h++) {
            const bf16 *from = job->from[part] + row * job->from_stride[part] + h * job->head_dim;
            if (job->is_fp8) {
                uint8_t *to = job->cache[part] + at + h * job->head_stride;
                for (int i = 0; i < job->head_dim; i++)
                    to[i] = encode_e4m3(bf16_to_float(from[i]) / job->scale[part]);
            } else {
                bf16 *to = (bf16 *)job->cache[part] + at + h * job->head_stride;
                memcpy(to, from, (size_t)job->head_dim * sizeof(bf16));
            }
        }
}

void hb_store_kv(const bf16 *k, long long k_stride, const bf16 *v, long long v_stride,
                 uint8_t *k_cache, uint8_t *v_cache, const int64_t *slots, float k_scale,
                 float v_scale, int rows, long long page_stride, long long slot_stride,
                 long long head_stride, int page_tokens, int num_kv_heads, int head_dim, int is_fp8,
                 int num_threads) {
    storing job = {{k, v}, {k_stride, v_stride}, {k_cache, v_cache},
                   page_stride, slot_stride, head_stride, {k_scale, v_scale}, slots,
                   page_tokens, num_kv_heads, head_dim, is_fp8};
    hb_phase phase = {store_token, rows};
    long long num_values = 2LL * rows * num_kv_heads * head_dim;
    hb_run(&phase, 1, &job, threads_for(num_values, num_threads));
}

// ---- token masks ------------------------------------------------------------------------------

// Logits of tokens whose bit is 0 become -inf. Bits: token 32 w + b is bit b of word w.
void hb_mask_logits(float *logits, const uint32_t *allowed, int count) {
    for (int at = 0; at < count; at += 32) {
        uint32_t word = allowed[at / 32];
        int left = count - at < 32 ? count - at : 32;
        if (word == 0xffffffffu) continue;
#if HB_AVX512
        if (left == 32) {
            __m512 closed = _mm512_set1_ps(-INFINITY);
            _mm512_mask_storeu_ps(logits + at, (__mmask16)~word, closed);
            _mm512_mask_storeu_ps(logits + at + 16, (__mmask16)(~word >> 16), closed);
            continue;
        }
#endif
        for (int b = 0; b < left; b++)
            if (!(word >> b & 1)) logits[at + b] = -INFINITY;
    }
}

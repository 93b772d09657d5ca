// Causal attention of a ragged batch over paged keys and values, read as stored (e4m3 or bf16).
//
// A unit is a few neighbouring queries of one sequence and all query heads of one key/value head. The
// context is walked in splits of 256 tokens from position 0: scores of a split (keys decoded and
// transposed 16 tokens at a time), their maximum and exponentials, then weighted values; the results
// of four splits are merged in order, then those of these spans. Both are fixed by position, so a
// query's result does not depend on its neighbours, on how a prompt is cut into chunks, or on the
// number of threads.
//
// With few units (decode) the spans of a unit are items of their own and a second phase merges them.
// So it is where a call computes a few spans only and a later one goes on from what is kept of them.
//
// Bytes: 2*C*K*H a sequence and query tile; FLOPs: 4*T*N*H*C. Limits: H a multiple of 4, at most 256.

#include <stdlib.h>

#include "attention.h"
#include "pool.h"

enum { VECTOR_ROWS = 32 };  // of a unit without the matrix unit: their scores stay in the first cache

static void read_unit(const attention *job, int index, unit *u) {
    const int32_t *entry = job->units + 3 * index;
    u->sequence = entry[0];
    u->kv_head = entry[2];
    u->group = job->num_heads / job->num_kv_heads;
    int start = job->query_starts[u->sequence], stop = job->query_starts[u->sequence + 1];
    int first = entry[1], last = first + job->tokens_per_unit;
    if (last > stop - start) last = stop - start;
    u->num_rows = 0;
    for (int j = first; j < last; j++)
        for (int g = 0; g < u->group; g++) {
            size_t head = (size_t)(start + j) * (size_t)job->num_heads +
                          (size_t)(u->kv_head * u->group + g);
            u->position[u->num_rows] = job->context_lengths[u->sequence] - (stop - start) + j;
            u->q[u->num_rows] = job->q + head * (size_t)job->head_dim;
            u->out[u->num_rows] = job->out + head * (size_t)job->head_dim;
            u->num_rows++;
        }
}

// Values of up to 16 tokens widened to f32: values[token][head_dim], see place_of.
INLINE void load_values(const attention *job, int head_dim, const long long *offsets, int count,
                        float *values) {
    for (int t = 0; t < count; t++) {
        float *to = values + t * head_dim;
        int i = 0;
        if (job->is_fp8) {
            const uint8_t *from = job->v_cache + offsets[t];
            for (; i + 64 <= head_dim; i += 64) {
                u8x64 codes;
                f32x16 wide[4];
                memcpy(&codes, from + i, 64);
                decode_e4m3_64_f32(codes, wide);
                for (int n = 0; n < 4; n++) store_f32(to + i + 16 * n, wide[n]);
            }
            for (; i < head_dim; i++) to[i] = bf16_to_float(hb_e4m3_words[from[i]]);
        } else {
            const bf16 *from = (const bf16 *)job->v_cache + offsets[t];
            for (; i + LANES <= head_dim; i += LANES) store_f32(to + i, load_bf16(from + i));
            for (; i < head_dim; i++) to[i] = bf16_to_float(from[i]);
        }
    }
}

INLINE void score_tile(const attention *job, const unit *u, int head_dim, const u16x32 *keys,
                       float scores[MAX_ROWS][SPLIT], int at) {
    for (int r = 0; r < u->num_rows; r++) {
        const bf16 *q = u->q[r];
        f32x16 a = {0}, b = {0}, c = {0}, d = {0};  // four chains hide the product's latency
        int i = 0;
        for (; i + 4 <= head_dim / 2; i += 4) {
            a = dot_pair(a, keys[i], q + 2 * i), b = dot_pair(b, keys[i + 1], q + 2 * i + 2);
            c = dot_pair(c, keys[i + 2], q + 2 * i + 4), d = dot_pair(d, keys[i + 3], q + 2 * i + 6);
        }
        for (; i < head_dim / 2; i++) a = dot_pair(a, keys[i], q + 2 * i);
        store_f32(&scores[r][at], ((a + b) + (c + d)) * job->score_scale);
    }
}

// Scores of one row -> exponentials in place; tokens past `limit` count nothing.
INLINE void soften(float *scores, int limit, state *result) {
    i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 top = splat(-INFINITY);
    for (int t = 0; t < limit; t += LANES) {
        f32x16 seen = select_f32(lane + t < limit, load_f32(scores + t), splat(-INFINITY));
        top = select_f32(seen > top, seen, top);
    }
    result->max = max_lanes(top);
    f32x16 sum = {0};
    for (int t = 0; t < limit; t += LANES) {
        f32x16 weight = exp_f32(load_f32(scores + t) - result->max);
        weight = select_f32(lane + t < limit, weight, splat(0.0f));
        store_f32(scores + t, weight);
        sum += weight;
    }
    result->sum = sum_lanes(sum);
}

INLINE void add_values(const float *weights, const float *values, int count, int head_dim,
                       float *sums) {
    int i = 0;
    for (; i + 4 * LANES <= head_dim; i += 4 * LANES) {
        f32x16 a = load_f32(sums + i), b = load_f32(sums + i + 16);
        f32x16 c = load_f32(sums + i + 32), d = load_f32(sums + i + 48);
        for (int t = 0; t < count; t++) {
            const float *from = values + t * head_dim + i;
            f32x16 weight = splat(weights[t]);
            a = fused(load_f32(from), weight, a), b = fused(load_f32(from + 16), weight, b);
            c = fused(load_f32(from + 32), weight, c), d = fused(load_f32(from + 48), weight, d);
        }
        store_f32(sums + i, a), store_f32(sums + i + 16, b);
        store_f32(sums + i + 32, c), store_f32(sums + i + 48, d);
    }
    for (; i < head_dim; i++)
        for (int t = 0; t < count; t++) sums[i] += values[t * head_dim + i] * weights[t];
}

// Values of a split added up for a few rows that see all of it alike (decoding), 64 features at a
// time, sums in registers; num_rows is a constant after inlining. Adds in the order of add_values.
INLINE void add_values_of_few(const attention *job, int num_rows, int head_dim,
                              const long long *offsets, int count, float scores[MAX_ROWS][SPLIT],
                              state *results) {
    for (int i = 0; i < head_dim; i += 64) {
        f32x16 sum[4][4];
        for (int r = 0; r < num_rows; r++)
            for (int n = 0; n < 4; n++) sum[r][n] = (f32x16){0};
        for (int t = 0; t < count; t++) {
            u8x64 codes;
            f32x16 wide[4];
            memcpy(&codes, job->v_cache + offsets[t] + i, 64);
            decode_e4m3_64_f32(codes, wide);
            for (int r = 0; r < num_rows; r++)
                for (int n = 0; n < 4; n++) sum[r][n] = fused(wide[n], splat(scores[r][t]), sum[r][n]);
        }
        for (int r = 0; r < num_rows; r++)
            for (int n = 0; n < 4; n++) store_f32(results[r].values + i + 16 * n, sum[r][n]);
    }
}

INLINE void add_values_of_many(const attention *job, const unit *u, int head_dim,
                               const long long *offsets, int longest, const int *limit,
                               float scores[MAX_ROWS][SPLIT], state *results) {
    float values[TILE * MAX_HEAD] __attribute__((aligned(64)));
    for (int r = 0; r < u->num_rows; r++)
        if (limit[r] > 0) memset(results[r].values, 0, (size_t)head_dim * sizeof(float));
    for (int t = 0; t < longest; t += TILE) {
        int count = longest - t < TILE ? longest - t : TILE;
        load_values(job, head_dim, offsets + t, count, values);
        for (int r = 0; r < u->num_rows; r++) {
            int seen = limit[r] - t < count ? limit[r] - t : count;
            if (seen > 0) add_values(&scores[r][t], values, seen, head_dim, results[r].values);
        }
    }
}

// All rows of a unit over one split. Rows whose query stands before the split are left untouched.
INLINE void attend_split_of(const attention *job, const unit *u, int head_dim, int split,
                            state *results) {
    float scores[MAX_ROWS][SPLIT] __attribute__((aligned(64)));
    u16x32 keys[MAX_HEAD / 2];
    long long offsets[SPLIT];
    int start = split * SPLIT, limit[MAX_ROWS], longest = 0, is_even = job->is_fp8 && head_dim % 64 == 0;
    for (int r = 0; r < u->num_rows; r++) {
        int seen = u->position[r] + 1 - start;
        limit[r] = seen < 0 ? 0 : seen > SPLIT ? SPLIT : seen;
        if (limit[r] > longest) longest = limit[r];
        if (limit[r] != limit[0]) is_even = 0;
    }
    find_tokens(job, u, start, longest, offsets);
    for (int t = 0; t < longest; t += TILE) {
        int left = longest - t, next = left - TILE;
        int count = left < TILE ? left : TILE, num_next = next < 0 ? 0 : next < TILE ? next : TILE;
        prefetch_tile(job, head_dim * (job->is_fp8 ? 1 : 2), offsets + t, count, num_next);
        load_keys(job, head_dim, offsets + t, count, keys);
        score_tile(job, u, head_dim, keys, scores, t);
    }
    for (int r = 0; r < u->num_rows; r++)
        if (limit[r] > 0) soften(scores[r], limit[r], &results[r]);
    switch (is_even ? u->num_rows : 0) {
        case 1: add_values_of_few(job, 1, head_dim, offsets, longest, scores, results); break;
        case 2: add_values_of_few(job, 2, head_dim, offsets, longest, scores, results); break;
        case 3: add_values_of_few(job, 3, head_dim, offsets, longest, scores, results); break;
        case 4: add_values_of_few(job, 4, head_dim, offsets, longest, scores, results); break;
        default: add_values_of_many(job, u, head_dim, offsets, longest, limit, scores, results);
    }
}

static void attend_split(const attention *job, const unit *u, int split, state *results) {
    if (job->use_tiles) {
        hb_attend_split_on_tiles(job, u, split, results);
        return;
    }
    switch (job->head_dim) {
        case 64: attend_split_of(job, u, 64, split, results); break;
        case 128: attend_split_of(job, u, 128, split, results); break;
        default: attend_split_of(job, u, job->head_dim, split, results);
    }
}

INLINE float exp_one(float x) { return sum_lanes(exp_f32(splat(x))) / 16.0f; }

// Put the result of a later split behind that of the earlier ones.
INLINE void merge(float *max, float *sum, float *values, const state *later, int head_dim) {
    float top = *max > later->max ? *max : later->max;
    float old_weight = exp_one(*max - top), new_weight = exp_one(later->max - top);
    *max = top;
    *sum = *sum * old_weight + later->sum * new_weight;
    for (int i = 0; i < head_dim; i++)
        values[i] = values[i] * old_weight + later->values[i] * new_weight;
}

INLINE void finish(const attention *job, bf16 *out, float sum, const float *values) {
    float scale = job->v_scale / sum;
    for (int i = 0; i < job->head_dim; i++)
        out[place_of(job, i)] = float_to_bf16(values[i] * scale);
}

// All rows of a unit over the splits of one span. Rows whose query stands before it mean nothing.
static void attend_span(const attention *job, const unit *u, int span, state *results) {
    static __thread state now[MAX_ROWS];
    int last = u->position[u->num_rows - 1];
    for (int split = span * SPAN; split < (span + 1) * SPAN && split * SPLIT <= last; split++) {
        if (split == span * SPAN) {
            attend_split(job, u, split, results);
            continue;
        }
        attend_split(job, u, split, now);
        for (int r = 0; r < u->num_rows; r++)
            if (u->position[r] >= split * SPLIT)
                merge(&results[r].max, &results[r].sum, results[r].values, &now[r], job->head_dim);
    }
}

// Phase of whole units: the spans one after the other.
static void attend_unit(const void *context, int item) {
    const attention *job = context;
    unit u;
    static __thread state total[MAX_ROWS], now[MAX_ROWS];
    read_unit(job, item, &u);
    attend_span(job, &u, 0, total);
    for (int span = 1; span * SPAN * SPLIT <= u.position[u.num_rows - 1]; span++) {
        attend_span(job, &u, span, now);
        for (int r = 0; r < u.num_rows; r++)
            if (u.position[r] >= span * SPAN * SPLIT)
                merge(&total[r].max, &total[r].sum, total[r].values, &now[r], job->head_dim);
    }
    for (int r = 0; r < u.num_rows; r++) finish(job, u.out[r], total[r].sum, total[r].values);
}

INLINE float *partial_of(const attention *job, int index, int span, int row) {
    size_t rows = (size_t)(job->tokens_per_unit * (job->num_heads / job->num_kv_heads));
    size_t place = (size_t)index * (size_t)job->num_spans + (size_t)(span - job->first_span);
    size_t at = place * rows + (size_t)row;
    return job->partial + at * (size_t)(job->head_dim + 2);
}

// Phase of single spans; the item is unit * num_spans + span, counted from the first.
static void attend_one_span(const void *context, int item) {
    const attention *job = context;
    int index = item / job->num_spans, span = job->first_span + item % job->num_spans;
    int start = span * SPAN * SPLIT;
    unit u;
    static __thread state now[MAX_ROWS];
    read_unit(job, index, &u);
    if (start > u.position[u.num_rows - 1]) return;
    attend_span(job, &u, span, now);
    for (int r = 0; r < u.num_rows; r++) {
        if (u.position[r] < start) continue;
        float *to = partial_of(job, index, span, r);
        to[0] = now[r].max, to[1] = now[r].sum;
        memcpy(to + 2, now[r].values, (size_t)job->head_dim * sizeof(float));
    }
}

// What is kept of a query and head from one call to the next.
INLINE float *kept_of(const attention *job, const bf16 *q) {
    size_t row = (size_t)(q - job->q) / (size_t)job->head_dim;
    return job->totals ? job->totals + row * (size_t)(job->head_dim + 2) : NULL;
}

INLINE void read_state(const attention *job, const float *from, state *to) {
    to->max = from[0], to->sum = from[1];
    memcpy(to->values, from + 2, (size_t)job->head_dim * sizeof(float));
}

static void merge_unit(const void *context, int item) {
    const attention *job = context;
    unit u;
    read_unit(job, item, &u);
    for (int r = 0; r < u.num_rows; r++) {
        state total, now;
        float *kept = kept_of(job, u.q[r]);
        int span = job->first_span, end = span + job->num_spans;
        if (span > 0) read_state(job, kept, &total);
        for (; span < end && span * SPAN * SPLIT <= u.position[r]; span++) {
            read_state(job, partial_of(job, item, span, r), span == 0 ? &total : &now);
            if (span > 0) merge(&total.max, &total.sum, total.values, &now, job->head_dim);
        }
        if (job->is_end) {
            finish(job, u.out[r], total.sum, total.values);
            continue;
        }
        kept[0] = total.max, kept[1] = total.sum;
        memcpy(kept + 2, total.values, (size_t)job->head_dim * sizeof(float));
    }
}

INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

static int list_units(const attention *job, int32_t *units) {
    int count = 0;
    for (int s = 0; s < job->num_sequences; s++) {
        int num_queries = job->query_starts[s + 1] - job->query_starts[s];
        for (int first = 0; first < num_queries; first += job->tokens_per_unit)
            for (int k = 0; k < job->num_kv_heads; k++, count++)
                if (units) {
                    units[3 * count] = s;
                    units[3 * count + 1] = first;
                    units[3 * count + 2] = k;
                }
    }
    return count;
}

// Computes the spans [first_span, stop_span) of the context. With `totals` a call leaves there what
// the next one goes on from, and only the one that reaches the end writes `out`; without it a call
// computes all. Returns 0, or 1 if memory ran out.
int hb_paged_attention(const bf16 *q, bf16 *out, const uint8_t *k_cache, const uint8_t *v_cache,
                       const int32_t *block_table, const int32_t *context_lengths,
                       const int32_t *query_starts, long long page_stride, long long slot_stride,
                       long long head_stride, long long table_stride, int num_sequences,
                       int page_tokens, int num_heads, int num_kv_heads, int head_dim, int is_fp8,
                       float score_scale, float v_scale, int first_span, int stop_span,
                       float *totals, int num_threads) {
    attention job = {.q = q, .out = out, .k_cache = k_cache, .v_cache = v_cache,
                     .page_stride = page_stride, .slot_stride = slot_stride,
                     .head_stride = head_stride, .block_table = block_table,
                     .context_lengths = context_lengths, .query_starts = query_starts,
                     .table_stride = table_stride, .num_sequences = num_sequences,
                     .page_tokens = page_tokens, .num_heads = num_heads,
                     .num_kv_heads = num_kv_heads, .head_dim = head_dim, .is_fp8 = is_fp8,
                     .score_scale = score_scale, .v_scale = v_scale,
                     .first_span = first_span, .totals = totals};
    int group = num_heads / num_kv_heads;
    job.use_tiles = hb_can_use_tiles(&job);
    int most_rows = job.use_tiles ? MAX_ROWS : VECTOR_ROWS;
    job.tokens_per_unit = group >= most_rows ? 1 : most_rows / group;
    int longest = 0, most = 0;
    for (int s = 0; s < num_sequences; s++) {
        int num_queries = query_starts[s + 1] - query_starts[s];
        if (num_queries > most) most = num_queries;
        // A caller that goes span by span stops at the longest context, queried or not.
        if ((num_queries > 0 || totals) && context_lengths[s] > longest) longest = context_lengths[s];
    }
    if (most == 0) return 0;
    if (most < job.tokens_per_unit) job.tokens_per_unit = most;
    job.num_units = list_units(&job, NULL);
    int end_span = ceil_div(longest, SPAN * SPLIT);
    job.is_end = stop_span >= end_span;
    job.num_spans = (job.is_end ? end_span : stop_span) - first_span;
    if (job.num_spans <= 0) return 0;
    job.is_spread = totals != NULL || (job.num_spans > 1 && job.num_units < 8 * num_threads);
    size_t rows = (size_t)job.num_units * (size_t)job.num_spans *
                  (size_t)(job.tokens_per_unit * group);
    int32_t *units = malloc((size_t)job.num_units * 3 * sizeof(int32_t));
    float *partial = job.is_spread ? malloc(rows * (size_t)(head_dim + 2) * sizeof(float)) : NULL;
    if (units == NULL || (job.is_spread && partial == NULL)) {
        free(units);
        free(partial);
        return 1;
    }
    list_units(&job, units);
    job.units = units, job.partial = partial;
    hb_phase whole[1] = {{attend_unit, job.num_units}};
    hb_phase spread[2] = {{attend_one_span, job.num_units * job.num_spans},
                         {merge_unit, job.num_units}};
    if (job.is_spread) hb_run(spread, 2, &job, num_threads);
    else hb_run(whole, 1, &job, num_threads);
    free(units);
    free(partial);
    return 0;
}

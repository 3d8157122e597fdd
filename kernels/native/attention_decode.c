/* Attention of one new token per sequence over its paged KV. See attention_decode.py.
 *
 * Keys and values are read in place, once for HEADS query heads that share them; a group of another size is filled up
 * with heads of zeros. Scores of POSITIONS x HEADS are one vector, position by position, and so the weights lie.
 */
#include "element.h"
#include "share.h"

#define HEADS 4
#define POSITIONS 4
#define CACHE_LINE 64
#define VALUE_LANES 4 /* vectors of a value summed up at once: with HEADS, as many sums as registers hold */

/* One sequence and some heads over one KV head, as pointers to their part of everything. */
struct task {
    const element *k_head, *v_head; /* of block 0; blocks lie block_stride apart */
    const int32_t *table;
    int64_t context_len, block_size, block_stride, head_dim;
    float *queries; /* [HEADS, head_dim] */
    float *sums;    /* [HEADS, head_dim] */
    float *weights; /* [context_len rounded up to POSITIONS, HEADS] */
};

/* The first row of one block in a cache. What a program reads next is far away, so it is sent for early. */
static inline const element *block_at(const struct task *t, const element *cache, int64_t index) {
    if ((index + 1) * t->block_size < t->context_len) {
        const element *next = cache + t->table[index + 1] * t->block_stride;
        for (int64_t i = 0; i < t->block_size * t->head_dim; i += CACHE_LINE / sizeof(element))
            __builtin_prefetch(next + i);
    }
    return cache + t->table[index] * t->block_stride;
}

/* The scores of POSITIONS keys that follow one another. */
static inline lanes scores_of(const struct task *t, const element *keys) {
    lanes parts[POSITIONS * HEADS] = {{0}};
    for (int64_t d = 0; d < t->head_dim; d += LANES)
        for (int i = 0; i < POSITIONS; i++) {
            lanes key = widen_lanes(keys + i * t->head_dim + d);
            for (int head = 0; head < HEADS; head++)
                parts[i * HEADS + head] += *(const lanes *)(t->queries + head * t->head_dim + d) * key;
        }
    return sum_each(parts);
}

/* Write the scores of all positions, and minus infinity past the last. */
static void score(const struct task *t) {
    for (int64_t start = 0; start < t->context_len; start += t->block_size) {
        const element *keys = block_at(t, t->k_head, start / t->block_size);
        for (int64_t i = 0; i < t->block_size && start + i < t->context_len; i += POSITIONS)
            *(lanes *)(t->weights + (start + i) * HEADS) = scores_of(t, keys + i * t->head_dim);
    }
    for (int64_t i = t->context_len; i % POSITIONS; i++)
        for (int head = 0; head < HEADS; head++)
            t->weights[i * HEADS + head] = -INFINITY;
}

/* Turn scores into weights, of which the largest of each head is 1; write what each head's add up to. */
static void weigh(const struct task *t, float totals[HEADS]) {
    float most[LANES], sums[LANES] = {0};
    for (int i = 0; i < LANES; i++)
        most[i] = -INFINITY;
    for (const float *scores = t->weights; scores < t->weights + t->context_len * HEADS; scores += LANES)
#pragma omp simd
        for (int i = 0; i < LANES; i++)
            most[i] = scores[i] > most[i] ? scores[i] : most[i];
    for (int i = HEADS; i < LANES; i++)
        most[i % HEADS] = most[i] > most[i % HEADS] ? most[i] : most[i % HEADS];
    for (int i = HEADS; i < LANES; i++)
        most[i] = most[i % HEADS];
    for (float *weights = t->weights; weights < t->weights + t->context_len * HEADS; weights += LANES)
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            weights[i] = exponential(weights[i] - most[i]);
            sums[i] += weights[i];
        }
    memset(totals, 0, HEADS * sizeof(float));
    for (int i = 0; i < LANES; i++)
        totals[i % HEADS] += sums[i];
}

/* Write the weighted sums of some lanes of the values, from dimension d on. */
static inline __attribute__((always_inline)) void sum_values(const struct task *t, int64_t d, const int num_lanes) {
    lanes sums[HEADS][VALUE_LANES] = {{{0}}};
    const float *weights = t->weights;
    for (int64_t first = 0; first < t->context_len; first += t->block_size) {
        const element *row = block_at(t, t->v_head, first / t->block_size) + d;
        int64_t num = t->context_len - first < t->block_size ? t->context_len - first : t->block_size;
        for (const float *end = weights + num * HEADS; weights < end; weights += HEADS, row += t->head_dim)
            for (int i = 0; i < num_lanes; i++) {
                lanes value = widen_lanes(row + i * LANES);
                for (int head = 0; head < HEADS; head++)
                    sums[head][i] += weights[head] * value;
            }
    }
    for (int head = 0; head < HEADS; head++)
        for (int i = 0; i < num_lanes; i++)
            *(lanes *)(t->sums + head * t->head_dim + d + i * LANES) = sums[head][i];
}

static void attend(const struct task *t, element *out, int64_t num_heads) {
    float totals[HEADS];
    score(t);
    weigh(t, totals);
    int64_t d = 0;
    for (; d + VALUE_LANES * LANES <= t->head_dim; d += VALUE_LANES * LANES)
        sum_values(t, d, VALUE_LANES);
    for (; d < t->head_dim; d += LANES)
        sum_values(t, d, 1);
    for (int64_t head = 0; head < num_heads; head++)
        for (int64_t i = head * t->head_dim; i < (head + 1) * t->head_dim; i++)
            out[i] = narrow(t->context_len ? t->sums[i] / totals[head] : 0.0f);
}

/* q: [num_sequences, num_heads, head_dim], sequences q_stride apart; out: likewise, dense; head_dim: a multiple of LANES
 * k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim]; block_size: a multiple of POSITIONS
 * block_tables: rows tables_stride apart; context_lens: [num_sequences]
 * room: [num_sequences, num_kv_heads, parts of a group, HEADS * (max_context + 2 * head_dim)];
 * max_context: a multiple of POSITIONS */
struct call {
    const element *q, *k_cache, *v_cache;
    const int32_t *block_tables, *context_lens;
    element *out;
    float *room;
    int64_t num_heads, num_kv_heads, block_size, head_dim, q_stride, tables_stride, max_context;
    float scale;
};

static int64_t parts_of_group(const struct call *c) {
    return (c->num_heads / c->num_kv_heads + HEADS - 1) / HEADS;
}

static void attend_part(const void *context, int64_t index) {
    const struct call *c = context;
    int64_t group = c->num_heads / c->num_kv_heads, parts = parts_of_group(c), head_dim = c->head_dim;
    int64_t sequence = index / (c->num_kv_heads * parts), kv_head = index / parts % c->num_kv_heads;
    int64_t first = index % parts * HEADS, head = kv_head * group + first; /* in the group, in the sequence */
    int64_t heads = group - first < HEADS ? group - first : HEADS;
    float *own = c->room + index * HEADS * (c->max_context + 2 * head_dim);
    struct task t = {
        .k_head = c->k_cache + kv_head * c->block_size * head_dim,
        .v_head = c->v_cache + kv_head * c->block_size * head_dim,
        .table = c->block_tables + sequence * c->tables_stride,
        .context_len = c->context_lens[sequence],
        .block_size = c->block_size,
        .block_stride = c->num_kv_heads * c->block_size * head_dim,
        .head_dim = head_dim,
        .queries = own,
        .sums = own + HEADS * head_dim,
        .weights = own + 2 * HEADS * head_dim,
    };
    const element *queries = c->q + sequence * c->q_stride + head * head_dim;
    for (int64_t i = 0; i < HEADS * head_dim; i++)
        t.queries[i] = i < heads * head_dim ? widen(queries[i]) * c->scale : 0.0f;
    attend(&t, c->out + (sequence * c->num_heads + head) * head_dim, heads);
}

void attention_decode(const element *q, const element *k_cache, const element *v_cache, const int32_t *block_tables,
                      const int32_t *context_lens, element *out, float *room, int64_t num_sequences, int64_t num_heads,
                      int64_t num_kv_heads, int64_t block_size, int64_t head_dim, int64_t q_stride,
                      int64_t tables_stride, int64_t max_context, float scale) {
    struct call call = {q,          k_cache,  v_cache,  block_tables,  context_lens, out,  room, num_heads, num_kv_heads,
                        block_size, head_dim, q_stride, tables_stride, max_context,  scale};
    share(attend_part, &call, num_sequences * num_kv_heads * parts_of_group(&call));
}

/* Rotary position embedding of queries and keys, and the write of keys and values to the cache. See
 * rope_and_write_kv.py. */
#include "element.h"

/* Turn pairs (i, i + half) of one head. */
static inline void rotate(const element *head, element *out, const float *cos, const float *sin, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = widen(head[i]), second = widen(head[i + half]);
        out[i] = narrow(first * cos[i] - second * sin[i]);
        out[i + half] = narrow(second * cos[i] + first * sin[i]);
    }
}

/* q: [num_tokens, num_heads, head_dim], tokens q_stride apart; k, v: likewise with num_kv_heads; out: as q, dense
 * cos, sin: [num_tokens, head_dim / 2]; slots: [num_tokens]
 * k_cache, v_cache: [num_blocks, num_kv_heads, block_size, head_dim] */
void rope_and_write_kv(const element *q, const element *k, const element *v, const float *cos, const float *sin,
                       const int64_t *slots, element *out, element *k_cache, element *v_cache, int64_t num_tokens,
                       int64_t num_heads, int64_t num_kv_heads, int64_t block_size, int64_t head_dim, int64_t q_stride,
                       int64_t k_stride, int64_t v_stride) {
    int64_t half = head_dim / 2;
#pragma omp parallel for if (num_tokens * num_heads * head_dim > WORTH_SHARING)
    for (int64_t token = 0; token < num_tokens; token++) {
        const float *c = cos + token * half, *s = sin + token * half;
        for (int64_t head = 0; head < num_heads; head++)
            rotate(q + token * q_stride + head * head_dim, out + (token * num_heads + head) * head_dim, c, s, half);
        int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t head = 0; head < num_kv_heads; head++) {
            int64_t place = ((block * num_kv_heads + head) * block_size + offset) * head_dim;
            rotate(k + token * k_stride + head * head_dim, k_cache + place, c, s, half);
            memcpy(v_cache + place, v + token * v_stride + head * head_dim, head_dim * sizeof(element));
        }
    }
}

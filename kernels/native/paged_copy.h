/* Where the parts of a contiguous payload lie in a paged KV cache: what gather_kv.c and scatter_kv.c share.
 *
 * Bytes are copied whatever they mean, so there is no element type here. A plane is one layer's keys or values.
 */
#ifndef PAGED_COPY_H
#define PAGED_COPY_H

#include <stdint.h>
#include <string.h>

/* Fewer bytes than that are not worth waking other threads for. */
#define WORTH_SHARING_BYTES (256 << 10)

#define CACHE_LINE 64

/* cache: [planes, num_blocks, num_cache_heads, block_size, slot_bytes] from the first plane that is copied
 * payload: [num_planes, num_heads, num_tokens, slot_bytes]; table: [num_blocks of the prompt], from position 0 */
struct area {
    char *cache, *payload;
    const int64_t *table;
    int64_t num_planes, num_blocks, num_cache_heads, block_size, slot_bytes;
    int64_t first_head, num_heads, first_token, num_tokens;
};

/* What of one plane lies in one block: runs of num_bytes, one per head, stride bytes apart. */
struct part {
    char *in_cache, *in_payload;
    int64_t num_bytes, cache_stride, payload_stride;
};

static inline int64_t first_entry(const struct area *a) {
    return a->first_token / a->block_size;
}

static inline int64_t end_entry(const struct area *a) {
    return (a->first_token + a->num_tokens + a->block_size - 1) / a->block_size;
}

static inline int64_t is_worth_sharing(const struct area *a) {
    return a->num_planes * a->num_heads * a->num_tokens * a->slot_bytes > WORTH_SHARING_BYTES;
}

static inline struct part part_in(const struct area *a, int64_t plane, int64_t entry) {
    int64_t start = entry * a->block_size, end = start + a->block_size, last = a->first_token + a->num_tokens;
    int64_t from = start > a->first_token ? start : a->first_token, to = end < last ? end : last;
    int64_t head = (plane * a->num_blocks + a->table[entry]) * a->num_cache_heads + a->first_head;
    int64_t row = plane * a->num_heads * a->num_tokens;
    return (struct part){
        .in_cache = a->cache + (head * a->block_size + from - start) * a->slot_bytes,
        .in_payload = a->payload + (row + from - a->first_token) * a->slot_bytes,
        .num_bytes = (to - from) * a->slot_bytes,
        .cache_stride = a->block_size * a->slot_bytes,
        .payload_stride = a->num_tokens * a->slot_bytes,
    };
}

#endif

/* Where the parts of a contiguous payload lie in a paged KV cache: what gather_kv.c and scatter_kv.c share.
 *
 * Bytes are copied whatever they mean, so there is no element type here. Of each plane (keys, say) the same layers and
 * tokens are copied, but heads of its own; a layer of a plane is called a sheet.
 */
#ifndef PAGED_COPY_H
#define PAGED_COPY_H

#include <stdint.h>
#include <string.h>

/* Fewer bytes than that are not worth waking other threads for. */
#define WORTH_SHARING_BYTES (256 << 10)

#define CACHE_LINE 64

/* cache: [layers, num_blocks, num_cache_heads, block_size, slot_bytes] from the first layer that is copied
 * payload: [num_layers, num_heads, num_tokens, slot_bytes]. Filled in by gather_kv.py. */
struct plane {
    char *cache, *payload;
    int64_t num_cache_heads, slot_bytes, first_head, num_heads;
};

/* table: [num_blocks of the prompt], from position 0 */
struct area {
    const struct plane *planes;
    const int64_t *table;
    int64_t num_planes, num_layers, num_blocks, block_size, first_token, num_tokens;
};

/* What of one sheet lies in one block: runs of num_bytes, one per head, stride bytes apart. */
struct part {
    char *in_cache, *in_payload;
    int64_t num_heads, num_bytes, cache_stride, payload_stride;
};

static inline int64_t first_entry(const struct area *a) {
    return a->first_token / a->block_size;
}

static inline int64_t end_entry(const struct area *a) {
    return (a->first_token + a->num_tokens + a->block_size - 1) / a->block_size;
}

static inline int64_t is_worth_sharing(const struct area *a) {
    int64_t num_bytes = 0;
    for (int64_t i = 0; i < a->num_planes; i++)
        num_bytes += a->num_layers * a->planes[i].num_heads * a->num_tokens * a->planes[i].slot_bytes;
    return num_bytes > WORTH_SHARING_BYTES;
}

static inline struct part part_in(const struct area *a, int64_t sheet, int64_t entry) {
    const struct plane *p = a->planes + sheet / a->num_layers;
    int64_t layer = sheet % a->num_layers;
    int64_t start = entry * a->block_size, end = start + a->block_size, last = a->first_token + a->num_tokens;
    int64_t from = start > a->first_token ? start : a->first_token, to = end < last ? end : last;
    int64_t head = (layer * a->num_blocks + a->table[entry]) * p->num_cache_heads + p->first_head;
    int64_t row = layer * p->num_heads * a->num_tokens;
    return (struct part){
        .in_cache = p->cache + (head * a->block_size + from - start) * p->slot_bytes,
        .in_payload = p->payload + (row + from - a->first_token) * p->slot_bytes,
        .num_heads = p->num_heads,
        .num_bytes = (to - from) * p->slot_bytes,
        .cache_stride = a->block_size * p->slot_bytes,
        .payload_stride = a->num_tokens * p->slot_bytes,
    };
}

#endif

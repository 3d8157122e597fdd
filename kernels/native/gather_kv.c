/* Blocks of a paged KV cache -> one contiguous payload. See gather_kv.py. */
#include "paged_copy.h"

#define TO_SECOND_LEVEL 2 /* as __builtin_prefetch counts; the first level is for what is being copied */

/* Blocks lie anywhere, so no processor foresees the next one: it is sent for while this one is copied, line by line,
 * for all of its lines at once would be more than the processor can wait for beside its copying. */
static inline void copy_and_send_for(const char *next, char *to, const char *from, int64_t num_bytes) {
    int64_t i = 0;
    for (; i + CACHE_LINE <= num_bytes; i += CACHE_LINE) {
        __builtin_prefetch(next + i, 0, TO_SECOND_LEVEL);
        memcpy(to + i, from + i, CACHE_LINE);
    }
    memcpy(to + i, from + i, num_bytes - i);
}

/* Shapes: see struct area. */
void gather_kv(const struct plane *planes, const int64_t *table, int64_t num_planes, int64_t num_layers,
               int64_t num_blocks, int64_t block_size, int64_t first_token, int64_t num_tokens) {
    const struct area area = {planes, table, num_planes, num_layers, num_blocks, block_size, first_token, num_tokens};
    int64_t first = first_entry(&area), end = end_entry(&area);
#pragma omp parallel for collapse(2) if (is_worth_sharing(&area))
    for (int64_t sheet = 0; sheet < num_planes * num_layers; sheet++)
        for (int64_t entry = first; entry < end; entry++) {
            struct part part = part_in(&area, sheet, entry);
            struct part next = part_in(&area, sheet, entry + 1 < end ? entry + 1 : entry);
            for (int64_t head = 0; head < part.num_heads; head++)
                copy_and_send_for(next.in_cache + head * next.cache_stride,
                                  part.in_payload + head * part.payload_stride,
                                  part.in_cache + head * part.cache_stride, part.num_bytes);
        }
}

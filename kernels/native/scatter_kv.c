/* One contiguous payload -> blocks of a paged KV cache. See scatter_kv.py. */
#include "paged_copy.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Whole cache lines go past the caches: nothing reads them soon, and what is written whole need not be read first. */
static inline void write_past_caches(char *to, const char *from, int64_t num_bytes) {
#if defined(__SSE2__)
    int64_t rest = -(uintptr_t)to % CACHE_LINE; /* up to the first whole line */
    if (num_bytes >= rest + CACHE_LINE) {
        memcpy(to, from, rest);
        to += rest, from += rest, num_bytes -= rest;
        for (; num_bytes >= CACHE_LINE; to += CACHE_LINE, from += CACHE_LINE, num_bytes -= CACHE_LINE)
            for (int i = 0; i < CACHE_LINE; i += sizeof(__m128i))
                _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    }
#endif
    memcpy(to, from, num_bytes);
}

/* Other threads, told of this later, must find what was written. */
static inline void finish_writes(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* Shapes: see struct area. */
void scatter_kv(const struct plane *planes, const int64_t *table, int64_t num_planes, int64_t num_layers,
                int64_t num_blocks, int64_t block_size, int64_t first_token, int64_t num_tokens) {
    const struct area area = {planes, table, num_planes, num_layers, num_blocks, block_size, first_token, num_tokens};
    int64_t first = first_entry(&area), end = end_entry(&area);
#pragma omp parallel if (is_worth_sharing(&area))
    {
#pragma omp for collapse(2)
        for (int64_t sheet = 0; sheet < num_planes * num_layers; sheet++)
            for (int64_t entry = first; entry < end; entry++) {
                struct part part = part_in(&area, sheet, entry);
                for (int64_t head = 0; head < part.num_heads; head++)
                    write_past_caches(part.in_cache + head * part.cache_stride,
                                      part.in_payload + head * part.payload_stride, part.num_bytes);
            }
        finish_writes();
    }
}

/* One digest for each unit of a payload. See xxh3_kv.py. */
#include <stddef.h>
#include <stdint.h>

#define DIGEST_BYTES 8

typedef uint64_t hash(const void *data, size_t num_bytes);

/* payload: [num_rows, row_bytes]; digests: [num_rows, units of a row, DIGEST_BYTES], most significant byte first */
void xxh3_kv(const char *payload, unsigned char *digests, hash *xxh3, int64_t num_rows, int64_t row_bytes,
             int64_t unit_bytes) {
    for (const char *row = payload; row < payload + num_rows * row_bytes; row += row_bytes)
        for (int64_t start = 0; start < row_bytes; start += unit_bytes) {
            uint64_t digest = xxh3(row + start, row_bytes - start < unit_bytes ? row_bytes - start : unit_bytes);
            for (int i = 0; i < DIGEST_BYTES; i++)
                *digests++ = digest >> 8 * (DIGEST_BYTES - 1 - i);
        }
}

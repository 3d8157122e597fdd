/* x W^T + b for a few rows, where reading W is what takes the time. See linear.py.
 *
 * A tile is ROWS rows of x times OUTPUTS rows of W, as many sums as one vector has lanes. Rows of W are read side by
 * side, which no processor foresees: so each tile sends for what is read AHEAD tiles later, in the order of memory.
 */
#include "element.h"
#include "share.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define ROWS 4
#define OUTPUTS 4
#define AHEAD 4
#define OUTPUTS_OF_PART 64

/* The elements of a cache line; two to a word where they are narrow. */
typedef uint32_t line __attribute__((vector_size(64), aligned(sizeof(element)), may_alias));
#define LINE (int64_t)(sizeof(line) / sizeof(element))

/* sums plus the products of two lines' elements, each in some lane. */
static inline lanes add_products(lanes sums, line a, line b) {
#if !defined(BFLOAT16)
    return sums + (lanes)a * (lanes)b;
#elif defined(__AVX512BF16__)
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (lanes)(a << 16) * (lanes)(b << 16);
    return sums + (lanes)(a >> 16 << 16) * (lanes)(b >> 16 << 16);
#endif
}

/* Write the products of some rows of x, [rows, size], with OUTPUTS rows of W: out, rows num_outputs apart. */
static inline __attribute__((always_inline)) void multiply_tile(const element *x, const element *weight,
                                                                const float *bias, element *out, int64_t num_outputs,
                                                                int64_t size, const int rows) {
    const element *later = weight + AHEAD * OUTPUTS * size;
    lanes parts[ROWS * OUTPUTS] = {{0}};
    for (int64_t k = 0; k < size; k += LINE) {
        line inputs[ROWS];
        for (int row = 0; row < rows; row++)
            inputs[row] = *(const line *)(x + row * size + k);
        for (int i = 0; i < OUTPUTS; i++, later += LINE) {
            line weights = *(const line *)(weight + i * size + k);
            __builtin_prefetch(later, 0, 2); /* no nearer than the second level: the first holds what is used now */
            for (int row = 0; row < rows; row++)
                parts[row * OUTPUTS + i] = add_products(parts[row * OUTPUTS + i], inputs[row], weights);
        }
    }
    lanes sums = sum_each(parts);
    element narrowed[ROWS * OUTPUTS];
#pragma omp simd
    for (int i = 0; i < ROWS * OUTPUTS; i++)
        narrowed[i] = narrow(sums[i] + bias[i % OUTPUTS]);
    for (int row = 0; row < rows; row++)
        memcpy(out + row * num_outputs, narrowed + row * OUTPUTS, OUTPUTS * sizeof(element));
}

static void multiply_rows(const element *x, const element *weight, const float *bias, element *out, int64_t num_rows,
                          int64_t num_outputs, int64_t size) {
    for (; num_rows >= ROWS; num_rows -= ROWS, x += ROWS * size, out += ROWS * num_outputs)
        multiply_tile(x, weight, bias, out, num_outputs, size, ROWS);
    if (num_rows == 3)
        multiply_tile(x, weight, bias, out, num_outputs, size, 3);
    else if (num_rows == 2)
        multiply_tile(x, weight, bias, out, num_outputs, size, 2);
    else if (num_rows == 1)
        multiply_tile(x, weight, bias, out, num_outputs, size, 1);
}

struct product {
    const element *x, *weight, *bias;
    element *out;
    int64_t num_rows, num_outputs, size;
};

/* Compute the outputs of OUTPUTS_OF_PART rows of W, or of those that are left. */
static void multiply_part(const void *context, int64_t part) {
    const struct product *p = context;
    int64_t first = part * OUTPUTS_OF_PART, end = first + OUTPUTS_OF_PART;
    for (; first < end && first < p->num_outputs; first += OUTPUTS) {
        float biases[OUTPUTS] = {0};
        for (int i = 0; p->bias && i < OUTPUTS; i++)
            biases[i] = widen(p->bias[first + i]);
        multiply_rows(p->x, p->weight + first * p->size, biases, p->out + first, p->num_rows, p->num_outputs, p->size);
    }
}

/* x: [num_rows, size]; weight: [num_outputs, size]; bias: [num_outputs] or null; out: [num_rows, num_outputs]
 * num_outputs: a multiple of OUTPUTS; size: a multiple of LINE */
void linear(const element *x, const element *weight, const element *bias, element *out, int64_t num_rows,
            int64_t num_outputs, int64_t size) {
    struct product product = {x, weight, bias, out, num_rows, num_outputs, size};
    share(multiply_part, &product, (num_outputs + OUTPUTS_OF_PART - 1) / OUTPUTS_OF_PART);
}

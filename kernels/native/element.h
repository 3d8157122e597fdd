/* The type of a tensor's elements, chosen by -DBFLOAT16 or -DFLOAT32, and arithmetic that compilers can vectorise. */
#ifndef ELEMENT_H
#define ELEMENT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Fewer elements than that are not worth waking other threads for. */
#define WORTH_SHARING 16384

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#if defined(BFLOAT16)

typedef uint16_t element;

static inline float widen(element x) {
    return float_of((uint32_t)x << 16);
}

/* To the nearest, ties to even. Adding could carry a NaN's bits over to another number, so it has a case of its own. */
static inline element narrow(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x == x ? rounded : 0x7fc0;
}

#elif defined(FLOAT32)

typedef float element;

static inline float widen(element x) {
    return x;
}

static inline element narrow(float x) {
    return x;
}

#else
#error "compile with -DBFLOAT16 or -DFLOAT32"
#endif

/* Sixteen elements at once, on whatever vectors the processor has; what they are loaded from need not be aligned. */
#define LANES 16
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

static inline lanes widen_lanes(const element *x) {
#if defined(BFLOAT16)
    typedef uint16_t narrow_lanes __attribute__((vector_size(LANES * sizeof(uint16_t)), aligned(2), may_alias));
    typedef uint32_t wide_lanes __attribute__((vector_size(LANES * sizeof(uint32_t))));
    return (lanes)(__builtin_convertvector(*(const narrow_lanes *)x, wide_lanes) << 16);
#else
    return *(const lanes *)x;
#endif
}

/* The sum of each of sixteen vectors, in their order: pairs are folded until all lanes are sums. */
static inline lanes sum_each(lanes x[LANES]) {
#define FOLD(a, b, first, second) (__builtin_shufflevector(a, b, first) + __builtin_shufflevector(a, b, second))
#define EIGHTS_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define EIGHTS_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FOURS_LOW 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define FOURS_HIGH 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define TWOS_LOW 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define TWOS_HIGH 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define ONES_LOW 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ONES_HIGH 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
    for (int i = 0; i < 8; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], EIGHTS_LOW, EIGHTS_HIGH);
    for (int i = 0; i < 4; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], FOURS_LOW, FOURS_HIGH);
    for (int i = 0; i < 2; i++)
        x[i] = FOLD(x[2 * i], x[2 * i + 1], TWOS_LOW, TWOS_HIGH);
    return FOLD(x[0], x[1], ONES_LOW, ONES_HIGH);
}

/* e^x for x in [-87, 88], the nearest of these beyond, NaN for NaN: 2^n times the Taylor series of the rest, to float's
 * precision. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float rest = (x - n * 0.693359375f) - n * -2.12194440e-4f; /* ln 2 in two parts, the first exact in products */
    float series = 1.0f / 5040.0f;
    series = series * rest + 1.0f / 720.0f;
    series = series * rest + 1.0f / 120.0f;
    series = series * rest + 1.0f / 24.0f;
    series = series * rest + 1.0f / 6.0f;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    return series * float_of((uint32_t)((int32_t)n + 127) << 23);
}

#endif

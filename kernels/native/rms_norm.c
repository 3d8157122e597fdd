/* Root-mean-square normalisation of rows, alone or of a sum. See rms_norm.py. */
#include "element.h"

static void scale_row(const element *row, const element *weight, element *out, int64_t size, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++)
        sum += widen(row[i]) * widen(row[i]);
    float scale = 1.0f / sqrtf(sum / size + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) /* rounded before the weight, as models are trained */
        out[i] = narrow(widen(narrow(widen(row[i]) * scale)) * widen(weight[i]));
}

/* x: [num_groups, rows_per_group, size], groups group_stride apart; weight: [size]; out: [num_rows, size] */
void rms_norm(const element *x, const element *weight, element *out, int64_t num_groups, int64_t rows_per_group,
              int64_t group_stride, int64_t size, float eps) {
#pragma omp parallel for if (num_groups * rows_per_group * size > WORTH_SHARING)
    for (int64_t row = 0; row < num_groups * rows_per_group; row++)
        scale_row(x + row / rows_per_group * group_stride + row % rows_per_group * size, weight, out + row * size, size,
                  eps);
}

/* x, residual, out, total: [num_rows, size]; weight: [size] */
void add_rms_norm(const element *x, const element *residual, const element *weight, element *out, element *total,
                  int64_t num_rows, int64_t size, float eps) {
#pragma omp parallel for if (num_rows * size > WORTH_SHARING)
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t start = row * size;
#pragma omp simd
        for (int64_t i = start; i < start + size; i++)
            total[i] = narrow(widen(x[i]) + widen(residual[i]));
        scale_row(total + start, weight, out + start, size, eps);
    }
}

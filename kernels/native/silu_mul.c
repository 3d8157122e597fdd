/* silu(gate) * up of rows that hold both. See silu_mul.py. */
#include "element.h"

/* gate_up: [num_rows, 2 * size]; out: [num_rows, size] */
void silu_mul(const element *gate_up, element *out, int64_t num_rows, int64_t size) {
#pragma omp parallel for if (num_rows * size > WORTH_SHARING)
    for (int64_t row = 0; row < num_rows; row++) {
        const element *gates = gate_up + row * 2 * size, *ups = gates + size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float gate = widen(gates[i]);
            out[row * size + i] = narrow(gate / (1.0f + exponential(-gate)) * widen(ups[i]));
        }
    }
}

// Linears with 4-bit or 8-bit weights. Every function with a Team is called by all threads of a running job.
//
// A row's result has the same bits for any number of rows, threads, and instruction set: the int8 dot product of a
// group is exact in int32, then acc = fma(weight scale * row scale, float(dot), acc) over the groups in order, then
// the bias is added.
#pragma once

#include "pool.h"
#include "tinychat.h"

namespace tinychat {

// Rows rounded to int8, symmetric, a scale for each row and group: x = values * scales.
struct Quantized {
    int8_t* values;  // [rows, stride]: inputs, then zeros
    float* scales;   // [rows, groups]; NaN where the group holds NaN or Inf
    int32_t* sums;   // [rows, groups]: the sum of a group's values
    int64_t stride;
    int64_t groups;
};

// Bytes that Quantized needs for so many rows, and its parts laid out in them. `memory` is aligned to 64 bytes.
size_t quantized_size(int64_t rows, int64_t inputs, int64_t group);
Quantized quantized_at(void* memory, int64_t rows, int64_t inputs, int64_t group);

// One row, on the calling thread alone.
void quantize_row(const float* x, int64_t inputs, int64_t group, const Quantized& out, int64_t row);

// All rows, shared out over the team. The result is complete after the next barrier.
void quantize(Team& team, const float* x, int64_t ldx, int64_t rows, int64_t inputs, int64_t group,
              const Quantized& out);

// y [rows, outputs], complete after the next barrier. Uses the team's counter: a barrier comes before it too.
void linear(Team& team, const tc_weights& w, const Quantized& x, int64_t rows, float* y, int64_t ldy,
            const float* bias);

// The same with float32 rows, in a fixed order of its own; slower.
void linear_exact(Team& team, const tc_weights& w, const float* x, int64_t ldx, int64_t rows, float* y, int64_t ldy,
                  const float* bias);

}  // namespace tinychat

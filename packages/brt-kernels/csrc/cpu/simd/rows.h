// Whole rows: copied, scaled, summed. Declared for the table in table.cpp.
#pragma once

#include "vec.h"

namespace brt::BRT_ISA {

void copy_row(void* dst, const void* src, int64_t num_bytes, bool stream);
void zero_row(void* dst, int64_t num_bytes, bool stream);
void scale_row(void* dst, const void* src, float weight, int64_t numel, Real type, bool stream);
void sum_rows(void* dst, const void* const* rows, const float* weights, int64_t num_rows, int64_t numel, Real type,
              bool stream);
void sum_float_rows(void* dst, const float* const* rows, const float* weights, int64_t num_rows, int64_t numel,
                    Real type);
float dot_row(const void* a, const void* b, int64_t numel, Real type);
void fence();

}  // namespace brt::BRT_ISA

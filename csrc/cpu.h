// What cpu.cpp offers to bind.cpp.
#pragma once
#include <string>

#include "kl.h"

namespace t2t {
void rows_cpu(const Rows&);
void scatter_cpu(const Rows&, double alpha);
const char* isa();                          // of the kernel that runs: portable, avx2 or avx512
bool use_isa(const std::string&);           // false: this machine has none of that name
void exp_f32(const float* x, float* y, int64_t n);
}  // namespace t2t

// What experts of a layer need beside products: shares of the chosen ones, and their weighted sum.
#include "decoder_kernels.h"
#include "exponential.h"
#include "rows.h"

namespace lowbit::LOWBIT_ISA {
namespace {

void exponentials(const float* x, size_t n, float peak, float* out) {
  for (size_t i = 0; i < n; i += 16)
    store_up_to(out + i, exponential(sub(load_up_to(x + i, n - i), set1(peak))), n - i);
}

void add_weighted(float* sum, const float* x, const float* bias, float weight, size_t n, bool fresh) {
  const F32 w = set1(weight);
  for (size_t i = 0; i < n; i += 16) {
    const size_t left = n - i;
    F32 v = load_up_to(x + i, left);
    if (bias) v = add(v, load_up_to(bias + i, left));
    store_up_to(sum + i, fresh ? mul(v, w) : fma(v, w, load_up_to(sum + i, left)), left);
  }
}

}  // namespace

void add_expert_kernels(DecoderKernels& table) {
  table.exponentials = exponentials;
  table.add_weighted = add_weighted;
}

}  // namespace lowbit::LOWBIT_ISA

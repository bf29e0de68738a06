// convert: many tensors from one storage type to another at once, such as the weights of a stage under autocast.
//
// Layout: of each tensor `count` values in a row. One job is a run of kRun values of all tensors, one after the other.
// Bytes: each value read once and written once.
#include "jobs.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

namespace {

constexpr int64_t kRun = 1 << 14;

// `n` values from value `first` of all on.
template <class From, class To>
void convert_run(const Conversion* tensor, int64_t first, int64_t n) {
  for (; n > 0; ++tensor) {
    const int64_t here = minimum(n, tensor->count - first);
    if (here > 0) {
      const From* const from = static_cast<const From*>(tensor->from) + first;
      To* const to = static_cast<To*>(tensor->to) + first;
      for_each_vector<float>(here, [=](int64_t i, auto lanes) __attribute__((always_inline)) {
        store_lanes(to + i, load_lanes(from + i, lanes), lanes);
      });
      first += here, n -= here;
    }
    first -= tensor->count;
  }
}

template <class From, class To>
void convert_all(const Conversion* tensors, int64_t count) {
  int64_t values = 0;
  for (int64_t i = 0; i < count; ++i) values += tensors[i].count;
  parallel(ceil_div(values, kRun),
           [=](int64_t job) { convert_run<From, To>(tensors, job * kRun, minimum(kRun, values - job * kRun)); });
}

}  // namespace

void convert(Dtype from, Dtype to, const Conversion* tensors, int64_t count, Workspace&) {
  if (from == Dtype::f32 && to == Dtype::bf16) convert_all<float, BFloat16>(tensors, count);
  if (from == Dtype::bf16 && to == Dtype::f32) convert_all<BFloat16, float>(tensors, count);
}

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
